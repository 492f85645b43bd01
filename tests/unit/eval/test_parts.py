"""Each part of an evaluation against a case whose answer is known by hand."""

import numpy as np
import pytest
import torch

from qanchor.checkpoint import Checkpoint
from qanchor.config import Scenario
from qanchor.encoder.event_encoder import EventEncoder
from qanchor.errors import ConfigError
from qanchor.eval.attention import attention_shares
from qanchor.eval.bootstrap import Bootstrap
from qanchor.eval.config import AnswerFile, AnswerTexts, EvalConfig
from qanchor.eval.embed import embed_answers, embed_corpus, encoded_corpus
from qanchor.eval.pooled import pooled_events
from qanchor.eval.projection import project
from qanchor.eval.query_effect import (
    other_user_cosine,
    own_minus_others,
    query_effect,
    variance_shares,
    within_user_cosine,
)
from qanchor.eval.splits import JudgedUsers, LabelledSplit
from qanchor.eval.zero_shot import yes_minus_no, zero_shot
from qanchor.train.corpus import PrefixCorpus, RenderedCorpus
from tests.unit.core.conftest import QUERIES


def test_pooled_vectors_are_means_per_modality_and_zeros_where_there_is_nothing(
    checkpoint: Checkpoint, rendered: RenderedCorpus
) -> None:
    corpus = encoded_corpus(checkpoint, rendered)
    means_UME = pooled_events(corpus)
    encoder: EventEncoder = checkpoint.model.event_encoder
    with torch.inference_mode():
        for user in (0, 7):
            start = 0
            for modality, count in enumerate(rendered.num_events[user]):
                rows = rendered.rows[user][start : start + count].astype(np.int64)
                start += count
                if not count:
                    assert not means_UME[user, modality].any()
                    continue
                vectors = [
                    encoder(torch.from_numpy(corpus.padded_texts(row[None])))[0] for row in rows
                ]
                wanted = torch.stack(vectors).mean(dim=0).numpy()
                np.testing.assert_allclose(means_UME[user, modality], wanted, atol=1e-5)
    assert not means_UME[0].any()


def test_attention_that_is_even_goes_by_the_number_of_positions(
    checkpoint: Checkpoint, corpus: PrefixCorpus
) -> None:
    for layer in checkpoint.model.decoder.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
        torch.nn.init.zeros_(layer.self_attn.q_proj.bias)
    base = Scenario(name="buy", question=QUERIES[0])
    rows = ((0.5,) * 32,) * 3
    tuned = Scenario(name="buy", question=QUERIES[0], soft_prompt=rows)
    users = [5, 9]
    found = attention_shares(checkpoint, corpus, users, [base], [tuned])
    query_len = len(checkpoint.encode_query(QUERIES[0]))
    header_len = len(checkpoint.meta.tokens.header)
    for share, num_rows in zip(found.shares, (0, 3), strict=True):
        wanted = []
        for user in users:
            events = corpus.rendered.num_events[user]
            counts = [header_len, 2 * 3, 1, 3, *events, query_len, num_rows, 1]
            wanted.append(np.array(counts) / sum(counts))
        np.testing.assert_allclose(share.total, np.mean(wanted, axis=0), atol=1e-6)
        np.testing.assert_allclose(np.sum(share.by_layer, axis=1), 1, atol=1e-6)
    assert [share.is_tuned for share in found.shares] == [False, True]
    assert found.groups[4:7] == ("shop", "visit", "tabular")
    assert checkpoint.model.decoder.config._attn_implementation == "eager"


def test_attention_leaves_the_model_as_it_was(
    checkpoint: Checkpoint, corpus: PrefixCorpus, rendered: RenderedCorpus
) -> None:
    checkpoint.model.decoder.set_attn_implementation("sdpa")
    before = embed_corpus(checkpoint, corpus, QUERIES)
    attention_shares(checkpoint, corpus, [3], [Scenario(name="buy", question=QUERIES[0])], [])
    assert checkpoint.model.decoder.config._attn_implementation == "sdpa"
    np.testing.assert_array_equal(embed_corpus(checkpoint, corpus, QUERIES), before)


def test_many_queries_and_some_users_are_embedded_as_each_alone(
    checkpoint: Checkpoint, corpus: PrefixCorpus
) -> None:
    many = [f"{QUERIES[0]} Asked {number}." for number in range(30)]
    some = embed_corpus(checkpoint, corpus, many, [2, 0])
    for number in (0, 12, 29):
        alone = embed_corpus(checkpoint, corpus, [many[number]])[[2, 0], 0]
        np.testing.assert_allclose(some[:, number], alone, atol=2e-6)


def test_yes_minus_no_is_the_difference_of_cosines() -> None:
    yes = np.array([[1.0, 0.0], [1.0, 0.0]], dtype=np.float32)
    no = np.array([[0.6, 0.8], [0.6, -0.8]], dtype=np.float32)
    users = np.array([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]], dtype=np.float32)
    # The two "no" vectors average to the direction of "yes": nobody says either.
    np.testing.assert_allclose(yes_minus_no(users, yes, no), 0, atol=1e-6)
    np.testing.assert_allclose(yes_minus_no(users, yes, no[:1]), [0.4, -0.8, 0.8 - 0.96], atol=1e-6)


def test_zero_shot_finds_users_whose_embedding_says_yes(checkpoint: Checkpoint) -> None:
    scenario = Scenario(name="buy", question=QUERIES[0])
    own = AnswerTexts(yes=("yes, often",), no=("no, hardly",))
    yes_Z = embed_answers(checkpoint, own.yes)[0]
    no_Z = embed_answers(checkpoint, own.no)[0]
    labels = np.array([0, 1, 1, 0])
    embeddings = np.where(labels[:, None] == 1, yes_Z, no_Z)
    part = LabelledSplit(np.arange(4), labels)
    judged = JudgedUsers(("a", "b", "c", "d"), {"buy": {"test": part}}, np.arange(4))
    settings = EvalConfig(answers=AnswerFile(scenarios={"buy": own}))
    bootstrap = Bootstrap(4, 50)
    found = zero_shot(checkpoint, [scenario], judged, {"buy": embeddings}, settings, bootstrap)
    assert found.average_auc == found.scenarios[0].auc == 1
    assert found.average_wording_auc is None
    turned = AnswerFile(scenarios={"buy": AnswerTexts(yes=own.no, no=own.yes)})
    settings = EvalConfig(answers=turned)
    found = zero_shot(checkpoint, [scenario], judged, {"buy": embeddings}, settings, bootstrap)
    assert found.average_auc == 0


def test_other_wordings_are_scored_one_by_one(checkpoint: Checkpoint) -> None:
    scenarios = [Scenario(name=name, question=QUERIES[0]) for name in ("buy", "go")]
    yes_Z, no_Z = (embed_answers(checkpoint, texts)[0] for texts in (["Yes."], ["No."]))
    labels = np.array([0, 1, 1])
    right = np.where(labels[:, None] == 1, yes_Z, no_Z)
    wrong = np.where(labels[:, None] == 1, no_Z, yes_Z)
    # Test users are rows 1 to 4 of the table; the first of them has no label.
    part = LabelledSplit(np.array([2, 3, 4]), labels)
    by_scenario = {name: {"test": part} for name in ("buy", "go")}
    judged = JudgedUsers(tuple("abcde"), by_scenario, np.arange(1, 5))
    everybody = np.concatenate([np.stack([yes_Z, yes_Z]), right])
    worded = np.stack([np.concatenate([yes_Z[None], one]) for one in (right, right, wrong)], axis=1)
    found = zero_shot(
        checkpoint,
        scenarios,
        judged,
        {"buy": everybody, "go": everybody},
        EvalConfig(wordings={"buy": ("Will they?", "Soon?", "Won't they?")}),
        Bootstrap(4, 50),
        {"buy": worded},
        {"go": np.concatenate([everybody[:2], right[::-1]])},
    )
    buy, go = found.scenarios
    assert [(one.question, one.auc) for one in buy.wordings] == [
        ("Will they?", 1),
        ("Soon?", 1),
        ("Won't they?", 0),
    ]
    assert go.wordings == ()
    assert go.together_auc is None
    assert buy.soft_auc is None
    # The users whose labels are 0, 1, 1 look like 1, 1, 0.
    assert go.soft_auc == found.average_soft_auc == 0.25
    assert found.average_wording_auc == pytest.approx(2 / 3)
    # Two that are right outvote the one that is not.
    assert buy.together_auc == found.average_together_auc == 1
    assert found.average_auc == 1


def test_answers_need_a_text_on_either_side() -> None:
    with pytest.raises(ConfigError, match="needs at least one answer text"):
        AnswerTexts(yes=())


def test_cosines_and_variance_of_a_hand_made_table() -> None:
    # Two users, two queries: the query turns everybody by a right angle, users are opposite.
    table_UQZ = np.array([[[1.0, 0.0], [0.0, 2.0]], [[-1.0, 0.0], [0.0, -2.0]]])
    np.testing.assert_allclose(within_user_cosine(table_UQZ), np.eye(2), atol=1e-12)
    np.testing.assert_allclose(other_user_cosine(table_UQZ), [-1, -1])
    user_alone = np.array([[[3.0, 0.0]] * 2, [[-3.0, 0.0]] * 2])
    assert variance_shares(user_alone) == (0, 1, 0)
    query_alone = np.array([[[3.0, 0.0], [0.0, 1.0]]] * 2)
    assert variance_shares(query_alone) == (1, 0, 0)
    both = np.array([[[1.0], [-1.0]], [[-1.0], [1.0]]])
    assert variance_shares(both) == (0, 0, 1)


def test_own_query_minus_the_mean_of_the_others() -> None:
    table = np.array([[0.9, 0.6, 0.6], [0.5, 0.7, 0.7], [0.5, 0.5, 0.5]])
    np.testing.assert_allclose(own_minus_others(table), [0.3, 0.1, 0.0], atol=1e-12)


def test_a_query_that_carries_its_label_is_found_to_probe_best() -> None:
    rng = np.random.default_rng(0)
    labels_UQ = rng.integers(0, 2, (300, 2))
    noise_UQZ = rng.normal(size=(300, 2, 3))
    # Query q's embedding holds label q and nothing of the other.
    noise_UQZ[:, :, 0] += 3 * labels_UQ
    parts = {"train": np.arange(100), "valid": np.arange(100, 200), "test": np.arange(200, 300)}
    by_scenario = {
        name: {split: LabelledSplit(rows, labels_UQ[rows, q]) for split, rows in parts.items()}
        for q, name in enumerate(("a", "b"))
    }
    judged = JudgedUsers(tuple(map(str, range(300))), by_scenario, parts["test"])
    found = query_effect(noise_UQZ.astype(np.float32), judged, Bootstrap(100, 200))
    assert (found.num_own_best, found.num_own_above_mean) == (2, 2)
    assert found.own_minus_others > 0.3
    assert found.own_minus_others_interval.is_above_zero
    assert found.cross_auc[0][0] > 0.9 > 0.7 > found.cross_auc[0][1]


def test_projections_part_what_lies_apart() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    points = (rng.normal(size=(40, 5)) + 20 * labels[:, None]).astype(np.float32)
    found = project("a", points, labels, is_tuned=False)
    for plane in (found.pca, found.tsne):
        assert plane.shape == (40, 2)
        centres = np.stack([plane[labels == label].mean(axis=0) for label in (0, 1)])
        near = np.linalg.norm(plane[:, None] - centres, axis=2).argmin(axis=1)
        assert (near == labels).all()
