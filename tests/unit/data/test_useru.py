"""UserU triples: grounded, reproducible, and blind to labels and to others' futures."""

import re
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qanchor.data.activity import Activity
from qanchor.data.adapters.oulad import oulad_config
from qanchor.data.dataset import DatasetConfig, open_dataset
from qanchor.data.grounded import GroundedUser, answer_topics
from qanchor.data.profile import Profile
from qanchor.data.topics import Topic, load_topics
from qanchor.data.useru import (
    Triple,
    TripleOptions,
    known_types,
    make_triples,
    read_triples,
    write_triples,
)
from qanchor.data.wallet import wallet_config
from qanchor.errors import ConfigError, DataError
from tests.unit.data.conftest import AS_OF_S, event_of, history_of


def _answers(write_tiny: Any, history: Activity, topic: Topic) -> list[str]:
    """The answers to one topic over many phrasings; none if the profile does not support it."""
    dataset = open_dataset(write_tiny())
    pool = load_topics(dataset.path, "tiny", dataset.schema, dataset.config.attributes)
    pool = msgspec.structs.replace(pool, topics=(topic,))
    attributes: dict[str, str | float | bool] = {"plan": "gold", "is_new": True}
    profile = Profile(user_id="1", as_of_s=AS_OF_S, attributes=attributes)
    user = GroundedUser(
        profile=profile, history=history, known_types={"visit": ("home", "shop"), "order": ("buy",)}
    )
    found = {
        each.answer for seed in range(20) for each in answer_topics(user, pool, 1, Random(seed))
    }
    return sorted(found)


def test_triples_do_not_depend_on_labels(wallet: Path, tmp_path: Path) -> None:
    with_labels = list(make_triples(open_dataset(wallet)))
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in wallet.iterdir():
        if path.name not in ("labels.parquet", "scenarios.json"):
            (bare / path.name).write_bytes(path.read_bytes())
    assert list(make_triples(open_dataset(bare))) == with_labels


def test_only_train_users_get_triples_unless_valid_is_asked_for(wallet: Path) -> None:
    dataset = open_dataset(wallet)
    train, valid = set(dataset.user_ids("train")), set(dataset.user_ids("valid"))
    assert {triple.user_id for triple in make_triples(dataset)} <= train
    with_valid = list(make_triples(dataset, TripleOptions(with_valid=True)))
    assert {triple.user_id for triple in with_valid} & valid
    assert {triple.user_id for triple in with_valid} <= train | valid
    assert {triple.user_id for triple in with_valid if triple.kind == "future"} <= train


def test_a_user_has_the_same_triples_whoever_else_is_there(wallet: Path) -> None:
    dataset = open_dataset(wallet)
    alone = [one for one in make_triples(dataset) if one.user_id in dataset.user_ids("train")]
    options = TripleOptions(with_valid=True)
    together = [
        one for one in make_triples(dataset, options) if dataset.split_of[one.user_id] == "train"
    ]
    assert alone == together


def test_the_seed_decides(wallet: Path) -> None:
    dataset = open_dataset(wallet)
    first, again, other = (
        list(make_triples(dataset, TripleOptions(seed=seed))) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_triples_are_short_varied_and_of_both_kinds(wallet: Path) -> None:
    dataset = open_dataset(wallet)
    triples = list(make_triples(dataset, TripleOptions(per_user_future=4, per_user_uqa=4)))
    kinds = [triple.kind for triple in triples]
    num_train = len(dataset.user_ids("train"))
    assert kinds.count("future") == 4 * num_train
    assert 3.5 * num_train < kinds.count("uqa") <= 4 * num_train
    assert max(len(triple.answer.split()) for triple in triples) <= 60
    assert all("{" not in triple.query + triple.answer for triple in triples)
    assert len({triple.topic for triple in triples}) > 50
    per_user: dict[str, list[str]] = {}
    for triple in triples:
        per_user.setdefault(triple.user_id, []).append(triple.topic)
    assert all(len(set(topics)) == len(topics) for topics in per_user.values())


def test_what_is_written_is_read_back(wallet: Path, tmp_path: Path) -> None:
    dataset = open_dataset(wallet)
    counts = write_triples(dataset, tmp_path / "deep" / "triples.parquet")
    triples = read_triples(tmp_path / "deep" / "triples.parquet")
    assert triples == list(make_triples(dataset))
    assert counts == {kind: sum(one.kind == kind for one in triples) for kind in counts}


def test_a_failed_run_leaves_no_file(write_tiny: Any, tmp_path: Path) -> None:
    path = write_tiny()
    (path / "future_events_train.parquet").unlink()
    with pytest.raises(DataError, match="file missing"):
        write_triples(open_dataset(path), tmp_path / "out" / "triples.parquet")
    assert list((tmp_path / "out").iterdir()) == []
    options = TripleOptions(per_user_future=0)
    assert all(one.kind == "uqa" for one in make_triples(open_dataset(path), options))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[futures]\nstopp = ['x']", r"futures.*stopp.*did you mean 'stop'"),
        ("[futures]\nstop = ['{unit}?']", r"futures.*may have fields"),
        (
            "[[topics]]\nname = 'x'\naggregate = 'frequency'\nabout = 'x'\n[topics.futures]\n"
            "low = ['{count}?']",
            r"topics\.x\.futures.*may have fields",
        ),
        (
            "[[topics]]\nname = 'x'\naggregate = 'recency'\nabout = 'x'\n[topics.futures]\n"
            "stop = ['{days}?']",
            r"topics\.x\.futures.*of aggregate frequency",
        ),
        ("history_only = ['nothing']", r"history_only.*must be one of"),
    ],
)
def test_wrong_phrasings_are_told_by_name(write_tiny: Any, text: str, said: str) -> None:
    path = write_tiny()
    (path / "topics.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_topics(path, "tiny", open_dataset(path).schema, ())


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        ("frequency", "2 of the last 90 days, 1 of the last 30."),
        ("recency", "Recently: the last visit activity was 10 days ago, after a pause of 30 days."),
        ("favourites", "Visit activity is mostly home (rarely) and shop (rarely)."),
    ],
)
def test_answers_are_computed_from_the_history(
    write_tiny: Any, aggregate: Any, expected: str
) -> None:
    history = history_of(event_of(-40, "home"), event_of(-10, "home"), event_of(-10, "shop"))
    topic = Topic(name="t", aggregate=aggregate, about="visit", modality="visit")
    answers = _answers(write_tiny, history, topic)
    assert any(expected in answer for answer in answers)


@pytest.mark.parametrize("aggregate", ["recency", "trend", "regularity", "favourites", "rhythm"])
def test_what_the_profile_does_not_support_is_not_answered(write_tiny: Any, aggregate: Any) -> None:
    topic = Topic(name="t", aggregate=aggregate, about="order", modality="order")
    assert _answers(write_tiny, history_of(event_of(-1, "home")), topic) == []


def test_event_types_are_known_from_all_row_groups(write_tiny: Any) -> None:
    path = write_tiny(events={"event_type": ["home", "shop", "buy", "buy"]})
    whole = known_types(open_dataset(path))
    assert whole == {"order": ("buy",), "visit": ("home", "shop")}
    table = pq.read_table(path / "events.parquet")
    place = table.column_names.index("event_type")
    words = pa.chunked_array(table["event_type"]).dictionary_encode()
    pq.write_table(
        table.set_column(place, "event_type", words), path / "events.parquet", row_group_size=1
    )
    assert known_types(open_dataset(path)) == whole


def test_absence_names_what_is_missing_and_given_up(write_tiny: Any) -> None:
    topic = Topic(name="t", aggregate="absence", about="visit")
    answers = _answers(write_tiny, history_of(event_of(-50, "shop")), topic)
    assert answers[0] == "Missing: home and buy. No longer in the last 30 days: shop."


def test_attributes_are_told_as_they_are(write_tiny: Any) -> None:
    topic = Topic(name="t", aggregate="attribute", about="x", columns=("plan", "age", "is_new"))
    assert "Plan gold, is new yes." in _answers(write_tiny, history_of(), topic)


def test_values_are_told_by_level_where_the_topic_file_explains_them(write_tiny: Any) -> None:
    path = write_tiny()
    (path / "topics.toml").write_text('[values.order]\nunit = "amount"\nlow = 10\nhigh = 20\n')
    pool = load_topics(path, "tiny", open_dataset(path).schema, ())
    (topic,) = [each for each in pool.topics if each.aggregate == "value"]
    history = history_of(event_of(-9, "buy", value=30.0), event_of(-2, "buy", value=20.0))
    user = GroundedUser(
        profile=Profile(user_id="1", as_of_s=AS_OF_S), history=history, known_types={}
    )
    pool = msgspec.structs.replace(pool, topics=(topic,))
    answers = {each.answer for s in range(9) for each in answer_topics(user, pool, 1, Random(s))}
    assert "High: mean amount 25, from 20 to 30, latest 20." in answers


def test_a_passive_event_is_no_active_day() -> None:
    activity = history_of(event_of(-1, "home"), event_of(-2, "missed"))
    assert [day for day, _ in activity.acts(("missed",))] == [-1]


@pytest.mark.parametrize("config", [oulad_config(), wallet_config()], ids=lambda one: one.name)
def test_packaged_topics_fit_their_data_set(config: DatasetConfig, tmp_path: Path) -> None:
    pool = load_topics(tmp_path, config.name, config.profile, config.attributes)
    names = [topic.name for topic in pool.topics]
    assert len(names) == len(set(names)) >= 50
    assert pool.words.subject in ("learner", "user")
    assert {topic.aggregate for topic in pool.topics} <= pool.aggregates.keys()


def test_the_topic_file_of_the_manual_can_be_used(write_tiny: Any) -> None:
    manual = Path(__file__).parents[3] / "docs" / "training.md"
    example, _ = re.findall(r"```toml\n(.*?)```", manual.read_text(), re.DOTALL)
    path = write_tiny()
    (path / "topics.toml").write_text(example)
    pool = load_topics(path, "tiny", open_dataset(path).schema, ())
    assert pool.topics[0].name == "returns"
    assert pool.words.synonyms["return"] == ("sending back", "refund")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('[[topics]]\nname = "t"\naggregate = "trend"\nabout = "x"\nmodality = "vist"\n', "vist"),
        ('[[topics]]\nname="t"\naggregate="attribute"\nabout="x"\ncolumns=["agee"]\n', "agee"),
        ('[values.visits]\nunit = "u"\nlow = 1\nhigh = 2\n', "visits"),
        ('[[topics]]\nname = "t"\naggregate = "average"\nabout = "x"\n', "average"),
        ('[synonyms]\nvisits = ["browsing"]\n', "visits"),
    ],
)
def test_a_topic_file_that_does_not_fit_is_refused(write_tiny: Any, text: str, value: str) -> None:
    path = write_tiny()
    (path / "topics.toml").write_text(text)
    with pytest.raises(ConfigError, match=value):
        load_topics(path, "tiny", open_dataset(path).schema, ("plan", "age"))


def test_a_triple_is_plain_data() -> None:
    assert Triple("1", "uqa", "t", "q", "a") == Triple("1", "uqa", "t", "q", "a")
