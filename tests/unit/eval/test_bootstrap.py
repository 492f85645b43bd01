"""Weighted AUC and KS against resampled users; intervals, pairing and what draws share."""

import tracemalloc

import numpy as np
import pytest

from qanchor.eval import metrics
from qanchor.eval.bootstrap import Bootstrap, TestScores, interval
from qanchor.eval.judge import Method, Probed, difference, judge
from qanchor.eval.metrics import auc, ks, weighted_auc_ks


def test_equal_weights_give_the_plain_metrics_of_a_hand_counted_case() -> None:
    labels, scores = np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8])
    found_auc, found_ks = weighted_auc_ks(labels, scores, np.ones((1, 4), dtype=np.float32))
    assert (found_auc[0], found_ks[0]) == (3 / 4, 1 / 2)


def test_weights_count_as_that_many_copies_ties_included() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    scores = np.round(rng.normal(size=60) + labels, 1)
    weights = rng.integers(0, 3, (20, 60)).astype(np.float32)
    found_auc, found_ks = weighted_auc_ks(labels, scores, weights)
    for row, count in enumerate(weights.astype(int)):
        copies_labels, copies_scores = np.repeat(labels, count), np.repeat(scores, count)
        assert found_auc[row] == pytest.approx(auc(copies_labels, copies_scores))
        assert found_ks[row] == pytest.approx(ks(copies_labels, copies_scores))


def test_a_draw_without_one_class_is_no_number_and_does_not_count() -> None:
    weights = np.array([[1, 1, 0], [1, 1, 1]], dtype=np.float32)
    found, _ = weighted_auc_ks(np.array([0, 0, 1]), np.array([0.0, 0.1, 0.2]), weights)
    assert np.isnan(found[0])
    assert interval(found).low == interval(found).high == 1


def test_an_interval_is_the_middle_of_the_draws() -> None:
    bounds = interval(np.arange(1001.0))
    assert (bounds.low, bounds.high) == pytest.approx((25.0, 975.0))


def test_the_interval_of_an_auc_is_as_wide_as_theory_says() -> None:
    rng = np.random.default_rng(1)
    count = 400
    labels = np.arange(count) % 2
    scores = rng.normal(size=count) + labels
    draws = Bootstrap(count, 1000).draws([TestScores(np.arange(count), labels, scores)])
    area = auc(labels, scores)
    # Hanley and McNeil's standard error of an area under the curve.
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    half = count // 2
    spread = area * (1 - area) + (half - 1) * (first - area**2 + second - area**2)
    error = np.sqrt(spread / half**2)
    assert draws.auc.std() == pytest.approx(error, rel=0.15)


def test_differences_are_paired_so_a_method_never_differs_from_itself() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 80)
    weak = rng.normal(size=80) + labels
    rows = {"all": np.arange(80), "some": np.arange(0, 80, 2)}
    bootstrap = Bootstrap(80, 300)

    def judged(name: str, scores: np.ndarray):  # type: ignore[no-untyped-def, type-arg]
        tests = {key: TestScores(at, labels[at], scores[at]) for key, at in rows.items()}
        method = Method(name, "embedding baseline", "")
        return judge(method, Probed(tests, dict.fromkeys(rows, 0.5), 1), bootstrap)

    one, same, right = judged("one", weak), judged("same", 3 * weak), judged("right", labels * 1.0)
    nothing = difference(one, same)
    assert (nothing.auc, nothing.auc_interval.low, nothing.auc_interval.high) == (0, 0, 0)
    gain = difference(right, one)
    assert gain.auc == pytest.approx(1 - one.score.average_auc)
    assert gain.auc_interval.is_above_zero
    assert (gain.num_better, gain.num_scenarios) == (2, 2)
    mean = np.mean([auc(labels[at], weak[at]) for at in rows.values()])
    assert one.score.average_auc == pytest.approx(mean)


def test_equal_seeds_give_equal_draws() -> None:
    first, again, other = Bootstrap(30, 5, 1), Bootstrap(30, 5, 1), Bootstrap(30, 5, 2)
    np.testing.assert_array_equal(first.weights_BU, again.weights_BU)
    assert (first.weights_BU != other.weights_BU).any()
    assert (first.weights_BU.sum(axis=1) == 30).all()


def test_draws_are_those_of_one_call_and_take_a_byte_per_user() -> None:
    num_users, num_draws = 4000, 200
    tracemalloc.start()
    weights_BU = Bootstrap(num_users, num_draws, 3).weights_BU
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * num_users * num_draws
    even = np.full(num_users, 1 / num_users)
    at_once = np.random.default_rng([3, 5]).multinomial(num_users, even, size=num_draws)
    np.testing.assert_array_equal(weights_BU, at_once)


def test_pieces_of_the_draws_give_the_same_bits_as_all_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(4)
    bootstrap, rows = Bootstrap(500, 70, 1), np.sort(rng.permutation(500)[:300])
    # Ties, and a class so rare that some draws have none of it.
    labels, scores = (rng.random(300) < 0.01).astype(np.int64), np.round(rng.normal(size=300), 1)
    whole = weighted_auc_ks(labels, scores, bootstrap.weights_BU.astype(np.float32)[:, rows])
    assert np.isnan(whole[0]).any()
    for cells in (1, 7 * 300, 300 * 64):
        monkeypatch.setattr(metrics, "CELLS_PER_PIECE", cells)
        found = bootstrap.draws([TestScores(rows, labels, scores)])
        np.testing.assert_array_equal(found.auc[:, 0], whole[0])
        np.testing.assert_array_equal(found.ks[:, 0], whole[1])


def test_many_draws_of_many_users_take_bounded_memory() -> None:
    num_users, num_draws = 20_000, 300
    rng = np.random.default_rng(5)
    weights_BU = rng.integers(0, 3, (num_draws, num_users), dtype=np.uint8)
    labels, scores = rng.integers(0, 2, num_users), rng.random(num_users)
    tracemalloc.start()
    weighted_auc_ks(labels, scores, weights_BU)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_users * num_draws > 5 * metrics.CELLS_PER_PIECE
    assert peak < 80 * metrics.CELLS_PER_PIECE
