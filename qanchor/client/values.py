"""What calls return, as plain values. Must not know grpc."""

from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from qanchor.client.errors import ClientError

FloatArray = npt.NDArray[np.float32]


class CacheState(Enum):
    """Where the user's prefix was."""

    DEVICE = 1
    HOST = 2
    ENCODED_NOW = 3
    ABSENT = 4
    DISK = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a reply rests on."""

    model_id: str
    export_id: str
    prefix_version: int
    as_of_s: int
    """Unix seconds."""
    cache_state: CacheState
    num_prefix_tokens: int
    queue_seconds: float
    prefill_seconds: float
    suffix_seconds: float
    scenario_versions: tuple[int, ...] = ()
    """Per query; 0 for free text."""


@dataclass(frozen=True, slots=True)
class EmbedResult:
    """Embeddings of one user."""

    vectors: FloatArray
    """float32 [num_queries, embedding_dim]: scenarios first, then free text, as asked."""
    provenance: Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequestItem:
    """One item to send through `stream_embed`."""

    request_id: str
    user_id: str
    scenarios: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()
    """Free text."""


@dataclass(frozen=True, slots=True)
class ItemResult:
    """One answered item of a stream: a result or an error."""

    request_id: str
    result: EmbedResult | None
    error: ClientError | None

    def unwrap(self) -> EmbedResult:
        """The result. Raises the item's ClientError."""
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result


@dataclass(frozen=True, slots=True, kw_only=True)
class PutResult:
    """A stored profile."""

    prefix_version: int
    digest: str
    as_of_s: int
    num_prefix_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendResult:
    """A profile after an append."""

    prefix_version: int
    digest: str
    as_of_s: int
    num_prefix_tokens: int
    is_duplicate: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileState:
    """What the server knows of a user."""

    prefix_version: int
    digest: str
    as_of_s: int
    num_prefix_tokens: int
    num_prefix_events: int
    cache_state: CacheState


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioInfo:
    """A named, versioned query of the server."""

    name: str
    version: int
    question: str
    domain: str
    num_prompt_rows: int
    num_suffix_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReloadResult:
    """What a reload of the server's scenario files changed."""

    changed: tuple[str, ...]
    """Names that are new or of a newer version."""
    removed: tuple[str, ...]
    scenarios: tuple[ScenarioInfo, ...]
    """All scenarios now, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierUse:
    """Use of one tier of keys and values now, and counts since the server's start."""

    budget_bytes: int
    """0: the tier is off."""
    used_bytes: int
    num_users: int
    num_hits: int
    num_evicted: int
    num_failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What the server runs, its limits and its counters since start."""

    server_version: str
    model_id: str
    export_id: str
    recipe: str
    embedding_dim: int
    max_prefix_len: int
    max_query_len: int
    max_queries_per_request: int
    max_message_bytes: int
    window_days: int
    modalities: tuple[str, ...]
    """Modalities that take events, in prefix order."""
    tiers: dict[CacheState, TierUse]
    """By DEVICE, HOST and DISK."""
    counters: dict[str, int]
    uptime_seconds: float
