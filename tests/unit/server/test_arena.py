"""The arena: regions never overlap, nothing is lost, and residue is known to the byte."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qanchor_server.arena import Arena, check_arena


def test_neighbouring_gaps_are_used_together() -> None:
    arena = Arena(256)
    first, second = arena.allocate(100, "a"), arena.allocate(64, "b")
    assert (first, second, arena.used_bytes) == (0, 128, 192)
    assert arena.allocate(65, "c") is None
    arena.free(0)
    arena.free(128)
    assert arena.residue("a") == [(0, 128)]
    assert arena.allocate(192, "c") == 0
    assert arena.residue("a") == arena.residue("b") == []


def test_what_is_left_of_a_gap_still_holds_the_last_owners_bytes() -> None:
    arena = Arena(256)
    assert arena.allocate(256, "a") == 0
    arena.free(0)
    assert arena.allocate(64, "b") == 0
    assert arena.residue("a") == [(64, 192)]
    arena.scrubbed("a")
    assert arena.residue("a") == []


def test_a_region_without_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="num_bytes=0"):
        Arena(64).allocate(0, "a")
    assert Arena(0).allocate(1, "a") is None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 400), st.booleans()), max_size=60))
def test_bytes_are_those_of_the_last_writer(events: list[tuple[str, int, bool]]) -> None:
    arena, memory = Arena(1024), ["-"] * 1024
    taken: dict[int, tuple[str, int]] = {}
    for owner, size, frees in events:
        if frees and taken:
            arena.free(min(taken))
            del taken[min(taken)]
            continue
        offset = arena.allocate(size, owner)
        if offset is not None:
            memory[offset : offset + arena.cost(size)] = owner * arena.cost(size)
            taken[offset] = owner, arena.cost(size)
        assert check_arena(arena) == ()
        for start, (who, length) in taken.items():
            assert set(memory[start : start + length]) == {who}
        used = {
            place for start, (_, length) in taken.items() for place in range(start, start + length)
        }
        for who in "abc":
            left = {p for start, length in arena.residue(who) for p in range(start, start + length)}
            assert left == {p for p in range(1024) if memory[p] == who and p not in used}
