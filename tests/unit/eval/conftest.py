"""The tiny model of the core tests, and a small wallet with a tiny trained run on it."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qanchor.config import override
from qanchor.data.dataset import LABELS_FILE, Dataset, open_dataset
from qanchor.data.useru import write_triples
from qanchor.data.wallet import generate_wallet
from qanchor.train.pretrain import pretrain
from qanchor.train.recipes import Recipe, mini
from tests.unit.core.conftest import (  # noqa: F401
    checkpoint,
    corpus,
    profiles,
    rendered,
    schema,
    tiny_recipe,
)

TINY = [
    "event_encoder.hidden_dim=16", "event_encoder.num_heads=2", "event_encoder.intermediate_dim=24",
    "decoder.hidden_dim=32", "decoder.num_layers=2", "decoder.intermediate_dim=48",
    "head.inner_dim=24", "head.embedding_dim=8", "event_vocab_size=400", "decoder.vocab_size=400",
    "train.centre_users=8", "train.steps=3", "train.users_per_batch=4",
    "train.queries_per_user=2", "train.warmup_steps=1", "train.num_threads=1",
]  # fmt: skip


@pytest.fixture(scope="session")
def wallet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 160 simulated users."""
    place = tmp_path_factory.mktemp("eval-wallet")
    return Path(generate_wallet(place / "data", 160, seed=1))


@pytest.fixture(scope="session")
def tiny_mini() -> Recipe:
    """`mini` at toy size, three steps."""
    return override(mini(), TINY)


@pytest.fixture(scope="session")
def run_dir(wallet: Path, tiny_mini: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the wallet; tests must not write to it."""
    place = tmp_path_factory.mktemp("eval-run")
    dataset = open_dataset(wallet)
    write_triples(dataset, place / "triples.parquet")
    pretrain(tiny_mini, dataset, place / "triples.parquet", place / "run")
    return place / "run"


def relabelled(
    wallet: Path, target: Path, label_of: Callable[[str, str, int], int | None]
) -> Dataset:
    """The wallet with other labels: `label_of(scenario, split, label)`, None drops a label."""
    shutil.copytree(wallet, target)
    dataset, table = open_dataset(target), pq.read_table(target / LABELS_FILE)
    splits = [dataset.split_of[str(user)] for user in table["user_id"].to_pylist()]
    rows = zip(table["scenario"].to_pylist(), splits, table["label"].to_pylist(), strict=True)
    labels = pa.array([label_of(*row) for row in rows], table["label"].type)
    place = table.column_names.index("label")
    pq.write_table(
        table.set_column(place, "label", labels).filter(labels.is_valid()), target / LABELS_FILE
    )
    return dataset


@pytest.fixture(scope="session")
def one_sided(wallet: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Four scenarios; of the second no test user has label 1, of the fourth no valid user a label.

    What their users did is as it was.
    """
    names = [scenario.name for scenario in open_dataset(wallet).scenarios]

    def label_of(scenario: str, split: str, label: int) -> int | None:
        if (scenario, split) == (names[1], "test"):
            return 0
        return None if (scenario, split) == (names[3], "valid") else label

    dataset = relabelled(wallet, tmp_path_factory.mktemp("one-sided") / "data", label_of)
    return replace(dataset, scenarios=dataset.scenarios[:4])
