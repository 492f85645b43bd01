"""The program `qanchor`: one verb per task; heavy imports happen inside the verb.

Results go to stdout (last line JSON), logs and progress to stderr. Exit codes: 0 done, 1 a check
failed, 2 wrong usage or input; `userqa` also 3, stopped before the end.
"""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from qanchor import __version__
from qanchor.errors import QAnchorError

VERB_MODULES = (
    "qanchor.data.cli",
    "qanchor.userqa.cli",
    "qanchor.train.cli",
    "qanchor.tune.cli",
    "qanchor.eval.cli",
    "qanchor.study.cli",
    "qanchor_export.cli",
    "qanchor_server.cli",
    "qanchor.client.cli",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, run the verb, return the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.INFO,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        code: int = args.run(args)
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; what Python flushes at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except QAnchorError as error:
        print(f"qanchor: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("qanchor"):
            raise
        print(f"qanchor: {error.name} is not installed; {_extra_hint(args.verb)}", file=sys.stderr)
        return 2
    return code


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, every verb registered; imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="qanchor", description="Query-conditioned user embeddings."
    )
    parser.add_argument("--version", action="version", version=f"qanchor {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="debug logging on stderr")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for module in VERB_MODULES:
        # By name: `qanchor` must not import export or server; only the program joins them.
        importlib.import_module(module).add_parser(subparsers)
    return parser


def _extra_hint(verb: str) -> str:
    extra = {"serve": "serve", "export": "export", "verify": "export", "userqa": "userqa"}.get(
        verb, "train"
    )
    return f"install it with `pip install 'qanchor[{extra}]'`"


if __name__ == "__main__":
    sys.exit(main())
