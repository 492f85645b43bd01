"""Which keys and values lie in host memory and on disk, and which moves bring them there.

Pure: it decides; the mover copies. Must not know numpy, files or a clock but the `now_s` passed in.
Not thread-safe: call from the worker thread only.

    device --Demote--> host --Write--> disk      when the device evicts; Write follows at once
    device <--restore-- host <--Read-- disk      when a queued user wants it

1. Host memory keeps what the device evicts. Its copy is written to disk right away, in the
   background, unless the disk has that content: host memory then makes room at no cost.
2. `want` pins a queued user's entry, or has it read from disk while other steps run.
3. The scheduler restores it in one step; the host keeps the copy until it needs the room.
4. Every move ends in `done`. A move that failed leaves nothing behind but a prefix to encode, or a
   file that could not be deleted: it stays known until a deletion of its user tries again.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from qanchor_server.arena import Arena
from qanchor_server.byte_tier import ByteTier, Content, Entry, FileSpace
from qanchor_server.kv_pool import Found, PrefixRef

MAX_FAILED_WRITES = 3
DISK_REST_S = 60.0
EXPIRE_EVERY = 16
"""Looks for expired entries per time to live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierBudgets:
    """Sizes of the tiers."""

    host_bytes: int
    """0: no host tier, and no disk tier either."""
    disk_bytes: int
    """0: no disk tier. Reads and writes go through host memory."""
    bytes_per_token: int
    """Keys and values of one prefix position."""
    header_bytes: int = 0
    """What a file holds beside keys and values."""
    ttl_s: float = 0.0
    """Entries not used for so long are dropped; 0: never."""


@dataclass(frozen=True, slots=True)
class Demote:
    """Copy a slot's first positions to host memory. On the worker thread, before the next step."""

    host: Entry
    slot_id: int


@dataclass(frozen=True, slots=True)
class Write:
    """Write an entry of host memory to disk. In the background."""

    host: Entry
    disk: Entry


@dataclass(frozen=True, slots=True)
class Read:
    """Read a file into host memory and check it. In the background, before any Write."""

    disk: Entry
    host: Entry


@dataclass(frozen=True, slots=True)
class Unlink:
    """Delete a file; `is_urgent` when a deletion waits for it. In the background."""

    file_id: int
    is_urgent: bool


@dataclass(frozen=True, slots=True)
class Scrub:
    """Overwrite free host memory with zeros. On the worker thread."""

    offset: int
    num_bytes: int


Move = Demote | Write | Read | Unlink | Scrub


class Want(Enum):
    """How a queued user's prefix can come to the device."""

    RESTORE = "restore"
    """From host memory, where it is pinned now."""
    READING = "reading"
    """It is being read into host memory, pinned; `done` tells when."""
    NO_ROOM = "no room"
    """It lies on disk, host memory has no room for it now."""
    ENCODE = "encode"


@dataclass(slots=True, eq=False)
class Forgetting:
    """What is still to happen until a user is gone from all tiers below the device."""

    user_id: str
    entries: list[Entry]
    file_ids: set[int]
    """The user's files, those included that were to be deleted before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierUse:
    """Use of one tier now, and counts since start."""

    budget_bytes: int
    used_bytes: int
    num_users: int
    num_hits: int
    """Prefixes that a waiting user got from here."""
    num_evicted: int
    num_failed: int = 0
    """Moves that failed; each costs one encoding at most."""


class KvTiers:
    """Host memory and disk below the KV pool."""

    def __init__(self, budgets: TierBudgets) -> None:
        self.budgets = budgets
        self.arena = Arena(budgets.host_bytes)
        disk_bytes = budgets.disk_bytes if budgets.host_bytes else 0
        self._files = FileSpace(disk_bytes, header_bytes=budgets.header_bytes)
        self.host, self.disk = ByteTier(self.arena), ByteTier(self._files)
        self._wanted: dict[str, Entry] = {}
        self._moves: list[Move] = []
        self._num_moving = 0
        self._unlinking: dict[int, str] = {}
        self.undeleted: dict[int, str] = {}
        """Files that could not be deleted, and whose they are."""
        self._num_failed_writes = 0
        self._disk_resume_s = float("-inf")
        self._now_s = 0.0
        self._next_expiry_s = 0.0

    def advance(self, now_s: float) -> None:
        """Set the time and drop what was not used for the time to live."""
        self._now_s = now_s
        ttl_s = self.budgets.ttl_s
        if ttl_s and now_s >= self._next_expiry_s:
            self._next_expiry_s = now_s + ttl_s / EXPIRE_EVERY
            self.host.expire(now_s - ttl_s)
            self.disk.expire(now_s - ttl_s)
            self._collect()

    def adopt(self, found: Iterable[tuple[int, Content, float]]) -> None:
        """Take in files of an earlier run: number, content, when used. Others are deleted.

        Newer files win where a user has two or the budget is short.
        """
        kept: list[Entry] = []
        taken: set[str] = set()
        for file_id, content, used_s in sorted(found, key=lambda item: item[2], reverse=True):
            is_new = content.user_id not in taken
            if is_new and self._files.adopt(file_id, content.num_bytes):
                taken.add(content.user_id)
                kept.append(Entry(content, file_id, used_s, is_filled=True))
            else:
                self._files.skip(file_id)
                self._unlink(file_id, content.user_id)
        for entry in reversed(kept):
            self.disk.adopt(entry)

    def locate(self, prefix: PrefixRef) -> Found | None:
        """Where exactly this content lies below the device. Moves nothing."""
        for tier, found in ((self.host, Found.HOST), (self.disk, Found.DISK)):
            entry = tier.find(prefix.user_id, prefix.digest)
            if entry and entry.is_filled:
                return found
        return None

    def demote(self, prefix: PrefixRef, slot_id: int) -> bool:
        """Keep what the device lets go of; False when there is no room now."""
        host = self.host.find(prefix.user_id, prefix.digest)
        if host is None:
            host = self.host.reserve(self._content(prefix), self._now_s)
            if host is None:
                return False
            self._moves.append(Demote(host, slot_id))
        elif host.is_filled:
            self.host.touch(host, self._now_s)
            self.host.shadow(host, False)
            self._write(host)
        return True

    def want(self, prefix: PrefixRef) -> Want:
        """Bring a queued user's prefix nearer; unless it is to be encoded, `leave` undoes it."""
        host = self.host.find(prefix.user_id, prefix.digest)
        if host is None:
            disk = self.disk.find(prefix.user_id, prefix.digest)
            if disk is None or not disk.is_filled or self._now_s < self._disk_resume_s:
                return Want.ENCODE
            if self.arena.cost(disk.content.num_bytes) > self.arena.num_bytes:
                return Want.ENCODE
            host = self.host.reserve(self._content(prefix), self._now_s)
            if host is None:
                return Want.NO_ROOM
            self.disk.pin(disk)
            self._moves.append(Read(disk, host))
        assert prefix.user_id not in self._wanted
        self._wanted[prefix.user_id] = host
        self.host.pin(host)
        return Want.RESTORE if host.is_filled else Want.READING

    def leave(self, user_id: str) -> None:
        """The user waits no longer for what it wanted, if it did."""
        entry = self._wanted.pop(user_id, None)
        if entry is not None:
            self.host.unpin(entry)

    def wanted(self, user_id: str) -> Entry:
        """The filled entry that a restore copies from."""
        entry = self._wanted[user_id]
        assert entry.is_filled
        return entry

    def restored(self, user_id: str, found: Found) -> None:
        """The wanted entry is on the device now; its copy here is the first to go."""
        entry = self._wanted[user_id]
        (self.disk if found is Found.DISK else self.host).num_hits += 1
        self.host.touch(entry, self._now_s)
        self.host.shadow(entry, True)
        self.leave(user_id)

    def discard(self, user_id: str) -> None:
        """Drop what the tiers hold of a user: it is stale or could not be restored."""
        self.leave(user_id)
        self.host.drop(user_id)
        self.disk.drop(user_id)
        self._collect()

    def forget(self, user_id: str) -> Forgetting:
        """Drop a user for good; ask `settle` after each move."""
        on_disk = self.disk.of_user(user_id)
        entries = self.host.of_user(user_id) + on_disk
        for file_id in [number for number, owner in self.undeleted.items() if owner == user_id]:
            del self.undeleted[file_id]
            self._unlink(file_id, user_id, is_urgent=True)
        file_ids = {file_id for file_id, owner in self._unlinking.items() if owner == user_id}
        self.host.drop(user_id)
        self.disk.drop(user_id)
        self._collect(is_urgent=True)
        return Forgetting(user_id, entries, file_ids | {entry.place for entry in on_disk})

    def settle(self, forgetting: Forgetting) -> bool:
        """Whether all moves for it have ended; then wipes free memory that still has bytes.

        No tier holds the user any more then, but for `undeleted` files.
        """
        if not all(entry.is_freed for entry in forgetting.entries):
            return False
        if forgetting.file_ids & self._unlinking.keys():
            return False
        for offset, num_bytes in self.arena.residue(forgetting.user_id):
            self._moves.append(Scrub(offset, num_bytes))
        self.arena.scrubbed(forgetting.user_id)
        return True

    def rest_disk(self) -> None:
        """Leave a disk that fails or hangs alone for a while: no reads, no writes."""
        self._disk_resume_s = self._now_s + DISK_REST_S

    def take_moves(self) -> list[Move]:
        """Moves to make, in this order; each ends in `done`."""
        moves, self._moves = self._moves, []
        self._num_moving += len(moves)
        return moves

    @property
    def is_moving(self) -> bool:
        """Whether moves are under way."""
        return self._num_moving > 0

    def done(self, move: Move, is_ok: bool) -> None:
        """A move has ended; a failed one leaves no entry."""
        self._num_moving -= 1
        match move:
            case Demote(host=host):
                host.is_filled = is_ok
                if is_ok and not host.is_doomed:
                    self._write(host)
                self._end(self.host, host, is_ok)
            case Write(host=host, disk=disk):
                disk.is_filled = is_ok
                self._note_write(is_ok)
                self._end(self.host, host, True)
                self._end(self.disk, disk, is_ok)
            case Read(host=host, disk=disk):
                host.is_filled = is_ok
                if is_ok:
                    self.disk.touch(disk, self._now_s)
                self._end(self.host, host, is_ok)
                self._end(self.disk, disk, is_ok)
            case Unlink(file_id=file_id):
                user_id = self._unlinking.pop(file_id)
                if not is_ok:
                    self.disk.num_failed += 1
                    self.undeleted[file_id] = user_id
        self._collect()

    def use(self, found: Found) -> TierUse:
        """Use of the host or the disk tier."""
        tier = self.host if found is Found.HOST else self.disk
        return TierUse(
            budget_bytes=tier.space.num_bytes,
            used_bytes=tier.space.used_bytes,
            num_users=tier.num_users,
            num_hits=tier.num_hits,
            num_evicted=tier.num_evicted,
            num_failed=tier.num_failed,
        )

    def _write(self, host: Entry) -> None:
        """Have an entry of host memory written to disk, unless the disk has its content."""
        content = host.content
        disk = self.disk.find(content.user_id, content.digest)
        if disk is not None:
            self.disk.touch(disk, self._now_s)
            return
        if self._now_s < self._disk_resume_s:
            return
        disk = self.disk.reserve(content, self._now_s)
        self._collect()
        if disk is not None:
            self.host.pin(host)
            self._moves.append(Write(host, disk))

    def _note_write(self, is_ok: bool) -> None:
        self._num_failed_writes = 0 if is_ok else self._num_failed_writes + 1
        if self._num_failed_writes >= MAX_FAILED_WRITES:
            self.rest_disk()

    def _end(self, tier: ByteTier, entry: Entry, is_ok: bool) -> None:
        if not is_ok:
            tier.num_failed += 1
            if not entry.is_doomed:
                tier.drop(entry.content.user_id)
        tier.unpin(entry)

    def _collect(self, is_urgent: bool = False) -> None:
        """Have the files of entries that left the disk tier deleted."""
        self.host.take_freed()
        for entry in self.disk.take_freed():
            self._unlink(entry.place, entry.content.user_id, is_urgent)

    def _unlink(self, file_id: int, user_id: str, is_urgent: bool = False) -> None:
        self._unlinking[file_id] = user_id
        self._moves.append(Unlink(file_id, is_urgent))

    def _content(self, prefix: PrefixRef) -> Content:
        return Content(
            user_id=prefix.user_id,
            digest=prefix.digest,
            num_tokens=prefix.num_tokens,
            num_bytes=prefix.num_tokens * self.budgets.bytes_per_token,
        )
