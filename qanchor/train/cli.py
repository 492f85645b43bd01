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
            "--triples they are made first, as RUN/triples.parquet. On several devices: "
            "torchrun --nproc-per-node 2 -m qanchor.cli pretrain ... (docs/training.md)."
        ),
    )
    parser.add_argument("dataset", type=Path, help="data set directory, see `qanchor data`")
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="where the run is kept")
    parser.add_argument("--recipe", default="mini", help="mini (2 CPU cores) or qwen2.5-0.5b")
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
    from qanchor.data.useru import write_triples
    from qanchor.train.distributed import joined_processes
    from qanchor.train.pretrain import pretrain, resume
    from qanchor.train.recipes import recipe_named

    with joined_processes() as processes:
        dataset = open_dataset(args.dataset)
        recipe = override(recipe_named(args.recipe), args.assignments)
        triples = args.triples or args.run_dir / "triples.parquet"
        if processes.is_first and not triples.is_file():
            triples.parent.mkdir(parents=True, exist_ok=True)
            write_triples(dataset, triples, recipe.triples)
        processes.wait()
        if args.resume:
            checkpoint = resume(dataset, triples, args.run_dir, processes)
        else:
            checkpoint = pretrain(recipe, dataset, triples, args.run_dir, processes)
    if processes.is_first:
        print(msgspec.json.encode({"checkpoint": str(checkpoint)}).decode())
    return 0
