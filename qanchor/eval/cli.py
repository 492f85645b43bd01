"""`qanchor eval`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qanchor.config import Scenario


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `qanchor eval`."""
    parser = subparsers.add_parser(
        "eval",
        help="judge a checkpoint's embeddings by linear probes",
        description=(
            "Embed every user of a data set for each of its scenarios, fit a linear probe on the "
            "train users, choose its strength on valid, report AUC and KS on test. The untrained "
            "model of the same run and hand-made features stand beside it."
        ),
    )
    parser.add_argument("checkpoint", type=Path, help="e.g. runs/oulad/checkpoint")
    parser.add_argument("dataset", type=Path, help="data set directory with labels and scenarios")
    parser.add_argument("--untrained", type=Path, help="default: the run's own untrained/")
    parser.add_argument(
        "--no-handmade", action="store_true", help="leave the hand-made-feature baselines out"
    )
    parser.add_argument(
        "--max-users", type=int, default=0, help="users per split; quicker and noisier (0 = all)"
    )
    parser.add_argument(
        "--scenarios",
        type=Path,
        metavar="FILE",
        help="also judge the scenarios of a file of `qanchor tune` or `qanchor compile`",
    )
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table and the averages."""
    import msgspec

    from qanchor import config
    from qanchor.bundle.scenario_file import check_fits, read_scenario_file
    from qanchor.checkpoint import checkpoint_id, load_checkpoint
    from qanchor.data.dataset import open_dataset
    from qanchor.eval.evaluate import evaluate, markdown_table, untrained_beside
    from qanchor.train.allocator import keep_freed_memory

    keep_freed_memory()
    main = load_checkpoint(args.checkpoint)
    checkpoints = {"Q-Anchor": main}
    tuned: tuple[Scenario, ...] = ()
    if args.scenarios:
        file = read_scenario_file(args.scenarios)
        check_fits(file, checkpoint_id(main), main.hidden_dim)
        tuned = file.scenarios
    untrained = args.untrained or untrained_beside(args.checkpoint)
    if untrained is None:
        print("no untrained/ beside the checkpoint: left out", file=sys.stderr)
    else:
        checkpoints["untrained model"] = load_checkpoint(untrained)
    dataset = open_dataset(args.dataset)
    result = evaluate(checkpoints, dataset, not args.no_handmade, args.max_users, tuned)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        config.save(result, args.out)
    print(markdown_table(result))
    averages = {
        method.method: {
            "auc": method.average_auc,
            "ks": method.average_ks,
            "valid_auc": method.average_valid_auc,
        }
        for method in result.methods
    }
    print(msgspec.json.encode(averages).decode())
    return 0
