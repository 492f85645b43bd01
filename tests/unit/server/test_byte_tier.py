"""A tier with many entries: whom it evicts, and how many entries it looks at for that."""

from collections import OrderedDict
from collections.abc import ValuesView
from typing import Any

from qanchor_server.byte_tier import ByteTier, Content, Entry, FileSpace, check_tier

NUM_USERS = 1000


class Visited(OrderedDict[str, Entry]):
    """Counts the entries that are looked at one after the other."""

    num_visited = 0

    def values(self) -> Any:
        return self._count(super().values())

    def _count(self, values: ValuesView[Entry]) -> Any:
        for entry in values:
            self.num_visited += 1
            yield entry


def content_of(user_id: str, num_bytes: int = 100) -> Content:
    return Content(user_id=user_id, digest="d", num_tokens=1, num_bytes=num_bytes)


def full_tier() -> tuple[ByteTier, Visited]:
    """Users 0 to 999 of 100 bytes each, user 0 the first to go; no byte is free."""
    space = FileSpace(NUM_USERS * 100)
    tier = ByteTier(space)
    for number in range(NUM_USERS):
        space.adopt(number, 100)
        tier.adopt(Entry(content_of(str(number)), number, 0.0, is_filled=True))
    tier._entries = Visited(tier._entries)
    return tier, tier._entries


def test_making_room_looks_at_the_entries_that_go_and_no_more() -> None:
    tier, entries = full_tier()
    for number in range(5):
        assert tier.reserve(content_of(f"new-{number}", 300), now_s=1.0)
    assert entries.num_visited == 15
    assert [entry.content.user_id for entry in tier.take_freed()] == [str(n) for n in range(15)]
    assert tier.num_evicted == 15


def test_pinned_entries_stay_and_a_newcomer_that_cannot_get_in_evicts_nobody() -> None:
    tier, entries = full_tier()
    for entry in list(tier.entries())[: NUM_USERS - 1]:
        tier.pin(entry)
        tier.pin(entry)
    num_visited = entries.num_visited
    assert tier.reserve(content_of("large", 101), now_s=1.0) is None
    assert (entries.num_visited, tier.take_freed()) == (num_visited, [])
    assert tier.reserve(content_of("small"), now_s=1.0)
    assert [entry.content.user_id for entry in tier.take_freed()] == [str(NUM_USERS - 1)]
    first = tier.entries()[0]
    tier.unpin(first)
    assert tier.reserve(content_of("other"), now_s=1.0) is None
    tier.unpin(first)
    assert tier.reserve(content_of("other"), now_s=1.0)
    assert tier.take_freed() == [first]


def test_check_tier_sees_a_pin_that_is_not_booked() -> None:
    tier, _ = full_tier()
    tier.entries()[0].pins += 1
    assert check_tier(tier) == ("pinned_bytes=0 but pinned entries sum to 100",)
