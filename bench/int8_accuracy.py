"""What int8 costs in accuracy: the same labelled users through both bundles of one checkpoint.

    python -m bench.int8_accuracy CHECKPOINT DATASET [--max-users 2000]

Exports the checkpoint in float32 and in int8 (calibrated on train users of the data set), embeds
the first users of each split through ONNX Runtime under every scenario's question, and compares:
cosines vector by vector, and the test AUC of linear probes fitted to each side on its own.

Legend: U users, Q questions, Z embedding_dim.
"""

import argparse
import datetime
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from qanchor.bundle.manifest import KvDType
from qanchor.bundle.reader import open_bundle
from qanchor.checkpoint import load_checkpoint
from qanchor.data.dataset import Dataset, open_dataset
from qanchor.data.prefix import build_layout, slot_vectors, with_measures
from qanchor.data.render import RenderedProfile, render_profile
from qanchor.environment import environment
from qanchor.eval.evaluate import SPLITS, probe_scenario
from qanchor_bench.machine import hardware_slug
from qanchor_export.bundle_writer import export_bundle
from qanchor_export.calibration import calibration_users
from qanchor_export.quantize import Calibration
from qanchor_export.runner import BundleRunner
from qanchor_export.source import source_of
from qanchor_export.weights import Numbers

FloatArray = npt.NDArray[np.float32]

MIN_MEAN_COSINE = 0.995
MAX_AUC_DIFFERENCE = 0.003


@dataclass(frozen=True, slots=True)
class Sides:
    """Embeddings [U, Q, Z] of the same users under the same questions."""

    users: list[str]
    float32_UQZ: FloatArray
    int8_UQZ: FloatArray


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table and the result path as JSON; 1 when int8 is beyond the bounds."""
    args = _parse(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    dataset = open_dataset(args.dataset)
    source = source_of(load_checkpoint(args.checkpoint))
    with tempfile.TemporaryDirectory() as scratch:
        runners = []
        for name, numbers in (
            ("float32", Numbers()),
            ("int8", Numbers(precision="int8", kv_dtype=args.kv_dtype)),
        ):
            path = Path(scratch) / name
            users = calibration_users(source, args.dataset, args.calibrate_users)
            export_bundle(source, path, numbers=numbers, calibration=Calibration(users))
            runners.append(BundleRunner(open_bundle(path), num_threads=args.threads))
        sides = embed(runners, dataset, args.max_users)
    result: dict[str, Any] = {
        "bench": "int8_accuracy",
        "recipe": source.recipe,
        "checkpoint_id": source.checkpoint_id,
        "dataset": dataset.name,
        "kv_dtype": args.kv_dtype,
        "num_users": len(sides.users),
        "environment": msgspec.to_builtins(environment()),
        **compare(sides, dataset),
    }
    print(markdown(result))
    args.results.mkdir(parents=True, exist_ok=True)
    today = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d")
    commit = result["environment"]["commit"]
    file = args.results / f"int8_accuracy_{dataset.name}_{hardware_slug()}_{today}_{commit}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    shown = {key: result[key] for key in ("is_ok", "mean_cosine", "auc_difference")}
    print(json.dumps({**shown, "result": file.name}))
    return 0 if result["is_ok"] else 1


def embed(runners: Sequence[BundleRunner], dataset: Dataset, max_users: int) -> Sides:
    """All scenarios' questions of the first users of each split, through both bundles."""
    users = [user for split in SPLITS for user in _first(dataset.user_ids(split), max_users)]
    questions = [scenario.question for scenario in dataset.scenarios]
    found: list[list[FloatArray]] = [[], []]
    ids = []
    profiles = tqdm(
        dataset.profiles(user_ids=users), total=len(users), desc="embedding", unit="user"
    )
    for profile in profiles:
        ids.append(profile.user_id)
        rendered = render_profile(profile, dataset.schema)
        for side, vectors_QZ in enumerate(_both(runners, rendered, questions)):
            found[side].append(vectors_QZ)
    float32_UQZ, int8_UQZ = (np.stack(side) for side in found)
    return Sides(ids, float32_UQZ, int8_UQZ)


def _both(
    runners: Sequence[BundleRunner], rendered: RenderedProfile, questions: list[str]
) -> list[FloatArray]:
    """One user's answers [Q, Z] from each bundle; the event encoder is the same in both."""
    first = runners[0]
    layout = build_layout(rendered.num_events, first.bundle.manifest.tokens)
    vectors_NE = with_measures(first.event_vectors(rendered), rendered)
    vectors_PE = slot_vectors(layout, rendered.num_events, vectors_NE)
    return [
        runner.suffix([(runner.prefill(layout, vectors_PE), [runner.query(q) for q in questions])])
        for runner in runners
    ]


def compare(sides: Sides, dataset: Dataset) -> dict[str, Any]:
    """Cosines over all vectors, and each scenario's test AUC on both sides."""
    cosines_UQ = (sides.float32_UQZ * sides.int8_UQZ).sum(-1)
    scenarios = []
    for index, scenario in enumerate(dataset.scenarios):
        aucs = [
            probe_scenario(dataset, scenario.name, sides.users, matrix_UQZ[:, index]).auc
            for matrix_UQZ in (sides.float32_UQZ, sides.int8_UQZ)
        ]
        scenarios.append({"scenario": scenario.name, "float32_auc": aucs[0], "int8_auc": aucs[1]})
    means = [float(np.mean([s[key] for s in scenarios])) for key in ("float32_auc", "int8_auc")]
    difference = abs(means[1] - means[0])
    mean_cosine = float(cosines_UQ.mean())
    return {
        "mean_cosine": mean_cosine,
        "p01_cosine": float(np.percentile(cosines_UQ, 1)),
        "least_cosine": float(cosines_UQ.min()),
        "float32_average_auc": means[0],
        "int8_average_auc": means[1],
        "auc_difference": difference,
        "scenarios": scenarios,
        "is_ok": mean_cosine >= MIN_MEAN_COSINE and difference <= MAX_AUC_DIFFERENCE,
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as the table that documents show."""
    lines = [
        f"{result['dataset']}, {result['num_users']} users, recipe {result['recipe']}: mean cosine "
        f"of int8 to float32 {result['mean_cosine']:.5f}, 1 % below {result['p01_cosine']:.5f}, "
        f"least {result['least_cosine']:.5f}; keys and values in {result['kv_dtype']}.",
        "",
        "| scenario | test AUC, float32 | int8 | difference |",
        "|---|---|---|---|",
    ]
    rows = [(s["scenario"], s["float32_auc"], s["int8_auc"]) for s in result["scenarios"]]
    rows.append(("average", result["float32_average_auc"], result["int8_average_auc"]))
    for name, exact, rounded in rows:
        lines.append(f"| {name} | {exact:.4f} | {rounded:.4f} | {rounded - exact:+.4f} |")
    return "\n".join(lines)


def _first(users: list[str], max_users: int) -> list[str]:
    return users[:max_users] if max_users else users


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.int8_accuracy", description=__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("dataset", type=Path, metavar="DATASET")
    parser.add_argument("--max-users", type=int, default=2000, help="per split; 0 takes all")
    parser.add_argument("--calibrate-users", type=int, default=32, help="train users")
    parser.add_argument(
        "--kv-dtype", choices=get_args(KvDType), default="float32", help="of the int8 bundle"
    )
    parser.add_argument("--threads", type=int, default=0, help="0 takes all cores")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results", help="output folder"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
