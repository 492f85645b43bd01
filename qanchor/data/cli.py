"""`qanchor data ...`: make, check and look at data set directories. Imports what it needs late.

Results go to stdout, the last line as JSON; progress goes to stderr. Exit codes: 0 done, 1 the
check found problems, 2 wrong usage or input.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from qanchor.errors import InvalidInput

_FORMAT = """\
A data set is a directory:
  schema.json      name, modalities and their templates, attribute columns
  users.parquet    one row per user: user_id, split, asof_day, attributes
  events.parquet   user_id, day, modality, event_type, text, value; sorted by user_id, day
and, where there is something to predict, labels.parquet, scenarios.json and
future_events_train.parquet (train users only: what pre-training learns to foresee).
user_id is an integer or a string, of the same type in all files.
topics.toml, if there is one, names things in words and adds questions (docs/training.md).
"""


def add_parser(subparsers: Any) -> None:
    """Register the verb `data` and its own verbs with an argparse sub-parser collection."""
    parser = subparsers.add_parser(
        "data",
        help="make, check and look at data sets of user behaviour",
        description=_FORMAT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_import(verbs)
    _add_wallet(verbs)
    _add_validate(verbs)
    _add_triples(verbs)
    _add_show(verbs)


def _add_import(verbs: Any) -> None:
    parser = verbs.add_parser(
        "import",
        help="turn a public data set into a data set directory",
        description="oulad: Open University Learning Analytics Dataset. SRC is the folder of the "
        "publisher's seven CSV files (analyse.kmi.open.ac.uk/open_dataset), or of Parquet files "
        "already in this format. The result is validated.",
    )
    parser.add_argument("kind", choices=["oulad"], help="which data set SRC holds")
    parser.add_argument("source", metavar="SRC", help="folder with the downloaded files")
    parser.add_argument("destination", metavar="DST", help="new or empty folder to write to")
    parser.set_defaults(run=_guarded(run_import))


def _add_wallet(verbs: Any) -> None:
    parser = verbs.add_parser(
        "wallet",
        help="simulate the users of a mobile wallet",
        description="Writes an invented data set with six modalities and ten scenarios, to try "
        "everything without private data. About 110 events per user; 2,000 users take seconds "
        "and suffice for a demo, 20,000 give steadier figures. Same seed, same users.",
    )
    parser.add_argument("destination", metavar="DST", help="new or empty folder to write to")
    parser.add_argument("--users", type=int, default=2000, help="how many (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.set_defaults(run=_guarded(run_wallet))


def _add_validate(verbs: Any) -> None:
    parser = verbs.add_parser(
        "validate",
        help="check every rule of the format",
        description="Lists each problem with file, row, column, value, rule and remedy. "
        "Exit code 1 if there is any.",
    )
    parser.add_argument("directory", metavar="DIR", help="a data set directory")
    parser.add_argument(
        "--max-problems", type=int, default=20, help="list at most so many (default %(default)s)"
    )
    parser.set_defaults(run=_guarded(run_validate))


def _add_triples(verbs: Any) -> None:
    parser = verbs.add_parser(
        "triples",
        help="make UserU (user, query, answer) triples for pre-training",
        description="Two kinds: `future` verbalises what train users did after the as-of moment, "
        "`uqa` asks and answers topics about the history. More per user vary the questions a "
        "model sees and cost training steps, not memory. Labels are never read.",
    )
    parser.add_argument("directory", metavar="DIR", help="a data set directory")
    parser.add_argument("output", metavar="OUT.parquet", help="file to write")
    parser.add_argument(
        "--future", type=int, default=30, help="per train user (default %(default)s)"
    )
    parser.add_argument("--uqa", type=int, default=6, help="per user (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument(
        "--with-valid", action="store_true", help="uqa triples for users of split valid too"
    )
    parser.set_defaults(run=_guarded(run_triples))


def _add_show(verbs: Any) -> None:
    parser = verbs.add_parser(
        "show",
        help="print a user's profile as the model sees it",
        description="One line per prefix position that holds an event or an attribute, after "
        "window, limits and grouping; the JSON line counts them by modality.",
    )
    parser.add_argument("directory", metavar="DIR", help="a data set directory")
    parser.add_argument("user_id", metavar="USER", help="a user_id of users.parquet")
    parser.add_argument(
        "--json", action="store_true", help="the profile as `qanchor profile put` reads it"
    )
    parser.set_defaults(run=_guarded(run_show))


def _guarded(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Turn wrong input into exit code 2 and one line on stderr."""

    def guarded(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except InvalidInput as error:
            print(f"qanchor data: {error}", file=sys.stderr)
            return 2

    return guarded


def _result(**fields: object) -> None:
    print(json.dumps(fields))


def run_import(args: argparse.Namespace) -> int:
    """Import a public data set."""
    from qanchor.data.adapters.oulad import import_oulad
    from qanchor.data.dataset import open_dataset

    dataset = open_dataset(import_oulad(args.source, args.destination))
    _result(dataset=dataset.name, path=args.destination, num_users=len(dataset.user_ids()))
    return 0


def run_wallet(args: argparse.Namespace) -> int:
    """Simulate a wallet."""
    from qanchor.data.wallet import generate_wallet

    generate_wallet(args.destination, args.users, seed=args.seed)
    _result(dataset="wallet", path=args.destination, num_users=args.users, seed=args.seed)
    return 0


def run_validate(args: argparse.Namespace) -> int:
    """Check a data set directory."""
    from qanchor.data.validate import validate_dataset

    report = validate_dataset(args.directory, max_problems=args.max_problems)
    for problem in report.problems:
        print(problem)
    left_out = report.num_problems - len(report.problems)
    if left_out:
        print(f"... and {left_out} more")
    _result(
        path=args.directory,
        is_valid=report.is_valid,
        num_problems=report.num_problems,
        num_rows=report.num_rows,
    )
    return 0 if report.is_valid else 1


def run_triples(args: argparse.Namespace) -> int:
    """Write UserU triples."""
    from qanchor.data.dataset import open_dataset
    from qanchor.data.useru import TripleOptions, write_triples

    options = TripleOptions(
        per_user_future=args.future,
        per_user_uqa=args.uqa,
        seed=args.seed,
        with_valid=args.with_valid,
    )
    counts = write_triples(open_dataset(args.directory), args.output, options)
    _result(path=args.output, num_future=counts["future"], num_uqa=counts["uqa"], seed=args.seed)
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Print one rendered profile."""
    from qanchor.data.dataset import open_dataset
    from qanchor.data.render import render_profile

    dataset = open_dataset(args.directory)
    (profile,) = dataset.profiles([args.user_id])
    if args.json:
        print(json.dumps(asdict(profile)))
        return 0
    rendered = render_profile(profile, dataset.schema)
    print(dataset.schema.header)
    for spec, texts in zip(dataset.schema.modalities, rendered.texts, strict=True):
        print(f"\n<|{spec.name}_start|>")
        for text in texts:
            print(f"  {text}")
        print(f"<|{spec.name}_end|>")
    names = [spec.name for spec in dataset.schema.modalities]
    _result(
        user_id=profile.user_id,
        split=dataset.split_of[profile.user_id],
        num_events=len(profile.events),
        num_positions=dict(zip(names, rendered.num_events, strict=True)),
    )
    return 0
