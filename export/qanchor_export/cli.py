"""The verbs `export` and `verify`; heavy imports happen when a verb runs."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from qanchor import config
from qanchor.bundle.manifest import KvDType, Precision
from qanchor.errors import ConfigError

if TYPE_CHECKING:
    from qanchor_export.quantize import Calibration
    from qanchor_export.source import ExportSource
    from qanchor_export.verify import Check
    from qanchor_export.weights import Numbers

_NUM_SITES_SHOWN = 12
_EXPORT_HELP = """\
Turn a checkpoint into a bundle: three ONNX graphs, one file of weights, tokenizers, scenarios,
parity cases and a manifest with the hash of every file. The bundle is all the server needs; it
is never changed, a new model is a new bundle.

  qanchor export runs/mini bundles/mini
  qanchor export runs/mini bundles/mini --scenarios tuned.json   (tuned or compiled scenarios)
  qanchor export runs/mini bundles/mini-int8 --precision int8 --calibrate data/oulad
  qanchor export --random --shape qwen2.5-0.5b bundles/random-0.5b   (to measure an engine; 3 GB)

--target tensorrt takes a finished bundle instead of a checkpoint and builds TensorRT plan files
from it, on the machine whose GPU will run them (minutes per graph). They compute in the types of
the bundle. PLANS may hold those of several machines and bundles:

  qanchor export bundles/mini-fp16 plans --target tensorrt
  qanchor serve bundles/mini-fp16 --engine tensorrt --set plans_dir=plans
"""
_VERIFY_HELP = """\
Prove that a bundle computes what torch computed, and the same however it is run: in chunks,
alone, packed, batched with other users. Prints the largest and mean difference of the components
of the unit vectors and the mean cosine; what is beyond the tolerance of the bundle's types (1e-4 in
float32) fails (exit 1). Takes a minute for a small model, some
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
        help="CHECKPOINT BUNDLE; BUNDLE alone with --random; BUNDLE PLANS with --target tensorrt",
    )
    export.add_argument(
        "--target",
        choices=("onnx", "tensorrt"),
        default="onnx",
        help="onnx (default): a bundle. tensorrt: plan files of a finished bundle",
    )
    export.add_argument(
        "--precision",
        default="float32",
        choices=get_args(Precision),
        help="what the decoder computes in. float32 (default) equals torch; int8 is for CPUs and "
        "several times as fast there; float16 and bfloat16 are for GPUs",
    )
    export.add_argument(
        "--kv-dtype",
        choices=get_args(KvDType),
        help="how keys and values are stored: memory per user against accuracy. Default: the type "
        "of the activations",
    )
    _add_calibration(export)
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
    config.add_set_argument(
        export, "with --target tensorrt: --set max_step_tokens=512 (qanchor/bundle/buckets.py)"
    )
    export.set_defaults(run=run_export)


def _add_calibration(export: argparse.ArgumentParser) -> None:
    int8 = export.add_argument_group(
        "int8",
        "What becomes int8 is decided on real users: outliers are moved from activations into "
        "weights, and the matrices that harm most stay float32 until the budget is met. The "
        "bundle's int8_report.json says what each would cost.",
    )
    int8.add_argument(
        "--calibrate",
        type=Path,
        metavar="DATASET",
        help="data set whose train users decide; default: users made up from the schema, which "
        "says little about a trained model",
    )
    int8.add_argument(
        "--calibrate-users", type=int, default=32, metavar="N", help="users taken (default: 32)"
    )
    int8.add_argument(
        "--min-cosine",
        type=float,
        default=0.998,
        metavar="C",
        help="budget: least mean cosine of the embeddings to float32 (default: 0.998)",
    )


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
    if args.target == "tensorrt":
        return _run_export_plans(args)
    if args.assignments:
        print("--set has no effect without --target tensorrt", file=sys.stderr)
    from qanchor_export.bundle_writer import export_bundle
    from qanchor_export.weights import Numbers

    source, destination = _source(args)
    numbers = Numbers(precision=args.precision, kv_dtype=args.kv_dtype)
    calibration = _calibration(args, source, numbers)
    manifest = export_bundle(
        source, destination, numbers=numbers, calibration=calibration, force=args.force
    )
    if calibration is not None:
        print(_int8_table(destination))
    num_bytes = sum(file.num_bytes for file in manifest.files.values())
    found = {"bundle": str(destination), "model_id": manifest.model_id, "recipe": manifest.recipe}
    print(json.dumps({**found, "num_bytes": num_bytes}))
    return 0


def _run_export_plans(args: argparse.Namespace) -> int:
    """Build plan files; the last line of stdout says where they are, as JSON."""
    from qanchor.bundle.buckets import BucketLimits
    from qanchor.bundle.reader import open_bundle
    from qanchor_export.to_tensorrt import export_plans

    if len(args.paths) != 2 or args.random:
        raise ConfigError(
            "PATH", args.paths, "--target tensorrt takes a finished BUNDLE and PLANS", "see --help"
        )
    for flag, is_given in (
        ("--precision", args.precision != "float32"),
        ("--kv-dtype", args.kv_dtype is not None),
        ("--scenarios", args.scenarios is not None),
    ):
        if is_given:
            print(f"{flag} has no effect: plan files are what the bundle is", file=sys.stderr)
    bundle = open_bundle(args.paths[0])
    limits = config.override(BucketLimits(), args.assignments)
    directory, plans = export_plans(bundle, args.paths[1], limits)
    num_bytes = sum((directory / plan.file).stat().st_size for plan in plans.graphs.values())
    found = {"plans": str(directory), "gpu": plans.gpu, "tensorrt": plans.tensorrt_version}
    print(json.dumps({**found, "num_bytes": num_bytes}))
    return 0


def _calibration(
    args: argparse.Namespace, source: "ExportSource", numbers: "Numbers"
) -> "Calibration | None":
    from qanchor_export.calibration import calibration_users
    from qanchor_export.quantize import Calibration

    if "int8" not in (numbers.precision, numbers.stored):
        if args.calibrate is not None:
            print("--calibrate has no effect without int8", file=sys.stderr)
        return None
    for flag, value, is_right in (
        ("--calibrate-users", args.calibrate_users, args.calibrate_users >= 1),
        ("--min-cosine", args.min_cosine, 0.0 < args.min_cosine <= 1.0),
    ):
        if not is_right:
            raise ConfigError(flag, value, "out of range", "leave it out")
    users = calibration_users(source, args.calibrate, args.calibrate_users)
    return Calibration(users, args.min_cosine)


def _int8_table(bundle: Path) -> str:
    """The report's projections, the most harmful first, as aligned text."""
    from qanchor.bundle.manifest import INT8_REPORT_FILE
    from qanchor_export.quantize import QuantizationReport

    report = config.load(QuantizationReport, bundle / INT8_REPORT_FILE)
    lines = [
        f"{report.users}: mean cosine to float32 {report.mean_cosine:.5f}, least "
        f"{report.least_cosine:.5f}; smoothing {report.alpha:g} of "
        + ", ".join(f"{alpha}: {cosine:.5f}" for alpha, cosine in report.alphas.items())
    ]
    if report.sites:
        lines.append("layer  matrix  output error  cosine loss alone")
    ordered = sorted(report.sites, key=lambda site: site.cosine_loss, reverse=True)
    for site in ordered[:_NUM_SITES_SHOWN]:
        kept = "" if site.is_int8 else "  stays float32"
        lines.append(
            f"{site.layer:5d}  {site.projection:6}  {site.output_error:12.2%}  "
            f"{site.cosine_loss:17.2e}{kept}"
        )
    return "\n".join(lines)


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
    manifest = runner.bundle.manifest
    print(
        json.dumps(
            {
                "ok": is_ok,
                "max_abs": worst,
                "mean_cosine": min(check.mean_cosine for check in checks),
                "num_checks": len(checks),
                "precision": manifest.precision,
                "kv_dtype": manifest.dims.kv_dtype,
                "model_id": manifest.model_id,
            }
        )
    )
    return 0 if is_ok else 1


def table(checks: "list[Check]") -> str:
    """The checks as aligned text."""
    width = max(len(check.name) for check in checks)
    lines = [f"{'check':{width}}  vectors   max |diff|  mean |diff|  mean cosine"]
    for check in checks:
        allowed = f"at most {check.allowed.max_abs:g}, cosine {check.allowed.mean_cosine:g}"
        verdict = "ok" if check.is_ok else "FAILED"
        lines.append(
            f"{check.name:{width}}  {check.num_vectors:7d}   {check.max_abs:10.2e}  "
            f"{check.mean_abs:11.2e}  {check.mean_cosine:11.6f}  {verdict} ({allowed})"
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
