"""A batch in pieces has the losses and gradients of the whole, with the memory of a piece."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from qanchor.checkpoint import Checkpoint, build_model
from qanchor.config import override
from qanchor.data.profile import Profile
from qanchor.data.statistics import learn_space, log_statistics
from qanchor.decoder import LoraConfig
from qanchor.losses import LossConfig
from qanchor.statistics_head import StatisticsHead
from qanchor.towers import QAnchorModel
from qanchor.train.batches import Segment
from qanchor.train.corpus import PrefixCorpus
from qanchor.train.gradient_cache import backward
from qanchor.train.source import Picked
from qanchor.train.step import Step, StepLosses, TowerRows, answer_keys
from qanchor.train.yes_no import yes_no_of

QUERIES = ("Will the user buy again?", "How active is the user?")
LOSS = LossConfig(drop_equal_answers=True)


@pytest.fixture
def picked(checkpoint: Checkpoint, corpus: PrefixCorpus) -> Picked:
    """Seven users; some are asked two questions, some one; answers differ in length and repeat."""
    answers = ("yes, often", "no", "no, hardly", "yes", "no")
    segments = [
        [
            Segment(
                checkpoint.encode_query(QUERIES[number]),
                checkpoint.encode_answer(answers[(user + number) % len(answers)]),
            )
            for number in range(1 + user % 2)
        ]
        for user in range(7)
    ]
    return Picked(corpus, range(1, 8), segments)


def with_lora(checkpoint: Checkpoint, dropout: float) -> QAnchorModel:
    """The fixture's model with adapters that already do something."""
    recipe = override(checkpoint.meta.recipe, ["event_encoder.is_trained=true"])
    recipe = msgspec.structs.replace(recipe, lora=LoraConfig(rank=4, dropout=dropout))
    meta = msgspec.structs.replace(checkpoint.meta, recipe=recipe)
    model = build_model(meta, checkpoint.tokenizer, checkpoint.event_tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def gradients(step: Step, picked: Picked) -> tuple[StepLosses, dict[str, Tensor]]:
    """Losses and gradients of a training pass from one random state."""
    torch.manual_seed(11)
    step.model.train()
    step.model.zero_grad(set_to_none=True)
    losses = backward(step, picked, is_masked=True)
    return losses, {
        name: parameter.grad.clone()
        for name, parameter in step.model.named_parameters()
        if parameter.grad is not None
    }


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    off = {
        name: float((found[name] - gradient).abs().max()) / scale
        for name, gradient in expected.items()
    }
    worst = max(off, key=lambda name: off[name])
    assert off[worst] < tolerance, f"{worst} is off by {off[worst]} of the largest gradient"


@pytest.mark.parametrize("users_per_piece", [1, 3])
@pytest.mark.parametrize("has_lora", [False, True])
def test_pieces_have_the_gradients_of_the_whole(
    checkpoint: Checkpoint, picked: Picked, users_per_piece: int, has_lora: bool
) -> None:
    model = with_lora(checkpoint, 0.0) if has_lora else checkpoint.model
    whole, expected = gradients(Step(model=model, loss=LOSS), picked)
    in_pieces = Step(model=model, loss=LOSS, users_per_piece=users_per_piece)
    pieces, found = gradients(in_pieces, picked)
    assert_close(found, expected, 1e-5)
    for term in ("contrastive", "row_losses_T", "anchor", "semantic"):
        torch.testing.assert_close(getattr(pieces, term), getattr(whole, term))


def test_statistics_in_pieces(
    checkpoint: Checkpoint, picked: Picked, profiles: list[Profile]
) -> None:
    """Users are asked one question or two, and of some less is known of the future."""
    space = learn_space(profiles, future_days=30)
    rows = [
        log_statistics(profile, profile.events[:2], 30 - 5 * number, space)
        for number, profile in enumerate(profiles[:6])
    ]
    rendered = replace(picked.corpus.rendered, statistics=np.stack([*rows, *rows]))
    picked = replace(picked, corpus=replace(picked.corpus, rendered=rendered))
    model = checkpoint.model
    model.statistics_head = StatisticsHead(checkpoint.meta.recipe.head.embedding_dim, space)
    model.statistics_head.set_scale(np.stack(rows), whitening=0.5)
    loss = LossConfig(statistics_weight=2.0, statistics_future_share=0.3)
    whole, expected = gradients(Step(model=model, loss=loss), picked)
    pieces, found = gradients(Step(model=model, loss=loss, users_per_piece=3), picked)
    assert whole.by_name()["statistics"] > 0
    torch.testing.assert_close(pieces.row_losses_T, whole.row_losses_T)
    assert_close(found, expected, 1e-5)
    assert "statistics_head.linear.weight" in expected
    without = msgspec.structs.replace(loss, statistics_weight=0.0)
    _, fewer = gradients(Step(model=model, loss=without), picked)
    assert not torch.equal(fewer["head.down.weight"], expected["head.down.weight"])


def test_yes_and_no_in_pieces(checkpoint: Checkpoint, picked: Picked) -> None:
    """Answers that say neither do not count, in whatever piece they are."""
    silent = Segment(picked.segments[0][0].query, checkpoint.encode_answer("now and then"))
    segments = [[silent] * len(picked.segments[0]), *picked.segments[1:]]
    picked = replace(picked, segments=segments)
    loss = LossConfig(yes_no_weight=2.0)
    yes_no = yes_no_of(checkpoint)
    model = checkpoint.model
    whole, expected = gradients(Step(model=model, loss=loss, yes_no=yes_no), picked)
    in_pieces = Step(model=model, loss=loss, yes_no=yes_no, users_per_piece=1)
    pieces, found = gradients(in_pieces, picked)
    assert whole.by_name()["yes_no"] > 0
    torch.testing.assert_close(pieces.row_losses_T, whole.row_losses_T)
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("off", ["contrastive_weight", "next_token_weight"])
def test_each_term_alone(checkpoint: Checkpoint, picked: Picked, off: str) -> None:
    loss = msgspec.structs.replace(LOSS, **{off: 0.0})
    _, expected = gradients(Step(model=checkpoint.model, loss=loss), picked)
    _, found = gradients(Step(model=checkpoint.model, loss=loss, users_per_piece=2), picked)
    assert_close(found, expected, 1e-5)


def test_bfloat16_pieces_reach_every_weight(checkpoint: Checkpoint, picked: Picked) -> None:
    """Were weights cast in the pass without graph kept, the second pass would not reach them."""
    model = checkpoint.model
    _, expected = gradients(Step(model=model, loss=LOSS, dtype="bfloat16"), picked)
    in_pieces = Step(model=model, loss=LOSS, dtype="bfloat16", users_per_piece=3)
    _, found = gradients(in_pieces, picked)
    # Other pieces, other padding: bfloat16 has 8 bits.
    assert_close(found, expected, 0.05)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingStep(Step):
    """A step that remembers what each pass over each piece gave, and over how many users."""

    seen: list[Tensor] = field(default_factory=list)
    num_users: list[int] = field(default_factory=list)

    def rows(self, piece: Picked, *, with_row_losses: bool = True) -> TowerRows:
        # Not super(): a dataclass with slots is another class than the one `super()` knows.
        rows = Step.rows(self, piece, with_row_losses=with_row_losses)
        self.seen.append(torch.cat([rows.anchor_QZ, rows.semantic_QZ]).detach())
        self.num_users.append(len(piece.users))
        return rows


def test_dropout_is_the_same_in_both_passes(checkpoint: Checkpoint, picked: Picked) -> None:
    model = with_lora(checkpoint, 0.5).train()
    step = RecordingStep(model=model, loss=LOSS, users_per_piece=3)
    backward(step, picked, is_masked=True)
    assert step.num_users == [3, 3, 1, 3, 3, 1]
    for first, second in zip(step.seen[:3], step.seen[3:], strict=True):
        assert torch.equal(first, second)
    drawn_anew = step.rows(step.pieces(picked)[0])
    assert not torch.equal(drawn_anew.anchor_QZ.detach(), step.seen[0][: len(drawn_anew.anchor_QZ)])


class _Kept:
    """A tensor kept for the backward pass, counted while it lives."""

    def __init__(self, tensor: Tensor, live: list[int]) -> None:
        self.tensor, self._live = tensor, live
        live[0] += tensor.nbytes
        live[1] = max(live)

    def __del__(self) -> None:
        self._live[0] -= self.tensor.nbytes


@contextmanager
def counted_activations() -> Iterator[list[int]]:
    """[bytes kept for backward passes now, most ever]."""
    live = [0, 0]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: _Kept(tensor, live), lambda kept: kept.tensor
    ):
        yield live


def test_activations_are_those_of_a_piece(checkpoint: Checkpoint, picked: Picked) -> None:
    peaks = {}
    for users_per_piece in (0, 4, 1):
        step = Step(model=checkpoint.model, loss=LOSS, users_per_piece=users_per_piece)
        with counted_activations() as live:
            gradients(step, picked)
        peaks[users_per_piece] = live[1]
    assert peaks[4] < 0.7 * peaks[0]
    assert peaks[1] < 0.4 * peaks[4]


def test_recomputed_layers_have_the_same_gradients_for_less_memory(
    checkpoint: Checkpoint, picked: Picked
) -> None:
    model = with_lora(checkpoint, 0.5)
    step = Step(model=model, loss=LOSS)
    with counted_activations() as plain:
        _, expected = gradients(step, picked)
    model.recompute_layers()
    with counted_activations() as recomputed:
        _, found = gradients(step, picked)
    assert_close(found, expected, 1e-6)
    assert any("event_encoder" in name for name in found)
    assert recomputed[1] < 0.6 * plain[1]


def test_answers_have_equal_keys_exactly_when_they_are_equal() -> None:
    answers = [(3, 4), (3,), (), (3, 4), (4, 3), (3, 4, 0)]
    keys = answer_keys([Segment((1,), answer) for answer in answers])
    equal = [[first == second for second in answers] for first in answers]
    assert (keys[:, None] == keys).tolist() == equal


@pytest.mark.parametrize("context", ["all", "embedding"])
def test_questions_for_the_yes_no_loss_alone_change_no_other_term(
    checkpoint: Checkpoint, picked: Picked, context: Literal["all", "embedding"]
) -> None:
    model, yes_no = checkpoint.model.eval(), yes_no_of(checkpoint)
    loss = LossConfig(yes_no_weight=2.0, next_token_context=context)
    more = Segment(checkpoint.encode_query("Any return?"), checkpoint.encode_answer("Yes."))

    def asked(also: Segment) -> Picked:
        # Of some users nothing more is asked.
        segments = [
            [*of_user, also] if user % 3 else of_user
            for user, of_user in enumerate(picked.segments)
        ]
        return replace(picked, segments=segments)

    aside = asked(replace(more, is_yes_no_only=True))
    step = Step(model=model, loss=loss, yes_no=yes_no)
    found, plain = step.losses(aside, is_masked=True), step.losses(picked, is_masked=True)
    as_pairs = step.losses(asked(more), is_masked=True)
    torch.testing.assert_close(found.anchor, plain.anchor)
    torch.testing.assert_close(found.contrastive, plain.contrastive)
    terms, before = found.by_name(), plain.by_name()
    assert terms["next_token"] == pytest.approx(before["next_token"], rel=1e-5)
    assert terms["yes_no"] == pytest.approx(as_pairs.by_name()["yes_no"], rel=1e-5)
    assert terms["yes_no"] != pytest.approx(before["yes_no"], rel=1e-3)
    whole, expected = gradients(step, aside)
    in_pieces = Step(model=model, loss=loss, yes_no=yes_no, users_per_piece=2)
    pieces, gradient = gradients(in_pieces, aside)
    torch.testing.assert_close(pieces.row_losses_T, whole.row_losses_T)
    assert_close(gradient, expected, 1e-5)
