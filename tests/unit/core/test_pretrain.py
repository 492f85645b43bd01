"""The training loop: it learns, stops and goes on exactly, and touches only what it may."""

import itertools
import shutil
from pathlib import Path
from typing import Any, Literal

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from qanchor.checkpoint import Checkpoint, load_checkpoint
from qanchor.cli import main
from qanchor.config import override
from qanchor.data.dataset import open_dataset
from qanchor.data.useru import TripleOptions, write_triples
from qanchor.data.wallet import generate_wallet
from qanchor.errors import ConfigError, DataError
from qanchor.train import pretrain as training
from qanchor.train.optimizer import build_optimizers, learning_rate_share
from qanchor.train.pretrain import METRICS_FILE, UNTRAINED, pretrain, resume
from qanchor.train.recipes import Recipe, TrainConfig
from qanchor.train.run_directory import INPUTS_FILE, TRIPLES_FILE
from qanchor.train.step import StepLosses

STEPS = 8


@pytest.fixture(scope="module")
def wallet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty simulated users and their triples."""
    directory = tmp_path_factory.mktemp("wallet")
    generate_wallet(directory / "data", 60, seed=3)
    write_triples(open_dataset(directory / "data"), directory / "triples.parquet")
    return directory


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Recipe) -> Recipe:
    return override(
        tiny_recipe,
        [
            f"train.steps={STEPS}", "train.users_per_batch=4", "train.queries_per_user=2",
            "train.warmup_steps=2", "train.heldout_users=4", "train.evaluate_every=4",
            "train.checkpoint_every=4", "loss.mask_from_step=2", "train.num_threads=1",
        ],
    )  # fmt: skip


def losses(run_dir: Path, term: str = "loss") -> list[float]:
    lines = (run_dir / METRICS_FILE).read_bytes().splitlines()
    return [msgspec.json.decode(line)[term] for line in lines]


@pytest.mark.parametrize(
    ("is_trained", "optimizer", "event_dropout"),
    [("true", "adamw", 0.2), ("false", "adamw", 0), ("false", "muon", 0.2)],
)
def test_a_run_killed_and_resumed_has_the_same_losses_to_the_bit(
    recipe: Recipe,
    wallet: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_trained: str,
    optimizer: str,
    event_dropout: float,
) -> None:
    recipe = override(
        recipe,
        [
            f"event_encoder.is_trained={is_trained}",
            f"train.optimizer={optimizer}",
            f"train.event_dropout={event_dropout}",
        ],
    )
    dataset, triples = open_dataset(wallet / "data"), wallet / "triples.parquet"
    pretrain(recipe, dataset, triples, tmp_path / "whole")
    original, calls = training.backward, itertools.count(1)

    def killed_in_step_seven(*args: Any, **kwargs: Any) -> StepLosses:
        if next(calls) == 7:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "backward", killed_in_step_seven)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, dataset, triples, tmp_path / "killed")
    assert len(losses(tmp_path / "killed")) == 6
    latest = resume(dataset, triples, tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert load_checkpoint(latest).meta.step == STEPS


def test_training_lowers_the_loss_and_reports_held_out_users(
    recipe: Recipe, wallet: Path, tmp_path: Path
) -> None:
    longer = override(recipe, ["train.steps=120", "train.evaluate_every=120"])
    pretrain(longer, open_dataset(wallet / "data"), wallet / "triples.parquet", tmp_path / "run")
    for term, share in (("contrastive", 0.8), ("next_token", 0.8), ("statistics", 0.95)):
        found = losses(tmp_path / "run", term)
        assert sum(found[-5:]) < share * sum(found[:5]), term
    last = msgspec.json.decode((tmp_path / "run" / METRICS_FILE).read_bytes().splitlines()[-1])
    terms = ("contrastive", "next_token", "statistics", "top1")
    assert {f"heldout_{term}" for term in terms} <= last.keys()


def test_an_event_encoder_that_is_not_trained_stays_as_it_starts(
    recipe: Recipe, wallet: Path, tmp_path: Path
) -> None:
    frozen = override(recipe, ["event_encoder.is_trained=false"])
    latest = pretrain(
        frozen, open_dataset(wallet / "data"), wallet / "triples.parquet", tmp_path / "run"
    )
    start, end = (
        load_checkpoint(path).model.state_dict() for path in (tmp_path / "run" / UNTRAINED, latest)
    )
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert not any(name.startswith("event_encoder.") for name in changed)
    assert any(name.startswith("encoder.") for name in changed)


def test_labels_do_not_enter_pre_training(recipe: Recipe, wallet: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(wallet / "data", bare)
    (bare / "labels.parquet").unlink()
    pretrain(recipe, open_dataset(bare), wallet / "triples.parquet", tmp_path / "without")
    pretrain(recipe, open_dataset(wallet / "data"), wallet / "triples.parquet", tmp_path / "with")
    assert losses(tmp_path / "without") == losses(tmp_path / "with")


def test_a_triple_of_a_test_user_is_refused(recipe: Recipe, wallet: Path, tmp_path: Path) -> None:
    dataset = open_dataset(wallet / "data")
    table = pq.read_table(wallet / "triples.parquet").to_pylist()
    table[3]["user_id"] = dataset.user_ids("test")[0]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "triples.parquet")
    with pytest.raises(DataError, match=r"triples: user_id.*is no train user"):
        pretrain(recipe, dataset, tmp_path / "triples.parquet", tmp_path / "run")


def test_a_directory_with_a_run_is_not_overwritten(
    recipe: Recipe, wallet: Path, tmp_path: Path
) -> None:
    (tmp_path / "run" / UNTRAINED).mkdir(parents=True)
    with pytest.raises(ConfigError, match="already holds a run"):
        pretrain(
            recipe, open_dataset(wallet / "data"), wallet / "triples.parquet", tmp_path / "run"
        )


@pytest.fixture(scope="module")
def begun(recipe: Recipe, wallet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data set, triples and a run of one step begun with them; what changes it copies it."""
    place = tmp_path_factory.mktemp("begun")
    shutil.copytree(wallet / "data", place / "data")
    shutil.copy(wallet / "triples.parquet", place / "mine.parquet")
    short = override(recipe, ["train.steps=1"])
    pretrain(short, open_dataset(place / "data"), place / "mine.parquet", place / "run")
    return place


def halved(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.slice(0, len(table) // 2), path)


def test_a_resumed_run_takes_the_triples_it_was_begun_with(
    begun: Path, wallet: Path, tmp_path: Path
) -> None:
    place = shutil.copytree(begun, tmp_path / "copy", symlinks=True)
    dataset, run, mine = open_dataset(place / "data"), place / "run", place / "mine.parquet"
    assert resume(dataset, None, run) == resume(dataset, wallet / "triples.parquet", run)
    inputs = msgspec.json.decode((run / INPUTS_FILE).read_bytes())
    assert inputs["triples"] == str(begun / "mine.parquet")
    (run / INPUTS_FILE).write_bytes(msgspec.json.encode(inputs | {"triples": str(mine)}))
    halved(mine)
    for given in (None, mine):
        with pytest.raises(ConfigError, match=r"--triples=.*not that of .* when the run was begun"):
            resume(dataset, given, run)
    mine.unlink()
    with pytest.raises(ConfigError, match=r"--triples=.*mine.parquet.*no such file"):
        resume(dataset, None, run)
    assert not (run / TRIPLES_FILE).exists()


@pytest.mark.parametrize("name", ["events.parquet", "future_events_train.parquet"])
def test_a_resumed_run_wants_its_data_set_as_it_was(begun: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(begun, tmp_path, symlinks=True, dirs_exist_ok=True)
    dataset = open_dataset(tmp_path / "data")
    (tmp_path / "data" / "labels.parquet").unlink()
    resume(dataset, None, tmp_path / "run")
    halved(tmp_path / "data" / name)
    with pytest.raises(ConfigError, match=r"dataset=.*not those the run was begun with"):
        resume(dataset, None, tmp_path / "run")


def test_a_run_of_an_earlier_version_goes_on_with_the_triples_it_has(
    begun: Path, tmp_path: Path
) -> None:
    shutil.copytree(begun, tmp_path, symlinks=True, dirs_exist_ok=True)
    dataset, run = open_dataset(tmp_path / "data"), tmp_path / "run"
    (run / INPUTS_FILE).unlink()
    with pytest.raises(ConfigError, match="no such file"):
        resume(dataset, None, run)
    resume(dataset, tmp_path / "mine.parquet", run)
    shutil.copy(tmp_path / "mine.parquet", run / TRIPLES_FILE)
    resume(dataset, None, run)


def test_triples_that_lie_in_the_run_directory_are_used_only_if_the_recipe_makes_them(
    recipe: Recipe, wallet: Path, tmp_path: Path
) -> None:
    short = override(recipe, ["train.steps=1", "triples.views_per_user=0"])
    dataset, run = open_dataset(wallet / "data"), tmp_path / "run"
    left = run / TRIPLES_FILE
    write_triples(dataset, left, TripleOptions(per_user_future=2))
    before = left.read_bytes()
    with pytest.raises(ConfigError, match="not what this recipe makes"):
        pretrain(short, dataset, None, run)
    assert left.read_bytes() == before
    assert [path.name for path in run.iterdir()] == [TRIPLES_FILE]
    # Left by a kill before the first checkpoint.
    write_triples(dataset, left, short.triples)
    pretrain(short, dataset, None, run)
    shutil.move(run, tmp_path / "elsewhere")
    resume(dataset, None, tmp_path / "elsewhere")


def test_the_command_makes_no_triples_for_a_name_mistyped_or_a_run_there_is(
    begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = str(begun / "data"), str(begun / "run")
    missing = tmp_path / "tripels.parquet"
    assert main(["pretrain", data, str(tmp_path / "run"), "--triples", str(missing)]) == 2
    assert "qanchor data triples" in capsys.readouterr().err
    assert not missing.exists()
    assert main(["pretrain", data, run]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["pretrain", data, str(tmp_path / "none"), "--resume"]) == 2
    assert not list((tmp_path).rglob("*.parquet"))
    assert not (begun / "run" / TRIPLES_FILE).exists()


def test_a_resumed_run_keeps_its_recipe(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pretrain", str(begun / "data"), str(begun / "run"), "--resume"]
    assert main([*words, "--recipe", "mini", "--set", "train.steps=1"]) == 0
    for changed in (["--set", "train.steps=99"], ["--recipe", "qwen2.5-0.5b"]):
        assert main([*words, *changed]) == 2
        assert "keeps its recipe" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_trainable_parameter_is_moved_by_one_optimizer(
    checkpoint: Checkpoint, optimizer: Literal["adamw", "muon"]
) -> None:
    model = checkpoint.model
    made = build_optimizers(model, TrainConfig(optimizer=optimizer))
    held = [id(p) for each in made for group in each.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}
    # The table of token embeddings, which is the vocabulary projection too, is AdamW's.
    table = id(model.decoder.get_input_embeddings().weight)
    assert table in {id(p) for group in made[0].param_groups for p in group["params"]}


def test_learning_rate_warms_up_then_falls_to_a_tenth() -> None:
    train = TrainConfig(steps=110, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate_share(step, train) for step in range(train.steps + 1)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("can", "expected"), [({"avx512_bf16": True}, "bfloat16"), ({"avx2": True}, "float32")]
)
def test_a_run_keeps_the_dtype_its_first_device_multiplies_in(
    recipe: Recipe,
    wallet: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    can: dict[str, bool],
    expected: str,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    data, triples = open_dataset(wallet / "data"), wallet / "triples.parquet"
    short = override(recipe, ["train.dtype=auto", "train.steps=1"])
    path = pretrain(short, data, triples, tmp_path / "run")
    assert load_checkpoint(path).meta.recipe.train.dtype == expected
