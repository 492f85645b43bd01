"""Questions read by a frozen sentence encoder: the same rows in training, evaluation and tuning."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertModel, MPNetConfig, MPNetModel

from qanchor.checkpoint import (
    Checkpoint,
    build_model,
    checkpoint_id,
    load_checkpoint,
    save_checkpoint,
)
from qanchor.config import Scenario, override
from qanchor.data.dataset import SCHEMA_FILE, open_dataset
from qanchor.data.useru import read_columns, write_triples
from qanchor.data.wallet import generate_wallet
from qanchor.encoder.query_encoder import (
    QueryEncoder,
    QueryEncoderConfig,
    QueryMap,
    load_query_encoder,
)
from qanchor.errors import ConfigError
from qanchor.eval.attention import attention_shares
from qanchor.eval.embed import embed_corpus, segment_of
from qanchor.train import pretrain as training
from qanchor.train.batches import Segment, anchor_batch
from qanchor.train.corpus import PrefixCorpus
from qanchor.train.pretrain import UNTRAINED, pretrain, resume
from qanchor.train.recipes import Recipe
from qanchor.train.sources import fresh_sources
from qanchor.train.step import StepLosses
from qanchor.train.triples import read_triple_texts
from qanchor.tune.prefix_cache import encode_prefixes
from qanchor.tune.suffix_pass import SuffixPass
from tests.conftest import with_mpnet_ids
from tests.unit.core.conftest import QUERIES

TEXTS = (*QUERIES, "Why?", "Does the user travel far, and how often, and with whom?")


@pytest.fixture
def encoder(sentence_encoder_dir: Path) -> QueryEncoder:
    return load_query_encoder(sentence_encoder_dir)


@pytest.fixture
def mpnet_dir(sentence_encoder_dir: Path, tmp_path: Path) -> Path:
    """A small MPNet with the same tokenizer; its weights are random."""
    tokenizer = with_mpnet_ids(load_query_encoder(sentence_encoder_dir).tokenizer)
    mpnet = MPNetConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=24, num_hidden_layers=2,
        num_attention_heads=3, intermediate_size=40, max_position_embeddings=82,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(4)
    MPNetModel(mpnet, add_pooling_layer=False).save_pretrained(tmp_path / "mpnet")
    tokenizer.save(str(tmp_path / "mpnet" / "tokenizer.json"))
    return tmp_path / "mpnet"


def test_an_mpnet_reads_too(mpnet_dir: Path, tmp_path: Path) -> None:
    encoder = load_query_encoder(mpnet_dir)
    assert encoder.num_positions == 80
    mpnet = MPNetModel.from_pretrained(mpnet_dir).eval()
    longest = encoder.tokens(" ".join(["user"] * 200))[:80]
    ids = [*(encoder.tokens(text) for text in TEXTS), longest]
    encoder.save(tmp_path / "again")
    for one in (encoder, load_query_encoder(tmp_path / "again")):
        for of_text, found in zip(ids, one.states(ids), strict=True):
            with torch.no_grad():
                states = mpnet(input_ids=torch.tensor([of_text]), output_hidden_states=True)
            wanted = torch.cat([states.hidden_states[layer][0] for layer in (1, 2)], dim=-1)
            np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


@pytest.fixture
def reading(checkpoint: Checkpoint, sentence_encoder_dir: Path) -> Checkpoint:
    """The tiny checkpoint with a query encoder before it, questions scaled."""
    recipe = override(checkpoint.meta.recipe, [f"query_encoder.path={sentence_encoder_dir}"])
    meta = msgspec.structs.replace(checkpoint.meta, recipe=recipe)
    encoder = load_query_encoder(sentence_encoder_dir)
    model = build_model(meta, checkpoint.tokenizer, checkpoint.event_tokenizer, encoder).eval()
    assert model.query_map is not None
    model.query_map.set_scale(encoder.states([encoder.tokens(text) for text in TEXTS]))
    return dataclasses.replace(checkpoint, model=model, meta=meta, query_encoder=encoder)


def test_a_state_is_that_of_two_layers_whatever_text_stands_beside_it(
    encoder: QueryEncoder, sentence_encoder_dir: Path
) -> None:
    bert = BertModel.from_pretrained(sentence_encoder_dir).eval()
    ids = [encoder.tokens(text) for text in TEXTS]
    # The tokenizer's own cutting and padding are off: else all would have one length.
    assert len({len(of_text) for of_text in ids}) == len(TEXTS)
    together = encoder.states(ids)
    for of_text, found in zip(ids, together, strict=True):
        with torch.no_grad():
            states = bert(input_ids=torch.tensor([of_text]), output_hidden_states=True)
        # Of two layers the first is the middle one.
        wanted = torch.cat([states.hidden_states[layer][0] for layer in (1, 2)], dim=-1)
        assert found.shape == (len(of_text), encoder.state_dim)
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)
        np.testing.assert_allclose(found, encoder.states([of_text])[0], atol=1e-5)


def padded(states: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Questions as a batch has them; what stands behind them must not matter."""
    batch = torch.full((len(states), 4 + max(map(len, states)), states[0].shape[1]), 9.0)
    for row, of_text in enumerate(states):
        batch[row, : len(of_text)] = torch.from_numpy(of_text)
    return batch, torch.tensor([len(of_text) for of_text in states])


def test_the_map_is_linear_in_weighted_means_of_scaled_states(encoder: QueryEncoder) -> None:
    config = QueryEncoderConfig(num_rows=3, num_heads=4, head_dim=5)
    query_map = QueryMap(encoder.state_dim, 7, config).eval()
    states = encoder.states([encoder.tokens(text) for text in TEXTS])
    query_map.set_scale(states)
    all_tokens = np.concatenate(states)
    np.testing.assert_allclose(query_map.mean_E.numpy(), all_tokens.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(query_map.spread_E.numpy(), all_tokens.std(axis=0), atol=1e-5)
    with torch.no_grad():
        found = query_map(*padded(states)).numpy()
        look, keep = query_map.look_EH.numpy(), query_map.keep_HEK.numpy()
        weights = np.stack([row.weight.numpy() for row in query_map.rows])
        biases = np.stack([row.bias.numpy() for row in query_map.rows])
    for of_text, rows in zip(states, found, strict=True):
        scaled = (of_text - query_map.mean_E.numpy()) / query_map.spread_E.numpy()
        share = np.exp(scaled @ look)
        means = (share / share.sum(axis=0)).T @ scaled
        numbers = np.einsum("he,hek->hk", means, keep).ravel()
        np.testing.assert_allclose(rows, weights @ numbers + biases, atol=1e-4)


def test_training_leaves_out_the_same_numbers_of_all_tokens_of_a_question() -> None:
    """Else a number one token lacks would be read off another, and heads would learn noise."""
    config = QueryEncoderConfig(dropout=0.5, num_heads=1, head_dim=64, num_rows=1)
    query_map = QueryMap(8, 64, config).train()
    states = torch.randn(1, 1, 8).expand(1, 6, 8)
    for seed in range(5):
        torch.manual_seed(seed)
        many = query_map(states, torch.tensor([6]))
        torch.manual_seed(seed)
        torch.testing.assert_close(query_map(states[:, :1], torch.tensor([1])), many)


def test_numbers_that_hardly_differ_are_not_blown_up(encoder: QueryEncoder) -> None:
    query_map = QueryMap(encoder.state_dim, 7, QueryEncoderConfig())
    one_token = [encoder.states([encoder.tokens(TEXTS[0])])[0][:1]]
    query_map.set_scale(one_token)
    assert query_map(*padded(one_token)).isfinite().all()
    states = [np.random.default_rng(0).normal(size=(50, encoder.state_dim)).astype(np.float32)]
    states[0][:, 3] = 5.0
    query_map.set_scale(states)
    assert query_map.spread_E[3] == pytest.approx(0.1 * states[0].std(axis=0).mean())


def test_a_question_takes_its_rows_whatever_its_length(reading: Checkpoint) -> None:
    queries = [reading.query(text) for text in TEXTS]
    assert {query.suffix_len for query in queries} == {2 + 1}
    assert all(query.token_ids == () for query in queries)
    rows = np.stack([query.prompt_rows_KD for query in queries])
    assert np.abs(rows[1:] - rows[0]).max(axis=(1, 2)).min() > 1e-2


def test_training_reads_a_question_as_everybody_else_does(
    reading: Checkpoint, corpus: PrefixCorpus
) -> None:
    """What training makes of states inside the step = the rows that serving is given."""
    encoder = reading.query_encoder
    assert encoder is not None
    states = encoder.states([encoder.tokens(text) for text in QUERIES])
    asked = [Segment((), query_states_TE=of_text, num_query_rows=2) for of_text in states]
    given = [segment_of(reading, text) for text in QUERIES]
    with torch.no_grad():
        trained, _ = reading.model.anchor(anchor_batch(corpus, [3, 9], [asked, asked[::-1]]))
        served, _ = reading.model.anchor(anchor_batch(corpus, [3, 9], [given, given[::-1]]))
    torch.testing.assert_close(trained, served, atol=1e-5, rtol=0)
    assert (trained[0] - trained[1]).abs().max() > 1e-3


def test_only_the_map_learns(reading: Checkpoint, corpus: PrefixCorpus) -> None:
    encoder = reading.query_encoder
    assert encoder is not None
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    (states,) = encoder.states([encoder.tokens(QUERIES[0])])
    segment = Segment((), query_states_TE=states, num_query_rows=2)
    anchors, _ = reading.model.anchor(anchor_batch(corpus, [3], [[segment]]))
    anchors[0, 0].backward()
    assert reading.model.query_map is not None
    for parameter in reading.model.query_map.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


def test_a_checkpoint_holds_the_encoder_itself(
    reading: Checkpoint, sentence_encoder_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(sentence_encoder_dir, tmp_path / "moved")
    recipe = override(reading.meta.recipe, [f"query_encoder.path={tmp_path / 'moved'}"])
    meta = msgspec.structs.replace(reading.meta, recipe=recipe)
    save_checkpoint(dataclasses.replace(reading, meta=meta), tmp_path / "saved")
    shutil.rmtree(tmp_path / "moved")
    loaded = load_checkpoint(tmp_path / "saved")
    for text in TEXTS:
        np.testing.assert_array_equal(
            loaded.query(text).prompt_rows_KD, reading.query(text).prompt_rows_KD
        )
    assert checkpoint_id(loaded) == checkpoint_id(reading)
    assert loaded.query_encoder is not None
    with torch.no_grad():
        next(loaded.query_encoder.model.parameters())[0, 0] += 1e-3
    assert checkpoint_id(loaded) != checkpoint_id(reading)


@pytest.mark.parametrize(
    ("change", "said"),
    [("num_heads=4", "look_EH"), ("num_rows=3", r"query_map\.rows\.2")],
)
def test_weights_of_another_model_are_told_with_a_remedy(
    reading: Checkpoint, tmp_path: Path, change: str, said: str
) -> None:
    recipe = override(reading.meta.recipe, [f"query_encoder.{change}"])
    meta = msgspec.structs.replace(reading.meta, recipe=recipe)
    save_checkpoint(dataclasses.replace(reading, meta=meta), tmp_path / "saved")
    with pytest.raises(ConfigError, match=rf"saved.*must fit.*{said}.*train again"):
        load_checkpoint(tmp_path / "saved")


def test_soft_prompts_stand_behind_the_rows_of_the_question(
    reading: Checkpoint, corpus: PrefixCorpus
) -> None:
    prompt = tuple(tuple(0.05 * (row - column) for column in range(32)) for row in range(3))
    tuned = Scenario(name="a", question=QUERIES[1], soft_prompt=prompt)
    compiled = Scenario(name="b", question=QUERIES[1], soft_prompt=prompt, is_compiled=True)
    plain = reading.query(QUERIES[1])
    suffix = reading.scenario(tuned)
    assert suffix.suffix_len == 2 + 3 + 1
    assert suffix.prompt_rows_KD is not None
    np.testing.assert_array_equal(suffix.prompt_rows_KD[:2], plain.prompt_rows_KD)
    np.testing.assert_array_equal(suffix.prompt_rows_KD[2:], np.float32(prompt))
    assert reading.scenario(compiled).suffix_len == 3 + 1
    asked = [QUERIES[1], tuned, compiled]
    together = embed_corpus(reading, corpus, asked, [5])
    passes = SuffixPass(
        reading.model,
        encode_prefixes(reading.model, corpus, [5], torch.float32),
        reading.meta.tokens.user_emb,
    )
    for place, query in enumerate([plain, suffix, reading.scenario(compiled)]):
        with torch.no_grad():
            behind = passes.embeddings([0], passes.suffix_of(query)).numpy()
        np.testing.assert_allclose(behind, together[:, place], atol=1e-5)


def test_attention_to_the_rows_of_a_question_is_the_querys(
    reading: Checkpoint, corpus: PrefixCorpus
) -> None:
    prompt = ((0.5,) * 32,)
    plain = Scenario(name="plain", question=QUERIES[0])
    tuned = Scenario(name="plain", question=QUERIES[0], soft_prompt=prompt)
    found = attention_shares(reading, corpus, [5], [plain], [tuned])
    before, after = (dict(zip(found.groups, s.total, strict=True)) for s in found.shares)
    assert before["query"] > 0
    assert before["soft prompt"] == 0
    assert after["query"] > 0
    assert after["soft prompt"] > 0


@pytest.fixture(scope="module")
def wallet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wallet")
    generate_wallet(directory / "data", 40, seed=5)
    write_triples(open_dataset(directory / "data"), directory / "triples.parquet")
    return directory


@pytest.fixture
def recipe(tiny_recipe: Recipe, sentence_encoder_dir: Path) -> Recipe:
    return override(
        tiny_recipe,
        [
            f"query_encoder.path={sentence_encoder_dir}", "train.users_per_batch=6",
            "train.queries_per_user=2", "train.heldout_users=3", "train.steps=6",
            "train.warmup_steps=2", "train.evaluate_every=3", "train.checkpoint_every=3",
            "train.num_threads=1",
        ],
    )  # fmt: skip


def run(recipe: Recipe, wallet: Path, run_dir: Path) -> Checkpoint:
    latest = pretrain(recipe, open_dataset(wallet / "data"), wallet / "triples.parquet", run_dir)
    return load_checkpoint(latest)


def losses(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("shard_users", [0, 12])
def test_a_run_moves_the_map_and_nothing_of_the_encoder_and_resumes_to_the_bit(
    recipe: Recipe,
    wallet: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shard_users: int,
) -> None:
    recipe = override(
        recipe,
        [
            f"train.shard_users={shard_users}", "train.users_per_piece=4",
            "loss.yes_no_weight=0.5", "train.yes_no_per_user=2",
        ],
    )  # fmt: skip
    whole = run(recipe, wallet, tmp_path / "whole")
    untrained = load_checkpoint(tmp_path / "whole" / UNTRAINED)
    assert whole.model.query_map is not None
    assert untrained.model.query_map is not None
    torch.testing.assert_close(whole.model.query_map.mean_E, untrained.model.query_map.mean_E)
    assert untrained.model.query_map.mean_E.abs().max() > 0
    for before, after in zip(
        untrained.model.query_map.parameters(), whole.model.query_map.parameters(), strict=True
    ):
        assert not torch.equal(before, after)
    assert untrained.query_encoder is not None
    assert whole.query_encoder is not None
    for before, after in zip(
        untrained.query_encoder.model.parameters(),
        whole.query_encoder.model.parameters(),
        strict=True,
    ):
        assert torch.equal(before, after)
    original, calls = training.backward, itertools.count(1)

    def killed_in_step_five(*args: Any, **kwargs: Any) -> StepLosses:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "backward", killed_in_step_five)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, wallet, tmp_path / "killed")
    resume(open_dataset(wallet / "data"), wallet / "triples.parquet", tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.parametrize("shard_users", [0, 12])
def test_a_batch_asks_what_the_triples_ask(
    recipe: Recipe, wallet: Path, tmp_path: Path, shard_users: int
) -> None:
    changes = ["loss.yes_no_weight=0.5", "train.yes_no_per_user=3"]
    recipe = override(recipe, [f"train.shard_users={shard_users}", *changes])
    triples = wallet / "triples.parquet"
    made, sources = fresh_sources(recipe, open_dataset(wallet / "data"), triples, tmp_path / "run")
    encoder, limit = made.query_encoder, recipe.train.max_query_len
    assert encoder is not None
    texts = read_triple_texts(triples)
    distinct = list(dict.fromkeys(texts.queries))
    states = encoder.states([encoder.tokens(text)[:limit] for text in distinct])
    states_of = dict(zip(distinct, states, strict=True))
    asked: dict[tuple[int, ...], set[str]] = {}
    for query, answer in zip(texts.queries, texts.answers, strict=True):
        asked.setdefault(made.encode_answer(answer), set()).add(query)
    for step in range(2):
        for of_user in sources.training.batch(step).segments:
            assert sum(not one.is_yes_no_only for one in of_user) == 2
            assert sum(one.is_yes_no_only for one in of_user) == 3
            for one in of_user:
                assert (one.query, one.num_query_rows) == ((), 2)
                assert one.query_states_TE is not None
                apart = [
                    np.abs(states_of[query] - one.query_states_TE).max()
                    for query in asked[one.answer]
                    if len(states_of[query]) == len(one.query_states_TE)
                ]
                # In float16, and a text's neighbours in its piece move the last bit.
                assert min(apart) < 4e-3


def test_without_the_yes_no_loss_nothing_is_asked_for_it(
    recipe: Recipe, wallet: Path, tmp_path: Path
) -> None:
    recipe = override(recipe, ["loss.yes_no_weight=0", "train.yes_no_per_user=3"])
    dataset = open_dataset(wallet / "data")
    _, sources = fresh_sources(recipe, dataset, wallet / "triples.parquet", tmp_path / "run")
    asked = [one for of_user in sources.training.batch(0).segments for one in of_user]
    assert not any(one.is_yes_no_only for one in asked)


def test_a_question_longer_than_the_encoder_reads_is_cut_everywhere(
    recipe: Recipe, wallet: Path, tmp_path: Path
) -> None:
    texts = read_columns(wallet / "triples.parquet")
    table = pq.read_table(wallet / "triples.parquet")
    place = table.column_names.index("query")
    long = pa.array(["Will the user go on and on? " * 60] * 5 + texts["query"][5:])
    pq.write_table(table.set_column(place, "query", long), tmp_path / "long.parquet")
    latest = pretrain(
        override(recipe, ["train.steps=1"]),
        open_dataset(wallet / "data"),
        tmp_path / "long.parquet",
        tmp_path / "run",
    )
    assert load_checkpoint(latest).meta.step == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["query_encoder.path=/nowhere"], r"query_encoder\.path.*no config\.json"),
        (["train.max_query_len=81"], "the query encoder has 80 positions"),
        (["query_encoder.num_rows=0"], r"query_encoder\.num_rows.*at least 1"),
        (["query_encoder.num_heads=0"], r"query_encoder\.num_heads.*at least 1"),
        (["query_encoder.dropout=1.0"], r"query_encoder\.dropout.*\[0, 1\)"),
        (["train.yes_no_per_user=-1"], r"train\.yes_no_per_user.*must not be negative"),
    ],
)
def test_what_cannot_work_is_said_before_training(
    recipe: Recipe, wallet: Path, tmp_path: Path, changes: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        run(override(recipe, changes), wallet, tmp_path / "run")


def test_a_model_that_hears_no_question_has_no_query_encoder(
    recipe: Recipe, wallet: Path, tmp_path: Path
) -> None:
    shutil.copytree(wallet / "data", tmp_path / "silent")
    file = tmp_path / "silent" / SCHEMA_FILE
    described = json.loads(file.read_text())
    described["profile"]["query_template"] = ""
    file.write_text(json.dumps(described))
    silent = open_dataset(tmp_path / "silent")
    with pytest.raises(ConfigError, match=r"query_template is empty"):
        pretrain(recipe, silent, wallet / "triples.parquet", tmp_path / "run")
