"""The whole synthesis against a real HTTP server: what is asked, kept, stored and counted."""

import json
import re
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qanchor.config import save
from qanchor.data.dataset import Dataset, open_dataset
from qanchor.data.useru import TRIPLE_COLUMNS, TripleOptions, make_triples, read_triples
from qanchor.data.writer import write_table
from qanchor.errors import ConfigError
from qanchor.train.triples import read_triple_texts
from qanchor.userqa.config import UserQaConfig
from qanchor.userqa.endpoint import Address
from qanchor.userqa.synthesis import synthesise
from tests.unit.userqa.conftest import KEY, Synthesise
from tests.unit.userqa.fake_endpoint import Asked, FakeEndpoint, Said, completion

NO_RETRY = {"max_retries": 0}


def num_train(wallet: Dataset) -> int:
    return len(wallet.user_ids("train"))


async def test_each_user_is_picked_drafted_and_reflected_on(
    synthesis: Synthesise, endpoint: FakeEndpoint, wallet: Dataset, tmp_path: Path
) -> None:
    """Of ten answers the fake model revises one and drops one."""
    report, num_users = await synthesis(), num_train(wallet)
    assert Counter(asked.step for asked in endpoint.asked) == {
        "pick": num_users,
        "draft": num_users,
        "reflect": num_users,
    }
    assert report.num_drafted == 10 * num_users
    assert (report.num_kept, report.num_revised, report.num_dropped) == (
        8 * num_users,
        num_users,
        num_users,
    )
    triples = read_triples(tmp_path / "out/triples.parquet")
    assert len(triples) == report.num_uqa == 9 * num_users
    assert {triple.user_id for triple in triples} == set(wallet.user_ids("train"))
    assert sum(triple.answer.startswith("Corrected") for triple in triples) == num_users
    assert report.num_tokens_in == 100 * 3 * num_users
    assert report.is_complete


async def test_the_file_is_what_pretrain_reads(synthesis: Synthesise, tmp_path: Path) -> None:
    await synthesis(num_future=2)
    path = tmp_path / "out/triples.parquet"
    assert pq.read_schema(path).names == list(TRIPLE_COLUMNS)
    texts = read_triple_texts(path)
    assert len(texts.views) == len(texts.topics) == len(texts.queries) == len(texts.answers) > 0


async def test_only_history_is_sent_and_no_id(
    endpoint: FakeEndpoint, wallet: Dataset, tmp_path: Path
) -> None:
    """The user's id, a label's scenario and an event of the as-of day stay here."""
    user_id = "31415926"
    tables = {
        "users": {"user_id": [int(user_id)], "split": ["train"], "asof_day": [75]},
        "events": {
            "user_id": [int(user_id)] * 2,
            "day": [74, 75],
            "modality": ["bill", "bill"],
            "event_type": ["coffee", "coffee"],
            "text": ["coffee {cup}, yesterday's", "coffee of the future"],
            "value": [1.0, 2.0],
        },
        "labels": {"user_id": [int(user_id)], "scenario": ["secret_label"], "label": [1]},
    }
    for name, columns in tables.items():
        write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    schema = json.loads((wallet.path / "schema.json").read_text())
    save({**schema, "attributes": []}, tmp_path / "schema.json")
    await synthesise(
        open_dataset(tmp_path), tmp_path / "out", UserQaConfig(), Address(endpoint.url, "m", KEY)
    )
    assert len(endpoint.asked) == 3
    for asked in endpoint.asked:
        assert "{cup}, yesterday's" in asked.text
        for kept_back in ("future", user_id, "secret_label"):
            assert kept_back not in asked.body


async def test_steps_of_a_user_begin_alike_so_that_endpoints_can_cache(
    synthesis: Synthesise, endpoint: FakeEndpoint
) -> None:
    await synthesis(max_users=1)
    beginnings = {asked.text.partition("END OF PROFILE")[0] for asked in endpoint.asked}
    assert len(beginnings) == 1


async def test_a_second_run_asks_nothing_and_writes_the_same(
    synthesis: Synthesise, endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    await synthesis()
    first, num_asked = (tmp_path / "out/triples.parquet").read_bytes(), len(endpoint.asked)
    report = await synthesis()
    assert len(endpoint.asked) == num_asked
    assert (report.num_requests, report.num_replies_from_store) == (0, num_asked)
    assert (tmp_path / "out/triples.parquet").read_bytes() == first


async def test_the_file_does_not_depend_on_which_reply_comes_first(
    synthesis: Synthesise, endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    await synthesis("one_by_one", endpoint={"concurrency": 1})
    assert endpoint.most_at_once == 1
    endpoint.delay_s = 0.02
    await synthesis("together", endpoint={"concurrency": 5})
    assert 1 < endpoint.most_at_once <= 5
    one, other = (tmp_path / name / "triples.parquet" for name in ("one_by_one", "together"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("step", ["pick", "draft", "reflect"])
@pytest.mark.parametrize("content", [None, "Sorry, no.", '{"answers": [{}], "topics": [0]}'])
async def test_a_malformed_reply_is_asked_for_again(
    synthesis: Synthesise, endpoint: FakeEndpoint, step: str, content: str | None
) -> None:
    def misbehave(asked: Asked) -> Said | None:
        bad = asked.step == step and not asked.is_mending
        return Said(body=completion(content)) if bad else None

    endpoint.misbehave = misbehave
    report = await synthesis(max_users=2)
    assert getattr(report, f"num_malformed_{step}") == 2
    assert (report.num_uqa, report.num_requests) == (18, 8)
    again = [asked for asked in endpoint.asked if asked.is_mending]
    assert len(again) == 2
    assert all("cannot be used" in asked.text for asked in again)


@pytest.mark.parametrize(
    ("step", "counted"),
    [
        ("pick", {"num_topics_filled_in": 10, "num_uqa": 9}),
        ("draft", {"num_draft_missing": 10, "num_uqa": 0, "num_users_without_triples": 1}),
        ("reflect", {"num_verdict_missing": 10, "num_uqa": 0, "num_dropped": 0}),
    ],
)
async def test_what_stays_malformed_is_given_up_and_counted(
    synthesis: Synthesise, endpoint: FakeEndpoint, step: str, counted: dict[str, int]
) -> None:
    endpoint.misbehave = lambda asked: (
        Said(body=completion("never")) if asked.step == step else None
    )
    report = await synthesis(max_users=1, max_mendings=2)
    assert sum(asked.step == step for asked in endpoint.asked) == 3
    assert getattr(report, f"num_malformed_{step}") == 3
    assert {name: getattr(report, name) for name in counted} == counted
    assert report.is_complete


async def test_of_a_reply_that_is_never_whole_the_good_part_is_kept(
    synthesis: Synthesise, endpoint: FakeEndpoint
) -> None:
    def misbehave(asked: Asked) -> Said | None:
        if asked.step != "draft":
            return None
        names = re.findall(r"^([a-z0-9_]+): ", asked.text.rpartition("TOPICS")[2], re.MULTILINE)
        entries = [{"topic": name, "query": "Which?", "answer": "This."} for name in names[:7]]
        return Said(body=completion(json.dumps({"answers": [*entries, {"topic": 5}]})))

    endpoint.misbehave = misbehave
    report = await synthesis(max_users=1)
    assert (report.num_drafted, report.num_draft_missing, report.num_uqa) == (7, 3, 6)


@pytest.mark.parametrize(
    "body", ["", "<html>busy</html>", "{", "[]", '{"choices": []}', '{"choices": [{"message": 3}]}']
)
async def test_a_body_that_is_no_completion_is_a_malformed_reply(
    synthesis: Synthesise, endpoint: FakeEndpoint, body: str
) -> None:
    endpoint.misbehave = lambda asked: Said(body=body) if asked.number == 0 else None
    report = await synthesis(max_users=1)
    assert (report.num_malformed_pick, report.num_replies_without_usage) == (1, 1)
    assert report.num_uqa == 9


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": -5, "completion_tokens": 1}, {}])
async def test_without_a_count_tokens_are_estimated(
    synthesis: Synthesise, endpoint: FakeEndpoint, usage: dict[str, int] | None
) -> None:
    endpoint.misbehave = lambda asked: Said(body=completion("{}", usage))
    report = await synthesis(max_users=1, max_mendings=0)
    assert report.num_replies_without_usage == report.num_requests == 2
    assert report.num_tokens_in > 400
    assert report.num_tokens_out == 2


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_failing_endpoint_is_retried_after_the_time_it_asks_for(
    synthesis: Synthesise, endpoint: FakeEndpoint, status: int
) -> None:
    busy = Said(status=status, headers={"Retry-After": "0.9"})
    endpoint.misbehave = lambda asked: busy if asked.number == 0 else None
    report = await synthesis(max_users=1)
    # Without Retry-After the first pause is half a second at most.
    assert 0.9 <= endpoint.asked[1].time_s - endpoint.asked[0].time_s < 2.0
    assert (report.num_requests, report.num_uqa) == (3, 9)


async def test_a_reply_that_takes_too_long_is_asked_for_again(
    synthesis: Synthesise, endpoint: FakeEndpoint
) -> None:
    slow = Said(body=completion("{}"), delay_s=1.6)
    endpoint.misbehave = lambda asked: slow if asked.number == 0 else None
    report = await synthesis(max_users=1, endpoint={"timeout_seconds": 1.0})
    assert len(endpoint.asked) == 4
    assert (report.num_requests, report.num_uqa) == (3, 9)


async def test_a_connection_that_breaks_is_made_again(
    synthesis: Synthesise, endpoint: FakeEndpoint
) -> None:
    cut = Said(body=completion("{}"), is_cut=True)
    endpoint.misbehave = lambda asked: cut if asked.number == 1 else None
    report = await synthesis(max_users=1)
    assert (len(endpoint.asked), report.num_uqa) == (4, 9)


async def test_users_the_endpoint_failed_for_are_left_for_another_run(
    synthesis: Synthesise, endpoint: FakeEndpoint, wallet: Dataset, tmp_path: Path
) -> None:
    endpoint.misbehave = lambda asked: Said(status=500) if asked.number == 4 else None
    report = await synthesis(endpoint=NO_RETRY)
    assert (report.num_users_unfinished, report.stopped_by) == (1, "")
    assert not report.is_complete
    assert report.num_uqa == 9 * (num_train(wallet) - 1)
    report = await synthesis(endpoint=NO_RETRY)
    assert report.is_complete
    await synthesis("at_once")
    out, at_once = (tmp_path / name / "triples.parquet" for name in ("out", "at_once"))
    assert out.read_bytes() == at_once.read_bytes()


async def test_an_endpoint_that_keeps_failing_stops_the_run(
    synthesis: Synthesise, endpoint: FakeEndpoint, wallet: Dataset
) -> None:
    endpoint.misbehave = lambda asked: Said(status=500)
    limits = {**NO_RETRY, "max_failures_in_a_row": 3, "concurrency": 1}
    report = await synthesis(endpoint=limits)
    assert len(endpoint.asked) == 3
    assert report.stopped_by == "endpoint"
    assert report.num_users_unfinished == num_train(wallet)


async def test_a_refused_request_drops_its_user_alone(
    synthesis: Synthesise, endpoint: FakeEndpoint
) -> None:
    long = Said(status=400, body=json.dumps({"error": {"message": "context too long"}}))
    endpoint.misbehave = lambda asked: long if asked.number == 0 else None
    report = await synthesis(max_users=3, endpoint={"concurrency": 1})
    assert (report.num_users_refused, report.num_uqa, report.is_complete) == (1, 18, True)


@pytest.mark.parametrize("status", [401, 403])
async def test_a_wrong_key_stops_at_once_and_is_not_repeated_anywhere(
    synthesis: Synthesise, endpoint: FakeEndpoint, tmp_path: Path, status: int
) -> None:
    body = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}})
    endpoint.misbehave = lambda asked: Said(status=status, body=body)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY") as error:
        await synthesis(endpoint={"concurrency": 2})
    assert KEY not in str(error.value)
    assert len(endpoint.asked) <= 2
    assert not (tmp_path / "out/triples.parquet").exists()


async def test_a_wrong_key_does_not_wait_for_slow_replies(
    synthesis: Synthesise, endpoint: FakeEndpoint
) -> None:
    endpoint.misbehave = lambda asked: (
        Said(status=401) if asked.number == 1 else Said(body=completion("{}"), delay_s=5.0)
    )
    started = time.monotonic()
    with pytest.raises(ConfigError):
        await synthesis(endpoint={"concurrency": 2})
    assert time.monotonic() - started < 4.0


async def test_an_unknown_model_stops_at_once(
    synthesis: Synthesise, endpoint: FakeEndpoint
) -> None:
    endpoint.misbehave = lambda asked: Said(status=404)
    with pytest.raises(ConfigError, match="base_url"):
        await synthesis(endpoint={"concurrency": 1})
    assert len(endpoint.asked) == 1


async def test_the_key_is_sent_and_stays_out_of_every_file(
    synthesis: Synthesise, endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    await synthesis(max_users=1)
    assert {asked.authorization for asked in endpoint.asked} == {f"Bearer {KEY}"}
    files = [path for path in (tmp_path / "out").iterdir() if path.is_file()]
    assert {"triples.parquet", "replies.sqlite", "report.json", "config.json"} <= {
        path.name for path in files
    }
    assert not any(KEY.encode() in path.read_bytes() for path in files)


async def test_a_spent_budget_stops_cleanly_and_a_larger_one_goes_on(
    synthesis: Synthesise, endpoint: FakeEndpoint, wallet: Dataset, tmp_path: Path
) -> None:
    """A request costs 120 tokens, and ten times as many are set aside for it."""
    small = {"max_tokens": 5_000}
    report = await synthesis(endpoint={"max_reply_tokens": 200}, budget=small)
    assert report.stopped_by == "max_tokens"
    assert report.num_tokens_in + report.num_tokens_out <= 5_000
    assert 0 < report.num_users_unfinished < num_train(wallet)
    assert report.num_uqa == 9 * (num_train(wallet) - report.num_users_unfinished)
    num_asked = len(endpoint.asked)
    report = await synthesis(endpoint={"max_reply_tokens": 200})
    assert report.is_complete
    assert len({asked.body for asked in endpoint.asked}) == len(endpoint.asked) > num_asked
    await synthesis("at_once", endpoint={"max_reply_tokens": 200})
    out, at_once = (tmp_path / name / "triples.parquet" for name in ("out", "at_once"))
    assert out.read_bytes() == at_once.read_bytes()


async def test_the_report_tells_the_cost(synthesis: Synthesise) -> None:
    prices = {"price_in_per_million": 1000.0, "price_out_per_million": 10_000.0}
    report = await synthesis(max_users=1, budget=prices)
    assert report.cost == pytest.approx(3 * (100 * 1000 + 20 * 10_000) / 1e6)


async def test_equal_profiles_share_their_requests(
    endpoint: FakeEndpoint, wallet: Dataset, tmp_path: Path
) -> None:
    users = {"user_id": [1, 2, 3], "split": ["train"] * 3, "asof_day": [75] * 3}
    events = {
        "user_id": [1, 2],
        "day": [74, 74],
        "modality": ["bill", "bill"],
        "event_type": ["coffee", "coffee"],
        "text": ["coffee", "coffee"],
        "value": [1.0, 1.0],
    }
    write_table(pa.table(users), tmp_path / "users.parquet")
    write_table(pa.table(events), tmp_path / "events.parquet")
    schema = json.loads((wallet.path / "schema.json").read_text())
    save({**schema, "attributes": []}, tmp_path / "schema.json")
    report = await synthesise(
        open_dataset(tmp_path), tmp_path / "out", UserQaConfig(), Address(endpoint.url, "m", KEY)
    )
    assert len(endpoint.asked) == 3
    assert report.num_uqa == 18
    # The third has no profile at all.
    assert report.num_users_without_triples == 1


async def test_the_rules_write_the_triples_of_useru(wallet: Dataset, tmp_path: Path) -> None:
    config = UserQaConfig(num_future=4, seed=9, with_valid=True)
    report = await synthesise(wallet, tmp_path / "out", config, None)
    options = TripleOptions(per_user_future=4, per_user_uqa=10, seed=9, with_valid=True)
    expected = list(make_triples(wallet, options))
    triples = read_triples(tmp_path / "out/triples.parquet")
    assert [each for each in triples if each.kind == "uqa"] == [
        each for each in expected if each.kind == "uqa"
    ]
    assert Counter(triples) == Counter(expected)
    assert (report.author, report.num_requests, report.num_uqa + report.num_future) == (
        "builtin",
        0,
        len(expected),
    )


async def test_a_part_of_the_users_gets_future_triples_of_that_part(
    wallet: Dataset, tmp_path: Path
) -> None:
    config = UserQaConfig(num_future=2, max_users=3)
    report = await synthesise(wallet, tmp_path / "out", config, None)
    assert (report.num_users, report.num_future) == (3, 6)
