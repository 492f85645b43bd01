"""Suite `training`: time and memory of a training step by users per batch and per piece of it.

Shows what gradient caching costs and saves. Simulated users, recipe `mini`. Each setting has a
process of its own, so that each has its own peak memory; its steps follow one another.

python -m qanchor_bench.suites.training DIRECTORY USERS_PER_BATCH USERS_PER_PIECE STEPS THREADS
"""

import dataclasses
import json
import logging
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from qanchor.checkpoint import load_checkpoint, save_checkpoint
from qanchor.config import Config, override
from qanchor.data.dataset import open_dataset
from qanchor.data.useru import TripleOptions, write_triples
from qanchor.data.wallet import generate_wallet
from qanchor.train.allocator import keep_freed_memory
from qanchor.train.gradient_cache import backward
from qanchor.train.recipes import mini
from qanchor.train.sources import fresh_sources, in_shards
from qanchor.train.step import Step, autocast_dtype
from qanchor.train.yes_no import yes_no_of
from qanchor_bench.bench import Bench
from qanchor_bench.result import Check, Findings, Point

logger = logging.getLogger(__name__)

_START = "untrained"
_LOSS_TOLERANCE = 0.01
"""Relative; bfloat16 sums in other pieces."""
_TERMS = ("contrastive", "next_token")


class Measured(Config, frozen=True, kw_only=True):
    """One setting in a process of its own."""

    users_per_batch: int
    users_per_piece: int
    num_users: int
    """Users really in the batch."""
    seconds: tuple[float, ...]
    """Of each step after the first."""
    before_bytes: int
    """Peak resident memory before the first step."""
    peak_bytes: int
    contrastive: float
    next_token: float

    @property
    def name(self) -> str:
        """For people."""
        pieces = f"in pieces of {self.users_per_piece}" if self.users_per_piece else "in one piece"
        return f"{self.users_per_batch} users {pieces}"


def run(bench: Bench) -> Findings:
    """Measure every setting; settings of one batch size must agree in their losses."""
    scenario = bench.scenario
    prepare(bench.scratch, scenario.users[0], scenario.seed)
    rows = []
    for users_per_batch, users_per_piece in scenario.batches:
        arguments = (users_per_batch, users_per_piece, scenario.repeats, bench.threads)
        command = [sys.executable, "-m", __name__, str(bench.scratch), *map(str, arguments)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        rows.append(msgspec.json.decode(done.stdout.splitlines()[-1], type=Measured))
        logger.info("%s: %s", rows[-1].name, rows[-1].seconds)
    return Findings(
        points=tuple(point for row in rows for point in _points(row)),
        checks=tuple(agreement(rows)),
        figures=figures(rows),
        notes=("a process per setting: settings do not take turns within a round",),
    )


def prepare(directory: Path, num_users: int, seed: int) -> None:
    """Users, triples and an untrained checkpoint; the users of all settings lie in one shard."""
    generate_wallet(directory / "data", num_users, seed=seed)
    dataset = open_dataset(directory / "data")
    options = TripleOptions(per_user_future=4, per_user_uqa=0)
    write_triples(dataset, directory / "triples.parquet", options)
    recipe = override(mini(), [f"train.shard_users={num_users}", "train.heldout_users=0"])
    checkpoint, _ = fresh_sources(recipe, dataset, directory / "triples.parquet", directory)
    save_checkpoint(checkpoint, directory / _START)


def measure(
    directory: Path, users_per_batch: int, users_per_piece: int, num_steps: int
) -> Measured:
    """One setting in this process: a first step, then `num_steps` that count."""
    keep_freed_memory()
    checkpoint = load_checkpoint(directory / _START)
    train = [f"train.users_per_batch={users_per_batch}", "train.queries_per_user=1"]
    recipe = override(checkpoint.meta.recipe, train)
    meta = msgspec.structs.replace(checkpoint.meta, recipe=recipe)
    source = in_shards(dataclasses.replace(checkpoint, meta=meta), directory).training
    step = Step(
        model=checkpoint.model.train(),
        loss=recipe.loss,
        dtype=autocast_dtype(recipe.train.dtype, torch.device("cpu")),
        users_per_piece=users_per_piece,
        yes_no=yes_no_of(checkpoint),
    )
    picked = source.batch(0)
    before_bytes = _peak_bytes()
    seconds = []
    for _ in range(1 + num_steps):
        step.model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        losses = backward(step, picked, is_masked=False)
        seconds.append(time.perf_counter() - start)
    return Measured(
        users_per_batch=users_per_batch,
        users_per_piece=users_per_piece,
        num_users=len(picked.users),
        seconds=tuple(seconds[1:]),
        before_bytes=before_bytes,
        peak_bytes=_peak_bytes(),
        contrastive=losses.contrastive.item(),
        next_token=losses.by_name()["next_token"],
    )


def figures(rows: Sequence[Measured]) -> dict[str, float | None]:
    """Of each batch in pieces against the same batch in one piece: time, and memory it adds."""
    whole = {row.users_per_batch: row for row in rows if not row.users_per_piece}
    found: dict[str, float | None] = {}
    for row in rows:
        other = whole.get(row.users_per_batch)
        if row.users_per_piece and other:
            key = f"{row.users_per_batch}_by_{row.users_per_piece}"
            times = [_points(one)[0].median for one in (row, other)]
            added = [one.peak_bytes - one.before_bytes for one in (row, other)]
            found[f"{key}_time_over_one_piece"] = times[0] / times[1]
            found[f"{key}_memory_over_one_piece"] = added[0] / added[1] if added[1] else None
    return found


def agreement(rows: Sequence[Measured]) -> list[Check]:
    """Whether settings of one batch size have the same losses, and all have finite ones."""
    first: dict[int, Measured] = {}
    checks = []
    for row in rows:
        other = first.setdefault(row.users_per_batch, row)
        pairs = [(getattr(other, term), getattr(row, term)) for term in _TERMS]
        checks.append(
            Check(
                name=f"losses of {row.name} {'are finite' if row is other else f'= {other.name}'}",
                # `<=`, so that a NaN fails.
                is_ok=all(abs(b - a) <= _LOSS_TOLERANCE * abs(a) for a, b in pairs),
                detail=f"contrastive {row.contrastive:.4f}, next token {row.next_token:.4f}",
            )
        )
    return checks


def _points(row: Measured) -> tuple[Point, Point]:
    labels: dict[str, str | float] = {
        "users_per_batch": row.users_per_batch,
        "users_per_piece": row.users_per_piece,
        "num_users": row.num_users,
    }
    step = Point(
        name=f"step: {row.name}", group="step", labels=labels, unit="s", values=row.seconds
    )
    added = float(row.peak_bytes - row.before_bytes)
    memory = Point(
        name=f"peak memory above the start: {row.name}",
        group="bytes",
        labels=labels,
        unit="bytes",
        values=(added,),
    )
    return step, memory


def _peak_bytes() -> int:
    """Most resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure one setting; the last line is JSON."""
    directory, *numbers = sys.argv[1:]
    users_per_batch, users_per_piece, num_steps, threads = (int(number) for number in numbers)
    torch.set_num_threads(threads)
    found = measure(Path(directory), users_per_batch, users_per_piece, num_steps)
    print(json.dumps(msgspec.to_builtins(found)))


if __name__ == "__main__":
    main()
