"""The one thread that owns the engine.

1. `start` runs `prepare` on the thread: opening the engine, warm-up, parity. Then it serves.
2. Commands from the event loop (submit, cancel, forget, find) wait in an inbox.
3. Loop: empty the inbox, plan, reserve (inside plan), run, commit or roll back, answer.
4. Answers go back with call_soon_threadsafe, all of a step in one call.
5. A Retryable step is rolled back and its jobs fail; any other exception is fatal: all jobs fail,
   the thread ends, `on_fatal` is called on the event loop.

Must not know grpc or ONNX Runtime.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic

import numpy as np

from qanchor.bundle.packing import SuffixQuery, UserSuffix, pack
from qanchor_server.engine import Engine, FloatArray, SlotT
from qanchor_server.failures import (
    Cancelled,
    Expired,
    Fatal,
    Retryable,
    Unavailable,
    UnknownUser,
    Unserviceable,
)
from qanchor_server.kv_pool import KvPool, PrefixRef, Reservation
from qanchor_server.prefix_encoder import Encoding, PrefixEncoder
from qanchor_server.prefix_source import PreparedPrefix
from qanchor_server.scheduler import Scheduler
from qanchor_server.steps import Dropped, Finished, Job, PrefillStep, Reason, SuffixStep

log = logging.getLogger(__name__)

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Embeddings of a request's queries and what they rest on."""

    vectors_QZ: FloatArray
    """float32, one row per query; no rows for a warm-up request."""
    prefix: PrefixRef
    was_encoded: bool
    queue_seconds: float
    prefill_seconds: float
    suffix_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStats:
    """Counts since start and the pool's use, after the latest step."""

    num_answered: int = 0
    num_encoded: int = 0
    num_suffix_steps: int = 0
    num_prefill_steps: int = 0
    num_evicted: int = 0
    num_expired: int = 0
    num_cancelled: int = 0
    pool_bytes: int = 0
    pool_users: int = 0


@dataclass(frozen=True, slots=True)
class EngineParts(Generic[SlotT]):
    """What `prepare` hands over to the worker."""

    engine: Engine[SlotT]
    encoder: PrefixEncoder[SlotT]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerModel:
    """Numbers of the model that packing needs."""

    user_emb: int
    hidden_dim: int
    embedding_dim: int


@dataclass(slots=True, eq=False)
class _Pending:
    future: "asyncio.Future[Answer]"
    user_id: str
    queries: tuple[SuffixQuery, ...]
    vectors_QZ: FloatArray


@dataclass(slots=True)
class _Counts:
    values: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, amount: int = 1) -> None:
        self.values[name] = self.values.get(name, 0) + amount


_Command = Callable[[], None]


class Worker(Generic[SlotT]):
    """Runs steps on its own thread; submit, cancel, forget and find are called from the loop."""

    def __init__(
        self, *, pool: KvPool, scheduler: Scheduler, model: WorkerModel, clock: Clock
    ) -> None:
        self._pool = pool
        self._scheduler = scheduler
        self._model = model
        self._clock = clock
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._pending: dict[int, _Pending] = {}
        self._slots: dict[int, SlotT] = {}
        self._encoding: tuple[Reservation, Encoding[SlotT]] | None = None
        self._counts = _Counts()
        self._replies: list[_Command] = []
        self._next_job_id = 0
        self._is_stopping = False
        self._failure: Exception | None = None
        self._end_lock = threading.Lock()
        self._has_ended = False
        self.stats = WorkerStats()

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
    ) -> Answer:
        """Embed a user under queries; no queries: only encode the prefix.

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
            source=prepared,
        )
        vectors_QZ = np.empty((len(queries), self._model.embedding_dim), dtype=np.float32)
        future: asyncio.Future[Answer] = self._loop.create_future()
        pending = _Pending(future, prepared.ref.user_id, queries, vectors_QZ)
        self._send(lambda: self._submit(job, pending))
        try:
            return await future
        except asyncio.CancelledError:
            self._send(lambda: self._scheduler.cancel(job_id))
            raise

    async def forget(self, user_id: str, version: int) -> None:
        """Drop jobs and keys and values of a user that rest on `version` or older."""
        done: asyncio.Future[None] = self._loop.create_future()

        def command() -> None:
            self._forget(user_id, version)
            self._reply(done, None)

        self._send(command)
        await done

    async def find(self, user_id: str) -> PrefixRef | None:
        """The user's prefix in the pool, if any."""
        found: asyncio.Future[PrefixRef | None] = self._loop.create_future()
        self._send(lambda: self._reply(found, self._pool.find(user_id)))
        return await found

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
            self._send_replies()

    # What follows runs on the worker thread.

    def _serve(
        self,
        prepare: Callable[[], EngineParts[SlotT]],
        on_ready: Callable[[], None],
        on_fatal: Callable[[Exception], None],
    ) -> None:
        try:
            self._parts = prepare()
            self._loop.call_soon_threadsafe(on_ready)
            while not (self._is_stopping and not self._scheduler.has_work()):
                self._turn()
        # The process's one boundary: whatever escapes a step makes the engine's state unknown.
        except Exception as error:
            log.exception("the engine failed; the server is shutting down")
            self._failure = error
        self._end(on_fatal)

    def _end(self, on_fatal: Callable[[Exception], None]) -> None:
        """Fail what waits, refuse what still arrives, and report a failure."""
        self._is_stopping = True
        for job_id in tuple(self._pending):
            self._fail(job_id, self._refusal())
        with self._end_lock:
            self._has_ended = True
            while not self._inbox.empty():
                self._inbox.get()()
            self._send_replies()
        if self._failure is not None:
            self._loop.call_soon_threadsafe(on_fatal, self._failure)

    def _refusal(self) -> Exception:
        if self._failure is not None:
            return Fatal(f"the engine failed: {self._failure}")
        return Unavailable("the server is draining; retry")

    def _turn(self) -> None:
        self._read_inbox()
        plan = self._scheduler.plan(self._clock())
        for slot_id in self._pool.take_dropped():
            if slot_id in self._slots:
                self._parts.engine.free_slot(self._slots.pop(slot_id))
        for dropped in plan.dropped:
            self._drop(dropped)
        for finished in plan.finished:
            self._finish(finished)
        self._publish()
        self._send_replies()
        if plan.step is not None:
            self._run(plan.step)

    def _read_inbox(self) -> None:
        """Run all waiting commands; wait for one when there is nothing else to do."""
        if not self._scheduler.has_work() and not self._is_stopping:
            self._inbox.get()()
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            command()

    def _run(self, step: PrefillStep | SuffixStep) -> None:
        start_s = self._clock()
        try:
            if isinstance(step, PrefillStep):
                is_encoded = self._prefill(step)
            else:
                self._suffix(step)
                is_encoded = False
        except Retryable as error:
            log.warning("step rolled back: %s", error)
            self._scheduler.roll_back(step, str(error))
            return
        self._scheduler.commit(step, seconds=self._clock() - start_s, is_encoded=is_encoded)

    def _prefill(self, step: PrefillStep) -> bool:
        self._counts.add("num_prefill_steps")
        reservation = step.reservation
        # A reservation given up midway leaves its encoding behind; the next one is another object.
        if self._encoding is None or self._encoding[0] is not reservation:
            assert isinstance(step.source, PreparedPrefix)
            if reservation.slot_id not in self._slots:
                slot = self._parts.engine.allocate_slot(reservation.capacity)
                self._slots[reservation.slot_id] = slot
            slot = self._slots[reservation.slot_id]
            self._encoding = (reservation, self._parts.encoder.start(step.source, slot))
        is_encoded = self._parts.encoder.advance(self._encoding[1])
        if is_encoded:
            self._encoding = None
            self._counts.add("num_encoded")
        return is_encoded

    def _suffix(self, step: SuffixStep) -> None:
        self._counts.add("num_suffix_steps")
        users = []
        for user in step.users:
            queries: list[SuffixQuery] = []
            for part in user.slices:
                queries.extend(self._pending[part.job_id].queries[part.start : part.stop])
            users.append(UserSuffix(user.prefix.num_tokens, tuple(queries)))
        packed = pack(users, user_emb=self._model.user_emb, hidden_dim=self._model.hidden_dim)
        slots = [self._slots[user.slot_id] for user in step.users]
        vectors_QZ = self._parts.engine.suffix(packed, slots)
        row = 0
        for user in step.users:
            for part in user.slices:
                num_rows = part.stop - part.start
                wanted = self._pending[part.job_id].vectors_QZ
                wanted[part.start : part.stop] = vectors_QZ[row : row + num_rows]
                row += num_rows

    def _submit(self, job: Job, pending: _Pending) -> None:
        if self._is_stopping:
            self._reply_error(pending.future, self._refusal())
            return
        self._pending[job.job_id] = pending
        self._scheduler.submit(job)

    def _forget(self, user_id: str, version: int) -> None:
        slot_ids = self._scheduler.forget(user_id, version)
        if self._encoding is not None and self._encoding[0].prefix.user_id == user_id:
            self._encoding = None
        if self._failure is None:
            for slot_id in slot_ids:
                if slot_id in self._slots:
                    self._parts.engine.clear_slot(self._slots[slot_id])

    def _begin_stop(self) -> None:
        self._is_stopping = True

    def _finish(self, finished: Finished) -> None:
        pending = self._pending.pop(finished.job_id)
        self._counts.add("num_answered")
        device_s = finished.prefill_seconds + finished.suffix_seconds
        answer = Answer(
            vectors_QZ=pending.vectors_QZ,
            prefix=finished.prefix,
            was_encoded=finished.was_encoded,
            queue_seconds=max(0.0, self._clock() - finished.arrival_s - device_s),
            prefill_seconds=finished.prefill_seconds,
            suffix_seconds=finished.suffix_seconds,
        )
        self._reply(pending.future, answer)

    def _drop(self, dropped: Dropped) -> None:
        pending = self._pending[dropped.job_id]
        match dropped.reason:
            case Reason.EXPIRED:
                self._counts.add("num_expired")
                self._fail(dropped.job_id, Expired("the deadline passed in the queue"))
            case Reason.CANCELLED:
                self._counts.add("num_cancelled")
                self._fail(dropped.job_id, Cancelled("the caller has gone"))
            case Reason.DELETED:
                self._fail(dropped.job_id, UnknownUser(pending.user_id))
            case Reason.UNSERVICEABLE:
                self._fail(dropped.job_id, Unserviceable(dropped.detail))
            case Reason.RETRYABLE:
                self._fail(dropped.job_id, Retryable(dropped.detail))

    def _fail(self, job_id: int, error: Exception) -> None:
        self._reply_error(self._pending.pop(job_id).future, error)

    def _reply(self, future: "asyncio.Future[Any]", result: Any) -> None:
        self._replies.append(lambda: None if future.done() else future.set_result(result))

    def _reply_error(self, future: "asyncio.Future[Any]", error: Exception) -> None:
        self._replies.append(lambda: None if future.done() else future.set_exception(error))

    def _send_replies(self) -> None:
        if self._replies:
            replies, self._replies = self._replies, []
            self._loop.call_soon_threadsafe(_call_all, replies)

    def _publish(self) -> None:
        self.stats = WorkerStats(
            **self._counts.values,
            num_evicted=self._pool.num_evicted,
            pool_bytes=self._pool.used_bytes,
            pool_users=self._pool.num_users,
        )


def _call_all(commands: list[_Command]) -> None:
    for command in commands:
        command()
