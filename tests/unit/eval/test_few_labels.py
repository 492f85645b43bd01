"""Probes with few labels: who needs few is found, draws are paired, rare classes drawn whole."""

import numpy as np
import pytest

from qanchor.errors import ConfigError
from qanchor.eval.bootstrap import Bootstrap
from qanchor.eval.config import EvalConfig
from qanchor.eval.few_labels import few_labels
from qanchor.eval.splits import JudgedUsers, LabelledSplit

NUM_USERS = 900
SPLITS = {"train": np.arange(400), "valid": np.arange(400, 600), "test": np.arange(600, 900)}


def judged_by(labels_UQ: np.ndarray) -> JudgedUsers:
    by_scenario = {
        f"scenario {q}": {
            split: LabelledSplit(rows, labels_UQ[rows, q]) for split, rows in SPLITS.items()
        }
        for q in range(labels_UQ.shape[1])
    }
    return JudgedUsers(tuple(map(str, range(NUM_USERS))), by_scenario, SPLITS["test"])


def tables_of(labels_UQ: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tables whose first column tells the label aloud, and tables where noise is as loud."""
    rng = np.random.default_rng(0)
    loud, faint = [], []
    for q in range(labels_UQ.shape[1]):
        noise_UF = rng.normal(size=(NUM_USERS, 30)).astype(np.float32)
        signal_U = labels_UQ[:, q] + rng.normal(size=NUM_USERS) * 0.6
        loud.append(np.column_stack([*[signal_U] * 10, noise_UF[:, :5]]).astype(np.float32))
        faint.append(np.column_stack([signal_U, noise_UF]).astype(np.float32))
    return loud, faint


def test_who_needs_fewer_labels_is_found_and_more_labels_help() -> None:
    labels_UQ = np.random.default_rng(1).integers(0, 2, size=(NUM_USERS, 2))
    loud, faint = tables_of(labels_UQ)
    found = few_labels(
        # The third method is the first, twice over.
        {
            "loud": [[table] for table in loud],
            "faint": [[table] for table in faint],
            "twin": [[table, table] for table in loud],
        },
        judged_by(labels_UQ),
        EvalConfig(label_counts=(10, 200), label_draws=12),
        Bootstrap(300, 50),
    )
    assert found is not None
    auc = {(one.method, one.num_labels): one.auc for one in found.scores}
    assert auc["loud", 10] > auc["faint", 10] + 0.1
    assert auc["loud", 200] > 0.85 > auc["faint", 10]
    assert auc["faint", 200] > auc["faint", 10] + 0.1
    gains = {(one.over, one.num_labels): one for one in found.gains}
    assert gains["faint", 10].auc_interval.is_above_zero
    assert gains["faint", 10].auc == pytest.approx(auc["loud", 10] - auc["faint", 10])
    twin = gains["twin", 10]
    assert (twin.auc, twin.auc_interval.low, twin.auc_interval.high) == pytest.approx((0, 0, 0))
    assert found.num_draws == 12


def test_labels_at_random_tell_nothing() -> None:
    labels_UQ = np.random.default_rng(2).integers(0, 2, size=(NUM_USERS, 1))
    noise_UF = np.random.default_rng(3).normal(size=(NUM_USERS, 8)).astype(np.float32)
    found = few_labels(
        {"noise": [[noise_UF]]},
        judged_by(labels_UQ),
        EvalConfig(label_counts=(20,), label_draws=40),
        Bootstrap(300, 50),
    )
    assert found is not None
    (score,) = found.scores
    assert abs(score.auc - 0.5) < 0.03
    assert score.auc_interval.low < 0.5 < score.auc_interval.high
    assert found.gains == ()


def test_a_rare_class_gives_what_it_has() -> None:
    labels_UQ = np.zeros((NUM_USERS, 1), dtype=np.int64)
    for rows in SPLITS.values():
        labels_UQ[rows[:6]] = 1
    table_UF = (labels_UQ + np.random.default_rng(4).normal(size=(NUM_USERS, 3)) * 0.1).astype(
        np.float32
    )
    found = few_labels(
        {"told": [[table_UF]]},
        judged_by(labels_UQ),
        EvalConfig(label_counts=(2, 100), label_draws=5),
        Bootstrap(300, 50),
    )
    assert found is not None
    assert all(one.auc > 0.99 for one in found.scores)


def test_labels_that_are_not_there_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    labels_UQ = np.random.default_rng(2).integers(0, 2, size=(NUM_USERS, 1))
    tables = {"noise": [[np.random.default_rng(3).normal(size=(NUM_USERS, 4)).astype(np.float32)]]}
    judged, bootstrap = judged_by(labels_UQ), Bootstrap(300, 50)
    settings = EvalConfig(label_counts=(20, 401), label_draws=2)
    found = few_labels(tables, judged, settings, bootstrap)
    assert found is not None
    assert [one.num_labels for one in found.scores] == [20]
    assert "400 train users" in caplog.text
    settings = EvalConfig(label_counts=(401,), label_draws=2)
    assert few_labels(tables, judged, settings, bootstrap) is None


@pytest.mark.parametrize("wrong", [{"label_counts": (1,)}, {"label_draws": 0}])
def test_settings_that_cannot_be_drawn_are_told(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EvalConfig(**wrong)
