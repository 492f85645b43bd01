"""Metrics and probes against cases whose answer is known."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from qanchor.data.profile import DAY_SECONDS, Event, Profile
from qanchor.data.statistics import NEVER_DAYS, NUM_WEEKS, learn_space, past_statistics
from qanchor.eval import probe
from qanchor.eval.metrics import auc, ks
from qanchor.eval.probe import MAX_NEWTON_FEATURES, SplitData, boosting_probe, linear_probe


def test_auc_and_ks_of_a_hand_counted_case() -> None:
    labels, scores = np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8])
    assert auc(labels, scores) == pytest.approx(3 / 4)
    assert ks(labels, scores) == pytest.approx(1 / 2)


@pytest.mark.parametrize("fit", [linear_probe, boosting_probe])
def test_a_probe_finds_what_is_there_and_only_that(fit) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)

    def split(count: int, strength: float) -> SplitData:
        features_UF = rng.normal(size=(count, 5)).astype(np.float32)
        noise = rng.normal(size=count)
        return SplitData(features_UF, (strength * features_UF[:, 2] + noise > 0).astype(np.int64))

    names = ("train", "valid", "test")
    found = fit({name: split(1500, 3.0) for name in names})
    chance = fit({name: split(1500, 0.0) for name in names})
    assert found.auc > 0.9
    assert abs(chance.auc - 0.5) < 0.06
    shown = found.score(np.array([[0, 0, 3, 0, 0], [0, 0, -3, 0, 0]], dtype=np.float32))
    assert shown[0] > 0.9 > 0.1 > shown[1]


def test_hand_made_features_count_windows_days_and_recency() -> None:
    as_of_s = 100 * DAY_SECONDS

    def event(days_ago: int, value: float) -> Event:
        return Event(
            time_s=as_of_s - days_ago * DAY_SECONDS,
            modality="app",
            event_type="open",
            text="",
            value=value,
        )

    profile = Profile(
        user_id="a",
        as_of_s=as_of_s,
        events=(event(2, 3.0), event(2, 5.0), event(20, 1.0)),
        attributes={"age": 30.0, "city": "x"},
    )
    empty = Profile(user_id="b", as_of_s=as_of_s, attributes={"age": 10.0, "city": "y"})
    space = learn_space([profile, empty])
    assert space.categories == (("", ""), ("app", ""), ("app", "open"))
    row = past_statistics(profile, space)
    by_type = row[-16:-3]
    assert by_type.tolist() == [2, 1, 3, 3, 2, 8, 1, 3, 9, 2, 3, 9, 2]
    weeks = row[-16 - NUM_WEEKS : -16]
    assert weeks.tolist() == [1, 0, 1] + [0] * 10, "active days, not events"
    assert row[-3:].tolist() == [30.0, 1.0, 0.0]
    assert past_statistics(empty, space)[0] == NEVER_DAYS
    assert np.isnan(past_statistics(empty, space)[2:4]).all()
    assert past_statistics(empty, space)[-3:].tolist() == [10.0, 0.0, 1.0]


@pytest.mark.parametrize("most", [0, MAX_NEWTON_FEATURES], ids=["first-order", "Newton"])
def test_the_linear_probe_is_plain_logistic_regression(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "MAX_NEWTON_FEATURES", most)
    rng = np.random.default_rng(3)
    # Columns of very different size that hang together, as embeddings do.
    mix = rng.normal(size=(6, 6)) * 10.0 ** np.arange(-3, 3)

    def split(count: int) -> SplitData:
        features_UF = (rng.normal(size=(count, 6)) @ mix).astype(np.float32)
        labels = (features_UF[:, 0] * 1e3 + 2 * rng.normal(size=count) > 1).astype(np.int64)
        return SplitData(features_UF, labels)

    splits = {"train": split(400), "valid": split(200), "test": split(200)}
    found = linear_probe(splits)
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=found.setting, max_iter=1000))
    plain.fit(splits["train"].features.astype(np.float64), splits["train"].labels)
    wanted = plain.predict_proba(splits["test"].features.astype(np.float64))[:, 1]
    np.testing.assert_allclose(found.test_scores, wanted, atol=2e-3)
    np.testing.assert_array_equal(found.score(splits["test"].features), found.test_scores)
    assert found.auc == auc(splits["test"].labels, found.test_scores)
