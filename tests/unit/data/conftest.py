"""Small data sets on disk: one written by hand, one simulated."""

from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from types import MappingProxyType

import pyarrow as pa
import pytest

from qanchor.config import ModalitySpec, ProfileSchema, save
from qanchor.data.activity import Activity, collect
from qanchor.data.dataset import DatasetConfig
from qanchor.data.future_answers import FutureUser
from qanchor.data.futures import FutureQuestions, answer_futures
from qanchor.data.grounded import Answered
from qanchor.data.profile import DAY_SECONDS, Event
from qanchor.data.topics import TopicPool
from qanchor.data.wallet import generate_wallet
from qanchor.data.writer import write_table

UNTYPED: Mapping[str, tuple[str, ...]] = MappingProxyType({"visit": (), "order": ()})
"""Modalities without event types to ask about."""
AS_OF_S = 1_700_006_400  # a Wednesday, midnight

TABLES = {
    "users": {
        "user_id": [10, 20, 30, 40],
        "split": ["train", "valid", "test", "train"],
        "asof_day": [75, 75, 80, 75],
        "plan": ["gold", None, "basic", "basic"],
        "age": [31.0, 40.0, float("nan"), 22.0],
        "is_new": [True, False, False, None],
    },
    "events": {
        "user_id": [10, 10, 10, 30],
        "day": [1, 74, 74, 79],
        "modality": ["visit", "visit", "order", "order"],
        "event_type": ["home", "home", "buy", "buy"],
        "text": ["home page", "home page", "tea, 5 euro", "bread, 2 euro"],
        "value": [1.0, 3.0, 5.0, None],
    },
    "labels": {
        "user_id": [10, 20, 30],
        "scenario": ["will_buy", "will_buy", "will_buy"],
        "label": [1, 0, 0],
    },
    "future_events_train": {
        "user_id": [10, 10],
        "day": [75, 80],
        "modality": ["visit", "order"],
        "event_type": ["home", "buy"],
        "text": ["home page", "tea, 5 euro"],
        "value": [2.0, 5.0],
    },
}
"""A valid data set: user 20 and 40 have no events, user 40 has no label."""

SCENARIOS = [{"name": "will_buy", "question": "Will the user buy something?"}]


def event_of(day: int, event_type: str, text: str = "", value: float | None = None) -> Event:
    """An event of the tiny data set, so many days after AS_OF_S."""
    return Event(
        time_s=AS_OF_S + day * DAY_SECONDS,
        modality="order" if event_type in ("buy", "refused") else "visit",
        event_type=event_type,
        text=text or event_type,
        value=value,
    )


def history_of(*events: Event) -> Activity:
    """The 90 days before AS_OF_S."""
    return collect(events, AS_OF_S, -90, 90)


def tiny_config() -> DatasetConfig:
    """Two event modalities, one of them grouped by day, and attributes."""
    return DatasetConfig(
        name="tiny",
        profile=ProfileSchema(
            modalities=(
                ModalitySpec(name="visit", max_events=5, max_event_tokens=12, group_by="day"),
                ModalitySpec(name="order", max_events=3, max_event_tokens=12),
                ModalitySpec(name="tabular", kind="attributes", max_events=3, max_event_tokens=8),
            )
        ),
        attributes=("plan", "age", "is_new"),
        future_days=30,
    )


WriteTiny = Callable[..., Path]


@pytest.fixture
def write_tiny(tmp_path: Path) -> WriteTiny:
    """Writes the tiny data set; keyword arguments replace columns: events={"day": [...]}."""

    def write(**changes: dict[str, list[object]]) -> Path:
        directory = tmp_path / "tiny"
        directory.mkdir()
        save(tiny_config(), directory / "schema.json")
        save(SCENARIOS, directory / "scenarios.json")
        for name, columns in TABLES.items():
            merged = {**columns, **changes.get(name, {})}
            kept = {column: values for column, values in merged.items() if values is not None}
            write_table(pa.table(kept), directory / f"{name}.parquet")
        return directory

    return write


@pytest.fixture(scope="session")
def wallet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated wallet of 300 users."""
    return generate_wallet(tmp_path_factory.mktemp("data") / "wallet", 300, seed=5)


def ask_everything(
    history: Activity,
    future: Activity,
    pool: TopicPool,
    seed: int = 0,
    known_types: Mapping[str, tuple[str, ...]] = UNTYPED,
) -> list[Answered]:
    """All there is to ask about a future."""
    sample = [FutureUser(history=history, future=future)]
    questions = FutureQuestions(pool, known_types, sample)
    return answer_futures(history, future, questions, 999, Random(seed))
