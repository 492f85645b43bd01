"""Runs the scheduler's steps on the engine, and keeps the slots' tensors.

Must not know queues, futures or grpc. Call from the worker thread only.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Generic

import numpy as np

from qanchor.bundle.packing import SuffixQuery, UserSuffix
from qanchor_server.engine import Engine, FloatArray, SlotT
from qanchor_server.kv_mover import KvMover
from qanchor_server.kv_pool import Reservation
from qanchor_server.kv_tiers import Demote, Move
from qanchor_server.prefix_encoder import Encoding, PrefixEncoder
from qanchor_server.prefix_source import PreparedPrefix
from qanchor_server.steps import PrefillStep, RestoreStep, SuffixStep
from qanchor_server.suffix_runner import SuffixRunner


@dataclass(frozen=True, slots=True)
class EngineParts(Generic[SlotT]):
    """What belongs to one engine; made on the worker thread."""

    engine: Engine[SlotT]
    encoder: PrefixEncoder[SlotT]
    mover: KvMover[SlotT]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerModel:
    """Numbers of the model that packing needs."""

    user_emb: int
    hidden_dim: int
    embedding_dim: int


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A job's queries and where their embeddings go, one row each."""

    queries: tuple[SuffixQuery, ...]
    vectors_QZ: FloatArray
    """float32, filled step by step."""


class StepRunner(Generic[SlotT]):
    """Slots by number, and the three kinds of step on them."""

    def __init__(self, parts: EngineParts[SlotT], model: WorkerModel) -> None:
        self._parts = parts
        self._suffix = SuffixRunner(
            parts.engine, user_emb=model.user_emb, hidden_dim=model.hidden_dim
        )
        self._slots: dict[int, SlotT] = {}
        self._encoding: tuple[Reservation, Encoding[SlotT]] | None = None

    def prefill(self, step: PrefillStep) -> bool:
        """Advance an encoding by one piece; True when it is complete. Raises Retryable."""
        reservation = step.reservation
        # A reservation given up midway leaves its encoding behind; the next one is another object.
        if self._encoding is None or self._encoding[0] is not reservation:
            assert isinstance(step.source, PreparedPrefix)
            slot = self._slot_for(reservation)
            self._encoding = (reservation, self._parts.encoder.start(step.source, slot))
        is_encoded = self._parts.encoder.advance(self._encoding[1])
        if is_encoded:
            self._encoding = None
        return is_encoded

    def restore(self, step: RestoreStep) -> None:
        """Copy a prefix from host memory into its slot. Raises Retryable."""
        reservation = step.reservation
        slot = self._slot_for(reservation)
        num_tokens = reservation.prefix.num_tokens
        self._parts.mover.restore(slot, num_tokens, step.place, step.num_bytes)

    def suffix(
        self,
        step: SuffixStep,
        jobs: Mapping[int, Rows],
        ended: Callable[[Callable[[], None]], None],
        *,
        is_idle: bool,
    ) -> bool:
        """Embed a step's queries into their jobs' rows; True when it is complete. Raises Retryable.

        False: it was only begun, and other steps may run beside it. `ended` is called on another
        thread when it has ended, with what the worker thread calls then: it fills the rows, or
        raises what the engine raised. `is_idle`: no step is begun now.
        """
        asked: list[UserSuffix] = []
        slots: list[SlotT] = []
        places: list[FloatArray] = []
        for user in step.users:
            for part in user.slices:
                rows = jobs[part.job_id]
                queries = rows.queries[part.start : part.stop]
                asked.append(UserSuffix(user.prefix.num_tokens, queries))
                slots.append(self._slots[user.slot_id])
                places.append(rows.vectors_QZ[part.start : part.stop])

        def finish(found: list[FloatArray] | Exception) -> None:
            if isinstance(found, Exception):
                raise found
            _fill(places, np.concatenate(found))

        vectors_QZ = self._suffix.begin(
            asked, slots, lambda found: ended(partial(finish, found)), is_idle=is_idle
        )
        if vectors_QZ is None:
            return False
        _fill(places, vectors_QZ)
        return True

    def make(self, move: Move) -> bool | None:
        """Make a move, or begin it in the background and return None; False when it failed."""
        slot = self._slots[move.slot_id] if isinstance(move, Demote) else None
        return self._parts.mover.make(move, slot)

    def free(self, slot_ids: Iterable[int]) -> None:
        """Give the memory of slots back."""
        for slot_id in slot_ids:
            if slot_id in self._slots:
                self._parts.engine.free_slot(self._slots.pop(slot_id))

    def clear(self, user_id: str, slot_ids: Iterable[int]) -> None:
        """Overwrite slots that hold numbers of a user, and give up an encoding of the user."""
        if self._encoding is not None and self._encoding[0].prefix.user_id == user_id:
            self._encoding = None
        for slot_id in slot_ids:
            if slot_id in self._slots:
                self._parts.engine.clear_slot(self._slots[slot_id])
        self._parts.engine.clear_working()

    def _slot_for(self, reservation: Reservation) -> SlotT:
        """The reservation's slot; it holds nothing of whoever had it before."""
        slot_id, engine = reservation.slot_id, self._parts.engine
        if slot_id in self._slots:
            engine.clear_slot(self._slots[slot_id])
        else:
            self._slots[slot_id] = engine.allocate_slot(reservation.capacity)
        return self._slots[slot_id]


def _fill(places: Iterable[FloatArray], vectors_QZ: FloatArray) -> None:
    row = 0
    for place in places:
        place[:] = vectors_QZ[row : row + len(place)]
        row += len(place)
