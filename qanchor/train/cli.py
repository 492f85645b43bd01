"""`qanchor pretrain`."""

import argparse
import os
from pathlib import Path

from qanchor.config import add_set_argument


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `qanchor pretrain`."""
    parser = subparsers.add_parser(
        "pretrain",
        help="train both towers on a data set's train users",
        description=(
            "Joint contrastive and next-token pre-training. Writes RUN/untrained (step 0), "
            "RUN/checkpoint (newest) and RUN/metrics.jsonl. Labels are never read. Without "
            "--triples they are made first, as RUN/triples.parquet. A run goes on with the recipe, "
            "triples and data set it was begun with. On several devices: "
            "torchrun --nproc-per-node 2 -m qanchor.cli pretrain ... (docs/training.md)."
        ),
    )
    parser.add_argument("dataset", type=Path, help="data set directory, see `qanchor data`")
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="where the run is kept")
    parser.add_argument("--recipe", help="mini (2 CPU cores; the default) or qwen2.5-0.5b")
    parser.add_argument("--triples", type=Path, help="Parquet of (user_id, query, answer)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in RUN")
    add_set_argument(parser, "--set train.steps=200 --set loss.margin=null")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train or resume; the last line names the checkpoint."""
    if os.environ.get("RANK", "0") != "0":
        # One process shows bars; tqdm reads this when it is imported.
        os.environ["TQDM_DISABLE"] = "1"
    import msgspec

    from qanchor.config import override
    from qanchor.data.dataset import open_dataset
    from qanchor.train.distributed import joined_processes
    from qanchor.train.pretrain import pretrain, resume
    from qanchor.train.recipes import recipe_named

    with joined_processes() as processes:
        dataset = open_dataset(args.dataset)
        if args.resume:
            _refuse_changes(args)
            checkpoint = resume(dataset, args.triples, args.run_dir, processes)
        else:
            recipe = override(recipe_named(args.recipe or "mini"), args.assignments)
            checkpoint = pretrain(recipe, dataset, args.triples, args.run_dir, processes)
    if processes.is_first:
        print(msgspec.json.encode({"checkpoint": str(checkpoint)}).decode())
    return 0


def _refuse_changes(args: argparse.Namespace) -> None:
    """Raise ConfigError for a recipe or an override that the run in RUN does not have."""
    from qanchor.checkpoint import read_meta
    from qanchor.config import override
    from qanchor.errors import ConfigError
    from qanchor.train.run_directory import newest

    begun = read_meta(newest(args.run_dir)).recipe
    rule, remedy = "a resumed run keeps its recipe", "leave it out, or begin another run"
    if args.recipe not in (None, begun.name):
        raise ConfigError("--recipe", args.recipe, f"{rule}, {begun.name}", remedy)
    for assignment in args.assignments:
        if override(begun, [assignment]) != begun:
            raise ConfigError("--set", assignment, f"{rule}, which has another value", remedy)
