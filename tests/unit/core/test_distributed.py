"""Two processes over gloo are one: losses, gradients, whole runs, kill and resume."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from qanchor import config
from qanchor.checkpoint import load_checkpoint, save_checkpoint
from qanchor.config import override
from qanchor.data.dataset import open_dataset
from qanchor.data.useru import write_triples
from qanchor.data.wallet import generate_wallet
from qanchor.decoder import LoraConfig
from qanchor.errors import ConfigError
from qanchor.train.distributed import Processes
from qanchor.train.pretrain import METRICS_FILE, Trainer, pretrain
from qanchor.train.recipes import Recipe
from qanchor.train.setup import prepare
from qanchor.train.sources import in_memory
from tests.unit.core import processes_worker
from tests.unit.core.processes_worker import VARIANTS, measure, uneven_batch

STEPS = 6
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Recipe) -> Path:
    """Sixty simulated users, their triples, an untrained checkpoint and a recipe."""
    directory = tmp_path_factory.mktemp("processes")
    generate_wallet(directory / "data", 60, seed=3)
    dataset = open_dataset(directory / "data")
    write_triples(dataset, directory / "triples.parquet")
    recipe = override(
        tiny_recipe,
        [
            f"train.steps={STEPS}", "train.users_per_batch=6", "train.queries_per_user=2",
            "train.warmup_steps=2", "train.heldout_users=4", "train.evaluate_every=3",
            "train.checkpoint_every=3", "train.num_threads=1", "train.dtype=float32",
            "event_encoder.is_trained=true", "loss.contrastive_weight=1",
        ],
    )  # fmt: skip
    config.save(recipe, directory / "recipe.json")
    checkpoint, _ = prepare(recipe, dataset, directory / "triples.parquet")
    save_checkpoint(checkpoint, directory / "start")
    return directory


def torchrun(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Two processes of the worker."""
    return subprocess.run(
        [*TORCHRUN, processes_worker.__file__, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def lines(run_dir: Path) -> list[dict[str, float]]:
    return [
        msgspec.json.decode(line) for line in (run_dir / METRICS_FILE).read_bytes().splitlines()
    ]


@pytest.fixture(scope="module")
def of_two(workplace: Path) -> dict[str, Any]:
    """What two processes found, by variant."""
    done = torchrun("gradients", str(workplace))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = torch.load(workplace / "found.pt", weights_only=True)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_have_the_losses_and_gradients_of_one(
    workplace: Path, of_two: dict[str, Any], variant: str
) -> None:
    torch.set_num_threads(1)
    expected = measure(workplace, uneven_batch(workplace), "ddp", Processes())
    found = of_two[variant]
    assert found["num_pairs"] == expected["num_pairs"] == 11
    for name in ("contrastive", "next_token", "norm"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(
            found["gradients"][name], gradient, rtol=1e-4, atol=1e-6, msg=f"{name} in {variant}"
        )


@pytest.fixture(scope="module")
def of_one(workplace: Path) -> list[dict[str, float]]:
    """Metrics of the whole run in one process."""
    recipe = config.load(Recipe, workplace / "recipe.json")
    dataset = open_dataset(workplace / "data")
    pretrain(recipe, dataset, workplace / "triples.parquet", workplace / "one")
    return lines(workplace / "one")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_of_two_processes_is_that_of_one_and_survives_a_kill(
    workplace: Path, of_one: list[dict[str, float]], parallel: str, tmp_path: Path
) -> None:
    for name in ("data", "triples.parquet"):
        (tmp_path / name).symlink_to(workplace / name)
    recipe = config.load(Recipe, workplace / "recipe.json")
    recipe = override(recipe, [f"train.parallel={parallel}", "train.users_per_piece=2"])
    config.save(recipe, tmp_path / "recipe.json")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert torchrun("pretrain", str(tmp_path), str(whole)).returncode == 0
    found = lines(whole)
    assert len(found) == len(of_one) == STEPS
    for mine, theirs in zip(found, of_one, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4)
    done = torchrun("pretrain", str(tmp_path), str(killed), DIE_IN_STEP="4")
    assert done.returncode != 0
    assert len(lines(killed)) == 4
    done = torchrun("pretrain", str(tmp_path), str(killed))
    assert done.returncode == 0, done.stderr
    assert lines(killed) == lines(whole)
    trained = load_checkpoint(whole / "checkpoint").model.state_dict()
    again = load_checkpoint(killed / "checkpoint").model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in trained.items())


def test_lora_in_two_processes_repeats_with_its_dropout(workplace: Path, tmp_path: Path) -> None:
    for name in ("data", "triples.parquet"):
        (tmp_path / name).symlink_to(workplace / name)
    recipe = config.load(Recipe, workplace / "recipe.json")
    recipe = override(recipe, ["train.parallel=fsdp", "train.gradient_checkpointing=true"])
    recipe = msgspec.structs.replace(recipe, lora=LoraConfig(rank=4, dropout=0.5))
    config.save(recipe, tmp_path / "recipe.json")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = torchrun("pretrain", str(tmp_path), str(whole))
    assert done.returncode == 0, done.stderr
    # Killed before its first checkpoint, so that the untrained one has to do.
    assert torchrun("pretrain", str(tmp_path), str(killed), DIE_IN_STEP="2").returncode != 0
    done = torchrun("pretrain", str(tmp_path), str(killed))
    assert done.returncode == 0, done.stderr
    assert lines(killed) == lines(whole)


def test_shares_must_be_equal(workplace: Path, tmp_path: Path) -> None:
    recipe = config.load(Recipe, workplace / "recipe.json")
    checkpoint, data = prepare(
        recipe, open_dataset(workplace / "data"), workplace / "triples.parquet"
    )
    with pytest.raises(ConfigError, match=r"users_per_batch=6: must be a multiple of the 4 proc"):
        Trainer(checkpoint, in_memory(recipe, data), tmp_path, Processes(1, 4))


def test_the_command_runs_under_torchrun(workplace: Path, tmp_path: Path) -> None:
    """Bars and the result come from one process, not from each."""
    small = ("event_encoder.hidden_dim=16", "decoder.hidden_dim=32", "train.steps=2",
             "train.users_per_batch=4", "train.heldout_users=0", "train.num_threads=1")  # fmt: skip
    done = subprocess.run(
        [
            *TORCHRUN, "-m", "qanchor.cli", "pretrain", str(workplace / "data"),
            str(tmp_path / "run"), *(word for each in small for word in ("--set", each)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f'{{"checkpoint":"{tmp_path / "run" / "checkpoint"}"}}']
    assert len(lines(tmp_path / "run")) == 2
    assert done.stderr.count("pretrain mini: 100%") == 1
    assert done.stderr.count("rendering profiles: 100%") == 1
