"""What gradient caching costs and saves: memory and time of a step by users per batch and piece.

    python -m bench.large_batch [--users 4500] [--settings 32:0,256:0,256:32,2048:32] [--out FILE]

Simulated users, recipe `mini`, one process per setting, so that each has its own peak. A setting is
users_per_batch:users_per_piece. Settings of one batch size must agree in their losses. The last
line is JSON, with the environment.
"""

import argparse
import dataclasses
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import torch

from qanchor.checkpoint import load_checkpoint, save_checkpoint
from qanchor.config import override
from qanchor.data.dataset import open_dataset
from qanchor.data.useru import TripleOptions, write_triples
from qanchor.data.wallet import generate_wallet
from qanchor.environment import environment
from qanchor.train.allocator import keep_freed_memory
from qanchor.train.gradient_cache import backward
from qanchor.train.recipes import mini
from qanchor.train.sources import fresh_sources, in_shards
from qanchor.train.step import Step

logger = logging.getLogger("bench.large_batch")

START = "untrained"
LOSS_TOLERANCE = 0.01
"""Relative; bfloat16 sums in other pieces."""


def prepare(directory: Path, num_users: int) -> None:
    """Users, triples and an untrained checkpoint; the users of all settings lie in one shard."""
    generate_wallet(directory / "data", num_users, seed=0)
    dataset = open_dataset(directory / "data")
    options = TripleOptions(per_user_future=4, per_user_uqa=0)
    write_triples(dataset, directory / "triples.parquet", options)
    recipe = override(mini(), [f"train.shard_users={num_users}", "train.heldout_users=0"])
    checkpoint, _ = fresh_sources(recipe, dataset, directory / "triples.parquet", directory)
    save_checkpoint(checkpoint, directory / START)


def measure(directory: Path, setting: str, num_steps: int) -> dict[str, Any]:
    """Median seconds per step and peak resident bytes of a setting, in this process."""
    users_per_batch, users_per_piece = (int(part) for part in setting.split(":"))
    keep_freed_memory()
    torch.set_num_threads(os.cpu_count() or 1)
    checkpoint = load_checkpoint(directory / START)
    train = [f"train.users_per_batch={users_per_batch}", "train.queries_per_user=1"]
    recipe = override(checkpoint.meta.recipe, train)
    meta = msgspec.structs.replace(checkpoint.meta, recipe=recipe)
    source = in_shards(dataclasses.replace(checkpoint, meta=meta), directory).training
    step = Step(
        model=checkpoint.model.train(),
        loss=recipe.loss,
        dtype=recipe.train.dtype,
        users_per_piece=users_per_piece,
    )
    picked = source.batch(0)
    before_bytes = peak_bytes()
    seconds = []
    for _ in range(1 + num_steps):
        step.model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        losses = backward(step, picked, is_masked=False)
        seconds.append(time.perf_counter() - start)
    return {
        "setting": setting,
        "num_users": len(picked.users),
        "step_seconds": statistics.median(seconds[1:]),
        "all_seconds": seconds[1:],
        "before_bytes": before_bytes,
        "peak_bytes": peak_bytes(),
        "contrastive": losses.contrastive.item(),
        "next_token": losses.next_token.item(),
    }


def peak_bytes() -> int:
    """Most resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def agree(rows: list[dict[str, Any]]) -> bool:
    """Whether settings of one batch size have the same losses."""
    first: dict[str, dict[str, Any]] = {}
    is_same = True
    for row in rows:
        other = first.setdefault(str(row["setting"]).split(":")[0], row)
        for term in ("contrastive", "next_token"):
            expected, found = other[term], row[term]
            if abs(found - expected) > LOSS_TOLERANCE * abs(expected):
                logger.error("%s of %s is %f, expected %f", term, row["setting"], found, expected)
                is_same = False
    return is_same


def main() -> int:
    """Measure every setting; exit code 1 when losses disagree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=4500, help="simulated, all splits together")
    parser.add_argument("--settings", default="32:0,256:0,256:32,2048:32")
    parser.add_argument("--steps", type=int, default=5, help="after a warm-up; median shown")
    parser.add_argument("--out", type=Path, help="where the JSON goes besides stdout")
    parser.add_argument("--one", nargs=2, metavar=("DIR", "SETTING"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(Path(args.one[0]), args.one[1], args.steps)))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), args.users)
        for setting in args.settings.split(","):
            command = [sys.executable, "-m", "bench.large_batch", "--steps", str(args.steps)]
            done = subprocess.run(
                [*command, "--one", name, setting], check=True, stdout=subprocess.PIPE
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            logger.info("%s", rows[-1])
    result = {"rows": rows, "environment": msgspec.to_builtins(environment())}
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0 if agree(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
