"""`qanchor tune` and `qanchor compile`; heavy imports happen when a verb runs."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qanchor.config import add_set_argument

if TYPE_CHECKING:
    from qanchor.checkpoint import Checkpoint
    from qanchor.config import Scenario
    from qanchor.data.dataset import Dataset
    from qanchor.tune.compiling import CompileReport
    from qanchor.tune.scenarios import Reuse

_TUNE_HELP = """\
Cluster-based soft prompt tuning: per scenario a few vectors between query and <USER_EMB> and one
prototype per class are learnt from train users' labels, early stopping on valid; test users are
never looked at, judge the result with `qanchor eval --scenarios OUT`. The model stays as it is,
and so does every user's prefix: it is encoded once for all steps and scenarios, the query text once
per scenario, and the last lines say how many token positions that saved.

  qanchor tune runs/mini/checkpoint data/wallet wallet.scenarios.json --all
  qanchor export runs/mini/checkpoint bundles/mini --scenarios wallet.scenarios.json
"""
_COMPILE_HELP = """\
Distil the text of a scenario into a few vectors that give the same embedding, so that its suffix
is these vectors and <USER_EMB>. A verb of its own and not an option of `tune`: nothing is learnt
from labels, the target is the scenario as it is, and a tuned scenario can be compiled as well
(--scenarios). Labels, where there are any, only serve the report: the AUC of a linear probe
(train to valid) with text and compiled.

A scenario may be asked in several wordings (--wordings): it is compiled to the mean of their
embeddings, which hangs less on the words of any and costs the same however many there are.

  qanchor compile runs/mini/checkpoint data/wallet wallet.compiled.json --all
  qanchor compile runs/mini/checkpoint data/wallet wallet.compiled.json --all \\
      --wordings wordings.json
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register `qanchor tune` and `qanchor compile`."""
    tune = _verb(subparsers, "tune", "learn soft prompts for scenarios", _TUNE_HELP)
    tune.set_defaults(run=run_tune)
    compile_ = _verb(subparsers, "compile", "put vectors in place of a query's text", _COMPILE_HELP)
    compile_.add_argument(
        "--scenarios",
        type=Path,
        metavar="FILE",
        help="compile the scenarios of this file where it has them, e.g. tuned ones",
    )
    compile_.add_argument(
        "--wordings",
        type=Path,
        metavar="FILE",
        help="JSON or TOML: scenario name to a list of other questions that ask the same, as "
        "`qanchor eval --wordings` takes it",
    )
    compile_.set_defaults(run=run_compile)


def _verb(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    summary: str,
    description: str,
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="e.g. runs/oulad/checkpoint")
    parser.add_argument("dataset", type=Path, help="data set directory with scenarios")
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="scenario file (JSON) to write; one of the same checkpoint is extended",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--scenario", dest="names", action="append", metavar="NAME", help="may be repeated"
    )
    which.add_argument("--all", action="store_true", help="every scenario of the data set")
    add_set_argument(parser, "--set steps=200 --set max_train_users=1000 (qanchor/tune/config.py)")
    return parser


def run_tune(args: argparse.Namespace) -> int:
    """Tune; the last line of stdout is the summary as JSON."""
    import msgspec

    from qanchor.config import override
    from qanchor.tune.config import TuneConfig
    from qanchor.tune.scenarios import tune

    settings = override(TuneConfig(), args.assignments)
    summary = tune(*_opened(args), args.names or [], args.out, settings)
    for one in summary.scenarios:
        print(
            f"{one.scenario}: {one.judged_by} on valid {one.untuned:.4f} untuned, {one.tuned:.4f} "
            f"tuned (step {one.best_step} of {one.steps})"
        )
    print(_saved(summary.reuse))
    print(msgspec.json.encode(summary).decode())
    return 0


def run_compile(args: argparse.Namespace) -> int:
    """Compile; the last line of stdout is the summary as JSON."""
    import msgspec

    from qanchor.bundle.scenario_file import check_fits, read_scenario_file, with_replaced
    from qanchor.checkpoint import checkpoint_id
    from qanchor.config import override
    from qanchor.eval.config import read_wordings
    from qanchor.tune.config import CompileConfig
    from qanchor.tune.scenarios import compile_all

    settings = override(CompileConfig(), args.assignments)
    checkpoint, dataset = _opened(args)
    scenarios: tuple[Scenario, ...] = ()
    if args.scenarios:
        file = read_scenario_file(args.scenarios)
        check_fits(file, checkpoint_id(checkpoint), checkpoint.hidden_dim)
        scenarios = file.scenarios
    known = with_replaced(dataset.scenarios, scenarios)
    wordings = read_wordings(args.wordings, known) if args.wordings else {}
    names = args.names or []
    summary = compile_all(
        checkpoint, dataset, names, args.out, settings, scenarios=scenarios, wordings=wordings
    )
    for one in summary.scenarios:
        print(
            f"{one.scenario}: cosine {one.mean_cosine:.4f}, at least {one.min_cosine:.4f}; "
            f"{_probes(one)}{one.suffix_tokens_compiled} in place of {one.suffix_tokens_text} "
            "suffix tokens"
        )
    print(_saved(summary.reuse))
    print(msgspec.json.encode(summary).decode())
    return 0


def _saved(reuse: "Reuse") -> str:
    return (
        f"decoder positions computed: {reuse.prefix_positions} of prefixes, once per user, and "
        f"{reuse.suffix_positions} of suffixes; without the cache {reuse.positions_without_reuse}, "
        f"{reuse.times_fewer:.1f} times as many"
    )


def _probes(one: "CompileReport") -> str:
    if one.probe_auc_text is None or one.probe_auc_compiled is None:
        return ""
    return f"probe AUC {one.probe_auc_compiled:.4f}, with text {one.probe_auc_text:.4f}; "


def _opened(args: argparse.Namespace) -> "tuple[Checkpoint, Dataset]":
    from qanchor.checkpoint import load_for_inference
    from qanchor.data.dataset import open_dataset
    from qanchor.train.allocator import keep_freed_memory

    keep_freed_memory()
    return load_for_inference(args.checkpoint), open_dataset(args.dataset)
