"""One packed pass equals what it stands for: users and queries one by one, pooling in numpy."""

import numpy as np
import pytest
import torch

from qanchor.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from qanchor.data.prefix import slot_vectors
from qanchor.eval.embed import embed_users
from qanchor.losses import next_token_loss
from qanchor.train.batches import NO_LABEL, Segment, anchor_batch, answer_batch
from qanchor.train.corpus import PrefixCorpus, RenderedCorpus
from qanchor.train.event_vectors import with_event_vectors
from tests.unit.core.conftest import NUM_USERS, QUERIES


def segments_of(checkpoint: Checkpoint, answer: str = "") -> list[Segment]:
    ids = checkpoint.encode_answer(answer) if answer else ()
    return [Segment(checkpoint.encode_query(query), ids) for query in QUERIES]


@torch.no_grad()
def anchors(
    checkpoint: Checkpoint, corpus: PrefixCorpus, users: list[int], segments: list[list[Segment]]
) -> torch.Tensor:
    return checkpoint.model.anchor(anchor_batch(corpus, users, segments))[0]


def test_packed_queries_of_many_users_equal_each_query_alone(
    checkpoint: Checkpoint, corpus: PrefixCorpus
) -> None:
    segments = segments_of(checkpoint)
    users = list(range(NUM_USERS))
    together = anchors(checkpoint, corpus, users, [segments] * NUM_USERS)
    alone = torch.cat(
        [anchors(checkpoint, corpus, [user], [[one]]) for user in users for one in segments]
    )
    assert (together - alone).abs().max() < 1e-5


def test_event_vectors_made_ahead_stand_in_for_the_encoder(
    checkpoint: Checkpoint, corpus: PrefixCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = with_event_vectors(corpus, checkpoint.model.event_encoder)
    users, segments = list(range(NUM_USERS)), [segments_of(checkpoint)] * NUM_USERS
    fresh = anchors(checkpoint, corpus, users, segments)

    def encode_again(*_: object) -> None:
        pytest.fail("the texts were encoded again")

    monkeypatch.setattr(checkpoint.model.event_encoder, "in_pieces", encode_again)
    assert (anchors(checkpoint, ahead, users, segments) - fresh).abs().max() < 1e-5


def test_an_answer_after_the_user_embedding_token_does_not_change_it(
    checkpoint: Checkpoint, corpus: PrefixCorpus
) -> None:
    bare = anchors(checkpoint, corpus, [5], [segments_of(checkpoint)])
    answered = anchors(checkpoint, corpus, [5], [segments_of(checkpoint, "yes, often")])
    assert (bare - answered).abs().max() < 1e-5


def test_query_and_behaviour_both_move_the_embedding(
    checkpoint: Checkpoint, corpus: PrefixCorpus
) -> None:
    segments = segments_of(checkpoint)
    embeddings = anchors(checkpoint, corpus, [4, 9], [segments, segments]).reshape(
        2, len(QUERIES), -1
    )
    assert (embeddings[0, 0] - embeddings[0, 1]).abs().max() > 1e-3
    assert (embeddings[0, 0] - embeddings[1, 0]).abs().max() > 1e-3
    assert torch.allclose(embeddings.norm(dim=-1), torch.ones(2, len(QUERIES)), atol=1e-5)


def test_a_packed_pass_equals_transformers_on_the_plain_sequence(
    checkpoint: Checkpoint, corpus: PrefixCorpus
) -> None:
    """No packing, no mask of ours: [prefix, query, <USER_EMB>] causally through the Qwen2Model."""
    query = checkpoint.encode_query(QUERIES[1])
    batch = anchor_batch(corpus, [8], [[Segment(query)]])
    model = checkpoint.model
    with torch.no_grad():
        prefix = model.prefix_embeddings(batch)[:, : int(batch.prefix_len_B[0])]
        suffix = model.decoder.embed_tokens(torch.tensor([[*query, corpus.tokens.user_emb]]))
        states = model.decoder(inputs_embeds=torch.cat([prefix, suffix], dim=1)).last_hidden_state
        expected = model.head(states[:, -1])
        found = model.anchor(batch)[0]
    assert (found - expected).abs().max() < 1e-5


def test_next_token_labels_are_the_answer_and_then_eos(
    checkpoint: Checkpoint, corpus: PrefixCorpus
) -> None:
    answer = checkpoint.encode_answer("yes, often")
    batch = anchor_batch(corpus, [3], [[Segment(checkpoint.encode_query(QUERIES[0]), answer)]])
    labels = batch.labels_BS[0]
    assert labels[labels != NO_LABEL].tolist() == [*answer, corpus.tokens.eos]
    first = int((labels != NO_LABEL).nonzero()[0])
    assert batch.suffix_token_ids_BS[0, first] == corpus.tokens.user_emb


def test_semantic_embedding_of_a_padded_answer_equals_it_alone(
    checkpoint: Checkpoint, corpus: PrefixCorpus
) -> None:
    texts = ("yes, often" * 9, "no", "yes, often" * 4, "yes, often")
    segments = [Segment((), checkpoint.encode_answer(text)) for text in texts]
    with torch.no_grad():
        together = checkpoint.model.semantic(*answer_batch(segments, corpus.tokens))
        alone = torch.cat(
            [checkpoint.model.semantic(*answer_batch([one], corpus.tokens)) for one in segments]
        )
    assert (together - alone).abs().max() < 1e-5


@pytest.mark.parametrize("user", [0, 3, 11])
def test_torch_pooling_equals_the_servers_slot_vectors(
    checkpoint: Checkpoint, corpus: PrefixCorpus, user: int
) -> None:
    layout = corpus.layout(user)
    rows = corpus.event_rows(layout, user)
    with torch.no_grad():
        texts = corpus.padded_texts(corpus.rendered.rows[user].astype(np.int64))
        vectors = (
            checkpoint.model.event_encoder(torch.from_numpy(texts))
            if len(texts)
            else torch.zeros(0, 16)
        )
        spread = torch.zeros(1, len(layout), 16)
        spread[0, torch.from_numpy(rows) >= 0] = vectors[layout.source_P[rows >= 0]]
        pooled = checkpoint.model.encoder.pool(torch.from_numpy(layout.adapter_P)[None], spread)
    expected = slot_vectors(layout, corpus.rendered.num_events[user], vectors.numpy())
    np.testing.assert_allclose(pooled[0].numpy(), expected, atol=1e-6)


def test_a_checkpoint_comes_back_the_same(
    checkpoint: Checkpoint, rendered: RenderedCorpus, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    before = embed_users(checkpoint, rendered, QUERIES)
    save_checkpoint(checkpoint, tmp_path / "saved")
    loaded = load_checkpoint(tmp_path / "saved")
    assert loaded.meta == checkpoint.meta
    np.testing.assert_array_equal(embed_users(loaded, rendered, QUERIES), before)


def test_embeddings_come_in_the_order_of_the_users(
    checkpoint: Checkpoint, corpus: PrefixCorpus, rendered: RenderedCorpus
) -> None:
    embeddings = embed_users(checkpoint, rendered, QUERIES)
    alone = anchors(checkpoint, corpus, [7], [segments_of(checkpoint)])
    np.testing.assert_allclose(embeddings[7], alone.numpy(), atol=1e-5)


def test_answers_predicted_from_the_embedding_see_nothing_else(checkpoint: Checkpoint) -> None:
    """Logits equal those of [start made from u, answer] through the plain Qwen2 model, unpadded."""
    model, eos = checkpoint.model, checkpoint.meta.tokens.eos
    assert model.answer_start is not None
    texts = ("yes, often", "no", "yes, often" * 9)
    answers = [checkpoint.encode_answer(text) for text in texts]
    segments = [Segment((), answer) for answer in answers]
    width = checkpoint.meta.recipe.head.embedding_dim
    embeddings = torch.nn.functional.normalize(torch.randn(3, width), dim=-1).requires_grad_()
    logits, labels = model.logits_from_embedding(
        embeddings, *answer_batch(segments, checkpoint.meta.tokens)
    )
    assert labels.tolist() == [token for answer in answers for token in (*answer, eos)]
    expected = []
    for embedding, answer in zip(embeddings, answers, strict=True):
        start = model.answer_start(embedding * width**0.5)
        told = torch.cat([start[None], model.embed_tokens(torch.tensor(answer))])
        states = model.decoder(inputs_embeds=told[None]).last_hidden_state[0]
        expected.append(model.language_model.get_output_embeddings()(states))
    assert (logits - torch.cat(expected)).abs().max() < 1e-5
    next_token_loss(logits, labels).backward()
    assert embeddings.grad is not None
    assert embeddings.grad.abs().sum() > 0
