"""Which prefix comes next: restores in order of arrival; encodings shortest first, bounded."""

import random

from qanchor_server.byte_tier import Content
from qanchor_server.kv_pool import Found, PrefixRef
from qanchor_server.kv_tiers import KvTiers, Read, TierBudgets
from qanchor_server.prefix_queue import PrefixQueue


def ref(user_id: str, num_tokens: int = 10) -> PrefixRef:
    return PrefixRef(user_id=user_id, digest=user_id, version=1, num_tokens=num_tokens, as_of_s=0)


def tiers(host_bytes: int = 640) -> KvTiers:
    """Ten tokens are 320 bytes; the disk holds "disk-1" to "disk-3"."""
    made = KvTiers(TierBudgets(host_bytes=host_bytes, disk_bytes=10_000, bytes_per_token=32))
    found = [
        (number, Content(user_id=f"disk-{number}", digest=f"disk-{number}", num_tokens=10,
                         num_bytes=320), float(number))
        for number in (1, 2, 3)
    ]  # fmt: skip
    made.adopt(found)
    return made


def queue(made: KvTiers, patience: float = 2.0) -> PrefixQueue:
    waiting = PrefixQueue(made, patience=patience, max_read_s=1.0)
    waiting.note_encoding(num_tokens=10, seconds=10.0)
    return waiting


def order(waiting: PrefixQueue) -> list[str]:
    users = []
    while (prefix := waiting.next_encoding()) is not None:
        users.append(prefix.user_id)
        waiting.discard(prefix.user_id)
    return users


def test_a_short_encoding_overtakes_a_long_one_that_came_a_little_earlier() -> None:
    waiting = queue(tiers())
    waiting.add(ref("long", 100), arrival_s=0.0)
    waiting.add(ref("short", 10), arrival_s=179.0)
    waiting.add(ref("late", 10), arrival_s=181.0)
    assert order(waiting) == ["short", "long", "late"]


def test_without_patience_it_is_first_in_first_out() -> None:
    waiting = queue(tiers(), patience=0.0)
    waiting.add(ref("long", 100), arrival_s=0.0)
    waiting.add(ref("short", 10), arrival_s=1.0)
    assert order(waiting) == ["long", "short"]


def test_nobody_is_overtaken_for_longer_than_patience_allows() -> None:
    chance, waiting = random.Random(1), queue(tiers(), patience=2.0)
    now_s, arrivals = 0.0, {}
    for number in range(3000):
        now_s += chance.expovariate(1 / 60)
        user = ref(f"user-{number}", chance.randint(5, 100))
        arrivals[user.user_id] = now_s
        waiting.add(user, now_s)
        if chance.random() < 0.95:
            served = waiting.next_encoding()
            assert served is not None
            waiting.discard(served.user_id)
            arrived_s = arrivals.pop(served.user_id)
            # The longest encoding takes 100 s.
            assert arrived_s <= min(arrivals.values(), default=arrived_s) + 2.0 * 100
    assert len(arrivals) < 3000


def test_what_lies_on_disk_is_read_on_arrival_and_restored_in_order() -> None:
    made = tiers()
    waiting = queue(made)
    waiting.add(ref("disk-2"), arrival_s=0.0)
    (read,) = made.take_moves()
    assert isinstance(read, Read)
    assert waiting.next_restore() is None
    assert waiting.next_encoding() is None
    made.done(read, True)
    waiting.read_ended("disk-2", "disk-2", True)
    assert waiting.next_restore() == (ref("disk-2"), Found.DISK)


def test_a_read_without_room_begins_when_there_is_some() -> None:
    made = tiers(host_bytes=320)
    waiting = queue(made)
    waiting.add(ref("disk-1"), arrival_s=0.0)
    waiting.add(ref("disk-2"), arrival_s=0.0)
    (read,) = made.take_moves()
    waiting.advance(0.5)
    assert made.take_moves() == []
    made.done(read, True)
    waiting.read_ended("disk-1", "disk-1", True)
    waiting.discard("disk-1")
    waiting.advance(0.6)
    (read,) = made.take_moves()
    assert read.host.content.user_id == "disk-2"


def test_a_disk_that_gives_nothing_is_not_waited_for() -> None:
    made = tiers(host_bytes=320)
    waiting = queue(made)
    waiting.add(ref("disk-1"), arrival_s=0.0)
    waiting.add(ref("disk-2"), arrival_s=0.0)
    for now_s in (50.0, 50.9):
        made.advance(now_s)
        waiting.advance(now_s)
        assert waiting.next_encoding() is None
    made.advance(51.1)
    waiting.advance(51.1)
    assert order(waiting) == ["disk-1", "disk-2"]
    # Nor is it asked again for a while.
    waiting.add(ref("disk-3"), arrival_s=52.0)
    assert waiting.next_encoding() == ref("disk-3")


def test_a_prefix_larger_than_host_memory_is_encoded() -> None:
    waiting = queue(tiers(host_bytes=256))
    waiting.add(ref("disk-1"), arrival_s=0.0)
    assert waiting.next_encoding() == ref("disk-1")
