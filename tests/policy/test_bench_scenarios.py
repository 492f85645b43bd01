"""Every bench scenario file loads, and the short set covers what `make bench` promises."""

import json
from pathlib import Path

import pytest

from qanchor.errors import ConfigError
from qanchor_bench.cli import main
from qanchor_bench.result import load_result
from qanchor_bench.runner import SUITES
from qanchor_bench.scenario import SCENARIO_DIR, find_scenario, load_scenario, scenario_files

RESULTS = [
    path
    for path in sorted((Path(SCENARIO_DIR).parent / "results").glob("*.json"))
    # Those of `qanchor eval`, and of measurements before the suite, have forms of their own.
    if "findings" in json.loads(path.read_text())
]


@pytest.mark.parametrize("path", scenario_files(), ids=lambda path: path.stem)
def test_a_scenario_file_loads(path: Path) -> None:
    scenario = load_scenario(path)
    assert scenario.about
    assert scenario.suite in SUITES


def test_the_short_set_has_every_suite_of_the_mini_shape() -> None:
    short = [load_scenario(path) for path in scenario_files()]
    wanted = {"static", "engine", "serve", "peers", "cache"}
    assert {s.suite for s in short if s.is_short} >= wanted


def test_the_readme_has_a_section_for_every_suite() -> None:
    text = (SCENARIO_DIR.parent / "README.md").read_text()
    missing = [suite for suite in SUITES if f"\n## {suite}\n" not in text]
    assert not missing


def test_a_scenario_for_a_gpu_says_so_and_has_the_targets_of_one() -> None:
    on_gpu = [s for s in map(load_scenario, scenario_files()) if s.is_on_gpu]
    assert {s.engine for s in on_gpu if s.suite == "engine"} == {"cuda", "tensorrt"}
    for scenario in on_gpu:
        assert not scenario.is_short
        if scenario.suite == "engine":
            assert scenario.at_most == {"base_ms": 1.0, "base_queries_over_one": 1.6}
            assert scenario.max_users


def test_list_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert all(path.stem in said for path in scenario_files())


def test_wrong_names_and_fields_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean"):
        find_scenario("engine_minni")
    file = tmp_path / "thing.toml"
    file.write_text('name = "thing"\nabout = "a"\nsuite = "engine"\nquerys = [1]\n')
    with pytest.raises(ConfigError, match="queries"):
        load_scenario(file)
    file.write_text('name = "other"\nabout = "a"\nsuite = "engine"\n')
    with pytest.raises(ConfigError, match="file's name"):
        load_scenario(file)
    file.write_text('name = "thing"\nabout = "a"\nsuite = "engine"\nrepeats = 2\n')
    with pytest.raises(ConfigError, match="repeats"):
        load_scenario(file)
    file.write_text('name = "thing"\nabout = "a"\nsuite = "serve"\nengine = "static"\n')
    with pytest.raises(ConfigError, match="no server process"):
        load_scenario(file)
    file.write_text(
        'name = "thing"\nabout = "a"\nsuite = "engine"\nengine = "cuda"\nprecision = "int8"\n'
    )
    with pytest.raises(ConfigError, match="for CPUs"):
        load_scenario(file)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_committed_result_was_right_and_tells_its_environment(path: Path) -> None:
    result = load_result(path)
    assert result.is_right
    assert not result.environment.is_dirty
    assert result.environment.commit in path.name
