"""Scenario files: what they hold, which model they fit, how they enter an export."""

from pathlib import Path

import msgspec
import pytest
import torch

from qanchor import config
from qanchor.bundle.packing import scenario_suffix
from qanchor.bundle.scenario_file import (
    ScenarioFile,
    check_fits,
    read_scenario_file,
    with_replaced,
)
from qanchor.checkpoint import Checkpoint, checkpoint_id, load_checkpoint, save_checkpoint
from qanchor.config import Scenario
from qanchor.errors import ConfigError
from qanchor_export.reference import scenario_query
from qanchor_export.source import source_of

ROWS = ((0.25,) * 32, (-1.5,) * 32)
TUNED = Scenario(
    name="a", question="How active is the user?", version=2, soft_prompt=ROWS, prototypes=((1.0,),)
)
COMPILED = Scenario(name="b", question="Why?", soft_prompt=ROWS, is_compiled=True)


def file_of(checkpoint: Checkpoint) -> ScenarioFile:
    return ScenarioFile(
        checkpoint_id=checkpoint_id(checkpoint), hidden_dim=32, scenarios=(TUNED, COMPILED)
    )


def test_a_scenario_file_comes_back_the_same(checkpoint: Checkpoint, tmp_path: Path) -> None:
    config.save(file_of(checkpoint), tmp_path / "s.json")
    assert read_scenario_file(tmp_path / "s.json") == file_of(checkpoint)


def test_the_checkpoint_id_is_of_the_content(checkpoint: Checkpoint, tmp_path: Path) -> None:
    before = checkpoint_id(checkpoint)
    save_checkpoint(checkpoint, tmp_path / "one")
    assert checkpoint_id(load_checkpoint(tmp_path / "one")) == before
    with torch.no_grad():
        checkpoint.model.head.down.bias[0] += 1e-6
    assert checkpoint_id(checkpoint) != before


def test_an_export_takes_the_scenarios_of_a_file_of_its_checkpoint(checkpoint: Checkpoint) -> None:
    source = source_of(checkpoint, file_of(checkpoint))
    assert source.scenarios == (TUNED, COMPILED)
    assert source.checkpoint_id == checkpoint_id(checkpoint)
    assert source.max_query_len == checkpoint.meta.recipe.train.max_query_len + 1 + 2
    tuned, compiled = (scenario_query(source, scenario) for scenario in source.scenarios)
    assert tuned.token_ids == checkpoint.encode_query(TUNED.question)
    assert tuned.suffix_len == len(tuned.token_ids) + 3
    assert compiled.token_ids == ()
    assert compiled.suffix_len == 3


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"checkpoint_id": "0" * 32}, "scenario_file.checkpoint_id"),
        ({"hidden_dim": 896}, "scenario_file.hidden_dim"),
        ({"scenarios": (Scenario(name="x", question="", soft_prompt=((1.0,),)),)}, "x.soft_prompt"),
    ],
)
def test_a_file_of_another_model_is_refused(
    checkpoint: Checkpoint, change: dict[str, object], field: str
) -> None:
    with pytest.raises(ConfigError, match="tune") as caught:
        source_of(checkpoint, msgspec.structs.replace(file_of(checkpoint), **change))
    assert caught.value.field == field


def test_a_server_can_check_a_file_against_the_manifest_alone(checkpoint: Checkpoint) -> None:
    check_fits(file_of(checkpoint), checkpoint_id(checkpoint), 32)
    with pytest.raises(ConfigError, match="this model is unknown"):
        check_fits(file_of(checkpoint), "", 32)


def test_newer_scenarios_take_the_place_of_their_namesakes() -> None:
    old = [Scenario(name=name, question="?") for name in "abc"]
    new = [Scenario(name=name, question="!") for name in "db"]
    assert [(s.name, s.question) for s in with_replaced(old, new)] == [
        ("a", "?"), ("b", "!"), ("c", "?"), ("d", "!"),
    ]  # fmt: skip


def test_a_file_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    with pytest.raises(ConfigError, match="no such file"):
        read_scenario_file(path)
    config.save(ScenarioFile(checkpoint_id="1", hidden_dim=2, scenarios=(TUNED, TUNED)), path)
    with pytest.raises(ConfigError, match="unique"):
        read_scenario_file(path)
    newer = ScenarioFile(format_version=9, checkpoint_id="1", hidden_dim=2, scenarios=())
    config.save(newer, path)
    with pytest.raises(ConfigError, match="this program reads 1"):
        read_scenario_file(path)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"is_compiled": True}, "needs a soft prompt"),
        ({"soft_prompt": ((1.0,), (1.0, 2.0))}, "one width"),
        ({"prototypes": ((1.0,), (1.0, 2.0))}, "one width"),
    ],
)
def test_a_scenario_that_contradicts_itself_is_refused(
    fields: dict[str, object], rule: str
) -> None:
    with pytest.raises(ConfigError, match=rule):
        Scenario(name="x", question="?", **fields)  # type: ignore[arg-type]


def test_rows_of_another_width_are_refused_where_a_suffix_is_made() -> None:
    with pytest.raises(ConfigError, match="hidden_dim is 5"):
        scenario_suffix(TUNED, lambda _: [1], 5)
