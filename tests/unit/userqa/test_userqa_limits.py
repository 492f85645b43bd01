"""Store, budget, pool, config and address: what holds whatever is asked."""

import asyncio
import sqlite3
from pathlib import Path

import pytest

from qanchor.config import from_mapping, save
from qanchor.data.dataset import Dataset
from qanchor.errors import ConfigError, DataError
from qanchor.userqa.asking import request_key
from qanchor.userqa.budget import Budget, estimated_tokens
from qanchor.userqa.config import BudgetConfig, EndpointConfig, UserQaConfig
from qanchor.userqa.endpoint import OPENAI_URL, find_address
from qanchor.userqa.outcomes import Unfinished
from qanchor.userqa.pool import QaPool, QaTopic, load_pool
from qanchor.userqa.store import Reply, ReplyStore

REPLY = Reply("text", 10, 5, False)


def test_a_reply_is_on_disk_when_put_returns(tmp_path: Path) -> None:
    store = ReplyStore(tmp_path / "replies.sqlite")
    store.put("key", REPLY)
    store.close()
    store = ReplyStore(tmp_path / "replies.sqlite")
    assert store.get("key") == REPLY
    assert store.get("other") is None
    assert store.tokens() == (10, 5)
    store.close()


def test_the_log_is_written_ahead_and_in_full(tmp_path: Path) -> None:
    store = ReplyStore(tmp_path / "replies.sqlite")
    modes = [
        store._db.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous")
    ]
    assert modes == ["wal", 2]
    store.close()


def test_a_second_run_in_the_same_directory_is_turned_away(tmp_path: Path) -> None:
    store = ReplyStore(tmp_path / "replies.sqlite")
    with pytest.raises(ConfigError, match="other run"):
        ReplyStore(tmp_path / "replies.sqlite")
    store.close()


def test_another_file_is_not_taken_for_a_store(tmp_path: Path) -> None:
    (tmp_path / "replies.sqlite").write_bytes(b"not a database, but long enough" * 40)
    with pytest.raises(DataError, match="no store of replies"):
        ReplyStore(tmp_path / "replies.sqlite")


def test_a_store_holds_replies_and_hashes_only(tmp_path: Path) -> None:
    store = ReplyStore(tmp_path / "replies.sqlite")
    store.put(request_key({"model": "m"}, (("user", "PROFILE of somebody"),), 0), REPLY)
    store.close()
    with sqlite3.connect(tmp_path / "replies.sqlite") as db:
        rows = db.execute("SELECT * FROM replies").fetchall()
    db.close()
    assert [(len(row[0]), *row[1:]) for row in rows] == [(64, "text", 10, 5, 0)]


def test_every_part_of_a_request_counts_in_its_key() -> None:
    messages = (("user", "a"),)
    keys = {
        request_key({"model": "m"}, messages, 0),
        request_key({"model": "n"}, messages, 0),
        request_key({"model": "m", "temperature": 1.0}, messages, 0),
        request_key({"model": "m"}, (("system", "a"),), 0),
        request_key({"model": "m"}, messages, 1),
    }
    assert len(keys) == 5


async def test_the_budget_is_never_passed_and_ends_for_good() -> None:
    budget = Budget(BudgetConfig(max_tokens=100), 0, 0)
    await budget.reserve(30, 30)
    waiting = asyncio.create_task(budget.reserve(20, 30))
    await asyncio.sleep(0)
    assert not waiting.done()
    await budget.settle((30, 30), (30, 10))
    await waiting
    await budget.settle((20, 30), (20, 30))
    with pytest.raises(Unfinished, match="max_tokens"):
        await budget.reserve(6, 5)
    with pytest.raises(Unfinished):
        await budget.reserve(1, 1)
    assert (budget.num_tokens_in, budget.num_tokens_out) == (50, 40)


async def test_cost_is_counted_by_price_and_limits_too() -> None:
    config = BudgetConfig(max_cost=3.0, price_in_per_million=1.0, price_out_per_million=4.0)
    budget = Budget(config, 1_000_000, 250_000)
    assert budget.cost == pytest.approx(2.0)
    await budget.reserve(0, 250_000)
    await budget.settle((0, 250_000), (0, 0))
    with pytest.raises(Unfinished, match="max_cost"):
        await budget.reserve(1, 250_000)


def test_tokens_are_estimated_on_the_safe_side() -> None:
    assert estimated_tokens("a word") >= 2
    assert estimated_tokens("\u4e00" * 30) >= 30


def test_the_pool_of_everyday_life_has_72_topics(wallet: Dataset) -> None:
    assert len(load_pool("life", wallet).topics) == 72


def test_the_data_set_can_give_the_pool_or_a_file(wallet: Dataset, tmp_path: Path) -> None:
    own = load_pool("dataset", wallet)
    assert "takeout_habit" in own.names
    path = tmp_path / "pool.json"
    save(QaPool(topics=own.topics[:3]), path)
    assert load_pool(str(path), wallet).names == own.names[:3]


@pytest.mark.parametrize("names", [[], ["a", "a"], ["A b"], ["future_plans"]])
def test_pools_with_unusable_names_are_refused(names: list[str]) -> None:
    with pytest.raises(ConfigError):
        QaPool(topics=tuple(QaTopic(name=name, about="x") for name in names))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_topics": 0},
        {"max_mendings": -1},
        {"pool": "no/such/file.toml"},
        {"endpoint": {"concurrency": 0}},
        {"endpoint": {"base_url": "localhost:8000"}},
        {"endpoint": {"base_url": "http://me:secret@host/v1"}},
        {"endpoint": {"api_key": "sk-1"}},
        {"budget": {"max_cost": 1.0}},
        {"budget": {"price_in_per_million": -1.0}},
    ],
)
def test_options_that_cannot_work_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        from_mapping(UserQaConfig, fields)


def test_config_comes_before_environment() -> None:
    config = EndpointConfig(base_url="http://config/v1", api_key_variable="MY_KEY")
    environ = {"OPENAI_BASE_URL": "http://env/v1", "OPENAI_MODEL": "m", "MY_KEY": "sk-1\n"}
    address = find_address(config, environ)
    assert address
    assert (address.base_url, address.model, address.key) == ("http://config/v1", "m", "sk-1")
    assert "sk-1" not in repr(address)


def test_without_a_model_nobody_is_asked() -> None:
    assert find_address(EndpointConfig(), {"OPENAI_API_KEY": "sk-1"}) is None


def test_a_model_alone_means_openai() -> None:
    address = find_address(EndpointConfig(model="m"), {"OPENAI_API_KEY": "sk-1"})
    assert address
    assert address.base_url == OPENAI_URL


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"OPENAI_BASE_URL": "http://env/v1"}, "--builtin"),
        ({"OPENAI_MODEL": "m"}, "OPENAI_API_KEY"),
        ({"OPENAI_MODEL": "m", "OPENAI_API_KEY": "sk secret"}, "OPENAI_API_KEY"),
    ],
)
def test_half_an_address_is_an_error_that_names_the_remedy(
    environ: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        find_address(EndpointConfig(), environ)
    assert "secret" not in str(error.value)
