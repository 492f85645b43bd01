"""Tasks side by side: each once, begun in order, at most so many at a time, failures passed on."""

import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from qanchor_server.engine.lanes import Lanes


def run(lanes: Lanes, tasks: list[Callable[[int], Any]]) -> Any:
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    lanes.begin(tasks, ended.put)
    found = ended.get(timeout=10)
    if isinstance(found, Exception):
        raise found
    return found


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 50])
def test_every_task_runs_once_and_answers_in_order(num_tasks):
    ran = []

    def task(number: int, lane: int) -> int:
        assert lane in range(3)
        ran.append(number)
        time.sleep(0.001 * (number % 3))
        return number * number

    lanes = Lanes(3)
    for _ in range(3):
        found = run(lanes, [partial(task, number) for number in range(num_tasks)])
        assert found == [number * number for number in range(num_tasks)]
    assert sorted(ran) == sorted(3 * list(range(num_tasks)))


def test_lanes_work_at_the_same_time_and_have_numbers():
    meet = threading.Barrier(2, timeout=10)

    def task(lane: int) -> int:
        meet.wait()
        return lane

    lanes = Lanes(2)
    for _ in range(20):
        assert sorted(run(lanes, [task, task])) == [0, 1]


def test_what_is_begun_later_runs_when_a_lane_is_free():
    lanes, gate = Lanes(2), threading.Event()
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def waits(lane: int) -> str:
        assert gate.wait(timeout=10)
        return "first"

    lanes.begin([waits, lambda _: "first"], ended.put)
    lanes.begin([lambda _: "second"], ended.put)
    # One lane is held up; the other goes on to what was begun after it.
    assert ended.get(timeout=10) == ["second"]
    gate.set()
    assert ended.get(timeout=10) == ["first", "first"]


def test_a_failure_is_passed_on_when_all_have_ended():
    ended = []

    def task(number: int, lane: int) -> None:
        if number == 0:
            raise MemoryError("no room")
        time.sleep(0.02)
        ended.append(number)

    lanes = Lanes(2)
    for _ in range(2):
        ended.clear()
        with pytest.raises(MemoryError, match="no room"):
            run(lanes, [partial(task, number) for number in range(4)])
        assert sorted(ended) == [1, 2, 3]
    assert run(lanes, [lambda _: 1, lambda _: 2]) == [1, 2]
