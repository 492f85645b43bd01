"""`qanchor eval`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qanchor.config import add_set_argument
from qanchor.errors import ConfigError

if TYPE_CHECKING:
    from qanchor.config import Scenario
    from qanchor.eval.config import EvalConfig
    from qanchor.eval.methods import Subject

_HELP = """\
Embed every user of a data set for each of its scenarios, fit a linear probe on the train users,
choose its strength on valid, report AUC and KS on test with 95 % bootstrap intervals. Beside it
stand the untrained model of the same run, one question for all scenarios, mean-pooled event
vectors and hand-made features; then zero-shot scoring, what a query changes, where the embedding
token looks, and plots. --without leaves parts out; --max-users makes it quicker and noisier. A
scenario that lacks users of both classes in a split is left out; log, JSON and page say so.

  qanchor eval runs/oulad/checkpoint data/oulad --out eval.json --report eval.html
  qanchor eval runs/oulad/checkpoint data/oulad --wordings wordings.json --report eval.html
  qanchor eval runs/oulad/checkpoint data/oulad --outcomes outcomes.json --out eval.json
  qanchor eval runs/oulad/checkpoint data/oulad --scenarios tuned.json \\
      --also user-only=studies/oulad/runs/KEY/checkpoint --report eval.html

A study's page names the checkpoint of each of its variants.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `qanchor eval`."""
    parser = subparsers.add_parser(
        "eval",
        help="judge a checkpoint's embeddings beside baselines",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="e.g. runs/oulad/checkpoint")
    parser.add_argument("dataset", type=Path, help="data set directory with labels and scenarios")
    parser.add_argument("--untrained", type=Path, help="default: the run's own untrained/")
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="NAME=CHECKPOINT",
        help="judge another run's checkpoint too, e.g. a user-only model of `qanchor study`",
    )
    parser.add_argument(
        "--scenarios",
        type=Path,
        metavar="FILE",
        help="also judge the scenarios of a file of `qanchor tune` or `qanchor compile`",
    )
    parser.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help="JSON or TOML with lists `yes` and `no` of answer texts for zero-shot scoring, and "
        "under `scenarios` a scenario's own",
    )
    parser.add_argument(
        "--wordings",
        type=Path,
        metavar="FILE",
        help="JSON or TOML: scenario name to a list of other questions that ask the same, each "
        "scored zero-shot on the test users: how far the words matter",
    )
    parser.add_argument(
        "--outcomes",
        type=Path,
        metavar="FILE",
        help="JSON or TOML: name to kind, days, questions and what it is about (an example: "
        "docs/training.md, `What training asks`): anything train users' recorded futures answer "
        "with yes or no, scored zero-shot, users held out from training told apart",
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="PART",
        help="leave a part out, may be repeated: universal, pooled, handmade, zero-shot, queries, "
        "few-labels, attention, plots",
    )
    parser.add_argument(
        "--max-users",
        type=int,
        default=0,
        help="users per split, drawn at random but always the same: quicker and noisier figures, "
        "to be compared with those of the same limit alone (0 = all)",
    )
    add_set_argument(parser, "--set num_draws=200 (qanchor/eval/config.py)")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--report", type=Path, help="write one self-contained HTML page")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the tables and the averages."""
    import msgspec

    from qanchor import config
    from qanchor.data.dataset import open_dataset
    from qanchor.eval.evaluate import evaluate
    from qanchor.eval.outcomes import read_outcomes
    from qanchor.eval.results import difference_table, markdown_table
    from qanchor.train.allocator import keep_freed_memory

    keep_freed_memory()
    dataset = open_dataset(args.dataset)
    settings = _settings(args, dataset.scenarios)
    if args.report:
        # Wanted only at the end, missed before the work.
        import matplotlib.figure  # noqa: F401

        from qanchor.eval.report import document
        from qanchor.report.document import write_html
    outcomes = read_outcomes(args.outcomes, dataset) if args.outcomes else {}
    evaluated = evaluate(subject_of(args), dataset, settings, outcomes)
    result = evaluated.evaluation
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        config.save(result, args.out)
    if args.report:
        page = document(result, evaluated.projections, dataset.config.note)
        write_html(page, args.report)
    print(markdown_table(result.methods))
    print()
    print(difference_table(result.differences))
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


def _settings(args: argparse.Namespace, scenarios: "tuple[Scenario, ...]") -> "EvalConfig":
    import msgspec

    from qanchor.config import nearest, override
    from qanchor.eval.config import PARTS, EvalConfig, read_answers, read_wordings

    for part in args.without:
        if part not in PARTS:
            raise ConfigError("--without", part, "no such part", nearest(part, list(PARTS)))
    without = {*args.without, *(() if args.report else ("plots",))}
    settings = EvalConfig(
        parts=tuple(part for part in PARTS if part not in without), max_users=args.max_users
    )
    settings = override(settings, args.assignments)
    if args.answers:
        answers = read_answers(args.answers, scenarios)
        settings = msgspec.structs.replace(settings, answers=answers)
    if args.wordings:
        wordings = read_wordings(args.wordings, scenarios)
        settings = msgspec.structs.replace(settings, wordings=wordings)
    return settings


def subject_of(args: argparse.Namespace) -> "Subject":
    """The checkpoints and scenarios an evaluation is about. Raises ConfigError."""
    from qanchor.bundle.scenario_file import check_fits, read_scenario_file
    from qanchor.checkpoint import checkpoint_id, load_for_inference
    from qanchor.eval.evaluate import untrained_beside
    from qanchor.eval.methods import Subject

    main = load_for_inference(args.checkpoint)
    others = {}
    for assignment in args.also:
        name, equals, path = assignment.partition("=")
        if not (name and equals and path):
            raise ConfigError("--also", assignment, "must be NAME=CHECKPOINT", "give both")
        others[name] = load_for_inference(Path(path))
    file = None
    if args.scenarios:
        file = read_scenario_file(args.scenarios)
        check_fits(file, checkpoint_id(main), main.hidden_dim)
    untrained = args.untrained or untrained_beside(args.checkpoint)
    if untrained is None:
        print("no untrained/ beside the checkpoint: left out", file=sys.stderr)
    return Subject(
        checkpoint=main,
        untrained=load_for_inference(untrained) if untrained else None,
        others=others,
        tuned=file.scenarios if file else (),
    )
