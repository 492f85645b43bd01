"""The memory behind the pure parts: slots, host bytes and files that hold what was written to them.

Every byte of a prefix is a tag that stands for (user, digest). Background moves end when the test
says so, in order of their start within reads and within the rest; they may fail. A move that reads
bytes which are not whole, or a step that runs on them, fails the test.
"""

from dataclasses import dataclass, field

from qanchor_server.kv_pool import KvPool, PrefixRef
from qanchor_server.kv_tiers import Demote, KvTiers, Move, Read, Scrub, Unlink, Write
from qanchor_server.scheduler import Scheduler
from qanchor_server.steps import PrefillStep, RestoreStep, SuffixStep

Step = PrefillStep | RestoreStep | SuffixStep


def tag_of(user_id: str, digest: str) -> int:
    """A byte for a content; 0 is no content."""
    return 1 + hash((user_id, digest)) % 251


@dataclass
class World:
    """Device, host memory and disk, changed by moves and steps alone."""

    pool: KvPool
    tiers: KvTiers
    scheduler: Scheduler
    slots: dict[int, tuple[str, str]] = field(default_factory=dict)
    """What a complete slot holds: user and digest."""
    files: dict[int, tuple[str, str]] = field(default_factory=dict)
    pending: list[Move] = field(default_factory=list)
    num_encoded: int = 0

    def __post_init__(self) -> None:
        self.memory = bytearray(self.tiers.arena.num_bytes)

    def make(self, moves: tuple[Move, ...]) -> None:
        """Make or begin moves, as the worker does."""
        waiting = list(moves)
        while waiting:
            move = waiting.pop(0)
            if isinstance(move, Demote):
                content = move.host.content
                assert self.slots[move.slot_id] == (content.user_id, content.digest)
                self._fill(move.host.place, content)
            elif isinstance(move, Scrub):
                self.memory[move.offset : move.offset + move.num_bytes] = bytes(move.num_bytes)
            else:
                self.pending.append(move)
                continue
            waiting.extend(self.scheduler.move_done(move, True))

    def end_one(self, is_ok: bool = True) -> None:
        """Let the next background move end: an urgent one first."""
        urgent = [m for m in self.pending if isinstance(m, Read) or getattr(m, "is_urgent", False)]
        move = urgent[0] if urgent else self.pending[0]
        self.pending.remove(move)
        match move:
            case Write(host=host, disk=disk):
                self._check(host.place, host.content)
                if is_ok:
                    assert disk.place not in self.files
                    self.files[disk.place] = (host.content.user_id, host.content.digest)
            case Read(disk=disk, host=host):
                # A file that cannot be trusted is a failed read.
                wanted = (host.content.user_id, host.content.digest)
                assert self.files[disk.place] == wanted
                if is_ok:
                    self._fill(host.place, host.content)
            case Unlink(file_id=file_id):
                if is_ok:
                    self.files.pop(file_id, None)
        self.make(self.scheduler.move_done(move, is_ok))

    def run(self, step: Step, is_encoded: bool) -> None:
        """What the device does in a step."""
        match step:
            case PrefillStep(reservation=reservation):
                prefix = reservation.prefix
                self.slots.pop(reservation.slot_id, None)
                if is_encoded:
                    self.num_encoded += 1
                    self.slots[reservation.slot_id] = (prefix.user_id, prefix.digest)
            case RestoreStep(reservation=reservation, place=place, num_bytes=num_bytes):
                prefix = reservation.prefix
                tag = tag_of(prefix.user_id, prefix.digest)
                assert set(self.memory[place : place + num_bytes]) == {tag}, "not the asked bytes"
                self.slots[reservation.slot_id] = (prefix.user_id, prefix.digest)
            case SuffixStep(users=users):
                for user in users:
                    self.check_slot(user.prefix, user.slot_id)

    def check_slot(self, prefix: PrefixRef, slot_id: int) -> None:
        """The slot holds the whole of this prefix."""
        assert self.slots[slot_id] == (prefix.user_id, prefix.digest), "a wrong prefix is used"

    def check_disk(self) -> None:
        """Files take no more bytes than the budget, those being written included."""
        sizes = {entry.place: entry.content.num_bytes for entry in self.tiers.disk.entries()}
        writing = {m.disk.place for m in self.pending if isinstance(m, Write)}
        for place in writing:
            assert place in sizes
        assert self.tiers.disk.space.used_bytes <= self.tiers.disk.space.num_bytes

    def owns_bytes(self, user_id: str) -> bool:
        """Whether anything of the user is left below the device."""
        if any(owner == user_id for owner, _ in self.files.values()):
            return True
        digests = {entry.content.user_id for entry in self.tiers.host.entries()}
        return user_id in digests

    def _fill(self, place: int, content: object) -> None:
        tag = tag_of(content.user_id, content.digest)  # type: ignore[attr-defined]
        size = content.num_bytes  # type: ignore[attr-defined]
        self.memory[place : place + size] = bytes([tag]) * size

    def _check(self, place: int, content: object) -> None:
        tag = tag_of(content.user_id, content.digest)  # type: ignore[attr-defined]
        size = content.num_bytes  # type: ignore[attr-defined]
        assert set(self.memory[place : place + size]) == {tag}, "host bytes were overwritten"
