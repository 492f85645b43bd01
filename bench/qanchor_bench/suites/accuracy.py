"""Suite `accuracy`: what a precision costs, on labelled users of a trained checkpoint.

The scenario's checkpoint is exported in float32 and in the scenario's precision. Users drawn from
each split are embedded through ONNX Runtime by both under every question of the data set, and
compared: cosines vector by vector, and the test AUC of linear probes fitted to each side on its
own. Nothing is timed.

Legend: U users, Q questions, Z embedding_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from tqdm import tqdm

from qanchor.bundle.packing import SuffixQuery
from qanchor.bundle.reader import open_bundle
from qanchor.data.dataset import Dataset, open_dataset
from qanchor.data.prefix import build_layout, slot_vectors, with_measures
from qanchor.data.render import RenderedProfile, render_profile
from qanchor.eval.judge import probe_all
from qanchor.eval.methods import columns
from qanchor.eval.metrics import auc
from qanchor.eval.splits import chosen_users, judged_users
from qanchor_bench.bench import Bench
from qanchor_bench.bundles import bundle_of
from qanchor_bench.result import Check, Findings, Point
from qanchor_bench.workload import FloatArray
from qanchor_export.runner import BundleRunner

_UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Sides:
    """Embeddings [U, Q, Z] of the same users under the same questions."""

    users: list[str]
    float32_UQZ: FloatArray
    rounded_UQZ: FloatArray


def run(bench: Bench) -> Findings:
    """Embed, compare, probe."""
    scenario = bench.scenario
    opened = open_dataset(Path(scenario.dataset))
    dataset = judged_users(opened, chosen_users(opened, scenario.users[0])).narrowed(opened)
    exact = msgspec.structs.replace(scenario, precision="float32", kv_dtype=None)
    bundles = (open_bundle(bundle_of(exact, bench.scratch)), bench.bundle)
    runners = [BundleRunner(bundle, num_threads=bench.threads) for bundle in bundles]
    sides = embed(runners, dataset, scenario.users[0])
    points = _auc_points(sides, dataset, scenario.precision)
    return Findings(
        points=tuple(points),
        checks=_checks(sides),
        figures=figures(sides, points, scenario.precision),
        counts={"users": len(sides.users), "questions": len(dataset.scenarios)},
        notes=(
            f"{dataset.name}; {scenario.precision}, keys and values in "
            f"{bench.bundle.manifest.dims.kv_dtype}; each side has probes of its own",
        ),
    )


def embed(runners: Sequence[BundleRunner], dataset: Dataset, max_users: int) -> Sides:
    """All scenarios' questions of up to `max_users` users of each split, through both bundles."""
    users = chosen_users(dataset, max_users)
    asked = [[runner.query(one.question) for one in dataset.scenarios] for runner in runners]
    found: list[list[FloatArray]] = [[], []]
    ids = []
    profiles = tqdm(
        dataset.profiles(user_ids=users), total=len(users), desc="embedding", unit="user"
    )
    for profile in profiles:
        ids.append(profile.user_id)
        rendered = render_profile(profile, dataset.schema)
        for side, vectors_QZ in enumerate(_both(runners, rendered, asked)):
            found[side].append(vectors_QZ)
    float32_UQZ, rounded_UQZ = (np.stack(side) for side in found)
    return Sides(ids, float32_UQZ, rounded_UQZ)


def _both(
    runners: Sequence[BundleRunner], rendered: RenderedProfile, asked: list[list[SuffixQuery]]
) -> list[FloatArray]:
    """One user's answers [Q, Z] from each bundle; the event encoder is the same in both."""
    first = runners[0]
    layout = build_layout(rendered.num_events, first.bundle.manifest.tokens)
    vectors_NE = with_measures(first.event_vectors(rendered), rendered)
    vectors_PE = slot_vectors(layout, rendered.num_events, vectors_NE)
    return [
        runner.suffix([(runner.prefill(layout, vectors_PE), queries)])
        for runner, queries in zip(runners, asked, strict=True)
    ]


def _auc_points(sides: Sides, dataset: Dataset, precision: str) -> list[Point]:
    """Each scenario's test AUC on both sides, side by side."""
    judged = judged_users(dataset, sides.users)
    found = [
        (side, probe_all(judged, columns(matrix_UQZ), side).tests)
        for side, matrix_UQZ in (("float32", sides.float32_UQZ), (precision, sides.rounded_UQZ))
    ]
    return [
        Point(
            name=f"{scenario.name}: test AUC, {side}",
            group="test AUC",
            labels={"scenario": scenario.name, "side": side},
            unit="1",
            values=(auc(tests[scenario.name].labels, tests[scenario.name].scores),),
            better="more",
        )
        for scenario in dataset.scenarios
        for side, tests in found
    ]


def figures(sides: Sides, points: list[Point], precision: str) -> dict[str, float | None]:
    """Cosines over all vectors; the average AUC of both sides and how far they are apart."""
    cosines_UQ = (sides.float32_UQZ * sides.rounded_UQZ).sum(-1)
    # By place, not by side: the scenario's precision may be float32 too.
    exact, rounded = (
        float(np.mean([point.median for point in points[side::2]])) for side in (0, 1)
    )
    return {
        "mean_cosine": float(cosines_UQ.mean()),
        "p01_cosine": float(np.percentile(cosines_UQ, 1)),
        "least_cosine": float(cosines_UQ.min()),
        "float32_average_auc": exact,
        f"{precision}_average_auc": rounded,
        "average_auc_difference": abs(rounded - exact),
    }


def _checks(sides: Sides) -> tuple[Check, ...]:
    """Unit vectors, without which a cosine says nothing, of users who differ."""
    both = np.concatenate([sides.float32_UQZ, sides.rounded_UQZ])
    apart = float(np.abs(np.linalg.norm(both, axis=-1) - 1.0).max())
    spread = float(sides.float32_UQZ.std(axis=0).max())
    return (
        Check(
            name="all vectors have length one",
            is_ok=apart <= _UNIT_TOLERANCE,
            detail=f"{both.shape[0] * both.shape[1]} vectors, at most {apart:.1e} off",
        ),
        Check(
            name="users differ",
            is_ok=spread > _UNIT_TOLERANCE,
            detail=f"largest standard deviation over users {spread:.1e}",
        ),
    )
