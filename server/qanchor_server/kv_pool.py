"""Which user's keys and values stand in which slot of the device memory.

Pure: it counts bytes and names slots; the worker applies them to tensors. Must not know numpy,
engines or clocks. Not thread-safe: call from the worker thread only.

A slot is FREE, RESERVED (being filled) or HELD (by one user):

    reserve: FREE or new -> RESERVED      commit: RESERVED -> HELD
    release: RESERVED -> FREE             evict: HELD -> FREE, then perhaps dropped for its bytes
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import takewhile


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixRef:
    """Names one content of one user's prefix."""

    user_id: str
    digest: str
    """Identity of model and rendered texts; equal digests have equal keys and values."""
    version: int
    """Rises with every change of the stored profile."""
    num_tokens: int
    as_of_s: int
    """Unix seconds."""


class Found(Enum):
    """Where a prefix was when it was needed."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    ENCODED = "encoded"
    """Nowhere; it was encoded."""


class SlotState(Enum):
    """What a slot is used for."""

    FREE = "free"
    RESERVED = "reserved"
    HELD = "held"


@dataclass(frozen=True, slots=True)
class Reservation:
    """A slot to be filled for `prefix`; hand it to commit or release."""

    prefix: PrefixRef
    slot_id: int
    capacity: int


@dataclass(frozen=True, slots=True)
class Deferred:
    """No room now: what is there is pinned. Ask again after a step."""


@dataclass(frozen=True, slots=True)
class Unserviceable:
    """The prefix fits no slot, whatever is evicted."""

    rule: str


@dataclass(frozen=True, slots=True)
class Room:
    """How room can be made: users to evict, free slots to drop, and a slot to reuse if any."""

    capacity: int
    evict: tuple[str, ...] = ()
    drop: tuple[int, ...] = ()
    reuse: int | None = None


@dataclass(frozen=True, slots=True)
class Evicted:
    """A user let go to make room; the slot keeps the numbers until it is filled or freed."""

    prefix: PrefixRef
    slot_id: int


@dataclass(frozen=True, slots=True)
class SlotView:
    """One slot in a snapshot; `user_id` of the holder or of the reservation."""

    slot_id: int
    capacity: int
    state: SlotState
    user_id: str | None
    pins: int


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """All of the pool at one moment."""

    budget_bytes: int
    bytes_per_token: int
    used_bytes: int
    capacities: tuple[int, ...]
    slots: tuple[SlotView, ...]


@dataclass(slots=True)
class _Slot:
    capacity: int
    state: SlotState
    last_user_id: str | None = None


@dataclass(slots=True)
class _Entry:
    prefix: PrefixRef
    slot_id: int
    used_s: float
    pins: int = 0


class KvPool:
    """Slots of a few length classes within one byte budget, least recently used evicted first."""

    def __init__(
        self,
        *,
        budget_bytes: int,
        bytes_per_token: int,
        capacities: Sequence[int],
        ttl_s: float = 0.0,
    ) -> None:
        """`ttl_s`: users not used for so long are let go; 0: never."""
        self.budget_bytes = budget_bytes
        self._bytes_per_token = bytes_per_token
        self._capacities = tuple(sorted(capacities))
        self._slots: dict[int, _Slot] = {}
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._reservations: dict[int, Reservation] = {}
        self._dropped: list[int] = []
        self._evicted: list[Evicted] = []
        self._keeps: dict[str, float] = {}
        self._ttl_s = ttl_s
        self._now_s = 0.0
        self._next_slot_id = 0
        self._used_bytes = 0
        self.num_evicted = 0

    def advance(self, now_s: float) -> None:
        """Set the time; end what was to be kept until now, let go of users past the ttl."""
        self._now_s = now_s
        self._end_keeps(now_s)
        if not self._ttl_s:
            return
        # Least recently used first, so the first that is young enough ends the search.
        old = takewhile(lambda item: item[1].used_s <= now_s - self._ttl_s, self._entries.items())
        for user_id, entry in tuple(old):
            if not self._is_pinned(user_id, entry):
                self.evict(user_id)

    def keep(self, user_id: str, seconds: float, now_s: float) -> bool:
        """Keep a held user from eviction for so long; False when too much is kept already.

        What is not kept must always have room for one slot of the largest class.
        """
        if user_id not in self._entries:
            return False
        self._end_keeps(now_s)
        kept = self._keeps.keys() | {user_id}
        if not self._leaves_room(kept):
            return False
        self._keeps[user_id] = max(now_s + seconds, self._keeps.get(user_id, 0.0))
        return True

    def find(self, user_id: str) -> PrefixRef | None:
        """The prefix held for a user, if any."""
        entry = self._entries.get(user_id)
        return entry.prefix if entry else None

    def slot_of(self, user_id: str) -> int:
        """Slot that holds the user's prefix. The user must be held."""
        return self._entries[user_id].slot_id

    def touch(self, user_id: str) -> None:
        """Mark a held user as used now."""
        self._entries[user_id].used_s = self._now_s
        self._entries.move_to_end(user_id)

    def renew(self, prefix: PrefixRef) -> None:
        """Note a newer version of a held prefix whose content is the same."""
        entry = self._entries[prefix.user_id]
        assert entry.prefix.digest == prefix.digest
        if prefix.version > entry.prefix.version:
            entry.prefix = prefix

    def pin(self, user_id: str) -> None:
        """Keep a held user from eviction until as many unpins."""
        self._entries[user_id].pins += 1

    def unpin(self, user_id: str) -> None:
        """Undo one pin."""
        entry = self._entries[user_id]
        assert entry.pins > 0
        entry.pins -= 1

    def plan(self, prefix: PrefixRef) -> Room | Deferred | Unserviceable:
        """Find how room for a prefix can be made; changes nothing."""
        index = bisect_left(self._capacities, prefix.num_tokens)
        if index == len(self._capacities):
            return Unserviceable(
                f"num_tokens={prefix.num_tokens}: longer than the largest slot "
                f"({self._capacities[-1]} tokens)"
            )
        capacity = self._capacities[index]
        needed = capacity * self._bytes_per_token
        if needed > self.budget_bytes:
            return Unserviceable(
                f"num_tokens={prefix.num_tokens}: needs {needed} bytes, the pool has "
                f"{self.budget_bytes}"
            )
        stale = self._entries.get(prefix.user_id)
        if stale and stale.pins:
            return Deferred()
        return self._make_room(capacity, (prefix.user_id,) if stale else ())

    def reserve(self, prefix: PrefixRef) -> Reservation | Deferred | Unserviceable:
        """Take a slot for a prefix, evicting what `plan` names."""
        room = self.plan(prefix)
        if not isinstance(room, Room):
            return room
        for user_id in room.evict:
            entry = self._entries[user_id]
            self.evict(user_id)
            # The user's own older content is of no use to anybody.
            if user_id != prefix.user_id:
                self.num_evicted += 1
                self._evicted.append(Evicted(entry.prefix, entry.slot_id))
        for slot_id in room.drop:
            self._drop(slot_id)
        slot_id = room.reuse if room.reuse is not None else self._add_slot(room.capacity)
        self._slots[slot_id].state = SlotState.RESERVED
        self._slots[slot_id].last_user_id = prefix.user_id
        reservation = Reservation(prefix, slot_id, room.capacity)
        self._reservations[slot_id] = reservation
        return reservation

    def commit(self, reservation: Reservation) -> None:
        """The slot is filled: its user is held now."""
        del self._reservations[reservation.slot_id]
        self._slots[reservation.slot_id].state = SlotState.HELD
        prefix = reservation.prefix
        assert prefix.user_id not in self._entries
        self._entries[prefix.user_id] = _Entry(prefix, reservation.slot_id, self._now_s)
        if prefix.user_id in self._keeps and not self._leaves_room(self._keeps.keys()):
            del self._keeps[prefix.user_id]

    def release(self, reservation: Reservation) -> None:
        """Give a reserved slot back unfilled."""
        del self._reservations[reservation.slot_id]
        self._slots[reservation.slot_id].state = SlotState.FREE

    def evict(self, user_id: str) -> None:
        """Let go of a held, unpinned user."""
        entry = self._entries.pop(user_id)
        assert entry.pins == 0
        self._slots[entry.slot_id].state = SlotState.FREE

    def residue(self, user_id: str) -> list[int]:
        """Free slots whose tensors still hold the user's numbers."""
        return [
            slot_id
            for slot_id, slot in self._slots.items()
            if slot.state is SlotState.FREE and slot.last_user_id == user_id
        ]

    def forget(self, user_id: str) -> None:
        """Let go of a user, if held and unpinned, and of the wish to keep it."""
        self._keeps.pop(user_id, None)
        if user_id in self._entries:
            self.evict(user_id)

    def take_evicted(self) -> list[Evicted]:
        """Users let go since the last call; to be copied elsewhere before the next step."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def held(self) -> list[tuple[PrefixRef, int]]:
        """All held prefixes and their slots, least recently used first."""
        return [(entry.prefix, entry.slot_id) for entry in self._entries.values()]

    def take_dropped(self) -> list[int]:
        """Slots dropped since the last call; their tensors must be freed before the next step."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def snapshot(self) -> PoolSnapshot:
        """The pool as plain values, for invariants and statistics."""
        holders = {entry.slot_id: entry for entry in self._entries.values()}
        views = []
        for slot_id, slot in self._slots.items():
            entry = holders.get(slot_id)
            reservation = self._reservations.get(slot_id)
            user_id = reservation.prefix.user_id if reservation else None
            user_id = entry.prefix.user_id if entry else user_id
            views.append(
                SlotView(slot_id, slot.capacity, slot.state, user_id, entry.pins if entry else 0)
            )
        return PoolSnapshot(
            self.budget_bytes,
            self._bytes_per_token,
            self._used_bytes,
            self._capacities,
            tuple(views),
        )

    @property
    def used_bytes(self) -> int:
        """Bytes of all slots, free ones included: their tensors stay allocated for reuse."""
        return self._used_bytes

    @property
    def num_users(self) -> int:
        """Users held."""
        return len(self._entries)

    def _make_room(self, capacity: int, evict: tuple[str, ...]) -> Room | Deferred:
        needed = capacity * self._bytes_per_token
        available = self.budget_bytes - self._used_bytes
        spare = [slot_id for slot_id, slot in self._slots.items() if slot.state is SlotState.FREE]
        spare.extend(self._entries[user_id].slot_id for user_id in evict)
        drop: list[int] = []
        candidates = iter(
            [
                entry
                for user_id, entry in self._entries.items()
                if user_id not in evict and not self._is_pinned(user_id, entry)
            ]
        )
        while True:
            for slot_id in spare:
                if self._slots[slot_id].capacity == capacity:
                    return Room(capacity, evict, reuse=slot_id)
            for slot_id in spare:
                if available >= needed:
                    break
                drop.append(slot_id)
                available += self._slots[slot_id].capacity * self._bytes_per_token
            if available >= needed:
                return Room(capacity, evict, tuple(drop))
            entry = next(candidates, None)
            if entry is None:
                return Deferred()
            evict = (*evict, entry.prefix.user_id)
            spare = [entry.slot_id]

    def _end_keeps(self, now_s: float) -> None:
        if self._keeps:
            self._keeps = {user: until for user, until in self._keeps.items() if until > now_s}

    def _is_pinned(self, user_id: str, entry: _Entry) -> bool:
        return entry.pins > 0 or user_id in self._keeps

    def _leaves_room(self, kept: Iterable[str]) -> bool:
        num_tokens = self._capacities[-1] + sum(
            self._slots[self._entries[user_id].slot_id].capacity
            for user_id in kept
            if user_id in self._entries
        )
        return num_tokens * self._bytes_per_token <= self.budget_bytes

    def _add_slot(self, capacity: int) -> int:
        slot_id = self._next_slot_id
        self._next_slot_id += 1
        self._slots[slot_id] = _Slot(capacity, SlotState.FREE)
        self._used_bytes += capacity * self._bytes_per_token
        return slot_id

    def _drop(self, slot_id: int) -> None:
        slot = self._slots.pop(slot_id)
        assert slot.state is SlotState.FREE
        self._used_bytes -= slot.capacity * self._bytes_per_token
        self._dropped.append(slot_id)


def check_invariants(snapshot: PoolSnapshot) -> tuple[str, ...]:
    """What is wrong with a pool, in words; empty when all is well."""
    wrong = []
    total = sum(slot.capacity for slot in snapshot.slots) * snapshot.bytes_per_token
    if total != snapshot.used_bytes:
        wrong.append(f"used_bytes={snapshot.used_bytes} but slots sum to {total}")
    if snapshot.used_bytes > snapshot.budget_bytes:
        wrong.append(f"used_bytes={snapshot.used_bytes} exceeds budget {snapshot.budget_bytes}")
    held = [slot.user_id for slot in snapshot.slots if slot.state is SlotState.HELD]
    if len(set(held)) != len(held):
        wrong.append("a user is held twice")
    for slot in snapshot.slots:
        if slot.capacity not in snapshot.capacities:
            wrong.append(f"slot {slot.slot_id}: capacity {slot.capacity} is no class")
        if (slot.state is SlotState.FREE) != (slot.user_id is None):
            wrong.append(f"slot {slot.slot_id}: {slot.state} with user {slot.user_id!r}")
        if slot.pins < 0 or (slot.pins and slot.state is not SlotState.HELD):
            wrong.append(f"slot {slot.slot_id}: {slot.state} with {slot.pins} pins")
    return tuple(wrong)
