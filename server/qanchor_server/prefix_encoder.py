"""Encodes one user's prefix into a slot, one bounded piece at a time.

Pieces: event texts without a known vector, in batches; then the prefix in chunks. A suffix step
can run between any two pieces. Must not know the scheduler or grpc. Call from the worker thread.

Legend: N events of the user, E event_dim, P prefix length, T text length.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic

import numpy as np

from qanchor.bundle.reader import Bundle
from qanchor.data.prefix import slot_vectors, with_measures
from qanchor_server.engine import Engine, FloatArray, PrefixChunk, SlotT
from qanchor_server.prefix_source import PreparedPrefix

TextKey = bytes


class EventVectors:
    """The most recently used event vectors, by digest of text and token limit.

    Keys are digests: no text of a user outlives the user here.
    """

    def __init__(self, max_texts: int) -> None:
        self._max_texts = max_texts
        self._vectors: OrderedDict[TextKey, FloatArray] = OrderedDict()

    def get(self, key: TextKey) -> FloatArray | None:
        """The vector [E], or None."""
        vector = self._vectors.get(key)
        if vector is not None:
            self._vectors.move_to_end(key)
        return vector

    def put(self, key: TextKey, vector_E: FloatArray) -> None:
        """Keep a vector; the least recently used one goes when there are too many."""
        self._vectors[key] = vector_E
        if len(self._vectors) > self._max_texts:
            self._vectors.popitem(last=False)


@dataclass(frozen=True, slots=True)
class PendingText:
    """An event text whose vector is not known yet."""

    key: TextKey
    text: str
    max_event_tokens: int


@dataclass(slots=True)
class Encoding(Generic[SlotT]):
    """A prefix on its way into a slot."""

    prepared: PreparedPrefix
    slot: SlotT
    keys: list[TextKey]
    """One per event, in prefix order."""
    known: dict[TextKey, FloatArray]
    """Vectors of this user's texts; held here so that the cache cannot lose them midway."""
    pending: list[PendingText]
    """Texts to encode, longest first."""
    vectors_PE: FloatArray | None = field(default=None)
    num_done: int = 0
    """Prefix positions in the slot."""


class PrefixEncoder(Generic[SlotT]):
    """Runs event encoder and prefix graph for one prefix after the other."""

    def __init__(
        self,
        engine: Engine[SlotT],
        bundle: Bundle,
        *,
        chunk_len: int,
        max_event_tokens_per_step: int,
        max_cached_texts: int,
    ) -> None:
        self._engine = engine
        self._bundle = bundle
        self._chunk_len = chunk_len
        self._max_event_tokens = max_event_tokens_per_step
        self._cache = EventVectors(max_cached_texts)

    def start(self, prepared: PreparedPrefix, slot: SlotT) -> Encoding[SlotT]:
        """Look up the user's event vectors; texts that have none are pending."""
        keys: list[TextKey] = []
        known: dict[TextKey, FloatArray] = {}
        pending: dict[TextKey, PendingText] = {}
        modalities = self._bundle.manifest.profile_schema.modalities
        for spec, texts in zip(modalities, prepared.rendered.texts, strict=True):
            for text in texts:
                key = _text_key(text, spec.max_event_tokens)
                keys.append(key)
                if key in known or key in pending:
                    continue
                vector_E = self._cache.get(key)
                if vector_E is None:
                    pending[key] = PendingText(key, text, spec.max_event_tokens)
                else:
                    known[key] = vector_E
        # Neighbours in length share a batch, so that little of it is padding.
        ordered = sorted(pending.values(), key=lambda item: len(item.text), reverse=True)
        return Encoding(prepared, slot, keys, known, ordered)

    def advance(self, encoding: Encoding[SlotT]) -> bool:
        """Run one piece on the device; True when the prefix is complete in its slot.

        Raises Retryable from the engine; the encoding must then be given up.
        """
        if encoding.pending:
            self._encode_texts(encoding)
            return False
        if encoding.vectors_PE is None:
            encoding.vectors_PE = self._assemble(encoding)
        start, stop = encoding.num_done, encoding.num_done + self._chunk_len
        layout = encoding.prepared.layout
        self._engine.prefill(
            encoding.slot,
            PrefixChunk(
                token_ids_C=layout.token_ids_P[start:stop],
                adapter_C=layout.adapter_P[start:stop],
                vectors_CE=encoding.vectors_PE[start:stop],
                start=start,
            ),
        )
        encoding.num_done = min(stop, len(layout))
        return encoding.num_done == len(layout)

    def encode(self, prepared: PreparedPrefix, slot: SlotT) -> None:
        """Encode a whole prefix in one go; for warm-up and checks."""
        encoding = self.start(prepared, slot)
        while not self.advance(encoding):
            pass

    def _encode_texts(self, encoding: Encoding[SlotT]) -> None:
        batch = self._next_batch(encoding.pending)
        pad = self._bundle.manifest.event_pad
        text_len = max(1, max(len(ids) for ids in batch))
        token_ids_NT = np.full((len(batch), text_len), pad, dtype=np.int64)
        for row, ids in enumerate(batch):
            token_ids_NT[row, : len(ids)] = ids
        vectors_NE = self._engine.encode_events(token_ids_NT)
        for row, item in enumerate(encoding.pending[: len(batch)]):
            vector_E = vectors_NE[row].copy()
            encoding.known[item.key] = vector_E
            self._cache.put(item.key, vector_E)
        del encoding.pending[: len(batch)]

    def _next_batch(self, pending: list[PendingText]) -> list[list[int]]:
        """Token ids of the first pending texts that fit into a step, at least one.

        Texts are tokenised piece by piece: all of a user's at once would hold up a waiting suffix
        step for longer than any piece on the device.
        """
        batch: list[list[int]] = []
        text_len = 1
        for item in pending:
            ids = self._bundle.encode_event(item.text, item.max_event_tokens)
            text_len = max(text_len, len(ids))
            if batch and text_len * (len(batch) + 1) > self._max_event_tokens:
                break
            batch.append(ids)
        return batch

    def _assemble(self, encoding: Encoding[SlotT]) -> FloatArray:
        event_dim = self._bundle.manifest.dims.event_dim
        vectors_NE = np.zeros((len(encoding.keys), event_dim), dtype=np.float32)
        for row, key in enumerate(encoding.keys):
            vectors_NE[row] = encoding.known[key]
        prepared = encoding.prepared
        return slot_vectors(
            prepared.layout,
            prepared.rendered.num_events,
            with_measures(vectors_NE, prepared.rendered),
        )


def _text_key(text: str, max_event_tokens: int) -> TextKey:
    return hashlib.blake2b(f"{max_event_tokens}\0{text}".encode(), digest_size=16).digest()
