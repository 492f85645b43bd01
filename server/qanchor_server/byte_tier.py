"""One tier of keys and values below the device: whose, of which content, where, what goes first.

Pure: it counts bytes and names places; the mover applies them to memory and files. Must not know
numpy, files or clocks. Not thread-safe: call from the worker thread only.

An entry is FILLING (a move writes it) and then FILLED. Pins keep it: moves in flight and queued
users that wait for it. A doomed entry is no user's any more; its place is given back with its last
pin. The least recently used unpinned entry is evicted first; copies of what the device holds as
well (`is_shadow`) go before all others.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """Keys and values of one content of one user's prefix, the padding of the slot left out."""

    user_id: str
    digest: str
    """Identity of model and rendered texts."""
    num_tokens: int
    num_bytes: int


class Space(Protocol):
    """Hands out places for bytes within a budget."""

    used_bytes: int
    num_bytes: int

    def allocate(self, num_bytes: int, owner: str) -> int | None:
        """A place, or None when there is no room."""
        ...

    def free(self, place: int) -> None:
        """Give a place back."""
        ...

    def cost(self, num_bytes: int) -> int:
        """Bytes of the budget that such a place takes up."""
        ...


class FileSpace:
    """Numbers for files within a byte budget; a number is never used twice."""

    def __init__(self, num_bytes: int, *, header_bytes: int = 0) -> None:
        self.num_bytes = num_bytes
        self.used_bytes = 0
        self._header_bytes = header_bytes
        self._next_id = 0
        self._sizes: dict[int, int] = {}

    def allocate(self, num_bytes: int, owner: str) -> int | None:
        """A file number, or None when there is no room."""
        file_id = self._next_id
        return file_id if self.adopt(file_id, num_bytes) else None

    def adopt(self, file_id: int, num_bytes: int) -> bool:
        """Take in a file by its number; False when there is no room for it."""
        self.skip(file_id)
        size = self.cost(num_bytes)
        if self.used_bytes + size > self.num_bytes:
            return False
        self._sizes[file_id] = size
        self.used_bytes += size
        return True

    def skip(self, file_id: int) -> None:
        """Never give out a number that a file has already."""
        self._next_id = max(self._next_id, file_id + 1)

    def free(self, place: int) -> None:
        """Give the bytes of a file back."""
        self.used_bytes -= self._sizes.pop(place)

    def cost(self, num_bytes: int) -> int:
        """A file's bytes, its header included."""
        return num_bytes + self._header_bytes


@dataclass(slots=True, eq=False)
class Entry:
    """What a tier holds of a user."""

    content: Content
    place: int
    used_s: float
    is_filled: bool = False
    is_shadow: bool = False
    is_doomed: bool = False
    is_freed: bool = False
    pins: int = 0


class ByteTier:
    """Entries by user in one space; a user has one that is not doomed."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._doomed: list[Entry] = []
        self._freed: list[Entry] = []
        self.pinned_bytes = 0
        """Bytes of the budget that no eviction can free now."""
        self.num_hits = 0
        self.num_evicted = 0
        self.num_failed = 0

    def find(self, user_id: str, digest: str) -> Entry | None:
        """The user's entry if it has exactly this content, filled or filling."""
        entry = self._entries.get(user_id)
        return entry if entry and entry.content.digest == digest else None

    def of_user(self, user_id: str) -> list[Entry]:
        """All that has a place here and is of the user, doomed entries too."""
        found = self._entries.get(user_id)
        doomed = [entry for entry in self._doomed if entry.content.user_id == user_id]
        return [found, *doomed] if found else doomed

    def reserve(self, content: Content, now_s: float) -> Entry | None:
        """A pinned place to fill, the user's other contents dropped; None: no room now."""
        self.drop(content.user_id)
        place = self._make_room(content)
        if place is None:
            return None
        entry = Entry(content, place, now_s)
        self.pin(entry)
        self._entries[content.user_id] = entry
        return entry

    def adopt(self, entry: Entry) -> None:
        """Take in a filled entry whose place is booked already, as the most recently used."""
        self._entries[entry.content.user_id] = entry

    def touch(self, entry: Entry, now_s: float) -> None:
        """Mark an entry as used now."""
        entry.used_s = now_s
        if not entry.is_doomed:
            self._entries.move_to_end(entry.content.user_id)

    def shadow(self, entry: Entry, is_shadow: bool) -> None:
        """Note whether the device holds the same; such an entry is the first to go."""
        entry.is_shadow = is_shadow
        if not entry.is_doomed:
            self._entries.move_to_end(entry.content.user_id, last=not is_shadow)

    def pin(self, entry: Entry) -> None:
        """Keep an entry from eviction until as many unpins."""
        if not entry.pins:
            self.pinned_bytes += self._cost(entry)
        entry.pins += 1

    def unpin(self, entry: Entry) -> None:
        """Undo one pin; a doomed entry's place is given back with the last."""
        assert entry.pins > 0
        entry.pins -= 1
        if not entry.pins:
            self.pinned_bytes -= self._cost(entry)
        if entry.is_doomed and not entry.pins:
            self._doomed.remove(entry)
            self._free(entry)

    def drop(self, user_id: str) -> None:
        """The user has nothing here from now on; pinned bytes go with their last pin."""
        entry = self._entries.pop(user_id, None)
        if entry is None:
            return
        entry.is_doomed = True
        if entry.pins:
            self._doomed.append(entry)
        else:
            self._free(entry)

    def expire(self, before_s: float) -> None:
        """Drop what was not used since `before_s`, pinned entries left out."""
        for user_id, entry in list(self._entries.items()):
            if entry.used_s <= before_s and not entry.pins:
                self.drop(user_id)

    def take_freed(self) -> list[Entry]:
        """Entries whose place was given back since the last call."""
        freed, self._freed = self._freed, []
        return freed

    def entries(self) -> tuple[Entry, ...]:
        """All entries, first to go first, doomed ones at the end; for invariants."""
        return (*self._entries.values(), *self._doomed)

    @property
    def num_users(self) -> int:
        """Users with an entry, filling ones included."""
        return len(self._entries)

    def _make_room(self, content: Content) -> int | None:
        # Nobody is evicted for a newcomer that cannot get in anyway.
        if self.pinned_bytes + self.space.cost(content.num_bytes) > self.space.num_bytes:
            return None
        while (place := self.space.allocate(content.num_bytes, content.user_id)) is None:
            victim = next((entry for entry in self._entries.values() if not entry.pins), None)
            if victim is None:
                return None
            self.drop(victim.content.user_id)
            self.num_evicted += not victim.is_shadow
        return place

    def _cost(self, entry: Entry) -> int:
        return self.space.cost(entry.content.num_bytes)

    def _free(self, entry: Entry) -> None:
        entry.is_freed = True
        self.space.free(entry.place)
        self._freed.append(entry)


def check_tier(tier: ByteTier) -> tuple[str, ...]:
    """What is wrong with a tier, in words; empty when all is well."""
    wrong = []
    entries = tier.entries()
    places = [entry.place for entry in entries]
    if len(set(places)) != len(places):
        wrong.append("two entries share a place")
    total = sum(tier.space.cost(entry.content.num_bytes) for entry in entries)
    if total != tier.space.used_bytes:
        wrong.append(f"used_bytes={tier.space.used_bytes} but entries sum to {total}")
    pinned = sum(tier.space.cost(entry.content.num_bytes) for entry in entries if entry.pins)
    if pinned != tier.pinned_bytes:
        wrong.append(f"pinned_bytes={tier.pinned_bytes} but pinned entries sum to {pinned}")
    if tier.space.used_bytes > tier.space.num_bytes:
        wrong.append(f"used_bytes={tier.space.used_bytes} exceeds {tier.space.num_bytes}")
    wrong += [
        f"{entry.content.user_id}: filled={entry.is_filled}, {entry.pins} pins"
        for entry in entries
        if entry.pins < 0 or (not entry.is_filled and not entry.pins)
    ]
    return tuple(wrong)
