"""Studies as data: the built-in ones fit every recipe, a wrong one is told what is wrong."""

from pathlib import Path

import msgspec
import pytest

from qanchor.data.dataset import Dataset, open_dataset
from qanchor.errors import ConfigError
from qanchor.study.plan import BUILT_IN, read_study
from qanchor.study.runs import training_view, variant_run
from qanchor.train.recipes import RECIPES, Recipe, recipe_named


@pytest.fixture(scope="module")
def dataset(wallet: Path) -> Dataset:
    return open_dataset(wallet)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_study_resolves_with_every_recipe(
    name: str, recipe: str, dataset: Dataset
) -> None:
    triples = dataset.path / "users.parquet"
    for variant in read_study(name).variants:
        run = variant_run(variant, recipe_named(recipe), dataset, triples)
        steps = recipe_named(recipe).train.steps * variant.steps_share
        assert run.recipe.train.steps == round(steps)


def test_the_ablations_are_those_of_the_method(dataset: Dataset) -> None:
    triples = dataset.path / "users.parquet"
    study = read_study("ablation")
    runs = {
        variant.name: variant_run(variant, recipe_named("mini"), dataset, triples)
        for variant in study.variants
    }
    assert (runs["neither"].schema.has_user_token, runs["neither"].schema.has_modality_tokens) == (
        False,
        False,
    )
    assert runs["no contrastive loss"].recipe.loss.contrastive_weight == 0
    assert runs["no next-token loss"].recipe.loss.next_token_weight == 0
    assert runs["no statistics loss"].recipe.loss.statistics_weight == 0
    paper = runs["the paper's losses"].recipe.loss
    assert (paper.contrastive_weight, paper.next_token_context) == (1, "all")
    assert (paper.statistics_weight, paper.yes_no_weight) == (0, 0)
    alone = runs["the paper's losses without contrastive"].recipe.loss
    assert alone == msgspec.structs.replace(paper, contrastive_weight=0)
    assert runs["with margin mask"].recipe.loss.margin == 0.1
    assert runs["user-only"].schema.query_template == ""
    # `mini` has no mask: the variant is base, and is not trained twice. Nor are tuned ones.
    for name in ("no margin mask", "tuned", "tuned without pre-training", "untrained"):
        assert runs[name].key == runs["base"].key
    others = [run.key for name, run in runs.items() if run.key != runs["base"].key]
    assert len(set(others)) == len(others) == 11


def test_smaller_sets_of_users_lie_within_larger_ones(dataset: Dataset) -> None:
    triples = dataset.path / "users.parquet"
    study = read_study("scaling")
    seen = []
    for name in ("1/8 of the users", "1/4 of the users", "base"):
        variant = next(one for one in study.variants if one.name == name)
        run = variant_run(variant, recipe_named("mini"), dataset, triples)
        view = training_view(dataset, run)
        assert view.user_ids("test") == dataset.user_ids("test")
        seen.append(set(view.user_ids("train")))
    assert seen[0] < seen[1] < seen[2] == set(dataset.user_ids("train"))
    assert len(seen[0]) == round(len(seen[2]) / 8)


def test_only_keeps_the_first_variant_and_whole_curves() -> None:
    study = read_study("scaling").only(["prompt"])
    assert [variant.name for variant in study.variants][:2] == ["base", "1 prompt row"]
    assert [curve.name for curve in study.curves] == ["prompt"]
    single = read_study("scaling").only(["1/2 of the steps"])
    assert [variant.name for variant in single.variants] == ["base", "1/2 of the steps"]
    assert not single.curves
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        read_study("scaling").only(["step"])


def test_a_wrong_study_is_told(tmp_path: Path, dataset: Dataset, tiny_mini: Recipe) -> None:
    with pytest.raises(ConfigError, match="ablation, scaling"):
        read_study("ablations")
    file = tmp_path / "mine.toml"
    twice = '[[variants]]\nname = "a"\n' * 2
    file.write_text(f'title = "mine"\n{twice}')
    with pytest.raises(ConfigError, match="must be unique"):
        read_study(str(file))
    file.write_text('title = "mine"\n[[variants]]\nname = "a"\nset = ["loss.margins=0"]\n')
    with pytest.raises(ConfigError, match=r"did you mean 'margin'"):
        variant_run(read_study(str(file)).variants[0], tiny_mini, dataset, file)
