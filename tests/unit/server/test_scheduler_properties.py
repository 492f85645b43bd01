"""Random arrivals, cancels, deadlines, deletes and failures: nothing is lost, nothing is stale."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from qanchor_server.kv_pool import KvPool, PrefixRef, check_invariants
from qanchor_server.kv_tiers import KvTiers, TierBudgets
from qanchor_server.scheduler import Scheduler, SchedulerLimits
from qanchor_server.steps import Job, Plan, PrefillStep, SuffixStep

MAX_STEP_TOKENS, MAX_STEP_USERS, MAX_SUFFIX_RUN = 12, 2, 3
USERS = st.sampled_from("abcd")


class SchedulerMachine(RuleBasedStateMachine):
    """A worker that may fail, over two slots; versions rise as the store's do."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = KvPool(budget_bytes=20, bytes_per_token=1, capacities=(10,))
        self.scheduler = Scheduler(
            self.pool,
            KvTiers(TierBudgets(host_bytes=0, disk_bytes=0, bytes_per_token=1)),
            SchedulerLimits(
                max_step_tokens=MAX_STEP_TOKENS,
                max_step_users=MAX_STEP_USERS,
                max_suffix_run=MAX_SUFFIX_RUN,
            ),
        )
        self.now_s = 0.0
        self.counter = 0
        self.versions: dict[str, int] = {}
        self.deleted: dict[str, int] = {}
        self.open: dict[int, Job] = {}
        self.done: dict[int, int] = {}
        """Queries run per job, also of jobs that have left."""

    @rule(
        user=USERS,
        lens=st.lists(st.integers(1, MAX_STEP_TOKENS), max_size=4),
        wait_s=st.none() | st.integers(1, 5),
        changes=st.booleans(),
    )
    def arrive(self, user: str, lens: list[int], wait_s: int | None, changes: bool) -> None:
        if changes or user not in self.versions:
            self.counter += 1
            self.versions[user] = self.counter
        version = self.versions[user]
        # Every other version has the content of the one before.
        ref = PrefixRef(
            user_id=user, digest=f"{user}{version // 2}", version=version, num_tokens=9, as_of_s=0
        )
        job = Job(
            job_id=len(self.done),
            prefix=ref,
            query_lens=tuple(lens),
            arrival_s=self.now_s,
            deadline_s=None if wait_s is None else self.now_s + wait_s,
            source=ref,
        )
        self.open[job.job_id] = job
        self.done[job.job_id] = 0
        self.scheduler.submit(job)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.open:
            self.scheduler.cancel(data.draw(st.sampled_from(sorted(self.open))))

    @rule(user=USERS)
    def delete(self, user: str) -> None:
        self.counter += 1
        self.deleted[user] = self.counter
        self.versions.pop(user, None)
        self.scheduler.forget(user, self.counter)
        assert self.pool.find(user) is None

    @rule(fails=st.sampled_from((False, False, False, True)), is_encoded=st.booleans())
    def step(self, fails: bool, is_encoded: bool) -> None:
        self.now_s += 0.5
        plan = self.scheduler.plan(self.now_s)
        self.settle(plan)
        if plan.step is None:
            assert not self.open, "work waits but there is no step"
            return
        self.check_step(plan)
        if fails:
            self.scheduler.roll_back(plan.step, "")
        else:
            self.book(plan)
            self.scheduler.commit(plan.step, seconds=0.5, is_encoded=is_encoded)

    def settle(self, plan: Plan) -> None:
        for dropped in plan.dropped:
            del self.open[dropped.job_id]
        for finished in plan.finished:
            job = self.open.pop(finished.job_id)
            assert self.done[finished.job_id] == len(job.query_lens)
            assert finished.prefix.version >= job.prefix.version

    def check_step(self, plan: Plan) -> None:
        if isinstance(plan.step, PrefillStep):
            return
        assert isinstance(plan.step, SuffixStep)
        assert len(plan.step.users) <= MAX_STEP_USERS
        num_tokens = 0
        for user in plan.step.users:
            held = self.pool.find(user.prefix.user_id)
            assert held is not None
            assert held.digest == user.prefix.digest, "a stale prefix is used"
            assert held.version > self.deleted.get(user.prefix.user_id, 0)
            for part in user.slices:
                job = self.open[part.job_id]
                assert job.deadline_s is None or job.deadline_s > self.now_s
                num_tokens += sum(job.query_lens[part.start : part.stop])
        assert 0 < num_tokens <= MAX_STEP_TOKENS

    def book(self, plan: Plan) -> None:
        if isinstance(plan.step, SuffixStep):
            for user in plan.step.users:
                for part in user.slices:
                    assert self.done[part.job_id] == part.start, "a query is skipped or run twice"
                    self.done[part.job_id] = part.stop

    @invariant()
    def pool_is_sound(self) -> None:
        assert check_invariants(self.pool.snapshot()) == ()

    def teardown(self) -> None:
        """Whatever happened, the rest drains and every pin is gone."""
        for _ in range(500):
            plan = self.scheduler.plan(self.now_s)
            self.settle(plan)
            if plan.step is None:
                break
            self.book(plan)
            self.scheduler.commit(plan.step, seconds=0.5, is_encoded=True)
        assert not self.open
        assert not self.scheduler.has_work()
        assert all(slot.pins == 0 for slot in self.pool.snapshot().slots)


SchedulerMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None
)
TestSchedulerMachine = SchedulerMachine.TestCase
