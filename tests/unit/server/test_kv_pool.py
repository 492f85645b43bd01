"""The KV pool: room, eviction, pins, and invariants under random sequences."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qanchor_server.kv_pool import (
    Deferred,
    KvPool,
    PoolSnapshot,
    PrefixRef,
    Reservation,
    Room,
    SlotState,
    SlotView,
    Unserviceable,
    check_invariants,
)


def prefix(user_id: str, num_tokens: int = 10, version: int = 1) -> PrefixRef:
    return PrefixRef(
        user_id=user_id,
        digest=f"{user_id}-{version}",
        version=version,
        num_tokens=num_tokens,
        as_of_s=0,
    )


def pool(budget_tokens: int = 40) -> KvPool:
    """Classes of 10 and 20 tokens, one byte per token."""
    return KvPool(budget_bytes=budget_tokens, bytes_per_token=1, capacities=(20, 10))


def hold(kv: KvPool, ref: PrefixRef) -> int:
    reservation = kv.reserve(ref)
    assert isinstance(reservation, Reservation)
    kv.commit(reservation)
    return reservation.slot_id


def test_a_prefix_gets_the_smallest_class_that_holds_it() -> None:
    kv = pool()
    assert kv.plan(prefix("a", 10)) == Room(10)
    assert kv.plan(prefix("a", 11)) == Room(20)


def test_a_prefix_longer_than_every_class_is_unserviceable() -> None:
    outcome = pool().reserve(prefix("a", 21))
    assert isinstance(outcome, Unserviceable)
    assert "num_tokens=21" in outcome.rule


def test_a_class_larger_than_the_budget_is_unserviceable() -> None:
    assert isinstance(pool(budget_tokens=15).reserve(prefix("a", 11)), Unserviceable)


def test_the_least_recently_used_user_is_evicted_first() -> None:
    kv = pool(budget_tokens=20)
    slot_of_a = hold(kv, prefix("a"))
    hold(kv, prefix("b"))
    kv.touch("a")
    assert kv.plan(prefix("c")) == Room(10, evict=("b",), reuse=kv.slot_of("b"))
    hold(kv, prefix("c"))
    assert kv.find("b") is None
    assert kv.slot_of("a") == slot_of_a
    assert kv.num_evicted == 1


def test_a_pinned_user_is_not_evicted_and_the_newcomer_is_deferred() -> None:
    kv = pool(budget_tokens=10)
    hold(kv, prefix("a"))
    kv.pin("a")
    assert kv.reserve(prefix("b")) == Deferred()
    kv.unpin("a")
    assert isinstance(kv.reserve(prefix("b")), Reservation)


def test_small_slots_are_dropped_to_make_a_large_one() -> None:
    kv = pool(budget_tokens=20)
    small = [hold(kv, prefix("a")), hold(kv, prefix("b"))]
    hold(kv, prefix("c", 20))
    assert kv.take_dropped() == small
    assert kv.take_dropped() == []
    assert kv.used_bytes == 20


def test_a_released_reservation_leaves_no_user_and_a_free_slot() -> None:
    kv = pool(budget_tokens=10)
    reservation = kv.reserve(prefix("a"))
    assert isinstance(reservation, Reservation)
    assert kv.reserve(prefix("b")) == Deferred()
    kv.release(reservation)
    assert kv.find("a") is None
    assert hold(kv, prefix("b")) == reservation.slot_id


def test_a_new_version_of_a_user_replaces_the_old_one_in_place() -> None:
    kv = pool(budget_tokens=10)
    slot_id = hold(kv, prefix("a", version=1))
    assert hold(kv, prefix("a", version=2)) == slot_id
    assert kv.find("a") == prefix("a", version=2)
    assert kv.num_evicted == 0


def test_residue_names_free_slots_that_still_hold_a_users_numbers() -> None:
    kv = pool(budget_tokens=20)
    slot_id = hold(kv, prefix("a"))
    assert kv.residue("a") == []
    kv.evict("a")
    assert kv.residue("a") == [slot_id]
    hold(kv, prefix("b"))
    assert kv.residue("a") == []


def test_check_invariants_sees_a_broken_pool() -> None:
    slot = SlotView(0, 10, SlotState.FREE, "a", 1)
    wrong = check_invariants(PoolSnapshot(5, 1, 9, (20,), (slot, slot)))
    assert len(wrong) == 8


class PoolMachine(RuleBasedStateMachine):
    """Random verbs; the invariants hold after each and a pinned user is never lost."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool(budget_tokens=50)
        self.reserved: dict[str, Reservation] = {}
        self.pins: dict[str, int] = {}
        self.version = 0

    @rule(user=st.sampled_from("abcdefg"), num_tokens=st.integers(1, 22))
    def reserve(self, user: str, num_tokens: int) -> None:
        if user in self.reserved:
            return
        self.version += 1
        before = self.pool.snapshot()
        outcome = self.pool.reserve(prefix(user, num_tokens, self.version))
        if isinstance(outcome, Reservation):
            assert outcome.capacity >= num_tokens
            self.reserved[user] = outcome
        else:
            assert self.pool.snapshot() == before
        self.pool.take_dropped()

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), commits=st.booleans())
    def settle(self, data: st.DataObject, commits: bool) -> None:
        user = data.draw(st.sampled_from(sorted(self.reserved)))
        reservation = self.reserved.pop(user)
        if commits:
            self.pool.commit(reservation)
            assert self.pool.find(user) == reservation.prefix
        else:
            self.pool.release(reservation)
            assert self.pool.find(user) is None

    @rule(user=st.sampled_from("abcdefg"))
    def pin(self, user: str) -> None:
        if self.pool.find(user):
            self.pool.pin(user)
            self.pins[user] = self.pins.get(user, 0) + 1

    @rule(user=st.sampled_from("abcdefg"))
    def unpin(self, user: str) -> None:
        if self.pins.get(user):
            self.pool.unpin(user)
            self.pins[user] -= 1

    @rule(user=st.sampled_from("abcdefg"))
    def evict(self, user: str) -> None:
        if self.pool.find(user) and not self.pins.get(user):
            self.pool.evict(user)

    @invariant()
    def holds(self) -> None:
        assert check_invariants(self.pool.snapshot()) == ()
        for user, pins in self.pins.items():
            assert not pins or self.pool.find(user)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase
