"""A model to a bundle directory that appears whole or not at all.

1 trace the graphs; 2 move weights into one shared file; 3 digest everything into the model id;
4 stamp the export id into every graph; 5 ask torch for the parity cases; 6 write the manifest
with every file's hash; 7 rename into place.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from qanchor import config
from qanchor.bundle.manifest import (
    EVENT_ENCODER,
    EVENT_TOKENIZER_FILE,
    EXPORT_ID_KEY,
    FORMAT_VERSION,
    INT8_REPORT_FILE,
    MANIFEST_FILE,
    PARITY_FILE,
    PREFIX,
    QUERY_ENCODER,
    QUERY_TOKENIZER_FILE,
    QUERY_WEIGHTS_FILE,
    SCENARIOS_FILE,
    SUFFIX,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    FileSpec,
    GraphSpec,
    Limits,
    Manifest,
    ModelDims,
    ParityCase,
    QueryEncoderSpec,
    event_encoder_spec,
    prefix_spec,
    query_encoder_spec,
    suffix_spec,
)
from qanchor.bundle.packing import check_questions
from qanchor.bundle.reader import file_sha256
from qanchor.data.prefix import max_prefix_len
from qanchor.data.render import RenderedProfile
from qanchor.errors import BundleError
from qanchor_export.calibration import calibration_users
from qanchor_export.quantize import Calibration, quantize
from qanchor_export.reference import anchor_embeddings, make_query
from qanchor_export.sample_users import SAMPLE_QUERIES, sample_users
from qanchor_export.source import ExportSource
from qanchor_export.to_onnx import to_onnx
from qanchor_export.weight_file import WeightFile
from qanchor_export.weights import DecoderWeights, Numbers, decoder_weights, model_dims

logger = logging.getLogger(__name__)

_NUM_SAMPLE_USERS = 3
_NUM_SAMPLE_QUERIES = 3
_EXPORT_ID_CHARS = 16
_MODEL_ID_CHARS = 32


def export_bundle(
    source: ExportSource,
    destination: Path,
    users: Sequence[RenderedProfile] = (),
    *,
    numbers: Numbers | None = None,
    calibration: Calibration | None = None,
    force: bool = False,
) -> Manifest:
    """Write the bundle of `source` to `destination` and return its manifest.

    `numbers` are the types it computes in and stores, float32 by default; what becomes int8 is
    decided on the users of `calibration`, by default made up from the schema. `users` become the
    parity cases, by default made up too. Equal sources give equal model ids.
    Raises BundleError when `destination` exists and `force` is not set, and ConfigError when the
    graphs cannot compute the model's maths or a scenario's question is too long.
    """
    if destination.exists() and not force:
        raise BundleError(f"{destination}: exists; choose another path or give --force")
    check_questions(source.scenarios, source.encode_query, source.max_text_len)
    cases = _parity_cases(source, users)
    with _staging(destination) as staging:
        decoder = _decoder(source, numbers or Numbers(), calibration, staging)
        manifest = _write(source, cases, numbers or Numbers(), decoder, staging)
    logger.info("bundle %s: model %s", destination, manifest.model_id)
    return manifest


def _decoder(
    source: ExportSource, numbers: Numbers, calibration: Calibration | None, path: Path
) -> DecoderWeights:
    """The decoder in the wanted types; a report of what was decided for int8 goes to `path`."""
    decoder = decoder_weights(source.model, numbers)
    if "int8" in (numbers.precision, numbers.stored):
        chosen = calibration or Calibration(calibration_users(source, None))
        config.save(quantize(source, decoder, numbers, chosen), path / INT8_REPORT_FILE)
    return decoder


def _write(
    source: ExportSource,
    cases: tuple[ParityCase, ...],
    numbers: Numbers,
    decoder: DecoderWeights,
    path: Path,
) -> Manifest:
    dims = model_dims(source.model, numbers.stored)
    query_encoder = _query_encoder(source)
    specs = _specs(dims, numbers, query_encoder)
    source.tokenizer.save(str(path / TOKENIZER_FILE))
    source.event_tokenizer.save(str(path / EVENT_TOKENIZER_FILE))
    if source.query_encoder is not None:
        source.query_encoder.tokenizer.save(str(path / QUERY_TOKENIZER_FILE))
    graphs = to_onnx(source.model, source.query_encoder, decoder, specs)
    model_id = _write_graphs(source, graphs, specs, path)
    config.save(source.scenarios, path / SCENARIOS_FILE)
    config.save(cases, path / PARITY_FILE)
    schema = source.schema
    max_events = tuple(spec.max_events for spec in schema.modalities)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        export_id=model_id[:_EXPORT_ID_CHARS],
        model_id=model_id,
        checkpoint_id=source.checkpoint_id,
        recipe=source.recipe,
        precision=numbers.precision,
        dims=dims,
        profile_schema=schema,
        tokens=source.tokens,
        event_pad=source.model.event_encoder.pad_id,
        limits=Limits(
            max_prefix_len=max_prefix_len(max_events, source.tokens),
            max_query_len=source.max_query_len,
        ),
        query_encoder=query_encoder,
        graphs=specs,
        files={file.name: _file_spec(file) for file in sorted(path.iterdir())},
    )
    config.save(manifest, path / MANIFEST_FILE)
    return manifest


def _query_encoder(source: ExportSource) -> QueryEncoderSpec | None:
    query_map = source.model.query_map
    if query_map is None:
        return None
    return QueryEncoderSpec(num_rows=len(query_map.rows), max_text_len=source.max_text_len)


def _specs(
    dims: ModelDims, numbers: Numbers, query_encoder: QueryEncoderSpec | None
) -> dict[str, GraphSpec]:
    specs = {
        EVENT_ENCODER: event_encoder_spec(dims),
        PREFIX: prefix_spec(dims),
        SUFFIX: suffix_spec(dims, numbers.precision),
    }
    if query_encoder is not None:
        specs[QUERY_ENCODER] = query_encoder_spec(dims, query_encoder.num_rows)
    return specs


def _write_graphs(
    source: ExportSource, graphs: dict[str, ir.Model], specs: dict[str, GraphSpec], path: Path
) -> str:
    """Write graphs and weights; return the model id.

    The export id is a part of the model id: it depends on all the graphs compute with, and it
    can only be stamped in once they are all there.
    """
    files = [WEIGHTS_FILE, TOKENIZER_FILE, EVENT_TOKENIZER_FILE]
    with WeightFile(path / WEIGHTS_FILE) as weights:
        for name, graph in graphs.items():
            if name != QUERY_ENCODER:
                weights.move_out(graph)
    logger.info("weights shared between graphs: %d bytes", weights.num_shared_bytes)
    if QUERY_ENCODER in graphs:
        with WeightFile(path / QUERY_WEIGHTS_FILE) as weights:
            weights.move_out(graphs[QUERY_ENCODER])
        files += [QUERY_WEIGHTS_FILE, QUERY_TOKENIZER_FILE]
    digest = hashlib.sha256()
    for name in sorted(graphs):
        digest.update(_serialized(graphs[name]))
    for file in files:
        digest.update(file_sha256(path / file).encode())
    digest.update(config.to_json(source.schema) + config.to_json(source.tokens))
    model_id = digest.hexdigest()[:_MODEL_ID_CHARS]
    for name, graph in graphs.items():
        graph.metadata_props[EXPORT_ID_KEY] = model_id[:_EXPORT_ID_CHARS]
        (path / specs[name].file).write_bytes(_serialized(graph))
    return model_id


def _serialized(graph: ir.Model) -> bytes:
    data: bytes = ir.to_proto(graph).SerializeToString(deterministic=True)
    return data


def _parity_cases(source: ExportSource, users: Sequence[RenderedProfile]) -> tuple[ParityCase, ...]:
    rendered = users or sample_users(source.schema, _NUM_SAMPLE_USERS, seed=1)
    texts = SAMPLE_QUERIES[:_NUM_SAMPLE_QUERIES]
    queries = [make_query(source, text) for text in texts]
    cases = []
    for user in rendered:
        embeddings = anchor_embeddings(source, user, queries)
        rows = tuple(tuple(float(value) for value in row) for row in embeddings)
        cases.append(
            ParityCase(texts=user.texts, measures=user.measures, queries=texts, embeddings=rows)
        )
    return tuple(cases)


def _file_spec(path: Path) -> FileSpec:
    return FileSpec(sha256=file_sha256(path), num_bytes=path.stat().st_size)


@contextmanager
def _staging(destination: Path) -> Iterator[Path]:
    """A directory beside `destination` that takes its place on success, and goes on failure."""
    staging = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    replaced = staging.with_suffix(".replaced")
    staging.mkdir(parents=True)
    try:
        yield staging
        if destination.exists():
            destination.rename(replaced)
        staging.rename(destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if replaced.exists() and destination.exists():
            shutil.rmtree(replaced)
