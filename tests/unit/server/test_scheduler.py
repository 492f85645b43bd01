"""The scheduler: batching, single flight, deadlines, starvation, and random arrivals."""

from qanchor_server.kv_pool import Found, KvPool, PrefixRef, check_invariants
from qanchor_server.kv_tiers import KvTiers, TierBudgets
from qanchor_server.scheduler import Scheduler, SchedulerLimits
from qanchor_server.steps import Dropped, Finished, Job, PrefillStep, Reason, Step, SuffixStep


def prefix(user_id: str, version: int = 1, digest: str = "", num_tokens: int = 10) -> PrefixRef:
    return PrefixRef(
        user_id=user_id,
        digest=digest or f"{user_id}-{version}",
        version=version,
        num_tokens=num_tokens,
        as_of_s=0,
    )


class Bench:
    """A scheduler over a pool of `num_slots` slots, and a worker that runs steps at once."""

    def __init__(self, num_slots: int = 4, **limits: int) -> None:
        bounds = {"max_step_tokens": 20, "max_step_users": 3, "max_suffix_run": 2, **limits}
        self.pool = KvPool(budget_bytes=10 * num_slots, bytes_per_token=1, capacities=(10,))
        self.tiers = KvTiers(TierBudgets(host_bytes=0, disk_bytes=0, bytes_per_token=1))
        self.scheduler = Scheduler(self.pool, self.tiers, SchedulerLimits(**bounds))
        self.next_id = 0
        self.steps: list[Step] = []
        self.dropped: list[Dropped] = []
        self.finished: list[Finished] = []

    def submit(
        self,
        ref: PrefixRef,
        query_lens: tuple[int, ...] = (5,),
        arrival_s: float = 0.0,
        deadline_s: float | None = None,
        keep_s: float = 0.0,
    ) -> int:
        self.next_id += 1
        job = Job(
            job_id=self.next_id,
            prefix=ref,
            query_lens=query_lens,
            arrival_s=arrival_s,
            deadline_s=deadline_s,
            keep_s=keep_s,
            source=ref,
        )
        self.scheduler.submit(job)
        return job.job_id

    def plan(self, now_s: float = 0.0) -> Step | None:
        plan = self.scheduler.plan(now_s)
        self.dropped += plan.dropped
        self.finished += plan.finished
        assert check_invariants(self.pool.snapshot()) == ()
        return plan.step

    def run(self, now_s: float = 0.0, is_encoded: bool = True) -> Step | None:
        """Plan and commit one step."""
        step = self.plan(now_s)
        if step is not None:
            self.steps.append(step)
            self.scheduler.commit(step, seconds=1.0, is_encoded=is_encoded)
        return step

    def drain(self) -> None:
        for _ in range(1000):
            if self.run() is None and not self.scheduler.has_work():
                return
        raise AssertionError("the scheduler never came to rest")

    def warm(self, *users: str) -> None:
        for user in users:
            self.submit(prefix(user), ())
        self.drain()
        self.steps.clear()
        self.finished.clear()


def users_of(step: Step | None) -> list[str]:
    assert isinstance(step, SuffixStep)
    return [user.prefix.user_id for user in step.users]


def test_an_unknown_prefix_is_encoded_before_its_queries_run() -> None:
    bench = Bench()
    job = bench.submit(prefix("a"), (5, 5))
    assert isinstance(bench.run(), PrefillStep)
    step = bench.run()
    assert isinstance(step, SuffixStep)
    assert [(part.job_id, part.start, part.stop) for part in step.users[0].slices] == [(job, 0, 2)]
    bench.drain()
    (finished,) = bench.finished
    assert finished.found is Found.ENCODED
    assert (finished.prefill_seconds, finished.suffix_seconds) == (1, 1)


def test_many_requests_of_a_user_share_one_prefill() -> None:
    bench = Bench()
    for _ in range(3):
        bench.submit(prefix("a"))
    assert isinstance(bench.run(is_encoded=False), PrefillStep)
    bench.submit(prefix("a"))
    bench.drain()
    assert sum(isinstance(step, PrefillStep) for step in bench.steps) == 2
    assert len(bench.finished) == 4
    assert [f.prefill_seconds for f in bench.finished] == [2, 2, 2, 1]


def test_ready_users_share_a_suffix_step_up_to_the_bounds() -> None:
    bench = Bench(max_step_users=2)
    bench.warm("a", "b", "c")
    for user in "abc":
        bench.submit(prefix(user))
    assert users_of(bench.run()) == ["a", "b"]
    assert users_of(bench.run()) == ["c"]


def test_the_bounds_of_a_step_are_for_each_of_the_engines_lanes() -> None:
    bench = Bench(num_slots=5, max_step_users=2, max_step_tokens=6)
    bench.scheduler.num_lanes = 2
    bench.warm("a", "b", "c", "d", "e")
    for user in "abcde":
        bench.submit(prefix(user), (2,))
    assert users_of(bench.run()) == ["a", "b", "c", "d"]
    bench.drain()
    for user in "abc":
        bench.submit(prefix(user), (5,))
    assert users_of(bench.run()) == ["a", "b"]


def test_a_step_never_exceeds_its_tokens_and_a_long_job_is_split() -> None:
    bench = Bench(max_step_tokens=12)
    bench.warm("a", "b")
    bench.submit(prefix("a"), (5, 5, 5))
    bench.submit(prefix("b"), (5,))
    first, second = bench.run(), bench.run()
    assert isinstance(first, SuffixStep)
    assert [(part.start, part.stop) for part in first.users[0].slices] == [(0, 2)]
    # After its turn the user goes to the back.
    assert users_of(second) == ["b", "a"]
    bench.drain()
    assert len(bench.finished) == 2


def test_what_is_being_run_is_not_given_again_and_steps_end_in_any_order() -> None:
    bench = Bench(max_step_tokens=10, max_step_users=1)
    bench.warm("a", "b")
    job = bench.submit(prefix("a"), (5, 5, 5))
    other = bench.submit(prefix("b"))
    first, second, third = bench.plan(), bench.plan(), bench.plan()
    assert [users_of(step) for step in (first, second, third)] == [["a"], ["b"], ["a"]]
    assert bench.plan() is None
    assert bench.scheduler.has_work()
    for step in (third, second):
        bench.scheduler.commit(step, seconds=1.0)
    assert bench.plan() is None
    assert [finished.job_id for finished in bench.finished] == [other]
    bench.scheduler.commit(first, seconds=2.0)
    bench.drain()
    assert [finished.job_id for finished in bench.finished] == [other, job]
    assert bench.finished[-1].suffix_seconds == 3.0


def test_others_are_encoded_and_queued_while_a_step_is_being_run() -> None:
    bench = Bench(num_slots=2)
    bench.warm("a", "b")
    bench.submit(prefix("a"))
    begun = bench.plan()
    bench.submit(prefix("c"))
    step = bench.run()
    assert isinstance(step, PrefillStep)
    assert bench.pool.find("a") == prefix("a"), "it is being read"
    assert bench.pool.find("b") is None
    joined = bench.submit(prefix("a"))
    assert sorted(users_of(bench.run())) == ["a", "c"]
    bench.scheduler.commit(begun, seconds=1.0)
    bench.drain()
    assert joined in [finished.job_id for finished in bench.finished]
    assert len(bench.finished) == 3


def test_what_is_being_run_at_its_deadline_is_still_answered_but_gets_no_more() -> None:
    bench = Bench(max_step_tokens=5)
    bench.warm("a")
    short = bench.submit(prefix("a"), (5,), deadline_s=1.0)
    long = bench.submit(prefix("a"), (5, 5), deadline_s=1.0)
    first, second = bench.plan(), bench.plan()
    assert bench.plan(now_s=2.0) is None
    assert not bench.dropped
    for step in (first, second):
        bench.scheduler.commit(step, seconds=1.0)
    assert bench.plan(now_s=3.0) is None
    assert [finished.job_id for finished in bench.finished] == [short]
    assert bench.dropped == [Dropped(long, Reason.EXPIRED)]
    assert not bench.scheduler.has_work()


def test_two_steps_of_one_job_that_fail_drop_it_once() -> None:
    bench = Bench(max_step_tokens=5)
    bench.warm("a")
    job = bench.submit(prefix("a"), (5, 5, 5))
    steps = [bench.plan(), bench.plan()]
    for step in steps:
        bench.scheduler.roll_back(step, "no memory")
    assert bench.plan() is None
    assert bench.dropped == [Dropped(job, Reason.RETRYABLE, "no memory")]


def test_a_waiting_prefill_runs_after_the_bound_of_suffix_steps() -> None:
    bench = Bench(max_step_tokens=5, max_suffix_run=2)
    bench.warm("a")
    bench.submit(prefix("a"), (5,) * 6)
    bench.submit(prefix("b"))
    kinds = [type(bench.run(is_encoded=False)) for _ in range(6)]
    assert kinds == [SuffixStep, SuffixStep, PrefillStep] * 2


def test_an_expired_job_leaves_before_the_device_is_used() -> None:
    bench = Bench()
    job = bench.submit(prefix("a"), deadline_s=1.0)
    assert bench.plan(now_s=1.0) is None
    assert bench.dropped == [Dropped(job, Reason.EXPIRED)]
    assert not bench.scheduler.has_work()


def test_deadlines_of_jobs_that_have_left_are_not_kept() -> None:
    bench = Bench(max_step_tokens=5)
    bench.warm("a")
    first, last = bench.submit(prefix("a"), deadline_s=9.0), 0
    for number in range(3000):
        last = bench.submit(prefix("a"), deadline_s=86_400.0 - number)
        bench.run()
        assert len(bench.scheduler._deadlines) <= 2 * (bench.scheduler.num_jobs + 1)
    # A deadline that was kept is still met.
    assert bench.plan(now_s=86_400.0 - 2999) is None
    assert bench.dropped == [Dropped(last, Reason.EXPIRED)]
    assert (bench.finished[0].job_id, len(bench.finished)) == (first, 3000)


def test_an_encoding_nobody_waits_for_is_given_up() -> None:
    bench = Bench(num_slots=1)
    job = bench.submit(prefix("a"))
    bench.run(is_encoded=False)
    bench.scheduler.cancel(job)
    other = bench.submit(prefix("b"))
    step = bench.run()
    assert isinstance(step, PrefillStep)
    assert step.reservation.prefix.user_id == "b"
    bench.drain()
    assert bench.dropped == [Dropped(job, Reason.CANCELLED)]
    assert [finished.job_id for finished in bench.finished] == [other]


def test_a_user_with_waiting_queries_is_not_evicted_for_another() -> None:
    bench = Bench(num_slots=1, max_suffix_run=1, max_step_tokens=5)
    bench.warm("a")
    bench.submit(prefix("a"), (5, 5, 5))
    bench.submit(prefix("b"))
    bench.drain()
    kinds = [type(step) for step in bench.steps]
    assert kinds == [SuffixStep] * 3 + [PrefillStep, SuffixStep]


def test_a_prefix_is_kept_from_the_step_on_that_finishes_its_job() -> None:
    bench = Bench(num_slots=2)
    bench.submit(prefix("a"), (), keep_s=60.0)
    for user in "bcd":
        bench.submit(prefix(user), ())
    bench.drain()
    assert [finished.is_kept for finished in bench.finished] == [True, False, False, False]
    assert bench.pool.find("a") == prefix("a")
    bench.submit(prefix("d"), (), keep_s=1.0)
    bench.drain()
    # One slot of the largest class stays open to all.
    assert not bench.finished[-1].is_kept
    bench.run(now_s=61.5)
    bench.submit(prefix("b"), ())
    bench.submit(prefix("c"), ())
    bench.drain()
    assert bench.pool.find("a") is None


def test_after_a_rest_a_held_prefix_is_kept_from_its_requests_arrival() -> None:
    bench = Bench(num_slots=2)
    bench.submit(prefix("a"), (), keep_s=60.0)
    bench.submit(prefix("b"), ())
    bench.drain()
    # Nothing is planned for an hour; what was kept before is no longer.
    bench.submit(prefix("b"), (), arrival_s=3600.0, keep_s=60.0)
    bench.run(now_s=3601.0)
    assert bench.finished[-1].is_kept
    for user in "cd":
        bench.submit(prefix(user), (), arrival_s=3650.0)
        bench.run(now_s=3650.0)
    assert [bench.pool.find(user) is None for user in "abcd"] == [True, False, True, False]


def test_a_changed_profile_is_encoded_anew_and_the_old_request_keeps_its_prefix() -> None:
    bench = Bench()
    old = bench.submit(prefix("a", 1))
    new = bench.submit(prefix("a", 2))
    bench.drain()
    assert [(f.job_id, f.prefix.version) for f in bench.finished] == [(old, 1), (new, 2)]
    assert bench.pool.find("a") == prefix("a", 2)


def test_a_late_request_with_an_older_version_rests_on_the_newer_prefix() -> None:
    bench = Bench()
    bench.submit(prefix("a", 2), ())
    bench.drain()
    bench.submit(prefix("a", 1))
    step = bench.run()
    assert isinstance(step, SuffixStep)
    assert step.users[0].prefix.version == 2


def test_a_new_version_with_the_same_content_is_not_encoded_again() -> None:
    bench = Bench()
    bench.submit(prefix("a", 1, digest="same"), ())
    bench.drain()
    bench.submit(prefix("a", 2, digest="same"))
    step = bench.run()
    assert isinstance(step, SuffixStep)
    assert step.users[0].prefix.version == 2


def test_forget_drops_jobs_encoding_and_keys_and_values() -> None:
    bench = Bench()
    bench.warm("a")
    slot_id = bench.pool.slot_of("a")
    waiting = bench.submit(prefix("a"))
    assert bench.scheduler.forget("a", 5)[0] == [slot_id]
    late = bench.submit(prefix("a"))
    assert bench.plan() is None
    assert [d.job_id for d in bench.dropped] == [waiting, late]
    assert {d.reason for d in bench.dropped} == {Reason.DELETED}
    assert bench.pool.find("a") is None


def test_forget_during_an_encoding_never_brings_the_user_back() -> None:
    bench = Bench()
    bench.submit(prefix("a"))
    bench.run(is_encoded=False)
    assert len(bench.scheduler.forget("a", 5)[0]) == 1
    assert bench.plan() is None
    assert bench.pool.num_users == 0
    again = bench.submit(prefix("a", 6))
    bench.drain()
    assert [f.job_id for f in bench.finished] == [again]


def test_a_rolled_back_prefill_frees_its_slot_and_fails_its_jobs() -> None:
    bench = Bench(num_slots=1)
    job = bench.submit(prefix("a"))
    step = bench.plan()
    assert step is not None
    bench.scheduler.roll_back(step, "no memory")
    assert bench.plan() is None
    assert bench.dropped == [Dropped(job, Reason.RETRYABLE, "no memory")]
    bench.submit(prefix("b"))
    bench.drain()
    assert len(bench.finished) == 1


def test_a_prefix_that_fits_no_slot_is_unserviceable_and_others_go_on() -> None:
    bench = Bench()
    job = bench.submit(prefix("a", num_tokens=11))
    other = bench.submit(prefix("b"))
    bench.drain()
    assert [(d.job_id, d.reason) for d in bench.dropped] == [(job, Reason.UNSERVICEABLE)]
    assert [f.job_id for f in bench.finished] == [other]
