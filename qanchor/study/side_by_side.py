"""Variants of a study side by side, a process each: a GPU takes several small trainings at once."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

import torch
from tqdm import tqdm

from qanchor.study.plan import Variant
from qanchor.study.runs import VariantRun
from qanchor.study.work import Finished, Work

T = TypeVar("T")

_work: Work
"""Of a worker process."""


def finish_side_by_side(
    work: Work, pairs: list[tuple[Variant, VariantRun]], jobs: int
) -> list[Finished]:
    """The records of all variants; `jobs` processes train and judge those that have none."""
    open_pairs = [pair for pair in pairs if work.recorded(*pair) is None]
    # Before anything is judged: variants that share a run must not train it twice.
    runs = {run.key: run for _, run in open_pairs}
    with _pool(work, jobs) as pool:
        _all_done([pool.submit(_train, run) for run in runs.values()], "training", "run")
        judging = [pool.submit(_finish, variant, run) for variant, run in open_pairs]
        _all_done(judging, "judging", "variant")
    return [work.finished(*pair) for pair in pairs]


@contextmanager
def _pool(work: Work, jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes that draw no bars; trainings divide the cores, as under torchrun."""
    shared = {"LOCAL_WORLD_SIZE": str(jobs), "TQDM_DISABLE": "1"}
    before = {name: os.environ.get(name) for name in shared}
    os.environ.update(shared)
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(jobs, context, _start, (work, jobs)) as pool:
            yield pool
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _all_done(futures: list[Future[T]], doing: str, unit: str) -> None:
    """Wait for all, with a progress bar; an error is raised when the others have finished."""
    bar = tqdm(as_completed(futures), total=len(futures), desc=doing, unit=unit)
    errors = [error for future in bar if (error := future.exception()) is not None]
    if errors:
        raise errors[0]


def _start(work: Work, jobs: int) -> None:
    global _work
    _work = work
    torch.set_num_threads(max((os.cpu_count() or 1) // jobs, 1))
    threading.Thread(target=_end_with_the_study, daemon=True).start()


def _end_with_the_study() -> None:
    """A killed study that is started again must not meet a run that is still being written."""
    study = multiprocessing.parent_process()
    assert study is not None, "This is a bug: a worker has no parent."
    study.join()
    os._exit(1)


def _train(run: VariantRun) -> None:
    _work.train(run)


def _finish(variant: Variant, run: VariantRun) -> None:
    _work.finished(variant, run)
