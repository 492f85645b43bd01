"""What a scenario's engine is given, which bundle it asks for, and when a tail is told."""

from pathlib import Path

import msgspec
import pytest

pytest.importorskip("torch")

from qanchor.config import override
from qanchor.errors import ConfigError
from qanchor_bench import bundles, runner
from qanchor_bench.engines import server_config
from qanchor_bench.scenario import BenchScenario, find_scenario
from qanchor_bench.suites.cache import within_budgets
from qanchor_bench.suites.engine import tail

BASE = BenchScenario(
    name="some", about="by hand", suite="engine", queries=(10, 64), suffix_lens=(20, 7),
    users=(1, 40), prefix_lens=(760, 1024),
)  # fmt: skip


def changed(**changes: object) -> BenchScenario:
    return msgspec.structs.replace(BASE, **changes)


def test_buckets_hold_the_largest_step_of_a_scenario() -> None:
    """Base 1 x 10 x 20; 64 queries make 1280 tokens, 40 users 8000."""
    limits = server_config(BASE, None, 2).bucket_limits()  # type: ignore[arg-type] # cpu needs none
    assert (limits.max_step_users, limits.max_step_tokens) == (40, 8000)
    served = server_config(changed(suite="serve"), None)  # type: ignore[arg-type]
    assert (served.max_step_users, served.max_step_tokens) == (16, 512)


def test_settings_of_the_scenario_stand_above_the_benchs_and_are_checked() -> None:
    assert server_config(changed(server={"max_step_tokens": 64}), None).max_step_tokens == 64  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_step_tokens"):
        server_config(changed(server={"max_step_tokenz": 64}), None)  # type: ignore[arg-type]


def test_a_servers_setting_can_be_given_by_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert override(BASE, ["server.max_step_tokens=64"]).server == {"max_step_tokens": 64}
    scenario = find_scenario("serve_mini")
    assert runner.main([str(scenario), "results", "--prepare", "--set", "secondz=1"]) == 2
    told = capsys.readouterr().err
    assert "did you mean 'seconds'" in told
    assert "Traceback" not in told


def test_a_bundle_is_shared_by_scenarios_that_ask_for_the_same_and_by_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "_export", lambda scenario, path: None)
    data = tmp_path / "data"
    data.mkdir()
    (data / "schema.json").write_text("{}")

    def name(**changes: object) -> str:
        return bundles.bundle_of(changed(**changes), tmp_path).name

    assert name() == name(suite="peers", queries=(3,), prefix_lens=(8,))
    apart = [
        name(), name(seed=1), name(shape="tiny"), name(precision="int8"), name(engine="static"),
        name(engine="static", prefix_lens=(9,)), name(kv_dtype="float16"),
        name(precision="int8", dataset=str(data)), name(checkpoint=str(data)),
    ]  # fmt: skip
    assert len(set(apart)) == len(apart)
    calibrated = name(precision="int8", dataset=str(data))
    (data / "more").write_text("x")
    assert name(precision="int8", dataset=str(data)) != calibrated
    with pytest.raises(ConfigError, match="no files"):
        name(checkpoint=str(tmp_path / "absent"))


def test_a_tail_is_told_of_a_hundred_runs_and_more() -> None:
    runs = [1e-3] * 98 + [2e-3] * 2
    assert tail(runs) == {"base_p99_ms": 2.0}
    assert tail(runs[:-1]) == {}


def test_one_byte_over_a_budget_is_wrong() -> None:
    budgets = {"device": 10, "disk": 0}
    assert within_budgets(budgets, {"device": 10, "disk": 0}).is_ok
    assert not within_budgets(budgets, {"device": 11, "disk": 0}).is_ok
    assert not within_budgets({}, {}).is_ok
