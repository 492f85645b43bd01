"""A simulated mobile wallet: any number of users, for demos, tests and load. Not real people.

Every user has latent traits, slow drifts and, rarely, a short-lived intent. They set the rates at
which the user's habits show as events: 90 days of history and 30 days of future, drawn by the
same processes, with a weekly rhythm, favourite brands, and users who fall silent. Labels are read
off the simulated future, so that a label is a coin toss whose odds the history tells in part: a
model can learn them, but never fully. Figures obtained on this data say nothing about any real
wallet.

Each user draws from a generator of its own: content depends on the seed and the user's number,
not on how many users there are or how they are cut into chunks.
"""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from qanchor.config import load
from qanchor.data import dataset
from qanchor.data.dataset import DatasetConfig
from qanchor.data.wallet_habits import WalletScenario, WalletTables, load_wallet_tables
from qanchor.data.wallet_simulation import (
    HISTORY_DAYS,
    IntArray,
    Rates,
    SimulatedUser,
    label_of,
    make_rates,
    simulate_user,
)
from qanchor.data.writer import (
    EVENT_SCHEMA,
    LABEL_SCHEMA,
    TableWriter,
    make_directory,
    write_description,
)
from qanchor.errors import InvalidInput

_USER_SCHEMA = pa.schema(
    [
        ("user_id", pa.int64()),
        ("split", pa.string()),
        ("asof_day", pa.int16()),
        ("age_band", pa.string()),
        ("city_tier", pa.string()),
        ("income_band", pa.string()),
        ("tenure_years", pa.int8()),
        ("phone", pa.string()),
        ("has_credit_line", pa.bool_()),
        ("is_verified", pa.bool_()),
    ]
)


def generate_wallet(
    destination: str | Path, num_users: int, *, seed: int = 0, chunk_users: int = 1000
) -> Path:
    """Write a data set directory of `num_users` simulated users and return it.

    Memory is bounded by `chunk_users`, which does not change the content. Raises InvalidInput
    for a count below 1, DataError for a destination that is not empty.
    """
    for name, value in (("num_users", num_users), ("chunk_users", chunk_users)):
        if value < 1:
            raise InvalidInput(name, value, "must be at least 1", "ask for more")
    target = Path(destination)
    make_directory(target)
    tables = load_wallet_tables()
    rates = make_rates(tables)
    write_description(target, wallet_config(), map(_described, tables.scenarios))
    with (
        TableWriter(target / dataset.USERS_FILE, _USER_SCHEMA) as user_file,
        TableWriter(target / dataset.EVENTS_FILE, EVENT_SCHEMA) as event_file,
        TableWriter(target / dataset.FUTURE_FILE, EVENT_SCHEMA) as future_file,
        TableWriter(target / dataset.LABELS_FILE, LABEL_SCHEMA) as label_file,
        tqdm(total=num_users, unit=" users", desc="wallet") as bar,
    ):
        for first in range(0, num_users, chunk_users):
            ids = range(first, min(first + chunk_users, num_users))
            chunk = {user_id: simulate_user(rates, seed, user_id) for user_id in ids}
            train = {user: one for user, one in chunk.items() if split_of(user) == "train"}
            user_file.write(_user_table(chunk))
            event_file.write(_event_table(chunk, tables, is_future=False))
            future_file.write(_event_table(train, tables, is_future=True))
            label_file.write(_label_table(chunk, tables, rates))
            bar.update(len(ids))
    return target


def wallet_config() -> DatasetConfig:
    """The schema: the paper's six modalities, small enough for a demo (prefix of about 110)."""
    return load(DatasetConfig, Path(__file__).with_name("wallet_schema.json"))


def split_of(user_id: int) -> str:
    """60/20/20 by the md5 of the user id, so that a user keeps its split at any data set size."""
    place = int(hashlib.md5(str(user_id).encode()).hexdigest(), 16) % 10
    return "train" if place < 6 else "valid" if place < 8 else "test"


def _described(scenario: WalletScenario) -> dict[str, str]:
    return {
        "name": scenario.name,
        "domain": scenario.domain,
        "question": scenario.question,
        "definition": scenario.definition,
    }


def _user_table(chunk: dict[int, SimulatedUser]) -> pa.Table:
    rows = [
        {"user_id": user_id, "split": split_of(user_id), "asof_day": HISTORY_DAYS}
        | _attributes(user)
        for user_id, user in chunk.items()
    ]
    return pa.Table.from_pylist(rows, schema=_USER_SCHEMA)


def _attributes(user: SimulatedUser) -> dict[str, str | int | bool]:
    """What a wallet knows of a person: hints at some traits, mostly noise."""
    traits, noise = user.traits, user.noise
    age = noise[0] + 0.4 * traits["income"] - 0.4 * traits["gaming"]
    income = 0.7 * traits["income"] + 0.7 * noise[2]
    return {
        "age_band": _band(age, ("18-24", "25-34", "35-49", "50+")),
        "city_tier": _band(-0.5 * traits["takeout"] + noise[1], ("tier 1", "tier 2", "tier 3")),
        "income_band": _band(income, ("low", "middle", "upper middle", "high")),
        "tenure_years": int(np.clip(np.rint(4 + 2 * noise[3] + 0.5 * traits["activity"]), 0, 12)),
        "phone": _band(income + noise[4], ("basic", "standard", "premium")),
        "has_credit_line": bool(0.5 * traits["risk"] + noise[5] > 0),
        "is_verified": bool(noise[6] - 0.5 * traits["risk"] > -1.2),
    }


def _band(value: float, names: tuple[str, ...]) -> str:
    """Cut a value that is about standard normal into bands."""
    cuts = {3: (-0.5, 0.5), 4: (-0.8, 0.0, 0.8)}[len(names)]
    return names[int(np.searchsorted(cuts, value))]


def _event_table(
    chunk: dict[int, SimulatedUser], tables: WalletTables, *, is_future: bool
) -> pa.Table:
    """Events before or from the as-of day on, by user, day and habit."""
    if not chunk:
        return EVENT_SCHEMA.empty_table()
    users = list(chunk.values())
    length = [len(user.day_N) for user in users]
    user_id_N = np.repeat(np.fromiter(chunk, dtype=np.int64), length)
    day_N, habit_N, item_N = (
        np.concatenate([getattr(user, name) for user in users])
        for name in ("day_N", "habit_N", "item_N")
    )
    value_N = np.concatenate([user.value_N for user in users])
    keep_N = (day_N >= HISTORY_DAYS) == is_future
    habit_N = habit_N[keep_N]
    return pa.table(
        {
            "user_id": user_id_N[keep_N],
            "day": day_N[keep_N],
            "modality": _words([habit.modality for habit in tables.habits], habit_N),
            "event_type": _words([habit.event_type for habit in tables.habits], habit_N),
            "text": _texts(tables, habit_N, item_N[keep_N], value_N[keep_N].astype(np.int64)),
            "value": value_N[keep_N],
        }
    )


def _texts(
    tables: WalletTables, habit_N: IntArray, item_N: IntArray, value_N: IntArray
) -> pa.DictionaryArray:
    """`Burger Bay, 35 yuan` for payments, `home page` for visits; each text made once."""
    rows, place_N = np.unique(np.stack([habit_N, item_N, value_N]), axis=1, return_inverse=True)
    texts: dict[str, int] = {}
    code_U = []
    for habit_index, item_index, value in rows.T.tolist():
        habit = tables.habits[habit_index]
        text = habit.items[item_index]
        text = f"{text}, {value} yuan" if habit.yuan else text
        code_U.append(texts.setdefault(text, len(texts)))
    code_N = np.array(code_U, dtype=np.int32)[place_N]
    return pa.DictionaryArray.from_arrays(pa.array(code_N), pa.array(list(texts), pa.string()))


def _words(name_H: list[str], habit_N: IntArray) -> pa.DictionaryArray:
    distinct = list(dict.fromkeys(name_H))
    code_H = np.array([distinct.index(name) for name in name_H], dtype=np.int32)
    return pa.DictionaryArray.from_arrays(pa.array(code_H[habit_N]), pa.array(distinct))


def _label_table(chunk: dict[int, SimulatedUser], tables: WalletTables, rates: Rates) -> pa.Table:
    """All labels of a user, then the next user's."""
    names = [scenario.name for scenario in tables.scenarios]
    counting = [_counting(scenario, tables, rates) for scenario in tables.scenarios]
    labels = [
        label_of(scenario, user, counting_HW)
        for user in chunk.values()
        for scenario, counting_HW in zip(tables.scenarios, counting, strict=True)
    ]
    return pa.table(
        {
            "user_id": np.repeat(np.fromiter(chunk, dtype=np.int64), len(names)),
            "scenario": _words(names, np.tile(np.arange(len(names)), len(chunk))),
            "asof_day": pa.array([HISTORY_DAYS] * len(labels), pa.int16()),
            "label": pa.array(labels, pa.int8()),
        }
    )


def _counting(scenario: WalletScenario, tables: WalletTables, rates: Rates) -> IntArray:
    """1 for each habit and item whose events count for the scenario [H, W]."""
    counting_HW = np.zeros(rates.has_item_HW.shape, dtype=np.int64)
    for place, habit in enumerate(tables.habits):
        if scenario.event_types and habit.event_type not in scenario.event_types:
            continue
        if scenario.min_yuan and not habit.yuan:
            continue
        for item_place, item in enumerate(habit.items):
            counting_HW[place, item_place] = scenario.item in ("", item)
    return counting_HW
