"""Jobs whose callers wait, and the way of answers back to the event loop.

Answers are collected and cross over in one call per step. Must not know engines or schedulers.
Call from the worker thread only; once it has ended, from whoever holds its lock.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qanchor_server.answers import Answer, Counts
from qanchor_server.failures import (
    Cancelled,
    Expired,
    Retryable,
    UnknownUser,
    Unserviceable,
)
from qanchor_server.kv_pool import Found
from qanchor_server.step_runner import Rows
from qanchor_server.steps import Dropped, Finished, Reason


@dataclass(frozen=True, slots=True, eq=False)
class Caller:
    """Who waits for a job."""

    future: "asyncio.Future[Answer]"
    user_id: str


class Replies:
    """Open jobs, and answers that have not crossed over yet."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._callers: dict[int, Caller] = {}
        self._waiting: list[Callable[[], None]] = []
        self.rows: dict[int, Rows] = {}
        """Queries and embeddings of open jobs."""

    def open(self, job_id: int, caller: Caller, rows: Rows) -> None:
        """Expect an answer for a job."""
        self._callers[job_id] = caller
        self.rows[job_id] = rows

    def finish(self, finished: Finished, now_s: float) -> None:
        """Answer a job."""
        caller, rows = self._callers.pop(finished.job_id), self.rows.pop(finished.job_id)
        self._counts.add("num_answered")
        self._counts.add("num_device_hits", int(finished.found is Found.DEVICE))
        device_s = finished.prefill_seconds + finished.suffix_seconds
        answer = Answer(
            vectors_QZ=rows.vectors_QZ,
            prefix=finished.prefix,
            found=finished.found,
            is_kept=finished.is_kept,
            queue_seconds=max(0.0, now_s - finished.arrival_s - device_s),
            prefill_seconds=finished.prefill_seconds,
            suffix_seconds=finished.suffix_seconds,
        )
        self.reply(caller.future, answer)

    def drop(self, dropped: Dropped) -> None:
        """Tell why a job left without an answer."""
        match dropped.reason:
            case Reason.EXPIRED:
                self._counts.add("num_expired")
                error: Exception = Expired("the deadline passed in the queue")
            case Reason.CANCELLED:
                self._counts.add("num_cancelled")
                error = Cancelled("the caller has gone")
            case Reason.DELETED:
                error = UnknownUser(self._callers[dropped.job_id].user_id)
            case Reason.UNSERVICEABLE:
                error = Unserviceable(dropped.detail)
            case Reason.RETRYABLE:
                error = Retryable(dropped.detail)
        self._fail(dropped.job_id, error)

    def fail_all(self, make_error: Callable[[], Exception]) -> None:
        """Fail every open job."""
        for job_id in tuple(self._callers):
            self._fail(job_id, make_error())

    def reply(self, future: "asyncio.Future[Any]", result: Any) -> None:
        """Set a future's result, unless its caller has gone."""
        self._waiting.append(lambda: None if future.done() else future.set_result(result))

    def reply_error(self, future: "asyncio.Future[Any]", error: Exception) -> None:
        """Set a future's exception, unless its caller has gone."""
        self._waiting.append(lambda: None if future.done() else future.set_exception(error))

    def send(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have the loop set what was collected."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            loop.call_soon_threadsafe(_call_all, waiting)

    def _fail(self, job_id: int, error: Exception) -> None:
        del self.rows[job_id]
        self.reply_error(self._callers.pop(job_id).future, error)


def _call_all(commands: list[Callable[[], None]]) -> None:
    for command in commands:
        command()
