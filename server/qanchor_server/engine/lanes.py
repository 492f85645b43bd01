"""Threads that work side by side, the caller's being one of them.

Must not know ONNX Runtime. One caller at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")


class Lanes:
    """Runs independent tasks, at most `count` at once; for tasks that let the GIL go."""

    def __init__(self, count: int) -> None:
        """`count`: at least 2; the caller's thread is one."""
        self.count = count
        self._helpers = ThreadPoolExecutor(count - 1, thread_name_prefix="qanchor-lane")

    def run(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """What each task returns, in order. Raises what a task raised, once all have ended."""
        found: dict[int, T] = {}
        # Whoever is free takes the next one; next() of this iterator is one bytecode under the GIL.
        left = iter(range(len(tasks)))
        helpers = [
            self._helpers.submit(_work, tasks, left, found)
            for _ in range(min(len(tasks), self.count) - 1)
        ]
        try:
            _work(tasks, left, found)
        finally:
            wait(helpers)
        for helper in helpers:
            helper.result()
        return [found[number] for number in range(len(tasks))]


def _work(tasks: Sequence[Callable[[], T]], left: Iterator[int], found: dict[int, T]) -> None:
    for number in left:
        found[number] = tasks[number]()
