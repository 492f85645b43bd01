"""What a query encoder has read of a run's questions is kept, and read from there."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qanchor.config import override
from qanchor.data.dataset import open_dataset
from qanchor.data.useru import write_triples
from qanchor.data.wallet import generate_wallet
from qanchor.encoder.query_encoder import QueryEncoder, load_query_encoder
from qanchor.train import pretrain as training
from qanchor.train.pretrain import pretrain, resume
from qanchor.train.query_states import kept_states
from qanchor.train.recipes import Recipe
from qanchor.train.run_directory import METRICS_FILE, QUERY_STATES_DIR
from tests.unit.core.conftest import QUERIES


@pytest.fixture
def encoder(sentence_encoder_dir: Path) -> QueryEncoder:
    return load_query_encoder(sentence_encoder_dir)


@pytest.fixture
def token_ids(encoder: QueryEncoder) -> list[tuple[int, ...]]:
    return [encoder.tokens(text) for text in QUERIES]


def refuse_to_read(*_: Any) -> None:
    pytest.fail("the encoder was asked to read")


def count_readings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each call of an encoder is given, from now on."""
    counts: list[int] = []
    original = QueryEncoder.states

    def counted(encoder: QueryEncoder, ids: Sequence[Sequence[int]], *rest: Any) -> Any:
        counts.append(len(ids))
        return original(encoder, ids, *rest)

    monkeypatch.setattr(QueryEncoder, "states", counted)
    return counts


def test_what_was_read_is_taken_from_the_file(
    encoder: QueryEncoder,
    token_ids: list[tuple[int, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = encoder.states(token_ids)
    kept_states(encoder, token_ids, tmp_path)
    monkeypatch.setattr(QueryEncoder, "states", refuse_to_read)
    for of_text, kept in zip(read, kept_states(encoder, token_ids, tmp_path), strict=True):
        assert kept.dtype == np.float16
        np.testing.assert_array_equal(kept, of_text.astype(np.float16))


def test_other_questions_or_weights_are_read_anew(
    encoder: QueryEncoder,
    token_ids: list[tuple[int, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = count_readings(monkeypatch)
    kept_states(encoder, token_ids, tmp_path)
    kept_states(encoder, token_ids[::-1], tmp_path)
    kept_states(encoder, token_ids[:-1], tmp_path)
    next(encoder.model.parameters()).data += 1.0
    kept_states(encoder, token_ids, tmp_path)
    assert counts == [len(QUERIES), len(QUERIES), len(QUERIES) - 1, len(QUERIES)]


def test_texts_joined_otherwise_are_other_texts(
    encoder: QueryEncoder, token_ids: list[tuple[int, ...]], tmp_path: Path
) -> None:
    together = [(*token_ids[0], *token_ids[1])]
    (joined,) = kept_states(encoder, together, tmp_path)
    first, second = kept_states(encoder, token_ids[:2], tmp_path)
    assert len(joined) == len(first) + len(second)
    assert np.abs(joined[: len(first)] - first).max() > 0


def test_a_reading_cut_short_leaves_nothing(
    encoder: QueryEncoder,
    token_ids: list[tuple[int, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def cut_short(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(QueryEncoder, "states", cut_short)
        with pytest.raises(KeyboardInterrupt):
            kept_states(encoder, token_ids, tmp_path)
    assert not list(tmp_path.iterdir())
    assert len(kept_states(encoder, token_ids, tmp_path)) == len(QUERIES)


@pytest.fixture(scope="module")
def wallet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wallet")
    generate_wallet(directory / "data", 40, seed=5)
    write_triples(open_dataset(directory / "data"), directory / "triples.parquet")
    return directory


@pytest.fixture
def recipe(tiny_recipe: Recipe, sentence_encoder_dir: Path) -> Recipe:
    changes = [
        f"query_encoder.path={sentence_encoder_dir}", "train.users_per_batch=6", "train.steps=4",
        "train.queries_per_user=2", "train.warmup_steps=2", "train.checkpoint_every=2",
    ]  # fmt: skip
    return override(tiny_recipe, changes)


def test_a_run_that_goes_on_does_not_read_again(
    recipe: Recipe, wallet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, triples = open_dataset(wallet / "data"), wallet / "triples.parquet"
    pretrain(recipe, dataset, triples, tmp_path / "whole")
    original, calls = training.backward, itertools.count(1)

    def killed_in_step_four(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "backward", killed_in_step_four)
        with pytest.raises(KeyboardInterrupt):
            pretrain(recipe, dataset, triples, tmp_path / "killed")
    assert (tmp_path / "killed" / QUERY_STATES_DIR).is_dir()
    monkeypatch.setattr(QueryEncoder, "states", refuse_to_read)
    resume(dataset, triples, tmp_path / "killed")
    whole, killed = ((tmp_path / name / METRICS_FILE).read_bytes() for name in ("whole", "killed"))
    assert killed == whole
    assert not (tmp_path / "killed" / QUERY_STATES_DIR).exists()


def test_runs_share_a_cache(
    recipe: Recipe, wallet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = override(recipe, [f"query_encoder.cache={tmp_path / 'cache'}", "train.steps=1"])
    dataset, triples = open_dataset(wallet / "data"), wallet / "triples.parquet"
    pretrain(recipe, dataset, triples, tmp_path / "first")
    (kept,) = (tmp_path / "cache").iterdir()
    written = kept.stat().st_mtime_ns
    counts = count_readings(monkeypatch)
    pretrain(override(recipe, ["train.seed=1"]), dataset, triples, tmp_path / "second")
    # What the map's scale is taken from is a sample, and read for itself.
    assert len(counts) == 1
    assert [(path, path.stat().st_mtime_ns) for path in (tmp_path / "cache").iterdir()] == [
        (kept, written)
    ]
    assert not (tmp_path / "first" / QUERY_STATES_DIR).exists()
