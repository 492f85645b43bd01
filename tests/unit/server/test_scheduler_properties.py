"""Random arrivals, cancels, deadlines, deletes and failures over three tiers.

Nothing is lost, nothing is stale, no budget is exceeded, no bytes but the asked ones are used,
nobody starves; checked after every step.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tier_world import World

from qanchor_server.arena import check_arena
from qanchor_server.byte_tier import check_tier
from qanchor_server.kv_pool import KvPool, PrefixRef, SlotState, check_invariants
from qanchor_server.kv_tiers import KvTiers, TierBudgets
from qanchor_server.scheduler import Scheduler, SchedulerLimits
from qanchor_server.steps import Job, Plan, PrefillStep, RestoreStep, SuffixStep

MAX_STEP_TOKENS, MAX_STEP_USERS, MAX_SUFFIX_RUN = 12, 2, 3
MAX_READ_S = 3.0
MAX_BEGUN = 2
USERS = "abcdefgh"
LENGTHS = {"a": 9, "b": 9, "c": 5, "d": 7, "e": 2, "f": 10, "g": 10, "h": 6}
BYTES_PER_TOKEN = 32
"""Ten tokens are 320 bytes: five cache lines of host memory."""


class SchedulerMachine(RuleBasedStateMachine):
    """A worker that may fail, over two slots and small tiers; versions rise as the store's do."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = KvPool(
            budget_bytes=20 * BYTES_PER_TOKEN,
            bytes_per_token=BYTES_PER_TOKEN,
            capacities=(5, 10),
            ttl_s=20.0,
        )
        self.tiers = KvTiers(
            TierBudgets(
                host_bytes=704,
                disk_bytes=1700,
                bytes_per_token=BYTES_PER_TOKEN,
                header_bytes=10,
                ttl_s=30.0,
            )
        )
        self.scheduler = Scheduler(
            self.pool,
            self.tiers,
            SchedulerLimits(
                max_step_tokens=MAX_STEP_TOKENS,
                max_step_users=MAX_STEP_USERS,
                max_suffix_run=MAX_SUFFIX_RUN,
                prefill_patience=2.0,
                max_read_seconds=MAX_READ_S,
            ),
        )
        self.world = World(self.pool, self.tiers, self.scheduler)
        self.now_s = 0.0
        self.counter = 0
        self.versions: dict[str, int] = {}
        self.deleted: dict[str, int] = {}
        self.kept: dict[str, float] = {}
        self.begun: list[SuffixStep] = []
        """Steps that are being run while others are planned."""
        self.failed: list[SuffixStep] = []
        """Of those, what failed; rolled back when none is begun."""
        self.open: dict[int, Job] = {}
        self.done: dict[int, int] = {}
        """Queries run per job, also of jobs that have left."""

    @rule(
        user=st.sampled_from(USERS),
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
            user_id=user,
            digest=f"{user}{version // 2}",
            version=version,
            num_tokens=LENGTHS[user],
            as_of_s=0,
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

    @precondition(lambda self: not self.begun)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.open:
            self.scheduler.cancel(data.draw(st.sampled_from(sorted(self.open))))

    @precondition(lambda self: not self.begun)
    @rule(user=st.sampled_from(USERS), ends=st.booleans())
    def delete(self, user: str, ends: bool) -> None:
        self.counter += 1
        self.deleted[user] = self.counter
        self.versions.pop(user, None)
        _, forgetting = self.scheduler.forget(user, self.counter)
        self.world.make(tuple(self.tiers.take_moves()))
        assert self.pool.find(user) is None
        while ends and not self.tiers.settle(forgetting):
            self.world.end_one()
        if ends:
            self.world.make(tuple(self.tiers.take_moves()))
            assert not self.world.owns_bytes(user)
            assert self.tiers.arena.residue(user) == []

    @rule(user=st.sampled_from(USERS), seconds=st.integers(1, 10))
    def keep(self, user: str, seconds: int) -> None:
        if self.pool.keep(user, seconds, self.now_s):
            self.kept[user] = max(self.now_s + seconds, self.kept.get(user, 0.0))

    @precondition(lambda self: self.world.pending)
    @rule(is_ok=st.sampled_from((True, True, True, False)))
    def end_move(self, is_ok: bool) -> None:
        self.world.end_one(is_ok)

    @precondition(lambda self: self.begun)
    @rule(last=st.booleans(), fails=st.sampled_from((False, False, False, True)))
    def end_step(self, last: bool, fails: bool) -> None:
        step = self.begun.pop(-1 if last else 0)
        if fails:
            self.failed.append(step)
        else:
            # Until now the slots held what was asked.
            self.world.run(step, True)
            self.scheduler.commit(step, seconds=0.5)
        while self.failed and not self.begun:
            self.scheduler.roll_back(self.failed.pop(0), "")

    @precondition(lambda self: len(self.begun) < MAX_BEGUN and not self.failed)
    @rule(
        fails=st.sampled_from((False, False, False, True)),
        is_encoded=st.booleans(),
        goes_on=st.booleans(),
    )
    def step(self, fails: bool, is_encoded: bool, goes_on: bool) -> None:
        self.now_s += 0.5
        held = {user for user in USERS if self.pool.find(user)}
        plan = self.scheduler.plan(self.now_s)
        self.settle(plan)
        self.world.make(plan.moves)
        self.check_kept(held)
        if plan.step is None:
            assert not self.open or self.world.pending or self.begun, "work waits, no step"
            return
        self.check_step(plan)
        is_suffix = isinstance(plan.step, SuffixStep)
        if is_suffix and (goes_on or self.begun):
            self.book(plan)
            self.begun.append(plan.step)
        elif fails:
            self.scheduler.roll_back(plan.step, "")
        else:
            self.world.run(plan.step, is_encoded)
            self.book(plan)
            self.scheduler.commit(plan.step, seconds=0.5, is_encoded=is_encoded)
        self.world.make(tuple(self.tiers.take_moves()))

    def check_kept(self, held: set[str]) -> None:
        """Who is to be kept is evicted for nobody else; a newer content may replace the own."""
        step_user = {
            slot.user_id for slot in self.pool.snapshot().slots if slot.state is SlotState.RESERVED
        }
        for user, until_s in self.kept.items():
            if until_s > self.now_s and user in held and user not in step_user:
                assert self.pool.find(user) or user in self.deleted

    def settle(self, plan: Plan) -> None:
        for dropped in plan.dropped:
            del self.open[dropped.job_id]
        for finished in plan.finished:
            job = self.open.pop(finished.job_id)
            assert self.done[finished.job_id] == len(job.query_lens)
            assert finished.prefix.version >= job.prefix.version

    def check_step(self, plan: Plan) -> None:
        if isinstance(plan.step, PrefillStep):
            prefix = plan.step.reservation.prefix
            # Single flight: never two encodings of a user, nor one of what is held.
            assert self.pool.find(prefix.user_id) is None
            return
        if isinstance(plan.step, RestoreStep):
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
        assert check_arena(self.tiers.arena) == ()
        assert check_tier(self.tiers.host) == ()
        assert check_tier(self.tiers.disk) == ()
        self.world.check_disk()

    def teardown(self) -> None:
        """Whatever happened, the rest drains and every pin is gone."""
        for step in self.begun:
            self.world.run(step, True)
            self.scheduler.commit(step, seconds=0.5)
        for step in self.failed:
            self.scheduler.roll_back(step, "")
        for _ in range(500):
            plan = self.scheduler.plan(self.now_s)
            self.settle(plan)
            self.world.make(plan.moves)
            if plan.step is not None:
                self.world.run(plan.step, True)
                self.book(plan)
                self.scheduler.commit(plan.step, seconds=0.5, is_encoded=True)
            elif self.world.pending:
                self.world.end_one()
            else:
                break
        assert not self.open
        assert not self.scheduler.has_work()
        assert all(slot.pins == 0 for slot in self.pool.snapshot().slots)
        while self.world.pending:
            self.world.end_one()
        tiers = (self.tiers.host, self.tiers.disk)
        assert all(entry.pins == 0 for tier in tiers for entry in tier.entries())
        left = dict(self.world.files)
        for entry in self.tiers.disk.entries():
            assert left.pop(entry.place) == (entry.content.user_id, entry.content.digest)
        assert {place: user_id for place, (user_id, _) in left.items()}.items() <= (
            self.tiers.undeleted.items()
        )


SchedulerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
TestSchedulerMachine = SchedulerMachine.TestCase
