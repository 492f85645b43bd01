"""The one thread that owns the engine.

1. `start` runs `prepare` on the thread: opening the engine, warm-up, parity. Then it serves.
2. Commands from the event loop (submit, cancel, forget, find) and ends of disk moves wait in an
   inbox.
3. Loop: empty the inbox, plan, reserve (inside plan), move, run, commit or roll back, answer.
   Where the engine runs users side by side, suffix steps are only begun, at most MAX_BEGUN at a
   time; their ends come through the inbox. What takes jobs or slots away waits until none is.
4. Answers go back with call_soon_threadsafe, all of a step in one call.
5. A Retryable step is rolled back and its jobs fail; any other exception is fatal: all jobs fail,
   the thread ends, `on_fatal` is called on the event loop.
6. After a drain, what only the device holds is put on disk for the next start.

Must not know grpc or ONNX Runtime.
"""

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic

import numpy as np

from qanchor.bundle.packing import SuffixQuery
from qanchor_server.answers import Answer, Counts, WorkerStats
from qanchor_server.disk_files import SUFFIX, FoundFile
from qanchor_server.engine import SlotT
from qanchor_server.failures import Fatal, Retryable, Unavailable
from qanchor_server.kv_flush import flush_to_disk
from qanchor_server.kv_mover import KvMover
from qanchor_server.kv_pool import Found, KvPool, PrefixRef
from qanchor_server.kv_tiers import Forgetting, KvTiers, Move, TierUse
from qanchor_server.prefix_source import PreparedPrefix
from qanchor_server.replies import Caller, Replies
from qanchor_server.scheduler import Scheduler
from qanchor_server.step_runner import EngineParts, Rows, StepRunner, WorkerModel
from qanchor_server.steps import Job, PrefillStep, RestoreStep, Step, SuffixStep

log = logging.getLogger(__name__)

Clock = Callable[[], float]

READ_POLL_S = 0.02
"""While jobs wait for nothing but a read: how often their deadlines are looked at."""
MAX_BEGUN = 2
"""Suffix steps at a time: one to run, and one so that no lane waits for the next plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long the worker waits and flushes."""

    idle_s: float | None
    """An idle worker looks for expired keys and values this often; None: never."""
    flush_s: float
    """Most time after a drain to put on disk what only the device holds."""


_Command = Callable[[], None]


class Worker(Generic[SlotT]):
    """Runs steps on its own thread; submit, cancel, forget and find are called from the loop."""

    def __init__(
        self,
        *,
        pool: KvPool,
        tiers: KvTiers,
        scheduler: Scheduler,
        model: WorkerModel,
        pace: Pace,
        clock: Clock,
    ) -> None:
        self._pool = pool
        self._tiers = tiers
        self._scheduler = scheduler
        self._model = model
        self._pace = pace
        self._clock = clock
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._leaving: list[tuple[Forgetting, asyncio.Future[None]]] = []
        self._runner: StepRunner[SlotT] | None = None
        self._is_idle = True
        self._num_begun = 0
        self._held_back: deque[_Command] = deque()
        """What waits until no suffix step is begun."""
        self._counts = Counts()
        self._replies = Replies(self._counts)
        self._next_job_id = 0
        self._is_stopping = False
        self._failure: Exception | None = None
        self._end_lock = threading.Lock()
        self._has_ended = False

    def start(
        self,
        loop: asyncio.AbstractEventLoop,
        prepare: Callable[[], EngineParts[SlotT]],
        *,
        on_ready: Callable[[], None],
        on_fatal: Callable[[Exception], None],
    ) -> None:
        """Start the thread; both callbacks are called on `loop`."""
        self._loop = loop
        self._thread = threading.Thread(
            target=self._serve, args=(prepare, on_ready, on_fatal), name="qanchor-engine"
        )
        self._thread.start()

    async def embed(
        self,
        prepared: PreparedPrefix,
        queries: tuple[SuffixQuery, ...],
        *,
        timeout_s: float | None,
        keep_s: float = 0.0,
    ) -> Answer:
        """Embed a user under queries; no queries: only encode the prefix.

        `keep_s`: seconds for which the prefix is to stay on the device after that; the answer's
        `is_kept` is False when too much is kept already.

        A caller that is cancelled takes the job out of the queue. Raises UnknownUser (deleted
        meanwhile), Expired, Unserviceable, Retryable, Unavailable, Fatal.
        """
        now_s = self._clock()
        job_id = self._next_job_id
        self._next_job_id += 1
        job = Job(
            job_id=job_id,
            prefix=prepared.ref,
            query_lens=tuple(query.suffix_len for query in queries),
            arrival_s=now_s,
            deadline_s=None if timeout_s is None else now_s + timeout_s,
            keep_s=keep_s,
            source=prepared,
        )
        vectors_QZ = np.empty((len(queries), self._model.embedding_dim), dtype=np.float32)
        future: asyncio.Future[Answer] = self._loop.create_future()
        caller, rows = Caller(future, prepared.ref.user_id), Rows(queries, vectors_QZ)
        self._send(lambda: self._submit(job, caller, rows))
        try:
            return await future
        except asyncio.CancelledError:
            self._send(lambda: self._when_none_is_begun(lambda: self._scheduler.cancel(job_id)))
            raise

    async def forget(self, user_id: str, version: int) -> None:
        """Drop jobs and keys and values of a user that rest on `version` or older, in all tiers.

        Raises Unavailable when the server ended before a file was deleted; Retryable when a file
        could not be deleted. The next call for the user tries again.
        """
        done: asyncio.Future[None] = self._loop.create_future()
        self._send(lambda: self._when_none_is_begun(lambda: self._forget(user_id, version, done)))
        await done

    async def find(self, prefix: PrefixRef) -> Found | None:
        """The tier that holds exactly this prefix, if any."""
        found: asyncio.Future[Found | None] = self._loop.create_future()
        self._send(lambda: self._replies.reply(found, self._locate(prefix)))
        return await found

    @property
    def stats(self) -> WorkerStats:
        """Counts since start and use of the tiers. From any thread: single numbers are read, which
        may be of a step that is just being booked."""
        device = TierUse(
            budget_bytes=self._pool.budget_bytes,
            used_bytes=self._pool.used_bytes,
            num_users=self._pool.num_users,
            num_hits=self._counts.values.get("num_device_hits", 0),
            num_evicted=self._pool.num_evicted,
        )
        host, disk = self._tiers.use(Found.HOST), self._tiers.use(Found.DISK)
        tiers = {Found.DEVICE: device, Found.HOST: host, Found.DISK: disk}
        return WorkerStats(**self._counts.values, tiers=tiers)

    def adopt(self, files: Iterable[FoundFile], unix_s: float) -> None:
        """Take in files of an earlier run; those there is no room for are deleted.

        `unix_s`: Unix time now. Call from `prepare`.
        """
        now_s = self._clock()
        self._tiers.adopt(
            (file.file_id, file.content, now_s - (unix_s - file.used_unix_s)) for file in files
        )

    def stop(self) -> None:
        """Ask the thread to end after the jobs it has; new ones fail with Unavailable."""
        self._send(self._begin_stop)

    async def join(self) -> None:
        """Wait until the thread has ended."""
        await asyncio.get_running_loop().run_in_executor(None, self._thread.join)

    def _send(self, command: _Command) -> None:
        with self._end_lock:
            if not self._has_ended:
                self._inbox.put(command)
                return
            # The thread has ended and left its state to the loop.
            command()
            self._replies.send(self._loop)

    # What follows runs on the worker thread.

    def _serve(
        self,
        prepare: Callable[[], EngineParts[SlotT]],
        on_ready: Callable[[], None],
        on_fatal: Callable[[Exception], None],
    ) -> None:
        mover = None
        try:
            parts = prepare()
            mover = parts.mover
            self._runner = StepRunner(parts, self._model)
            if parts.engine.side_by_side is not None:
                self._scheduler.num_lanes = parts.engine.side_by_side.num_lanes
            mover.start(lambda move, is_ok: self._send(lambda: self._move_done(move, is_ok)))
            self._make(self._tiers.take_moves())
            self._loop.call_soon_threadsafe(on_ready)
            while not (self._is_stopping and not self._scheduler.has_work()):
                self._turn()
            self._flush()
        # The process's one boundary: whatever escapes a step makes the engine's state unknown.
        except Exception as error:
            log.exception("the engine failed; the server is shutting down")
            self._failure = error
        self._end(on_fatal, mover)

    def _end(self, on_fatal: Callable[[Exception], None], mover: KvMover[SlotT] | None) -> None:
        """Fail what waits, refuse what still arrives, and report a failure."""
        self._is_stopping = True
        self._replies.fail_all(self._refusal)
        if mover is not None:
            mover.close()
        with self._end_lock:
            self._has_ended = True
            self._num_begun = 0
            while not self._inbox.empty():
                self._inbox.get()()
            self._run_held_back()
            self._answer_leaving()
            self._replies.send(self._loop)
        if self._failure is not None:
            self._loop.call_soon_threadsafe(on_fatal, self._failure)

    def _refusal(self) -> Exception:
        if self._failure is not None:
            return Fatal(f"the engine failed: {self._failure}")
        return Unavailable("the server is draining; retry")

    def _turn(self) -> None:
        self._read_inbox()
        self._run_held_back()
        if self._held_back or self._num_begun == MAX_BEGUN:
            self._is_idle = True
            self._replies.send(self._loop)
            return
        plan = self._scheduler.plan(self._clock())
        self._make(plan.moves)
        self._running().free(self._pool.take_dropped())
        for dropped in plan.dropped:
            self._replies.drop(dropped)
        for finished in plan.finished:
            self._replies.finish(finished, self._clock())
        self._answer_leaving()
        self._replies.send(self._loop)
        self._is_idle = plan.step is None
        if plan.step is not None:
            self._run(plan.step)

    def _running(self) -> StepRunner[SlotT]:
        assert self._runner is not None
        return self._runner

    def _read_inbox(self) -> None:
        """Run all waiting commands; wait for one when there was nothing to run."""
        if self._is_idle and self._scheduler.has_work():
            self._run_command(READ_POLL_S)
        elif self._is_idle and not self._is_stopping:
            self._run_command(self._pace.idle_s)
        while not self._inbox.empty():
            self._inbox.get()()

    def _run_command(self, timeout_s: float | None) -> bool:
        """Wait for a command and run it; False when none came in time."""
        try:
            command = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return False
        command()
        return True

    def _make(self, moves: Iterable[Move]) -> None:
        """Make moves and those that follow from them; some end later, as commands."""
        waiting = deque(moves)
        while waiting:
            move = waiting.popleft()
            is_ok = False if self._runner is None else self._runner.make(move)
            if is_ok is not None:
                waiting.extend(self._scheduler.move_done(move, is_ok))

    def _move_done(self, move: Move, is_ok: bool) -> None:
        self._make(self._scheduler.move_done(move, is_ok))

    def _flush(self) -> None:
        until_s = self._clock() + self._pace.flush_s
        flush_to_disk(
            self._pool,
            self._tiers,
            make=self._make,
            wait=lambda: self._run_command(max(0.0, until_s - self._clock())),
        )

    def _run(self, step: Step) -> None:
        start_s = self._clock()
        is_encoded = False
        runner = self._running()
        try:
            if isinstance(step, PrefillStep):
                self._counts.add("num_prefill_steps")
                is_encoded = runner.prefill(step)
                self._counts.add("num_encoded", int(is_encoded))
            elif isinstance(step, RestoreStep):
                self._counts.add("num_restore_steps")
                runner.restore(step)
            else:
                self._counts.add("num_suffix_steps")
                if not runner.suffix(
                    step,
                    self._replies.rows,
                    lambda finish: self._inbox.put(lambda: self._ended(step, start_s, finish)),
                    is_idle=not self._num_begun,
                ):
                    self._num_begun += 1
                    return
        except Retryable as error:
            log.warning("step rolled back: %s", error)
            self._scheduler.roll_back(step, str(error))
            return
        self._scheduler.commit(step, seconds=self._clock() - start_s, is_encoded=is_encoded)

    def _ended(self, step: SuffixStep, start_s: float, finish: Callable[[], None]) -> None:
        """Book a suffix step that was begun."""
        if self._failure is not None:
            return
        self._num_begun -= 1
        try:
            finish()
        except Retryable as error:
            log.warning("step rolled back: %s", error)
            detail = str(error)
            self._held_back.append(lambda: self._scheduler.roll_back(step, detail))
        else:
            self._scheduler.commit(step, seconds=self._clock() - start_s)

    def _when_none_is_begun(self, command: _Command) -> None:
        self._held_back.append(command)
        self._run_held_back()

    def _run_held_back(self) -> None:
        while self._held_back and not self._num_begun:
            self._held_back.popleft()()

    def _locate(self, prefix: PrefixRef) -> Found | None:
        held = self._pool.find(prefix.user_id)
        if held is not None and held.digest == prefix.digest:
            return Found.DEVICE
        return self._tiers.locate(prefix)

    def _submit(self, job: Job, caller: Caller, rows: Rows) -> None:
        if self._is_stopping:
            self._replies.reply_error(caller.future, self._refusal())
            return
        self._replies.open(job.job_id, caller, rows)
        self._scheduler.submit(job)

    def _forget(self, user_id: str, version: int, done: "asyncio.Future[None]") -> None:
        slot_ids, forgetting = self._scheduler.forget(user_id, version)
        if self._failure is None and self._runner is not None:
            self._runner.clear(user_id, slot_ids)
        self._leaving.append((forgetting, done))
        self._make(self._tiers.take_moves())
        self._answer_leaving()

    def _answer_leaving(self) -> None:
        """Answer those whose user is gone from every tier, or cannot be."""
        leaving, self._leaving = self._leaving, []
        for forgetting, done in leaving:
            if self._tiers.settle(forgetting):
                self._make(self._tiers.take_moves())
                left = forgetting.file_ids & self._tiers.undeleted.keys()
                if left:
                    self._replies.reply_error(done, _undeleted(forgetting.user_id, left))
                else:
                    self._replies.reply(done, None)
            elif self._has_ended:
                self._replies.reply_error(done, Unavailable("the server ended; delete again"))
            else:
                self._leaving.append((forgetting, done))

    def _begin_stop(self) -> None:
        self._is_stopping = True


def _undeleted(user_id: str, file_ids: set[int]) -> Retryable:
    names = ", ".join(f"{file_id}{SUFFIX}" for file_id in sorted(file_ids))
    return Retryable(
        f"user_id={user_id!r}: no longer stored, but files of its keys and values could not be "
        f"deleted ({names}); see to the disk of kv_disk_dir, then delete again"
    )
