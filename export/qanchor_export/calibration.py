"""Real users through the torch graphs: what quantisation is decided by.

Legend: P prefix length, E vector width, N event texts, T text length, G KV heads, K head_dim,
I inputs of a projection, Q queries, Z embedding_dim.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qanchor.bundle.packing import PackedSuffix, UserSuffix, pack
from qanchor.bundle.reader import encode_event
from qanchor.data.prefix import PrefixLayout, build_layout, slot_vectors, with_measures
from qanchor.data.render import RenderedProfile, render_profile
from qanchor.errors import ConfigError
from qanchor_export.graphs_decoder import PrefixGraph, SuffixGraph
from qanchor_export.reference import make_query
from qanchor_export.sample_users import SAMPLE_QUERIES, sample_users
from qanchor_export.source import ExportSource

DEFAULT_NUM_USERS = 32
_NUM_SAMPLE_USERS = 4
_TEXTS_PER_BATCH = 64


@dataclass(frozen=True, slots=True)
class CalibrationUsers:
    """Users and the questions asked of each."""

    users: tuple[RenderedProfile, ...]
    questions: tuple[str, ...]
    origin: str
    """Where they come from, for the report."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One user's inputs of both graphs."""

    layout: PrefixLayout
    vectors_PE: Tensor
    packed: PackedSuffix


def calibration_users(
    source: ExportSource, dataset: Path | None, num_users: int = DEFAULT_NUM_USERS
) -> CalibrationUsers:
    """Train users of a data set, evenly spread; without one, made-up users of the schema.

    Raises ConfigError for a data set of another schema, DataError for one that is broken.
    """
    if dataset is None:
        users = sample_users(source.schema, _NUM_SAMPLE_USERS, seed=2)
        return CalibrationUsers(tuple(users), SAMPLE_QUERIES, "made-up users")
    # Not at the top: reading a data set needs pyarrow, exporting does not.
    from qanchor.data.dataset import open_dataset

    opened = open_dataset(dataset)
    if opened.schema != source.schema:
        raise ConfigError(
            "--calibrate",
            str(dataset),
            "its profile schema is not the checkpoint's",
            "give the data set the checkpoint was trained with",
        )
    everyone = opened.user_ids("train")
    step = max(1, len(everyone) // num_users)
    chosen = everyone[::step][:num_users]
    rendered = [render_profile(one, opened.schema) for one in opened.profiles(user_ids=chosen)]
    questions = tuple(scenario.question for scenario in opened.scenarios) or SAMPLE_QUERIES
    return CalibrationUsers(tuple(rendered), questions, f"{len(chosen)} train users of the data")


@torch.inference_mode()
def make_samples(source: ExportSource, calibration: CalibrationUsers) -> list[Sample]:
    """The graphs' inputs of every user, shortest first; event vectors from the event encoder."""
    queries = tuple(make_query(source, text) for text in calibration.questions)
    samples = []
    for user in calibration.users:
        layout = build_layout(user.num_events, source.tokens)
        vectors_PE = slot_vectors(layout, user.num_events, _event_vectors(source, user))
        packed = pack(
            [UserSuffix(len(layout), queries)],
            user_emb=source.tokens.user_emb,
            hidden_dim=source.hidden_dim,
        )
        samples.append(Sample(layout, torch.from_numpy(vectors_PE), packed))
    return sorted(samples, key=lambda sample: len(sample.layout))


@dataclass(frozen=True, slots=True)
class TorchGraphs:
    """The two decoder graphs of one set of weights, run in torch."""

    prefix: PrefixGraph
    suffix: SuffixGraph

    @torch.inference_mode()
    def keys_values(self, sample: Sample) -> tuple[Tensor, ...]:
        """Keys and values [1, G, P, K] of a user, as stored."""
        decoder = self.prefix.decoder
        empty = [
            torch.zeros((1, decoder.num_kv_heads, 1, decoder.head_dim), dtype=layer.store.dtype)
            for layer in decoder.stack
            for _ in range(2)
        ]
        present: tuple[Tensor, ...] = self.prefix(
            torch.from_numpy(sample.layout.token_ids_P),
            torch.from_numpy(sample.layout.adapter_P),
            sample.vectors_PE,
            torch.zeros(1, dtype=torch.int64),
            tuple(empty),
        )
        return present

    @torch.inference_mode()
    def embeddings(self, samples: Sequence[Sample]) -> Tensor:
        """All users' answers [Q, Z], one below the other."""
        found = []
        for sample in samples:
            past = self.keys_values(sample)
            arrays = sample.packed.inputs(by_query=self.suffix.by_query)
            inputs = [torch.from_numpy(array) for array in arrays.values()]
            found.append(self.suffix(*inputs, past))
        return torch.cat(found)


@contextmanager
def recorded_peaks(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Largest absolute value of every input channel [I] of each module while the block runs."""
    peaks: dict[str, Tensor] = {}

    def hook(name: str, rows_TI: Tensor) -> None:
        found_I = rows_TI.abs().amax(0)
        peaks[name] = torch.maximum(peaks[name], found_I) if name in peaks else found_I

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: hook(name, args[0]))
        for name, module in modules.items()
    ]
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()


def _event_vectors(source: ExportSource, user: RenderedProfile) -> np.ndarray:
    encoder = source.model.event_encoder
    texts = [
        encode_event(source.event_tokenizer, text, spec.max_event_tokens)
        for texts, spec in zip(user.texts, source.schema.modalities, strict=True)
        for text in texts
    ]
    vectors_NE = np.zeros((len(texts), encoder.event_dim), dtype=np.float32)
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    for start in range(0, len(order), _TEXTS_PER_BATCH):
        rows = order[start : start + _TEXTS_PER_BATCH]
        text_len = max(len(texts[row]) for row in rows)
        padded = [texts[row] + [encoder.pad_id] * (text_len - len(texts[row])) for row in rows]
        vectors_NE[rows] = encoder(torch.tensor(padded)).numpy()
    return with_measures(vectors_NE, user)
