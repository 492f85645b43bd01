"""Configuration: wrong keys, types and overrides are told with a remedy."""

from pathlib import Path

import msgspec
import pytest

from qanchor import config
from qanchor.config import ModalitySpec, ProfileSchema
from qanchor.errors import ConfigError
from qanchor.train.recipes import RECIPES, Recipe, mini, recipe_named


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_survives_being_saved_and_loaded(name: str, tmp_path: Path) -> None:
    config.save(recipe_named(name), tmp_path / "recipe.json")
    assert config.load(Recipe, tmp_path / "recipe.json") == recipe_named(name)


def test_override_sets_nested_values_and_keeps_the_rest() -> None:
    changed = config.override(mini(), ["train.steps=7", "loss.margin=null", "loss.mask=per_term"])
    assert (changed.train.steps, changed.loss.margin, changed.loss.mask) == (7, None, "per_term")
    assert changed.decoder == mini().decoder


@pytest.mark.parametrize(
    ("assignment", "remedy"),
    [
        ("train.step=7", "did you mean 'steps'"),
        ("trein.steps=7", "did you mean 'train'"),
        ("train.steps=many", "int"),
        ("train.steps", "path=value"),
    ],
)
def test_a_wrong_override_names_the_remedy(assignment: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy) as raised:
        config.override(mini(), [assignment])
    assert repr(assignment.partition("=")[0])[1:-1] in str(raised.value)
    assert len(str(raised.value)) < 400, "the assignment is told, not the whole recipe"


def test_an_unknown_key_names_the_nearest_valid_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_events'"):
        config.from_mapping(ModalitySpec, {"name": "app", "max_event": 3, "max_event_tokens": 4})


def test_an_unknown_recipe_names_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mini'"):
        recipe_named("mni")


@pytest.mark.parametrize(
    ("field", "wording", "correct"),
    [
        ("template", {"template": "{days} days ago: {text}"}, "'days'"),
        ("template", {"template": "{days_ago} days ago: {items}"}, "'items'"),
        ("template", {"template": "{value}", "group_by": "week"}, "'value'"),
        ("template", {"template": "{text"}, "expected '}'"),
        ("template", {"template": "{}: {text}"}, "Replacement index 0"),
        ("template", {"template": "{text.name}"}, "no attribute 'name'"),
        ("template", {"template": "{text:d}"}, "Unknown format code 'd'"),
        ("item_template", {"item_template": "{event}", "group_by": "day"}, "'event'"),
        ("summary_template", {"summary_template": "{events} events"}, "'events'"),
    ],
)
def test_a_template_that_cannot_be_filled_in_is_told_with_its_place(
    tmp_path: Path, field: str, wording: dict[str, str], correct: str
) -> None:
    spec = {"name": "app", "max_events": 3, "max_event_tokens": 4, **wording}
    config.save({"modalities": [spec]}, tmp_path / "schema.json")
    with pytest.raises(ConfigError, match="of these only: ") as raised:
        config.load(ProfileSchema, tmp_path / "schema.json")
    assert raised.value.field == f"{tmp_path / 'schema.json'}: app.{field}"
    assert raised.value.value == wording[field]
    assert correct in raised.value.remedy


def test_a_query_template_has_no_field_but_the_query() -> None:
    spec = ModalitySpec(name="app", max_events=1, max_event_tokens=4)
    with pytest.raises(ConfigError, match=r"query_template.*of these only: query"):
        ProfileSchema(modalities=(spec,), query_template="{subject}: {query}")


def test_measured_types_are_as_many_as_there_are_numbers_for() -> None:
    most = tuple("abcdefgh")
    spec = ModalitySpec(name="app", max_events=1, max_event_tokens=4, measured_types=most)
    with pytest.raises(ConfigError, match=r"app\.measured_types.*at most 8 .* these are 9"):
        msgspec.structs.replace(spec, measured_types=(*most, "i"))


@pytest.mark.parametrize("names", [("App",), ("app", "app"), ("a b",)])
def test_modality_names_must_be_identifiers_and_unique(names: tuple[str, ...]) -> None:
    specs = tuple(ModalitySpec(name=name, max_events=1, max_event_tokens=4) for name in names)
    with pytest.raises(ConfigError, match="modalities"):
        ProfileSchema(modalities=specs)
