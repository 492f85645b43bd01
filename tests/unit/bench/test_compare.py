"""`qanchor-bench compare`, reports and plots, from results made by hand."""

import json
from pathlib import Path

import msgspec
import pytest

from qanchor.environment import Environment
from qanchor.errors import ConfigError
from qanchor_bench.cli import main
from qanchor_bench.compare import changes
from qanchor_bench.report import markdown
from qanchor_bench.result import (
    Check,
    Findings,
    MachineState,
    Point,
    Result,
    load_result,
    save_result,
)
from qanchor_bench.scenario import BenchScenario

QUIET = (1.0, 1.01, 1.02, 1.01, 1.0)


def result(
    *points: Point, is_right: bool = True, not_run: tuple[str, ...] = (), **scenario: object
) -> Result:
    """A result on some machine; its one figure, `ratio`, is 2."""
    return Result(
        scenario=BenchScenario(
            **{"name": "some", "about": "by hand", "suite": "serve", **scenario}  # type: ignore[arg-type]
        ),
        environment=Environment(
            cpu="cpu", cores=2, python="3", packages={}, commit="abc", is_dirty=False
        ),
        machine=MachineState(
            threads=2,
            cpu_flags=("avx2",),
            governor="unknown",
            memory_gib=8.0,
            load_average_before=0.0,
            load_average_after=0.0,
            cpu_share_of_others=0.0,
            started_at="2026-11-25T10:00:00+00:00",
            wall_seconds=1.0,
        ),
        model_id="m",
        findings=Findings(
            points=points,
            checks=(Check(name="equal", is_ok=is_right, detail="by hand"),),
            figures={"ratio": 2.0, "lost": None},
            not_run=not_run,
        ),
    )


def point(name: str, values: tuple[float | None, ...], better: str = "less") -> Point:
    return Point(name=name, group="steps", unit="s", values=values, better=better)  # type: ignore[arg-type]


def scaled(factor: float) -> tuple[float, ...]:
    return tuple(factor * value for value in QUIET)


def test_slower_is_said_of_what_is_slower_alone(tmp_path: Path, capsys) -> None:
    noisy = (0.7, 1.0, 1.3, 1.9, 0.8)
    before = result(
        point("step", QUIET), point("wobbly", noisy), point("rate", QUIET, "more"),
        point("quicker", QUIET), point("gone", QUIET),
    )  # fmt: skip
    after = result(
        point("step", scaled(1.3)), point("wobbly", tuple(1.2 * v for v in noisy)),
        point("rate", scaled(0.5), "more"), point("quicker", scaled(0.5)),
    )  # fmt: skip
    verdicts = {change.before.name: change.verdict for change in changes(before, after)}
    assert verdicts == {"step": "slower", "wobbly": "same", "rate": "slower", "quicker": "faster"}
    old = save_result(before, tmp_path / "old", "box")
    new = save_result(after, tmp_path / "new", "box")
    assert old.name == "some_box_20261125_abc.json"
    assert main(["compare", str(old), str(new)]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["slower"] == ["step", "rate"]
    assert main(["compare", str(old), str(old)]) == 0


def test_a_percentile_that_was_lost_to_the_deadline_counts_as_slower() -> None:
    before, after = result(point("p99", QUIET)), result(point("p99", (None,) * 5))
    assert [change.verdict for change in changes(before, after)] == ["slower"]
    assert "beyond the deadline" in markdown(after)


def test_results_of_different_scenarios_are_not_compared() -> None:
    with pytest.raises(ConfigError, match="one scenario"):
        changes(result(), result(name="other"))


def test_targets_are_met_or_named(tmp_path: Path) -> None:
    kept = result(at_most={"ratio": 2.0}, at_least={"ratio": 1.5})
    assert kept.missed == ()
    missed = result(at_most={"ratio": 1.0, "lost": 5.0})
    assert missed.missed == (
        "ratio 2, wanted at most 1",
        "lost no value, wanted at most 5",
    )
    assert "MISSED" in markdown(missed)
    assert "met" in markdown(kept)
    assert not result(is_right=False).is_right
    stored = save_result(missed, tmp_path, "box")
    assert msgspec.to_builtins(load_result(stored)) == msgspec.to_builtins(missed)


def test_a_target_of_what_cannot_run_here_is_neither_met_nor_missed() -> None:
    wanted = {"over_a_peer": 2.0, "ratio": 1.0}
    assert result(not_run=("over_a_peer",), at_least=wanted).missed == ()
    assert "| over_a_peer | not run here | |" in markdown(result(not_run=("over_a_peer",)))
    assert result(at_least=wanted).missed == ("over_a_peer no value, wanted at least 2",)


def test_a_file_of_another_kind_is_refused(tmp_path: Path, capsys) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    assert main(["report", str(wrong)]) == 2
    assert "missing required field" in capsys.readouterr().err
