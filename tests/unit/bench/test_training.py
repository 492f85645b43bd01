"""What the training suite says of settings measured elsewhere."""

import math

import msgspec
import pytest

pytest.importorskip("torch")

from qanchor_bench.suites.training import Measured, agreement, figures

WHOLE = Measured(
    users_per_batch=32, users_per_piece=0, num_users=32, seconds=(1.0, 1.0, 1.0),
    before_bytes=100, peak_bytes=500, contrastive=2.0, next_token=1.0,
)  # fmt: skip


def in_pieces(**changes: object) -> Measured:
    fields = {"users_per_piece": 8, "seconds": (1.0, 1.5, 2.0), "peak_bytes": 200, **changes}
    return msgspec.structs.replace(WHOLE, **fields)


def test_pieces_are_told_as_time_and_memory_over_the_whole_batch() -> None:
    """1.5 s in place of 1 s; 100 bytes above the start in place of 400."""
    found = figures([WHOLE, in_pieces()])
    assert found == {"32_by_8_time_over_one_piece": 1.5, "32_by_8_memory_over_one_piece": 0.25}
    assert figures([in_pieces(users_per_batch=64), WHOLE]) == {}


@pytest.mark.parametrize(
    ("loss", "is_ok"), [(2.0, True), (2.01, True), (2.1, False), (math.nan, False)]
)
def test_losses_of_one_batch_must_agree(loss: float, is_ok: bool) -> None:
    checks = agreement([WHOLE, in_pieces(contrastive=loss)])
    assert [check.is_ok for check in checks] == [True, is_ok]
    other = agreement([WHOLE, in_pieces(users_per_batch=64, contrastive=loss)])
    assert other[1].is_ok is not math.isnan(loss)
