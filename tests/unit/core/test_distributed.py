"""Two processes over gloo are one: losses, gradients, whole runs, kill and resume."""

import os
import shutil
import signal
import subprocess
import sys
import time
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
from qanchor.errors import ConfigError
from qanchor.train.distributed import Processes
from qanchor.train.pretrain import METRICS_FILE, Trainer, pretrain
from qanchor.train.recipes import Recipe
from qanchor.train.setup import prepare
from qanchor.train.sources import in_memory
from tests.unit.core import processes_worker
from tests.unit.core.processes_worker import (
    RUNS,
    VARIANTS,
    measure,
    uneven_batch,
    with_query_encoder,
)

STEPS = 6
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def workplace(
    tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Recipe, sentence_encoder_dir: Path
) -> Path:
    """Sixty simulated users with triples, a sentence encoder, an untrained checkpoint, a recipe."""
    directory = tmp_path_factory.mktemp("processes")
    shutil.copytree(sentence_encoder_dir, directory / "encoder")
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
            # Muon makes small sums in another order large; gradients are what is compared here.
            "train.optimizer=adamw",
        ],
    )  # fmt: skip
    config.save(recipe, directory / "recipe.json")
    checkpoint, _ = prepare(recipe, dataset, directory / "triples.parquet")
    save_checkpoint(checkpoint, directory / "start")
    return directory


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Two processes of one program, to their end."""
    return subprocess.run(
        [*TORCHRUN, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def lines(run_dir: Path) -> list[dict[str, float]]:
    return [
        msgspec.json.decode(line) for line in (run_dir / METRICS_FILE).read_bytes().splitlines()
    ]


@pytest.fixture(scope="module")
def of_two(workplace: Path) -> dict[str, Any]:
    """What two processes found, by variant."""
    done = run([processes_worker.__file__, str(workplace)])
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
    for name in ("contrastive", "row_losses", "norm"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(
            found["gradients"][name], gradient, rtol=1e-4, atol=1e-6, msg=f"{name} in {variant}"
        )


@pytest.fixture(scope="module")
def of_one(workplace: Path) -> dict[bool, list[dict[str, float]]]:
    """Metrics of the whole run in one process, without and with a query encoder."""
    plain = config.load(Recipe, workplace / "recipe.json")
    found = {}
    for is_read, recipe in ((False, plain), (True, with_query_encoder(plain, workplace))):
        run_dir = workplace / f"one-{is_read}"
        dataset = open_dataset(workplace / "data")
        pretrain(recipe, dataset, workplace / "triples.parquet", run_dir)
        found[is_read] = lines(run_dir)
    return found


@pytest.mark.parametrize("name", ["ddp", "fsdp", "reading", "reading, fsdp"])
@pytest.mark.usefixtures("of_two")
def test_a_run_of_two_processes_is_that_of_one(
    workplace: Path, of_one: dict[bool, list[dict[str, float]]], name: str
) -> None:
    found, expected = lines(workplace / f"{name}-whole"), of_one["reading" in name]
    assert len(found) == len(expected) == STEPS
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.usefixtures("of_two")
def test_a_run_of_two_processes_stopped_and_resumed_is_the_same_to_the_bit(
    workplace: Path, name: str
) -> None:
    whole, stopped = workplace / f"{name}-whole", workplace / f"{name}-stopped"
    assert (stopped / "lines_before").read_bytes().count(b"\n") == RUNS[name][1]
    assert lines(stopped) == lines(whole)
    expected = load_checkpoint(whole / "checkpoint").model.state_dict()
    found = load_checkpoint(stopped / "checkpoint").model.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_shares_must_be_equal(workplace: Path, tmp_path: Path) -> None:
    recipe = config.load(Recipe, workplace / "recipe.json")
    checkpoint, data = prepare(
        recipe, open_dataset(workplace / "data"), workplace / "triples.parquet"
    )
    with pytest.raises(ConfigError, match=r"users_per_batch=6: must be a multiple of the 4 proc"):
        Trainer(checkpoint, in_memory(checkpoint, data), tmp_path, Processes(1, 4))


def test_muon_is_refused_where_matrices_are_sliced(workplace: Path, tmp_path: Path) -> None:
    recipe = override(
        config.load(Recipe, workplace / "recipe.json"),
        ["train.optimizer=muon", "train.parallel=fsdp"],
    )
    checkpoint, data = prepare(
        recipe, open_dataset(workplace / "data"), workplace / "triples.parquet"
    )
    with pytest.raises(ConfigError, match="muon needs whole matrices"):
        Trainer(checkpoint, in_memory(checkpoint, data), tmp_path, Processes(0, 2))


def test_the_command_under_torchrun_survives_kill_9(
    workplace: Path, of_one: dict[bool, list[dict[str, float]]], tmp_path: Path
) -> None:
    """And bars and the result come from one process, not from each."""
    command = ["-m", "qanchor.cli", "pretrain", str(workplace / "data"), str(tmp_path / "run")]
    command += ["--triples", str(workplace / "triples.parquet")]
    recipe = msgspec.to_builtins(config.load(Recipe, workplace / "recipe.json"))
    small = [
        f"{part}.{key}={msgspec.json.encode(value).decode()}"
        for part in ("event_encoder", "decoder", "head", "loss", "train")
        for key, value in recipe[part].items()
        if value != ""
    ]
    assignments = [word for each in small for word in ("--set", each)]
    started = subprocess.Popen(
        [*TORCHRUN, *command, *assignments],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (tmp_path / "run" / "checkpoint").exists():
        assert started.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.02)
    for worker in Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split():
        os.kill(int(worker), signal.SIGKILL)
    assert started.wait() != 0
    done = run([*command, "--resume"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f'{{"checkpoint":"{tmp_path / "run" / "checkpoint"}"}}']
    assert done.stderr.count("rendering profiles:   0%") == 1
    for mine, theirs in zip(lines(tmp_path / "run"), of_one[False], strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4)
