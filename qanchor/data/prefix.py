"""The prefix of a user as arrays: which position holds a token and which an event. Torch-free.

Q-Anchor Eq. (2): header, user token, modality tokens, then per modality its start token, its
events, its end token: coarse first, fine last. A schema may leave the user token or the modality
tokens out. Training, export and server build prefixes here.

Legend: P prefix length, N events of the user, M modalities, E event_dim.
"""

import hashlib
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from qanchor.config import Config
from qanchor.data.measures import NUM_MEASURES
from qanchor.data.render import RenderedProfile

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

ADAPTER_TOKEN = 0
ADAPTER_USER = 1
ADAPTER_MODALITY = 2
ADAPTER_FIRST_EVENT = 3


class PrefixTokens(Config, frozen=True, kw_only=True):
    """What a prefix and a suffix are built from, resolved once from tokenizer and schema."""

    header: tuple[int, ...]
    """Ids of the instruction header."""
    modality_start: tuple[int, ...]
    """Id of <|m_start|> per modality, in schema order."""
    modality_end: tuple[int, ...]
    """Id of <|m_end|> per modality, in schema order."""
    user_emb: int
    """Id of <USER_EMB>."""
    eos: int
    """Ends an answer in both towers."""
    pad: int
    """Fills batches; never attended to."""
    has_user_token: bool = True
    """As the schema says."""
    has_modality_tokens: bool = True
    """As the schema says."""


@dataclass(frozen=True, slots=True)
class PrefixLayout:
    """What stands at each prefix position.

    `token_ids_P`: int64, the token where `adapter_P` is ADAPTER_TOKEN, else 0.
    `adapter_P`: int64, which adapter turns the position's vector into an input embedding:
    ADAPTER_TOKEN none, ADAPTER_USER, ADAPTER_MODALITY, or ADAPTER_FIRST_EVENT + modality index.
    `source_P`: int64, for events the row in the user's flat event list, for modality tokens the
    modality index, else 0.
    """

    token_ids_P: IntArray
    adapter_P: IntArray
    source_P: IntArray

    def __len__(self) -> int:
        return len(self.token_ids_P)


def build_layout(num_events: tuple[int, ...], tokens: PrefixTokens) -> PrefixLayout:
    """Lay out a prefix for a user with `num_events[m]` events in modality m (schema order)."""
    rows = [(token, ADAPTER_TOKEN, 0) for token in tokens.header]
    if tokens.has_user_token:
        rows.append((0, ADAPTER_USER, 0))
    if tokens.has_modality_tokens:
        rows.extend((0, ADAPTER_MODALITY, index) for index in range(len(num_events)))
    event = 0
    for index, count in enumerate(num_events):
        rows.append((tokens.modality_start[index], ADAPTER_TOKEN, 0))
        adapter = ADAPTER_FIRST_EVENT + index
        rows.extend((0, adapter, event + offset) for offset in range(count))
        event += count
        rows.append((tokens.modality_end[index], ADAPTER_TOKEN, 0))
    columns = np.array(rows, dtype=np.int64).T
    return PrefixLayout(*(np.ascontiguousarray(column) for column in columns))


def prefix_len(num_events: tuple[int, ...], tokens: PrefixTokens) -> int:
    """Positions of the prefix `build_layout` makes of the same arguments."""
    per_modality = 2 + tokens.has_modality_tokens
    coarse_and_fine = tokens.has_user_token + per_modality * len(num_events) + sum(num_events)
    return len(tokens.header) + coarse_and_fine


def max_prefix_len(max_events: tuple[int, ...], tokens: PrefixTokens) -> int:
    """Positions of the longest prefix the schema allows."""
    return prefix_len(max_events, tokens)


def with_measures(event_vectors_NE: FloatArray, rendered: RenderedProfile) -> FloatArray:
    """Event vectors [N, E] with the profile's measures behind them, [N, E + F]."""
    rows = rendered.flat_measures()
    if not rendered.measures:
        return event_vectors_NE
    measures_NF = np.array(rows, dtype=np.float32).reshape(len(rows), NUM_MEASURES)
    return np.concatenate([event_vectors_NE, measures_NF], axis=1)


def slot_vectors(
    layout: PrefixLayout, num_events: tuple[int, ...], event_vectors_NE: FloatArray
) -> FloatArray:
    """Pre-adapter vectors [P, E] of a prefix: events, modality means, and the user mean.

    Means run over real events in encoder space; an empty modality is zeros and still counts in
    the user mean (Q-Anchor Eq. (1); as in the authors' code). Text positions are zeros. E is the
    width of the event vectors as they come, measures included.
    """
    event_dim = event_vectors_NE.shape[1]
    means_ME = np.zeros((len(num_events), event_dim), dtype=np.float32)
    start = 0
    for index, count in enumerate(num_events):
        if count:
            means_ME[index] = event_vectors_NE[start : start + count].mean(axis=0)
        start += count
    vectors_PE = np.zeros((len(layout), event_dim), dtype=np.float32)
    is_event = layout.adapter_P >= ADAPTER_FIRST_EVENT
    vectors_PE[is_event] = event_vectors_NE[layout.source_P[is_event]]
    is_modality = layout.adapter_P == ADAPTER_MODALITY
    vectors_PE[is_modality] = means_ME[layout.source_P[is_modality]]
    vectors_PE[layout.adapter_P == ADAPTER_USER] = means_ME.mean(axis=0)
    return vectors_PE


def content_digest(rendered: RenderedProfile, model_id: str) -> str:
    """Identity of a prefix: equal exactly when model, every text and every measure are equal."""
    measures = np.array(rendered.flat_measures(), dtype=np.float32).tobytes()
    # MessagePack says how many texts there are and how long each is: none can pass for two.
    content = msgspec.msgpack.encode((model_id, rendered.texts, measures))
    return hashlib.blake2b(content, digest_size=16).hexdigest()
