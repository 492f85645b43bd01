"""Every suite at the tiny size, whole: real graphs, real processes, real channel."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from qanchor.bundle.reader import Bundle, open_bundle
from qanchor.errors import ConfigError
from qanchor_bench.bench import Bench
from qanchor_bench.bundles import bundle_of, source_of
from qanchor_bench.cli import main
from qanchor_bench.result import Findings, load_result
from qanchor_bench.runner import measure
from qanchor_bench.scenario import BenchScenario
from qanchor_bench.suites import accuracy, cache, engine, peers, serve, static, training
from qanchor_bench.transformers_roads import transformers_roads
from qanchor_server.engine.memory import HostMemory
from qanchor_server.failures import Retryable

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


@pytest.mark.parametrize("name", ["cpu", "static"])
def test_peers_agree_with_the_packed_step(bench, name) -> None:
    found = peers.run(bench(suite="peers", engine=name))
    assert all(check.is_ok for check in found.checks), found.checks
    assert {point.labels["road"] for point in found.points} >= set(peers.TITLES)
    assert found.figures["speedup_over_full_passes"] is not None
    assert any("vLLM" in note for note in found.notes)
    assert ("speedup_over_llama" in found.figures) != ("speedup_over_llama" in found.not_run)


def test_transformers_answers_in_float32_whatever_it_runs_in() -> None:
    """As on a GPU, where it runs in the type of the bundle."""
    rng = np.random.default_rng(0)
    prefix_P, queries_NS = rng.integers(0, 300, 30), rng.integers(0, 300, (3, 5))
    exact = transformers_roads(source_of(TINY), prefix_P, queries_NS)
    source: Any = source_of(TINY)
    rounded = transformers_roads(source, prefix_P, queries_NS, dtype=torch.bfloat16)
    assert source.model.decoder.rotary_emb.inv_freq.dtype == torch.float32
    for name, road in exact.items():
        wanted, found = road(), rounded[name]()
        assert found.dtype == np.float32
        assert 0.99 < float((found * wanted).sum(-1).mean()) < 1 - 1e-7


class SmallMemory(HostMemory):
    """Host memory that ends: `NUM_SLOTS` allocations of one slot's size, working memory apart."""

    NUM_SLOTS = 9

    def __init__(self, slot_bytes: int) -> None:
        super().__init__()
        self.slot_bytes, self.held = slot_bytes, []

    def allocate(self, num_bytes: int) -> int:
        if num_bytes != self.slot_bytes:
            return super().allocate(num_bytes)
        if len(self.held) == self.NUM_SLOTS:
            raise Retryable("full")
        self.held.append(super().allocate(num_bytes))
        return self.held[-1]

    def free(self, address: int) -> None:
        super().free(address)
        if address in self.held:
            self.held.remove(address)


def test_an_engine_of_static_buckets_counts_the_users_that_its_memory_holds(
    bench, bundle, monkeypatch
) -> None:
    """The road of the GPU engines, on host memory: same buckets, same copies, same checks."""
    memory = SmallMemory(40 * bundle.manifest.dims.kv_bytes_per_token)
    monkeypatch.setattr("qanchor_bench.engines.HostMemory", lambda: memory)
    found = engine.run(bench(engine="static", max_users=1000))
    assert all(check.is_ok for check in found.checks), found.checks
    assert "engine = full torch passes" in {check.name for check in found.checks}
    by_name = {point.name: point.median for point in found.points}
    assert by_name["users held, prefix 40"] == SmallMemory.NUM_SLOTS
    assert by_name["working memory"] > 0
    # What filled the memory was given back; the run's two users and the fresh one remain.
    assert len(memory.held) == 3
    some = engine.run(bench(engine="static", max_users=3, users=(1,), prefix_lens=(30,)))
    assert {point.name: point.median for point in some.points}["users held, prefix 30"] == 3


def test_cache_finds_users_in_each_tier_and_compares_replies(bench) -> None:
    settings = {
        "suite": "cache", "users": (9,), "queries": (2,), "prefix_lens": (400,), "requests": 12,
        "tier_users": (2, 2, 3), "concurrency": 2, "warmup": 1,
    }  # fmt: skip
    found = cache.run(bench(**settings))
    assert all(check.is_ok for check in found.checks), found.checks
    by_name = {point.name: point for point in found.points}
    assert all(len(by_name[name].values) == 5 for name in cache.RETURNS.values())
    ratios = {name: found.figures[f"{name}_over_encoding_speedup"] for name in ("host", "disk")}
    assert ratios["host"] == pytest.approx(
        by_name[cache.RETURNS["encoding"]].median / by_name[cache.RETURNS["host"]].median
    )
    assert found.counts.pop("compared") == 6 * 3
    assert sum(found.counts.values()) == 5 * 12
    assert {"device", "encoded_now"} <= set(found.counts)
    for tier in ("device", "host", "disk"):
        assert 0 < found.figures[f"{tier}_peak_over_budget"] <= 1


def test_cache_tells_when_short_prefixes_need_more_users(bench) -> None:
    with pytest.raises(ConfigError, match="add users"):
        cache.run(bench(suite="cache", users=(9,)))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a simulated data set and an untrained checkpoint of it."""
    directory = tmp_path_factory.mktemp("untrained")
    # With this seed 60 users of each split have both classes of every label.
    training.prepare(directory, 400, seed=1)
    return directory


def test_accuracy_compares_int8_with_float32_on_labelled_users(untrained, tmp_path) -> None:
    scenario = msgspec.structs.replace(
        TINY, suite="accuracy", precision="int8", users=(60,), calibrate_users=4,
        checkpoint=str(untrained / "untrained"), dataset=str(untrained / "data"),
    )  # fmt: skip
    rounded = open_bundle(bundle_of(scenario, tmp_path))
    assert rounded.manifest.precision == "int8"
    assert bundle_of(scenario, tmp_path) == rounded.path
    found = accuracy.run(Bench(scenario, rounded, 1, tmp_path))
    assert all(check.is_ok for check in found.checks), found.checks
    assert 0.99 < found.figures["mean_cosine"] < 1 - 1e-7
    aucs = [point.median for point in found.points]
    assert found.figures["average_auc_difference"] == pytest.approx(
        abs(sum(aucs[1::2]) - sum(aucs[::2])) / (len(aucs) / 2)
    )
    with pytest.raises(ConfigError, match="labelled users"):
        bundle_of(msgspec.structs.replace(scenario, dataset=""), tmp_path)


def test_training_steps_in_pieces_have_the_losses_of_whole_batches(tmp_path) -> None:
    settings = {"suite": "training", "users": (120,), "batches": ((8, 0), (8, 4))}
    found = training.run(Bench(msgspec.structs.replace(TINY, **settings), None, 1, tmp_path))
    assert all(check.is_ok for check in found.checks), found.checks
    steps = [point for point in found.points if point.group == "step"]
    assert [len(point.values) for point in steps] == [5, 5]
    assert found.figures["8_by_4_time_over_one_piece"] == pytest.approx(
        steps[1].median / steps[0].median
    )


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


def test_serve_tells_wrong_replies(bench, monkeypatch) -> None:
    right = serve._EngineAlone.expected

    def turned(self, profiles):
        return {user: -vectors_QZ for user, vectors_QZ in right(self, profiles).items()}

    monkeypatch.setattr(serve._EngineAlone, "expected", turned)
    settings = {
        "suite": "serve", "users": (3,), "queries": (2,), "hit_ratios": (1.0,),
        "seconds": 0.2, "concurrency": 2, "deadline": 30.0,
    }  # fmt: skip
    found = serve.run(bench(**settings))
    assert found.counts["wrong"] == found.counts["compared"] > 0
    assert not found.checks[0].is_ok


def test_a_run_leaves_a_result_that_report_and_plots_are_made_from(bundle, tmp_path) -> None:
    scenario = msgspec.structs.replace(TINY, bundle=str(bundle.path), at_most={"nothing": 1.0})
    path = measure(scenario, tmp_path)
    result = load_result(path)
    assert result.is_right
    assert result.model_id == bundle.manifest.model_id
    assert result.scenario.bundle == bundle.path.name
    assert result.missed == ("nothing no value, wanted at most 1",)
    assert main(["report", str(path), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "### suffix step" in text
    assert (tmp_path / "report" / f"{path.stem}.png").stat().st_size > 10_000
    assert main(["compare", str(path), str(path)]) == 0
