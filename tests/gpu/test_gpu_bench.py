"""The bench suites on a GPU, at the tiny size."""

from pathlib import Path

import pytest

pytest.importorskip("torch")

from qanchor_bench.bench import Bench
from qanchor_bench.runner import prepare
from qanchor_bench.scenario import BenchScenario
from qanchor_bench.suites import engine, peers

TINY = {
    "name": "tiny", "about": "a test", "shape": "tiny", "precision": "float16", "users": (1, 2),
    "queries": (3, 1), "prefix_lens": (40, 20), "suffix_lens": (6,), "max_users": 100,
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("tensorrt", marks=pytest.mark.tensorrt),
    ],
)
def test_engine_and_peers_run_on_a_gpu(name: str, tmp_path: Path) -> None:
    for suite, module in (("engine", engine), ("peers", peers)):
        scenario = BenchScenario(**TINY, suite=suite, engine=name)  # type: ignore[arg-type]
        found = module.run(Bench(scenario, prepare(scenario), 1, tmp_path))
        assert all(check.is_ok for check in found.checks), found.checks
        assert all(point.median > 0 for point in found.points)
