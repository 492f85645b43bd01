"""Triples as the training loop holds them."""

from qanchor.checkpoint import Checkpoint
from qanchor.data.views import View
from qanchor.train.batches import Segment
from qanchor.train.triples import TripleTexts, load_triples


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
