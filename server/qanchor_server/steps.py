"""The values that pass between worker and scheduler: jobs, steps, plans, outcomes. Pure."""

from dataclasses import dataclass
from enum import Enum

from qanchor_server.kv_pool import Found, PrefixRef, Reservation
from qanchor_server.kv_tiers import Move


class Reason(Enum):
    """Why a job left the queue without an answer."""

    EXPIRED = "expired"
    CANCELLED = "cancelled"
    DELETED = "deleted"
    UNSERVICEABLE = "unserviceable"
    RETRYABLE = "retryable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request: queries over one prefix. No queries: only wants the prefix encoded."""

    job_id: int
    prefix: PrefixRef
    query_lens: tuple[int, ...]
    """Suffix tokens per query; each at most max_step_tokens."""
    arrival_s: float
    deadline_s: float | None = None
    keep_s: float = 0.0
    """How long the prefix is to stay on the device from when the job is finished; 0: no wish."""
    source: object = None
    """What the worker encodes the prefix from; handed back in PrefillStep."""


@dataclass(frozen=True, slots=True)
class JobSlice:
    """Queries [start, stop) of a job."""

    job_id: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class UserSlice:
    """One user's part of a suffix step."""

    prefix: PrefixRef
    slot_id: int
    slices: tuple[JobSlice, ...]


@dataclass(frozen=True, slots=True)
class SuffixStep:
    """Run queries of users whose prefixes are held."""

    users: tuple[UserSlice, ...]


@dataclass(frozen=True, slots=True)
class PrefillStep:
    """Advance the encoding of one prefix by one bounded piece."""

    reservation: Reservation
    source: object


@dataclass(frozen=True, slots=True)
class RestoreStep:
    """Copy one prefix from host memory into a slot; about as long as the copy of its bytes."""

    reservation: Reservation
    place: int
    """Offset in host memory."""
    num_bytes: int
    found: Found
    """HOST, or DISK when it was read from there for this."""


Step = SuffixStep | PrefillStep | RestoreStep


@dataclass(frozen=True, slots=True)
class Dropped:
    """A job that left without an answer."""

    job_id: int
    reason: Reason
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A job whose queries are all answered."""

    job_id: int
    prefix: PrefixRef
    found: Found
    """Where its prefix was; what the job had to wait for."""
    is_kept: bool
    """Its wish to keep the prefix was granted; False also without a wish."""
    arrival_s: float
    prefill_seconds: float
    suffix_seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The next step, or None when there is nothing to run; and what left the queue."""

    step: Step | None
    moves: tuple[Move, ...]
    """To make or to start before the step, in this order."""
    dropped: tuple[Dropped, ...]
    finished: tuple[Finished, ...]
