"""Every suite at the tiny size, whole: real graphs, real processes, real channel."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("torch")

from qanchor.bundle.reader import Bundle, open_bundle
from qanchor_bench.bench import Bench
from qanchor_bench.bundles import bundle_of
from qanchor_bench.cli import main
from qanchor_bench.result import Findings, load_result
from qanchor_bench.runner import measure
from qanchor_bench.scenario import BenchScenario
from qanchor_bench.suites import engine, peers, serve, static

TINY = BenchScenario(
    name="tiny", about="a test", suite="engine", shape="tiny", threads=1, warmup=0, users=(1, 2),
    queries=(3, 1), prefix_lens=(40, 20), suffix_lens=(6, 4), budget_gib=(0.001,), full_repeats=1,
)  # fmt: skip

RunSuite = Callable[..., Findings]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The random tiny bundle, exported as the runner exports it."""
    return open_bundle(bundle_of(TINY, tmp_path_factory.mktemp("bundles")))


@pytest.fixture
def bench(bundle: Bundle, tmp_path: Path) -> Callable[..., Bench]:
    """A bench with some settings changed."""

    def make(**changes: object) -> Bench:
        return Bench(msgspec.structs.replace(TINY, **changes), bundle, 1, tmp_path)

    return make


def test_static_counts_users_in_the_servers_own_pool(bench) -> None:
    found = static.run(bench())
    by_name = {point.name: point.median for point in found.points}
    dims = bench().bundle.manifest.dims
    slot_bytes = 128 * dims.kv_bytes_per_token
    assert by_name["users in 0.001 GiB, prefix 40"] == int(0.001 * (1 << 30)) // slot_bytes
    assert by_name["keys and values, prefix 40"] == 40 * dims.kv_bytes_per_token
    assert all(check.is_ok for check in found.checks)


def test_engine_measures_every_point_and_equals_torch(bench) -> None:
    found = engine.run(bench())
    assert all(check.is_ok for check in found.checks), found.checks
    assert "engine = full torch passes" in {check.name for check in found.checks}
    steps = [point for point in found.points if point.group == "suffix step"]
    assert len(steps) == 5
    assert all(len(point.values) == 5 and point.floor for point in found.points)
    assert found.figures["suffix_over_floor"] == pytest.approx(steps[0].median / steps[0].floor)
    expected = {"suffix_over_floor", "longest_over_shortest_prefix", "base_queries_over_one"}
    assert expected < set(found.figures)


def test_a_bundle_without_its_torch_model_is_held_to_its_stored_embeddings(bench) -> None:
    path = str(bench().bundle.path)
    found = engine.run(bench(bundle=path, users=(1,), queries=(1,), prefix_lens=(20,)))
    assert found.checks[0].name == "engine = stored torch embeddings"
    assert all(check.is_ok for check in found.checks)


def test_peers_agree_with_the_packed_step(bench) -> None:
    found = peers.run(bench(suite="peers"))
    assert all(check.is_ok for check in found.checks), found.checks
    assert {point.labels["road"] for point in found.points} >= set(peers.TITLES)
    assert found.figures["speedup_over_full_passes"] is not None
    assert any("vLLM" in note for note in found.notes)


@pytest.mark.parametrize("clients", [1, 2])
def test_serve_runs_server_and_clients_and_checks_replies(bench, clients) -> None:
    settings = {
        "suite": "serve", "users": (3,), "queries": (2,), "hit_ratios": (1.0, 0.5),
        "seconds": 0.4, "concurrency": 4, "clients": clients, "deadline": 30.0,
    }  # fmt: skip
    found = serve.run(bench(**settings))
    assert all(check.is_ok for check in found.checks), found.checks
    assert found.counts["misses"] > 0
    assert found.counts["hits"] > found.counts["misses"]
    assert found.counts["incomplete"] == found.counts["wrong"] == 0
    names = {point.name for point in found.points}
    assert {"engine step", "empty round trip", "saturated, stream"} <= names
    assert found.figures["p50_over_allowance"] is not None
    assert found.figures["p99_of_hits_at_0.5_over_at_1"] is not None


def test_a_run_leaves_a_result_that_report_and_plots_are_made_from(bundle, tmp_path) -> None:
    scenario = msgspec.structs.replace(TINY, bundle=str(bundle.path), at_most={"nothing": 1.0})
    path = measure(scenario, tmp_path)
    result = load_result(path)
    assert result.is_right
    assert result.model_id == bundle.manifest.model_id
    assert result.missed == ("nothing no value, wanted at most 1",)
    assert main(["report", str(path), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "### suffix step" in text
    assert (tmp_path / "report" / f"{path.stem}.png").stat().st_size > 10_000
    assert main(["compare", str(path), str(path)]) == 0
