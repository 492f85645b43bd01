"""Adapters centred from data: what leaves their LayerNorm has mean 0 and spread 1."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qanchor.checkpoint import Checkpoint
from qanchor.config import override
from qanchor.data.dataset import open_dataset
from qanchor.data.useru import write_triples
from qanchor.data.wallet import generate_wallet
from qanchor.train.batches import Segment, anchor_batch
from qanchor.train.centre import MIN_VECTORS
from qanchor.train.recipes import Recipe
from qanchor.train.setup import Material, prepare

NUM_USERS = 40


@pytest.fixture(scope="module")
def wallet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wallet")
    generate_wallet(directory / "data", 2 * NUM_USERS, seed=5)
    write_triples(open_dataset(directory / "data"), directory / "triples.parquet")
    return directory


def prepared(recipe: Recipe, wallet: Path, centre_users: int) -> tuple[Checkpoint, Material]:
    here = override(recipe, [f"train.centre_users={centre_users}"])
    return prepare(here, open_dataset(wallet / "data"), wallet / "triples.parquet")


@torch.no_grad()
def normed_user_means(checkpoint: Checkpoint, data: Material) -> Tensor:
    """What leaves the user adapter's LayerNorm, [U, E]."""
    users = list(range(len(data.corpus.rendered.user_ids)))
    batch = anchor_batch(data.corpus, users, [[Segment(query=())]] * len(users))
    model = checkpoint.model
    vectors_BPE = model.encoder.pool(batch.adapter_BP, model.event_vectors(batch))
    normed: Tensor = model.encoder.user_adapter.norm(vectors_BPE[batch.adapter_BP == 1])
    return normed


def share_between_users(vectors_UE: Tensor) -> float:
    """Share of the mean square that differs between users; 0 if all are alike."""
    apart = (vectors_UE - vectors_UE.mean(dim=0)).square().mean()
    return float(apart / vectors_UE.square().mean())


def test_centring_turns_what_users_share_into_what_tells_them_apart(
    tiny_recipe: Recipe, wallet: Path
) -> None:
    plain = normed_user_means(*prepared(tiny_recipe, wallet, 0))
    centred = normed_user_means(*prepared(tiny_recipe, wallet, 2 * NUM_USERS))
    assert share_between_users(plain) < 0.5
    assert share_between_users(centred) > 0.9
    torch.testing.assert_close(centred.mean(dim=0), torch.zeros_like(centred[0]), atol=0.3, rtol=0)


def test_an_adapter_that_meets_hardly_any_vector_keeps_its_start(
    tiny_recipe: Recipe, wallet: Path
) -> None:
    few = MIN_VECTORS - 1
    checkpoint, _ = prepared(tiny_recipe, wallet, few)
    norm = checkpoint.model.encoder.user_adapter.norm
    assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    assert torch.equal(norm.bias, torch.zeros_like(norm.bias))
