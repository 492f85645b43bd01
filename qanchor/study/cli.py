"""`qanchor study`; heavy imports happen when it runs."""

import argparse
from pathlib import Path

from qanchor.config import add_set_argument

_HELP = """\
Train variants of a recipe with the same budget and judge them on the same users: linear probes,
differences to the first variant with 95 % intervals, a Markdown table, JSON and an HTML page. A
study is a TOML file of variants; built in are

  ablation   what each part of the method is worth, as in its Table 3: tokens, losses, mask, the
             query itself, tuning with and without pre-training
  scaling    curves over train users, steps and soft-prompt rows

Every variant is a whole training; --set train.steps=... and --only make a study shorter. It can be
killed at any time: started again, it goes on, and what is finished is not done again. A GPU takes
several small models at once: --jobs 8.

  qanchor study ablation data/oulad studies/oulad-ablation --recipe mini
  qanchor study scaling data/oulad studies/oulad-scaling --only prompt --set-tune steps=200
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `qanchor study`."""
    parser = subparsers.add_parser(
        "study",
        help="train and compare variants: ablations, scaling curves",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", metavar="STUDY", help="ablation, scaling, or a TOML file")
    parser.add_argument("dataset", type=Path, help="data set directory with labels and scenarios")
    parser.add_argument("out", type=Path, metavar="OUT", help="where the study is kept")
    parser.add_argument("--recipe", default="mini", help="what all variants start from")
    parser.add_argument("--triples", type=Path, help="Parquet of (user_id, query, answer)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="variant or curve; repeatable"
    )
    parser.add_argument(
        "--max-users",
        type=int,
        default=0,
        help="users per split that are judged, drawn at random but always the same (0 = all)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="variants that train at once, sharing cores or a GPU, several GB of RAM each",
    )
    add_set_argument(parser, "--set train.steps=500 (the recipe of all variants)")
    parser.add_argument(
        "--set-tune",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override how soft prompts are tuned, e.g. --set-tune steps=200",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run or go on with a study; the last line is a summary as JSON."""
    import matplotlib.figure  # noqa: F401  (missed now, not after hours)
    import msgspec

    from qanchor import config
    from qanchor.config import override
    from qanchor.data.dataset import open_dataset
    from qanchor.errors import ConfigError
    from qanchor.report.document import write_html
    from qanchor.study.plan import read_study
    from qanchor.study.report import document
    from qanchor.study.results import markdown_table
    from qanchor.study.runner import StudyInput, run_study
    from qanchor.study.work import StudyConfig
    from qanchor.train.recipes import recipe_named
    from qanchor.tune.config import TuneConfig

    if args.jobs < 1:
        raise ConfigError("--jobs", args.jobs, "must be at least 1", "1 runs variants in turn")
    given = StudyInput(
        study=read_study(args.study).only(args.only),
        recipe=override(recipe_named(args.recipe), args.assignments),
        dataset=open_dataset(args.dataset),
        settings=StudyConfig(tune=override(TuneConfig(), args.set_tune), max_users=args.max_users),
        triples=args.triples,
    )
    result = run_study(given, args.out, args.jobs)
    table = markdown_table(result)
    config.save(result, args.out / "study.json")
    (args.out / "study.md").write_text(f"# {result.title}: {result.dataset}\n\n{table}\n")
    write_html(document(result), args.out / "study.html")
    print(table)
    summary = {one.variant.name: one.scores.average_auc for one in result.outcomes}
    print(msgspec.json.encode({"study": str(args.out), "auc": summary}).decode())
    return 0
