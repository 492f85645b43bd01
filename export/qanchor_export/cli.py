"""The verbs `export` and `verify`; heavy imports happen when a verb runs."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qanchor.errors import ConfigError

if TYPE_CHECKING:
    from qanchor_export.source import ExportSource
    from qanchor_export.verify import Check

_EXPORT_HELP = """\
Turn a checkpoint into a bundle: three ONNX graphs, one file of weights, tokenizers, scenarios,
parity cases and a manifest with the hash of every file. The bundle is all the server needs; it
is never changed, a new model is a new bundle.

  qanchor export runs/mini bundles/mini
  qanchor export runs/mini bundles/mini --scenarios tuned.json   (tuned or compiled scenarios)
  qanchor export --random --shape qwen2.5-0.5b bundles/random-0.5b   (to measure an engine; 3 GB)
"""
_VERIFY_HELP = """\
Prove that a bundle computes what torch computed, and the same however it is run: in chunks,
alone, packed, batched with other users. Prints the largest and mean difference of the components
of the unit vectors; anything above 1e-4 fails (exit 1). Takes a minute for a small model, some
minutes for 0.5B.
"""


def add_parser(subparsers: Any) -> None:
    """Register the verbs."""
    _add_export(subparsers)
    _add_verify(subparsers)


def _add_export(subparsers: Any) -> None:
    export = subparsers.add_parser(
        "export",
        help="checkpoint to bundle",
        description=_EXPORT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="CHECKPOINT BUNDLE, or BUNDLE alone with --random",
    )
    export.add_argument("--force", action="store_true", help="replace a bundle that is there")
    export.add_argument(
        "--random",
        action="store_true",
        help="random weights instead of a checkpoint: full cost, meaningless answers",
    )
    export.add_argument("--shape", default="", help="with --random: qwen2.5-0.5b, mini or tiny")
    export.add_argument(
        "--scenarios",
        type=Path,
        metavar="FILE",
        help="scenario file of `qanchor tune` or `compile`, in place of the checkpoint's scenarios "
        "of the same names; one made with another checkpoint is refused",
    )
    export.add_argument("--seed", type=int, default=0, help="with --random: of the weights")
    export.set_defaults(run=run_export)


def _add_verify(subparsers: Any) -> None:
    verify = subparsers.add_parser(
        "verify",
        help="prove a bundle equal to torch",
        description=_VERIFY_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument("bundle", type=Path, metavar="BUNDLE")
    verify.add_argument(
        "--checkpoint",
        type=Path,
        metavar="CKPT",
        help="also compare made-up users with this model and with a plain transformers pass",
    )
    verify.add_argument(
        "--users", type=int, default=4, metavar="N", help="made-up users (default: 4)"
    )
    verify.add_argument("--threads", type=int, default=0, help="CPU threads; 0 takes all cores")
    verify.set_defaults(run=run_verify)


def run_export(args: argparse.Namespace) -> int:
    """Write a bundle; the last line of stdout is its identity as JSON."""
    from qanchor_export.bundle_writer import export_bundle

    source, destination = _source(args)
    manifest = export_bundle(source, destination, force=args.force)
    num_bytes = sum(file.num_bytes for file in manifest.files.values())
    found = {"bundle": str(destination), "model_id": manifest.model_id, "recipe": manifest.recipe}
    print(json.dumps({**found, "num_bytes": num_bytes}))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Print the table of checks; 0 when all are within tolerance, else 1."""
    from qanchor.bundle.reader import open_bundle
    from qanchor_export.runner import BundleRunner
    from qanchor_export.verify import verify

    if args.users < 1:
        raise ConfigError("--users", args.users, "at least one user is needed", "try 4")
    source = None if args.checkpoint is None else _load(args.checkpoint)
    runner = BundleRunner(open_bundle(args.bundle), num_threads=args.threads)
    checks = verify(runner, source, num_users=args.users)
    print(table(checks))
    is_ok = all(check.is_ok for check in checks)
    worst = max(check.max_abs for check in checks)
    model_id = runner.bundle.manifest.model_id
    print(
        json.dumps({"ok": is_ok, "max_abs": worst, "num_checks": len(checks), "model_id": model_id})
    )
    return 0 if is_ok else 1


def table(checks: "list[Check]") -> str:
    """The checks as aligned text."""
    width = max(len(check.name) for check in checks)
    lines = [f"{'check':{width}}  vectors   max |diff|  mean |diff|"]
    for check in checks:
        verdict = "ok" if check.is_ok else f"FAILED, tolerance {check.tolerance:g}"
        lines.append(
            f"{check.name:{width}}  {check.num_vectors:7d}   {check.max_abs:10.2e}  "
            f"{check.mean_abs:11.2e}  {verdict}"
        )
    return "\n".join(lines)


def _source(args: argparse.Namespace) -> "tuple[ExportSource, Path]":
    if args.random:
        if args.scenarios:
            raise ConfigError(
                "--scenarios",
                str(args.scenarios),
                "soft prompts fit the checkpoint they were learnt with, not --random",
                "drop one of the two",
            )
        from qanchor_export.random_source import method_schema, random_source, shape_named

        if len(args.paths) != 1:
            raise ConfigError("PATH", args.paths, "--random takes BUNDLE alone", "drop CHECKPOINT")
        shape = shape_named(args.shape)
        return random_source(shape, method_schema(), args.seed), args.paths[0]
    if len(args.paths) != 2:
        raise ConfigError("PATH", args.paths, "give CHECKPOINT and BUNDLE", "see --help")
    if args.shape:
        print("--shape has no effect without --random", file=sys.stderr)
    return _load(args.paths[0], args.scenarios), args.paths[1]


def _load(checkpoint: Path, scenarios: Path | None = None) -> "ExportSource":
    from qanchor.bundle.scenario_file import read_scenario_file
    from qanchor.checkpoint import load_checkpoint
    from qanchor_export.source import source_of

    tuned = None if scenarios is None else read_scenario_file(scenarios)
    return source_of(load_checkpoint(checkpoint), tuned)
