"""The program `qanchor-bench`: list, run, report, compare. Heavy imports happen inside a verb."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qanchor import config
from qanchor.errors import QAnchorError
from qanchor_bench.result import RESULT_DIR, Result, load_result
from qanchor_bench.scenario import find_scenario, load_scenario, scenario_files

_DESCRIPTION = """\
Measure Q-Anchor and its peers from scenario files. Floors first, then times as a multiple of them;
every run checks that what it measured was also right. bench/README.md says what each number means.
"""
_RUN_HELP = """\
Measure scenarios, each in a process of its own, and write one JSON per scenario, a Markdown table
and a plot of each. A run on a busy machine is worth little: see the share of others in the table.

  qanchor-bench run engine_mini
  qanchor-bench run --short                     what `make bench` runs, some minutes on 2 cores
  qanchor-bench run serve_mini --set bundle=bundles/oulad --set clients=2
Exit 1 when an answer was wrong, a scenario failed, or (with --strict) a target was missed.
"""
_COMPARE_HELP = """\
Compare two results of one scenario. A point is slower when its median is worse by more than the
tolerance AND the middle halves of the repeats do not overlap. Exit 1 when something is slower.
"""


def build_parser() -> argparse.ArgumentParser:
    """The program's verbs and flags."""
    parser = argparse.ArgumentParser(
        prog="qanchor-bench",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    listing = verbs.add_parser("list", help="scenarios: name, suite, what they measure")
    listing.set_defaults(run=run_list)
    running = verbs.add_parser(
        "run",
        help="measure scenarios",
        description=_RUN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    running.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="name or .toml file")
    running.add_argument("--short", action="store_true", help="all scenarios of the short set")
    running.add_argument("--results", type=Path, default=RESULT_DIR, help="folder of the files")
    running.add_argument("--strict", action="store_true", help="missed targets fail the run too")
    config.add_set_argument(running, "--set repeats=9")
    running.set_defaults(run=run_run)
    reporting = verbs.add_parser("report", help="Markdown tables and plots of result files")
    reporting.add_argument("files", nargs="+", type=Path, metavar="RESULT.json")
    reporting.add_argument("--out", type=Path, help="folder for report.md and plots; else stdout")
    reporting.set_defaults(run=run_report)
    comparing = verbs.add_parser(
        "compare",
        help="what got slower between two results",
        description=_COMPARE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    comparing.add_argument("before", type=Path, metavar="A.json")
    comparing.add_argument("after", type=Path, metavar="B.json")
    comparing.add_argument(
        "--tolerance", type=float, default=0.05, help="change of the median that is let pass"
    )
    comparing.set_defaults(run=run_compare)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """0 when all is well, 1 for a failed check, 2 for a mistake in use."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    try:
        code: int = args.run(args)
    except (QAnchorError, OSError) as error:
        print(f"qanchor-bench: {error}", file=sys.stderr)
        return 2
    return code


def run_list(args: argparse.Namespace) -> int:
    """One line per scenario; the short set is marked."""
    found = [load_scenario(path) for path in scenario_files()]
    width = max((len(scenario.name) for scenario in found), default=0)
    for scenario in found:
        mark = "short" if scenario.is_short else ""
        print(f"{scenario.name:{width}}  {scenario.suite:8}  {mark:5}  {scenario.about}")
    print(json.dumps({"scenarios": [scenario.name for scenario in found]}))
    return 0


def run_run(args: argparse.Namespace) -> int:
    """Measure, print tables, write plots; the last line is JSON."""
    from qanchor_bench.report import markdown
    from qanchor_bench.runner import run_scenario

    files = [find_scenario(word) for word in args.scenarios]
    if args.short:
        files += [path for path in scenario_files() if load_scenario(path).is_short]
    if not files:
        print("qanchor-bench run: name scenarios or give --short; see `list`", file=sys.stderr)
        return 2
    summary: dict[str, Any] = {}
    is_ok = True
    for file in files:
        path = run_scenario(file, args.results, args.assignments)
        if path is None:
            summary[file.stem] = {"ok": False}
            is_ok = False
            continue
        result = load_result(path)
        print(markdown(result), flush=True)
        write_report(path, result)
        is_ok = is_ok and result.is_right and not (args.strict and result.missed)
        summary[file.stem] = {
            "ok": result.is_right,
            "result": str(path),
            "missed": list(result.missed),
            "figures": result.findings.figures,
        }
    print(json.dumps({"ok": is_ok, "scenarios": summary}))
    return 0 if is_ok else 1


def write_report(path: Path, result: Result) -> None:
    """Table and plot beside a result file."""
    from qanchor_bench.plots import draw
    from qanchor_bench.report import markdown

    path.with_suffix(".md").write_text(markdown(result) + "\n", encoding="utf-8")
    draw(result, path.with_suffix(".png"))


def run_report(args: argparse.Namespace) -> int:
    """Tables on stdout, or tables and plots in a folder."""
    from qanchor_bench.plots import draw
    from qanchor_bench.report import markdown

    results = [(path, load_result(path)) for path in args.files]
    text = "\n\n".join(markdown(result) for _, result in results)
    if args.out is None:
        print(text)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    for path, result in results:
        plot = draw(result, args.out / f"{path.stem}.png")
        if plot is not None:
            text += f"\n\n![{result.scenario.name}]({plot.name})"
    (args.out / "report.md").write_text(text + "\n", encoding="utf-8")
    print(json.dumps({"report": str(args.out / "report.md"), "results": len(results)}))
    return 0


def run_compare(args: argparse.Namespace) -> int:
    """Both medians with their spread; the last line is JSON."""
    from qanchor_bench.compare import changes, markdown, warnings

    before, after = load_result(args.before), load_result(args.after)
    found = changes(before, after, args.tolerance)
    print(markdown(found))
    for warning in warnings(before, after):
        print(f"- {warning}")
    slower = [change.before.name for change in found if change.verdict == "slower"]
    print(json.dumps({"ok": not slower, "slower": slower, "num_points": len(found)}))
    return 1 if slower else 0
