"""What the engine does next: continuous batching of suffix steps and prefill steps.

Pure: no numpy, no grpc, no clock but the `now_s` passed in. Not thread-safe: call from the worker
thread only. One step is a transaction:

1. `submit` puts a job behind its user's prefix; jobs of one prefix share one prefill.
2. `plan` drops expired jobs, then gives the next step, its slot already reserved, and the moves
   between tiers that must come before it.
3. The worker makes the moves, runs the step, then calls `commit` or `roll_back`. While suffix steps
   are being run it may submit, plan and run further steps; `cancel`, `forget` and `roll_back` of a
   suffix step take jobs away, so they wait until no suffix step is being run.

Restores cost a copy and go first, at most `max_step_users` of them in a row. Suffix steps go
before prefills; after `max_suffix_run` of them in a row a waiting prefill gets one step.
A user's waiting jobs stand in groups, one per prefix content, oldest first; only the first group
of a user is worked on. A job joins the oldest group that is not older than the prefix it brings,
so a reply never rests on an older profile than the one current when the request arrived.
"""

import heapq
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from qanchor_server.kv_pool import (
    Deferred,
    Found,
    KvPool,
    PrefixRef,
    Reservation,
    Unserviceable,
)
from qanchor_server.kv_tiers import Forgetting, KvTiers, Move, Read
from qanchor_server.prefix_queue import PrefixQueue
from qanchor_server.steps import (
    Dropped,
    Finished,
    Job,
    JobSlice,
    Plan,
    PrefillStep,
    Reason,
    RestoreStep,
    Step,
    SuffixStep,
    UserSlice,
)

MAX_TOMBSTONES = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Bounds of one step and of the prefill's wait."""

    max_step_tokens: int
    max_step_users: int
    max_suffix_run: int
    prefill_patience: float = 0.0
    """How many times its own encoding time a prefix may be overtaken by shorter ones."""
    max_read_seconds: float = 1.0
    """A disk that gives nothing for so long is not waited for."""


@dataclass(slots=True, eq=False)
class _Waiting:
    job: Job
    is_hit: bool
    next_query: int = 0
    """First query that no step has been given for."""
    num_run: int = 0
    """Queries whose step was committed; those between the two are being run."""
    is_late: bool = False
    """Its deadline passed while a step for it was being run: it gets no other."""
    prefill_seconds: float = 0.0
    suffix_seconds: float = 0.0


@dataclass(slots=True, eq=False)
class _Group:
    prefix: PrefixRef
    source: object
    is_ready: bool = False
    """Held in the pool and pinned. Only the first group of a user can be."""
    found: Found = Found.DEVICE
    """Where the prefix was before it was ready."""
    jobs: OrderedDict[int, _Waiting] = field(default_factory=OrderedDict)


class Scheduler:
    """Queues of jobs by user and the choice of the next step."""

    def __init__(self, pool: KvPool, tiers: KvTiers, limits: SchedulerLimits) -> None:
        self._pool = pool
        self._tiers = tiers
        self._limits = limits
        self.num_lanes = 1
        """Runs of a step that the engine has side by side; a step may be so many times larger."""
        self._users: dict[str, deque[_Group]] = {}
        self._groups_by_job: dict[int, _Group] = {}
        self._ready: OrderedDict[str, None] = OrderedDict()
        self._queue = PrefixQueue(
            tiers, patience=limits.prefill_patience, max_read_s=limits.max_read_seconds
        )
        self._reservation: Reservation | None = None
        self._encoding_seconds = 0.0
        self._deadlines: list[tuple[float, int]] = []
        self._tombstones: OrderedDict[str, int] = OrderedDict()
        self._dropped: list[Dropped] = []
        self._finished: list[Finished] = []
        self._suffix_run = 0
        self._restore_run = 0
        self._now_s = float("-inf")

    @property
    def num_jobs(self) -> int:
        """Jobs waiting."""
        return len(self._groups_by_job)

    def has_work(self) -> bool:
        """Whether `plan` has something to give or to report."""
        return bool(self._groups_by_job or self._dropped or self._finished)

    def submit(self, job: Job) -> None:
        """Queue a job; what becomes of it comes out of `plan` and `commit`."""
        user_id = job.prefix.user_id
        if job.prefix.version <= self._tombstones.get(user_id, 0):
            self._dropped.append(Dropped(job.job_id, Reason.DELETED))
            return
        group = self._group_for(job)
        group.jobs[job.job_id] = _Waiting(job, is_hit=group.is_ready)
        self._groups_by_job[job.job_id] = group
        if job.deadline_s is not None:
            self._note_deadline(job.deadline_s, job.job_id)
        if group.is_ready:
            self._finish_done(group)

    def cancel(self, job_id: int) -> None:
        """Drop a job whose caller has gone; unknown ids are ignored."""
        if job_id in self._groups_by_job:
            self._drop(job_id, Reason.CANCELLED)

    def forget(self, user_id: str, version: int) -> tuple[list[int], Forgetting]:
        """Drop all that rests on the user's profile up to `version`: jobs, encoding, held prefix.

        Jobs that arrive later with such a version are dropped too. Returns the free slots that
        still hold numbers of the user, which the worker clears, and what leaves the other tiers.
        """
        self._tombstones[user_id] = version
        self._tombstones.move_to_end(user_id)
        if len(self._tombstones) > MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)
        for group in tuple(self._users.get(user_id, ())):
            if group.prefix.version <= version:
                for job_id in tuple(group.jobs):
                    self._drop(job_id, Reason.DELETED)
        held = self._pool.find(user_id)
        if held is not None and held.version <= version:
            self._pool.forget(user_id)
        return self._pool.residue(user_id), self._tiers.forget(user_id)

    def plan(self, now_s: float) -> Plan:
        """Drop what expired and choose the next step."""
        self._now_s = now_s
        expired: list[int] = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, job_id = heapq.heappop(self._deadlines)
            if job_id in self._groups_by_job:
                expired.append(job_id)
        for job_id in expired:
            waiting = self._groups_by_job[job_id].jobs[job_id]
            if waiting.next_query > waiting.num_run:
                waiting.is_late = True
            else:
                self._drop(job_id, Reason.EXPIRED)
        self._pool.advance(now_s)
        self._tiers.advance(now_s)
        self._queue.advance(now_s)
        step = self._next_step()
        for evicted in self._pool.take_evicted():
            self._tiers.demote(evicted.prefix, evicted.slot_id)
        dropped, self._dropped = tuple(self._dropped), []
        finished, self._finished = tuple(self._finished), []
        return Plan(step, tuple(self._tiers.take_moves()), dropped, finished)

    def move_done(self, move: Move, is_ok: bool) -> tuple[Move, ...]:
        """Book a move that ended; returns the moves that follow from it."""
        self._tiers.done(move, is_ok)
        if isinstance(move, Read):
            content = move.host.content
            self._queue.read_ended(content.user_id, content.digest, is_ok)
        return tuple(self._tiers.take_moves())

    def commit(self, step: Step, *, seconds: float, is_encoded: bool = False) -> None:
        """Book a step that ran; `is_encoded` when a prefill step was the prefix's last.

        Jobs that are finished come out of the next `plan`.
        """
        self._now_s += seconds
        self._restore_run = self._restore_run + 1 if isinstance(step, RestoreStep) else 0
        if isinstance(step, PrefillStep):
            self._suffix_run = 0
            self._commit_prefill(step, seconds, is_encoded)
            return
        if isinstance(step, RestoreStep):
            self._commit_restore(step, seconds)
            return
        for user in step.users:
            group = self._users[user.prefix.user_id][0]
            self._pool.touch(user.prefix.user_id)
            for part in user.slices:
                waiting = group.jobs[part.job_id]
                waiting.num_run += part.stop - part.start
                waiting.suffix_seconds += seconds
            self._finish_done(group)
            self._drop_late(group)

    def roll_back(self, step: Step, detail: str) -> None:
        """Undo a step that failed: its reservation is released, its jobs leave as RETRYABLE.

        A restore that failed costs an encoding, and no job.
        """
        if isinstance(step, RestoreStep):
            self._pool.release(step.reservation)
            self._queue.cannot_restore(step.reservation.prefix.user_id)
            return
        if isinstance(step, PrefillStep):
            group = self._users[step.reservation.prefix.user_id][0]
            job_ids = list(group.jobs)
        else:
            job_ids = [part.job_id for user in step.users for part in user.slices]
        for job_id in job_ids:
            # Of two steps that failed, both may be of one job.
            if job_id in self._groups_by_job:
                self._drop(job_id, Reason.RETRYABLE, detail)

    def _note_deadline(self, deadline_s: float, job_id: int) -> None:
        heapq.heappush(self._deadlines, (deadline_s, job_id))
        # Most are of jobs that have left: each rebuild is paid for by those it takes out.
        if len(self._deadlines) > 2 * len(self._groups_by_job):
            self._deadlines = [item for item in self._deadlines if item[1] in self._groups_by_job]
            heapq.heapify(self._deadlines)

    def _group_for(self, job: Job) -> _Group:
        user_id = job.prefix.user_id
        groups = self._users.get(user_id)
        if groups is None:
            held = self._pool.find(user_id)
            prefix = job.prefix
            if held and held.version > prefix.version and held.digest != prefix.digest:
                prefix = held
            self._users[user_id] = deque([_Group(prefix, job.source)])
            self._activate(user_id, job.arrival_s)
            return self._users[user_id][0]
        for group in groups:
            if group.prefix.version >= job.prefix.version:
                return group
        newest = groups[-1]
        if newest.prefix.digest == job.prefix.digest:
            newest.prefix = job.prefix
            if newest.is_ready:
                self._pool.renew(job.prefix)
            return newest
        groups.append(_Group(job.prefix, job.source))
        return groups[-1]

    def _activate(self, user_id: str, arrival_s: float) -> None:
        """Make the user's first group ready when its prefix is held, else queue its prefix."""
        group = self._users[user_id][0]
        held = self._pool.find(user_id)
        if held is None or held.digest != group.prefix.digest:
            self._queue.add(group.prefix, arrival_s)
            return
        self._pool.renew(group.prefix)
        group.found = Found.DEVICE
        self._make_ready(group)

    def _make_ready(self, group: _Group) -> None:
        user_id = group.prefix.user_id
        group.is_ready = True
        group.source = None
        self._pool.pin(user_id)
        self._pool.touch(user_id)
        self._ready[user_id] = None
        self._finish_done(group)

    def _next_step(self) -> Step | None:
        may_restore = self._restore_run < self._limits.max_step_users
        step: Step | None = self._restore_step() if may_restore else None
        if step is None and self._ready and self._suffix_run < self._limits.max_suffix_run:
            step = self._suffix_step()
        if step is None:
            step = self._prefill_step()
        if step is None and self._ready:
            step = self._suffix_step()
        return step if step or may_restore else self._restore_step()

    def _restore_step(self) -> RestoreStep | None:
        while (restore := self._queue.next_restore()) is not None:
            prefix, found = restore
            outcome = self._reserve(prefix)
            if isinstance(outcome, Deferred):
                return None
            if isinstance(outcome, Reservation):
                entry = self._tiers.wanted(prefix.user_id)
                return RestoreStep(outcome, entry.place, entry.content.num_bytes, found)
        return None

    def _suffix_step(self) -> SuffixStep | None:
        room = self.num_lanes * self._limits.max_step_tokens
        most_users = self.num_lanes * self._limits.max_step_users
        users: list[UserSlice] = []
        for user_id in self._ready:
            if len(users) == most_users or room <= 0:
                break
            group = self._users[user_id][0]
            slices, room = _take(group, room)
            if slices:
                users.append(UserSlice(group.prefix, self._pool.slot_of(user_id), slices))
        if not users:
            return None
        for user in users:
            # After its turn a user goes to the back.
            self._ready.move_to_end(user.prefix.user_id)
        self._suffix_run = self._suffix_run + 1 if len(self._queue) else 0
        return SuffixStep(tuple(users))

    def _prefill_step(self) -> PrefillStep | None:
        while self._reservation is None:
            prefix = self._queue.next_encoding()
            if prefix is None:
                return None
            outcome = self._reserve(prefix)
            if isinstance(outcome, Deferred):
                return None
            if isinstance(outcome, Reservation):
                self._reservation = outcome
                self._encoding_seconds = 0.0
        group = self._users[self._reservation.prefix.user_id][0]
        return PrefillStep(self._reservation, group.source)

    def _reserve(self, prefix: PrefixRef) -> Reservation | Deferred | Unserviceable:
        """Reserve a slot; jobs whose prefix fits none are dropped."""
        outcome = self._pool.reserve(prefix)
        if isinstance(outcome, Unserviceable):
            for job_id in tuple(self._users[prefix.user_id][0].jobs):
                self._drop(job_id, Reason.UNSERVICEABLE, outcome.rule)
        return outcome

    def _commit_prefill(self, step: PrefillStep, seconds: float, is_encoded: bool) -> None:
        prefix = step.reservation.prefix
        group = self._users[prefix.user_id][0]
        self._encoding_seconds += seconds
        for waiting in group.jobs.values():
            waiting.prefill_seconds += seconds
        if is_encoded:
            self._reservation = None
            self._queue.note_encoding(prefix.num_tokens, self._encoding_seconds)
            self._hold(step.reservation, Found.ENCODED)

    def _commit_restore(self, step: RestoreStep, seconds: float) -> None:
        user_id = step.reservation.prefix.user_id
        for waiting in self._users[user_id][0].jobs.values():
            waiting.prefill_seconds += seconds
        self._tiers.restored(user_id, step.found)
        self._hold(step.reservation, step.found)

    def _hold(self, reservation: Reservation, found: Found) -> None:
        """A slot is filled: what waited for it is ready."""
        user_id = reservation.prefix.user_id
        group = self._users[user_id][0]
        self._pool.commit(reservation)
        self._pool.renew(group.prefix)
        self._queue.discard(user_id)
        group.found = found
        self._make_ready(group)

    def _finish_done(self, group: _Group) -> None:
        done = [w for w in group.jobs.values() if w.num_run == len(w.job.query_lens)]
        for waiting in done:
            self._finished.append(
                Finished(
                    job_id=waiting.job.job_id,
                    prefix=group.prefix,
                    found=Found.DEVICE if waiting.is_hit else group.found,
                    is_kept=self._keep(waiting.job),
                    arrival_s=waiting.job.arrival_s,
                    prefill_seconds=waiting.prefill_seconds,
                    suffix_seconds=waiting.suffix_seconds,
                )
            )
            self._remove(waiting.job.job_id)

    def _drop_late(self, group: _Group) -> None:
        late = [w for w in group.jobs.values() if w.is_late and w.next_query == w.num_run]
        for waiting in late:
            self._drop(waiting.job.job_id, Reason.EXPIRED)

    def _keep(self, job: Job) -> bool:
        """Keep a finished job's prefix on the device as long as it wishes.

        Now: the next step's reservation may evict it.
        """
        if not job.keep_s:
            return False
        # While nothing is planned the time stands still.
        now_s = max(self._now_s, job.arrival_s)
        return self._pool.keep(job.prefix.user_id, job.keep_s, now_s)

    def _drop(self, job_id: int, reason: Reason, detail: str = "") -> None:
        self._dropped.append(Dropped(job_id, reason, detail))
        self._remove(job_id)

    def _remove(self, job_id: int) -> None:
        group = self._groups_by_job.pop(job_id)
        del group.jobs[job_id]
        if not group.jobs:
            self._close(group)

    def _close(self, group: _Group) -> None:
        """Take an empty group out and turn to the user's next one."""
        user_id = group.prefix.user_id
        groups = self._users[user_id]
        is_active = groups[0] is group
        groups.remove(group)
        if not is_active:
            return
        if group.is_ready:
            self._pool.unpin(user_id)
            del self._ready[user_id]
        else:
            self._queue.discard(user_id)
            if self._reservation and self._reservation.prefix.user_id == user_id:
                self._pool.release(self._reservation)
                self._reservation = None
        if groups:
            oldest = next(iter(groups[0].jobs.values()))
            self._activate(user_id, oldest.job.arrival_s)
        else:
            del self._users[user_id]


def _take(group: _Group, room: int) -> tuple[tuple[JobSlice, ...], int]:
    """Take the group's next queries that fit into `room` tokens; the room left (0: now full)."""
    slices = []
    for waiting in group.jobs.values():
        if waiting.is_late:
            continue
        start = stop = waiting.next_query
        lens = waiting.job.query_lens
        while stop < len(lens) and lens[stop] <= room:
            room -= lens[stop]
            stop += 1
        if stop > start:
            waiting.next_query = stop
            slices.append(JobSlice(waiting.job.job_id, start, stop))
        if stop < len(lens):
            return tuple(slices), 0
    return tuple(slices), room
