"""Tasks side by side: each once, in order, at most so many at a time, failures passed on."""

import threading
import time
from functools import partial

import pytest

from qanchor_server.engine.lanes import Lanes


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 50])
def test_every_task_runs_once_and_answers_in_order(num_tasks):
    ran = []

    def task(number: int) -> int:
        ran.append(number)
        time.sleep(0.001 * (number % 3))
        return number * number

    lanes = Lanes(3)
    for _ in range(3):
        found = lanes.run([partial(task, number) for number in range(num_tasks)])
        assert found == [number * number for number in range(num_tasks)]
    assert sorted(ran) == sorted(3 * list(range(num_tasks)))


def test_tasks_run_side_by_side_on_the_callers_thread_too():
    meet = threading.Barrier(2, timeout=10)

    def task() -> str:
        meet.wait()
        return threading.current_thread().name

    names = Lanes(2).run([task, task])
    assert threading.current_thread().name in names
    assert len(set(names)) == 2


def test_a_failure_is_raised_when_all_have_ended():
    ended = []

    def task(number: int) -> None:
        if number == 0:
            raise MemoryError("no room")
        time.sleep(0.02)
        ended.append(number)

    lanes = Lanes(2)
    for _ in range(2):
        ended.clear()
        with pytest.raises(MemoryError, match="no room"):
            lanes.run([partial(task, number) for number in range(4)])
        assert ended == [1, 2, 3]
    assert lanes.run([lambda: 1, lambda: 2]) == [1, 2]
