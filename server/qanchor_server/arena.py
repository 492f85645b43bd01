"""Where in one block of bytes each user's keys and values lie.

Pure: it hands out offsets; the mover applies them to memory. One block, made once: a device can pin
it, and a copy into it touches no fresh page. Must not know numpy, engines or clocks. Not
thread-safe: call from the worker thread only.
"""

from dataclasses import dataclass

ALIGNMENT = 64
"""Bytes; a cache line."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive bytes; `owner` used them last, and uses them now if `is_used`."""

    offset: int
    num_bytes: int
    owner: str | None
    is_used: bool


class Arena:
    """Contiguous regions within a fixed number of bytes, first fit."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.used_bytes = 0
        self._segments = [Segment(0, num_bytes, None, False)] if num_bytes else []

    def allocate(self, num_bytes: int, owner: str) -> int | None:
        """Offset of a region for `owner`, or None when no gap is large enough.

        Raises ValueError for a region without bytes.
        """
        if num_bytes < 1:
            raise ValueError(f"num_bytes={num_bytes}: a region needs at least one byte")
        size = _aligned(num_bytes)
        run = self._find(size)
        if run is None:
            return None
        start, stop, total = run
        offset = self._segments[start].offset
        taken = [Segment(offset, size, owner, True)]
        if total > size:
            # What is left over still holds bytes of whoever used it last.
            last = self._segments[stop - 1]
            taken.append(Segment(offset + size, total - size, last.owner, False))
        self._segments[start:stop] = taken
        self.used_bytes += size
        return offset

    def free(self, offset: int) -> None:
        """Give a region back; its bytes stay as they are."""
        index = self._index(offset)
        segment = self._segments[index]
        assert segment.is_used
        self._segments[index] = Segment(offset, segment.num_bytes, segment.owner, False)
        self.used_bytes -= segment.num_bytes

    def residue(self, owner: str) -> list[tuple[int, int]]:
        """Offset and size of free bytes that may still hold the owner's numbers."""
        return [
            (segment.offset, segment.num_bytes)
            for segment in self._segments
            if segment.owner == owner and not segment.is_used
        ]

    def scrubbed(self, owner: str) -> None:
        """Note that the owner's residue was overwritten with zeros."""
        for index, segment in enumerate(self._segments):
            if segment.owner == owner and not segment.is_used:
                self._segments[index] = Segment(segment.offset, segment.num_bytes, None, False)

    def cost(self, num_bytes: int) -> int:
        """Bytes that a region of `num_bytes` takes up."""
        return _aligned(num_bytes)

    def segments(self) -> tuple[Segment, ...]:
        """All of the block in order, for invariants."""
        return tuple(self._segments)

    def _find(self, size: int) -> tuple[int, int, int] | None:
        """First run of free segments of at least `size` bytes: start, stop, bytes."""
        start, total = 0, 0
        for index, segment in enumerate(self._segments):
            if segment.is_used:
                start, total = index + 1, 0
                continue
            total += segment.num_bytes
            if total >= size:
                return start, index + 1, total
        return None

    def _index(self, offset: int) -> int:
        for index, segment in enumerate(self._segments):
            if segment.offset == offset:
                return index
        raise AssertionError(f"no region at {offset}")


def check_arena(arena: Arena) -> tuple[str, ...]:
    """What is wrong with an arena, in words; empty when all is well."""
    wrong, end = [], 0
    for segment in arena.segments():
        if segment.offset != end:
            wrong.append(f"segment at {segment.offset}: the one before ends at {end}")
        if segment.num_bytes < 1:
            wrong.append(f"segment at {segment.offset}: {segment.num_bytes} bytes")
        end = segment.offset + segment.num_bytes
    if end != arena.num_bytes:
        wrong.append(f"segments end at {end} of {arena.num_bytes}")
    used = sum(segment.num_bytes for segment in arena.segments() if segment.is_used)
    if used != arena.used_bytes:
        wrong.append(f"used_bytes={arena.used_bytes} but regions sum to {used}")
    return tuple(wrong)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
