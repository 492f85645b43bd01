"""Studies as data: the built-in ones fit every recipe, a wrong one is told what is wrong."""

import shutil
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from qanchor.config import override
from qanchor.data.dataset import Dataset, open_dataset
from qanchor.errors import ConfigError
from qanchor.study.plan import BUILT_IN, read_study
from qanchor.study.runs import base_triples, directory_id, training_view, variant_run
from qanchor.train.recipes import RECIPES, Recipe, recipe_named

DATA_ID = "0123456789ab"


@pytest.fixture(scope="module")
def dataset(wallet: Path) -> Dataset:
    return open_dataset(wallet)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_study_resolves_with_every_recipe(
    name: str, recipe: str, dataset: Dataset
) -> None:
    for variant in read_study(name).variants:
        run = variant_run(variant, recipe_named(recipe), dataset, DATA_ID)
        steps = recipe_named(recipe).train.steps * variant.steps_share
        assert run.recipe.train.steps == round(steps)


def test_the_ablations_are_those_of_the_method(dataset: Dataset) -> None:
    study = read_study("ablation")
    runs = {
        variant.name: variant_run(variant, recipe_named("mini"), dataset, DATA_ID)
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
    study = read_study("scaling")
    seen = []
    for name in ("1/8 of the users", "1/4 of the users", "base"):
        variant = next(one for one in study.variants if one.name == name)
        run = variant_run(variant, recipe_named("mini"), dataset, DATA_ID)
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
        variant_run(read_study(str(file)).variants[0], tiny_mini, dataset, DATA_ID)


def test_results_follow_from_the_contents_of_data_and_triples(
    wallet: Path, tmp_path: Path, tiny_mini: Recipe
) -> None:
    data = Path(shutil.copytree(wallet, tmp_path / "data"))
    few = override(tiny_mini, ["triples.per_user_future=1", "triples.views_per_user=0"])
    out = tmp_path / "study"
    triples, data_id = base_triples(None, open_dataset(data), few, out)
    written = triples.stat().st_mtime_ns
    assert base_triples(None, open_dataset(data), few, out) == (triples, data_id)
    assert triples.stat().st_mtime_ns == written
    ids, files = [data_id], [triples]

    def note(recipe: Recipe = few) -> None:
        path, data_id = base_triples(None, open_dataset(data), recipe, out)
        ids.append(data_id)
        files.append(path)

    labels = pq.read_table(data / "labels.parquet")
    flipped = pc.subtract(1, labels["label"]).cast(pa.int8())
    place = labels.column_names.index("label")
    pq.write_table(labels.set_column(place, "label", flipped), data / "labels.parquet")
    note()
    scenarios = (data / "scenarios.json").read_text()
    (data / "scenarios.json").write_text(scenarios.replace("Will", "Does", 1))
    note()
    (data / "topics.toml").write_text('subject = "shopkeeper"\n')
    note()
    assert any("shopkeeper" in query for query in pq.read_table(files[-1])["query"].to_pylist())
    note(override(few, ["triples.seed=1"]))
    assert len(set(ids)) == len(set(files)) == len(ids) == 5
    mine = shutil.copy(triples, tmp_path / "mine.parquet")
    _, with_mine = base_triples(Path(mine), open_dataset(data), few, out)
    _, with_other = base_triples(files[-1], open_dataset(data), few, out)
    assert with_mine != with_other
    with pytest.raises(ConfigError, match=r"--triples=.*no such file"):
        base_triples(tmp_path / "tripels.parquet", open_dataset(data), few, out)
    assert not (tmp_path / "tripels.parquet").exists()


@pytest.mark.parametrize("part", ["decoder", "event_encoder", "query_encoder"])
def test_results_follow_from_the_contents_of_backbones(
    part: str, dataset: Dataset, tmp_path: Path
) -> None:
    weights = tmp_path / "model.safetensors"
    recipe = override(recipe_named("mini"), [f"{part}.path={tmp_path}"])

    def key() -> str:
        directory_id.cache_clear()
        return variant_run(read_study("ablation").variants[0], recipe, dataset, DATA_ID).key

    weights.write_bytes(b"one")
    first = key()
    assert key() == first
    weights.write_bytes(b"two")
    assert key() != first
