"""Weighted AUC and KS against resampled users; intervals, pairing and what draws share."""

import numpy as np
import pytest

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
