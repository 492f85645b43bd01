"""Opening a bundle: hashes checked, parts of one export only, tokenizers ready. Torch-free.

Must not know ONNX Runtime; engines open the graph files themselves.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from qanchor import config
from qanchor.bundle.manifest import (
    EVENT_TOKENIZER_FILE,
    EXPORT_ID_KEY,
    FORMAT_VERSION,
    MANIFEST_FILE,
    PARITY_FILE,
    QUERY_TOKENIZER_FILE,
    SCENARIOS_FILE,
    TOKENIZER_FILE,
    Manifest,
    ParityCase,
)
from qanchor.config import Scenario
from qanchor.errors import BundleError, ConfigError


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened, hash-checked bundle."""

    path: Path
    manifest: Manifest
    scenarios: tuple[Scenario, ...]
    parity: tuple[ParityCase, ...]
    tokenizer: Tokenizer
    event_tokenizer: Tokenizer
    query_tokenizer: Tokenizer | None = None
    """Of the query encoder, where there is one."""

    def check_export_id(self, graph: str, metadata: Mapping[str, str]) -> None:
        """Raise BundleError unless an opened graph's metadata names this bundle's export."""
        found, wanted = metadata.get(EXPORT_ID_KEY), self.manifest.export_id
        if found != wanted:
            raise BundleError(
                f"{self.path / self.manifest.graphs[graph].file}: {EXPORT_ID_KEY}={found!r}, the "
                f"manifest says {wanted!r}; graphs of different exports do not fit, export again"
            )

    def encode_query(self, query: str) -> list[int]:
        """Token ids a question is read as, however many.

        By the query encoder, as it stands, where there is one; else by the decoder, in the schema's
        template, as tokens of the suffix.
        """
        if self.query_tokenizer is not None:
            return list(self.query_tokenizer.encode(query).ids)
        text = self.manifest.profile_schema.query_template.format(query=query)
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_event(self, text: str, max_event_tokens: int) -> list[int]:
        """Token ids of an event text, cut to the modality's limit; the closing token is kept."""
        return encode_event(self.event_tokenizer, text, max_event_tokens)


def encode_event(tokenizer: Tokenizer, text: str, max_event_tokens: int) -> list[int]:
    """Token ids of an event text with the tokenizer's own specials, last one kept when cut."""
    ids = list(tokenizer.encode(text).ids)
    if len(ids) > max_event_tokens:
        ids = ids[: max_event_tokens - 1] + ids[-1:]
    return ids


def open_bundle(path: Path) -> Bundle:
    """Read and check a bundle directory.

    Raises BundleError when a file is missing, was altered since export, or is of a newer format.
    """
    manifest_path = path / MANIFEST_FILE
    if not manifest_path.is_file():
        raise BundleError(f"{path}: no {MANIFEST_FILE}; make a bundle with `qanchor export`")
    try:
        manifest = config.load(Manifest, manifest_path)
    except ConfigError as error:
        raise BundleError(f"{manifest_path}: {error}") from None
    if manifest.format_version != FORMAT_VERSION:
        raise BundleError(
            f"{path}: format_version={manifest.format_version}, this program reads "
            f"{FORMAT_VERSION}; export the checkpoint again"
        )
    for name, spec in manifest.files.items():
        _check_file(path / name, spec.sha256)
    query_tokenizer = None
    if manifest.query_encoder is not None:
        query_tokenizer = Tokenizer.from_file(str(path / QUERY_TOKENIZER_FILE))
    return Bundle(
        path=path,
        manifest=manifest,
        scenarios=config.load(tuple[Scenario, ...], path / SCENARIOS_FILE),
        parity=config.load(tuple[ParityCase, ...], path / PARITY_FILE),
        tokenizer=Tokenizer.from_file(str(path / TOKENIZER_FILE)),
        event_tokenizer=Tokenizer.from_file(str(path / EVENT_TOKENIZER_FILE)),
        query_tokenizer=query_tokenizer,
    )


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_file(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise BundleError(f"{path}: missing; copy the whole bundle directory")
    found = file_sha256(path)
    if found != sha256:
        raise BundleError(
            f"{path}: sha256 {found[:12]} differs from the manifest's {sha256[:12]}; "
            "the file was altered or comes from another export"
        )
