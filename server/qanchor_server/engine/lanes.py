"""Threads that work side by side, each with a number.

Must not know ONNX Runtime.
"""

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeAlias, TypeVar

T = TypeVar("T")
Task: TypeAlias = Callable[[int], T]
"""Takes the number of the lane it runs in, counted from 0."""
Done: TypeAlias = Callable[[list[T] | Exception], None]
"""Takes what each task returned, in order, or what the first that failed raised."""


class Lanes:
    """Runs tasks in the order given, at most `count` at once; for tasks that let the GIL go."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._numbers = itertools.count()
        self._own = threading.local()
        self._threads = ThreadPoolExecutor(
            count, thread_name_prefix="qanchor-lane", initializer=self._take_number
        )

    def begin(self, tasks: Sequence[Task[T]], done: Done[T]) -> None:
        """Queue tasks, at least one, behind those of earlier calls, and return at once.

        `done` is called once all have ended, in the lane of the last; what it raised would be lost.
        """
        batch = _Batch(len(tasks), done)
        for place, task in enumerate(tasks):
            self._threads.submit(self._work, batch, place, task)

    def _take_number(self) -> None:
        self._own.number = next(self._numbers)

    def _work(self, batch: "_Batch[T]", place: int, task: Task[T]) -> None:
        try:
            result: T | Exception = task(self._own.number)
        # It goes to whoever waits for the batch.
        except Exception as error:
            result = error
        batch.ended(place, result)


class _Batch(Generic[T]):
    """Results of the tasks of one call."""

    def __init__(self, count: int, done: Done[T]) -> None:
        self._done = done
        self._lock = threading.Lock()
        self._left = count
        self._results: dict[int, T] = {}
        self._failure: Exception | None = None

    def ended(self, place: int, result: T | Exception) -> None:
        with self._lock:
            self._left -= 1
            if not isinstance(result, Exception):
                self._results[place] = result
            elif self._failure is None:
                self._failure = result
            is_last = not self._left
        if is_last:
            results = self._results
            self._done(self._failure or [results[place] for place in range(len(results))])
