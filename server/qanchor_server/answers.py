"""What the worker gives back to the event loop: answers, and counts since start. Pure values."""

from dataclasses import dataclass, field

from qanchor_server.engine import FloatArray
from qanchor_server.kv_pool import Found, PrefixRef
from qanchor_server.kv_tiers import TierUse


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Embeddings of a request's queries and what they rest on."""

    vectors_QZ: FloatArray
    """float32, one row per query; no rows for a warm-up request."""
    prefix: PrefixRef
    found: Found
    """Where the prefix was."""
    is_kept: bool
    """It stays on the device for the time asked for."""
    queue_seconds: float
    prefill_seconds: float
    suffix_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStats:
    """Counts since start, and use of the tiers."""

    num_answered: int = 0
    num_encoded: int = 0
    num_suffix_steps: int = 0
    num_prefill_steps: int = 0
    num_restore_steps: int = 0
    num_device_hits: int = 0
    """Requests whose prefix was on the device."""
    num_expired: int = 0
    num_cancelled: int = 0
    tiers: dict[Found, TierUse] = field(default_factory=dict)
    """By DEVICE, HOST and DISK."""


@dataclass(slots=True)
class Counts:
    """Counts by the names of WorkerStats' fields."""

    values: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, amount: int = 1) -> None:
        """Count."""
        self.values[name] = self.values.get(name, 0) + amount
