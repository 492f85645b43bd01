"""The simulated wallet: reproducible, in the format, and worth learning from."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from qanchor.data.dataset import open_dataset
from qanchor.data.render import render_profile
from qanchor.data.wallet import generate_wallet, split_of, wallet_config
from qanchor.data.wallet_habits import DRIFTS, INTENTS, TRAITS, load_wallet_tables
from qanchor.data.wallet_simulation import make_rates, simulate_user
from qanchor.errors import DataError, InvalidInput

FILES = ("users", "events", "labels", "future_events_train")


def _rows(path: Path, name: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = pq.read_table(path / f"{name}.parquet").to_pylist()
    return rows


def test_content_depends_on_the_seed_and_not_on_the_chunks(tmp_path: Path) -> None:
    whole = generate_wallet(tmp_path / "whole", 23, seed=3)
    parts = generate_wallet(tmp_path / "parts", 23, seed=3, chunk_users=7)
    other = generate_wallet(tmp_path / "other", 23, seed=4)
    for name in FILES:
        assert _rows(whole, name) == _rows(parts, name)
    assert _rows(whole, "events") != _rows(other, "events")


def test_a_user_is_the_same_in_a_larger_wallet(tmp_path: Path) -> None:
    small = open_dataset(generate_wallet(tmp_path / "small", 3, seed=1))
    large = open_dataset(generate_wallet(tmp_path / "large", 9, seed=1))
    assert list(small.profiles()) == list(large.profiles(["0", "1", "2"]))
    assert [small.split_of[user] for user in "012"] == [split_of(user) for user in range(3)]


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    one, two = (generate_wallet(tmp_path / name, 12, seed=8) for name in ("one", "two"))
    for file in sorted(path.name for path in one.iterdir()):
        assert (one / file).read_bytes() == (two / file).read_bytes()


def test_profiles_fit_a_small_prefix(wallet: Path) -> None:
    dataset = open_dataset(wallet)
    names = [spec.name for spec in dataset.schema.modalities]
    assert names == ["bill", "minipro", "spm", "app", "search", "tabular"]
    profiles = list(dataset.profiles())
    assert 60 < np.mean([len(profile.events) for profile in profiles]) < 140
    # 82 events, 18 delimiters and modality tokens, the user token, a header of a few words.
    limit = sum(spec.max_events for spec in dataset.schema.modalities)
    assert limit == 82
    counts = [render_profile(profile, dataset.schema).num_events for profile in profiles]
    assert max(map(sum, counts)) <= limit


def test_base_rates_are_those_of_a_wallet(tmp_path: Path) -> None:
    dataset = open_dataset(generate_wallet(tmp_path / "wallet", 1500, seed=0))
    rates = {one.name: dataset.labels(one.name)[1].mean() for one in dataset.scenarios}
    assert len(rates) == 10
    assert 0.01 < rates["fraud_30d"] < 0.05
    assert rates["login_7d"] > 0.85
    others = [rate for name, rate in rates.items() if name not in ("fraud_30d", "login_7d")]
    assert all(0.04 < rate < 0.7 for rate in others)


def test_a_label_is_what_the_future_shows(wallet: Path) -> None:
    dataset = open_dataset(wallet)
    train = dataset.user_ids("train")
    ordered = {
        user_id: any(event.event_type == "takeout" for event in events)
        for user_id, events in dataset.future(train)
    }
    users, labels = dataset.labels("takeout_30d")
    known = dict(zip(users, labels.tolist(), strict=True))
    assert {user: bool(known[user]) for user in train} == ordered


def test_the_history_tells_more_about_the_future_than_the_attributes(tmp_path: Path) -> None:
    dataset = open_dataset(generate_wallet(tmp_path / "wallet", 1500, seed=0))
    recent = {
        profile.user_id: sum(
            event.event_type == "forest" and profile.as_of_s - event.time_s <= 45 * 86_400
            for event in profile.events
        )
        for profile in dataset.profiles()
    }
    users, labels = dataset.labels("forest_30d")
    scores = np.array([recent[user] for user in users])
    positive, negative = scores[labels == 1], scores[labels == 0]
    wins = (positive[:, None] > negative).mean() + 0.5 * (positive[:, None] == negative).mean()
    assert 0.7 < wins < 0.95


def test_habits_name_known_traits_and_modalities() -> None:
    tables = load_wallet_tables()
    modalities = {spec.name for spec in wallet_config().profile.modalities}
    for habit in tables.habits:
        assert habit.modality in modalities
        assert set(habit.traits) <= set(TRAITS)
        assert set(habit.drifts) <= set(DRIFTS)
        assert set(habit.intents) <= set(INTENTS)
    event_types = {habit.event_type for habit in tables.habits}
    for scenario in tables.scenarios:
        assert set(scenario.event_types) <= event_types


def test_amounts_and_visits_are_whole_and_positive() -> None:
    tables = load_wallet_tables()
    user = simulate_user(make_rates(tables), seed=0, user_id=0)
    assert (user.value_N >= 1).all()
    assert (user.value_N == np.rint(user.value_N)).all()
    items = [len(tables.habits[habit].items) for habit in user.habit_N]
    assert (user.item_N < items).all()
    assert (np.diff(user.day_N) >= 0).all()


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="num_users=0"):
        generate_wallet(tmp_path / "none", 0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="empty directory"):
        generate_wallet(tmp_path / "full", 5)
