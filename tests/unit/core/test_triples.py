"""Triples as the training loop holds them, and the order in which it visits them."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from qanchor.checkpoint import Checkpoint
from qanchor.config import override
from qanchor.data.views import View
from qanchor.train.batches import Segment
from qanchor.train.triples import BatchOrder, TripleTexts, UserTriples, load_triples
from qanchor.train.yes_no import yes_no_of


def test_a_text_may_be_question_and_answer(checkpoint: Checkpoint) -> None:
    """A question stands in its template, an answer does not."""
    text = "yes, often"
    view = View("u3", 0)
    texts = TripleTexts([view, view], ["a", "b"], [text, "How active?"], ["no, hardly", text])
    (segments,) = load_triples(texts, checkpoint, [view.name], "triples").segments
    assert segments == (
        Segment(checkpoint.encode_query(text), checkpoint.encode_answer("no, hardly")),
        Segment(checkpoint.encode_query("How active?"), checkpoint.encode_answer(text)),
    )
    assert segments[0].query != segments[1].answer


def test_queries_that_are_cut_are_counted_once(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    view = View("u3", 0)
    queries = ["How active?", "How active is the user?", "How active is the user?"]
    texts = TripleTexts([view] * 3, ["a", "b", "c"], queries, ["no"] * 3)
    whole = [checkpoint.encode_query(query) for query in queries]
    recipe = override(checkpoint.meta.recipe, [f"train.max_query_len={len(whole[0])}"])
    short = replace(checkpoint, meta=msgspec.structs.replace(checkpoint.meta, recipe=recipe))
    (segments,) = load_triples(texts, checkpoint, [view.name], "triples").segments
    assert [segment.query for segment in segments] == whole
    assert not caplog.records
    (segments,) = load_triples(texts, short, [view.name], "triples").segments
    assert [segment.query for segment in segments] == [ids[: len(whole[0])] for ids in whole]
    assert [one.getMessage() for one in caplog.records if "are cut" in one.message] == [
        f"1 queries are cut to train.max_query_len={len(whole[0])} tokens, so those that differ "
        "only further on are trained as one; shorten them or raise it"
    ]


def test_users_of_few_batches_wait_in_turn() -> None:
    """Seven users in batches of two: one waits each epoch, and not always who has most events."""
    segments = ((Segment((1,), (2,)),),) * 7
    order = BatchOrder(
        triples=UserTriples(tuple(range(7)), segments, ((0,),) * 7),
        topic_share=np.ones(1),
        prefix_lens=np.arange(10, 80, 10),
        users_per_batch=2,
        queries_per_user=1,
        seed=0,
    )
    assert order.batches_per_epoch == 3
    waiting = set()
    for epoch in range(60):
        seen = [user for index in range(3) for user in order.batch(3 * epoch + index)[0]]
        assert len(set(seen)) == 6
        waiting |= set(range(7)) - set(seen)
    assert waiting == set(range(7))


def test_further_triples_say_yes_or_no_and_are_the_users_own(checkpoint: Checkpoint) -> None:
    answers = ("Yes: 3 of 14 days.", "No: 1 of 14 days.", "often.", "none.", "Yes, rarely.")
    segments = tuple(
        tuple(
            Segment((user, number), checkpoint.encode_answer(answer))
            for number, answer in enumerate(answers)
        )
        for user in range(6)
    )
    order = BatchOrder(
        triples=UserTriples(tuple(range(6)), segments, (tuple(range(5)),) * 6),
        topic_share=np.full(5, 0.2),
        prefix_lens=np.ones(6, dtype=np.int64),
        users_per_batch=3,
        queries_per_user=1,
        seed=0,
        yes_no_per_user=2,
        yes_no=yes_no_of(checkpoint),
    )
    plain = replace(order, yes_no=None)
    for step in range(20):
        users, picked = order.batch(step)
        assert (users, [of_user[:1] for of_user in picked]) == plain.batch(step)
        assert (users, picked) == order.batch(step)
        for user, (pair, *more) in zip(users, picked, strict=True):
            assert not pair.is_yes_no_only
            assert all(each.is_yes_no_only for each in more)
            numbers = {each.query[1] for each in (pair, *more)}
            assert len(numbers) == 1 + len(more) == 3
            assert {each.query[0] for each in more} == {user}
            assert {each.query[1] for each in more} <= {0, 1, 4}
