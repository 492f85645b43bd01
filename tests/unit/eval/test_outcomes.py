"""Outcomes of recorded futures: what is so, who is asked, and how questions are scored."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from qanchor.checkpoint import Checkpoint, load_checkpoint
from qanchor.data.activity import collect
from qanchor.data.dataset import Dataset, open_dataset
from qanchor.data.future_answers import FutureUser
from qanchor.data.topics import load_topics
from qanchor.errors import ConfigError, DataError
from qanchor.eval.config import EvalConfig
from qanchor.eval.embed import embed_answers, embed_users, encoded_corpus
from qanchor.eval.metrics import auc
from qanchor.eval.outcomes import Outcome, asked_users, judge_outcomes, label, read_outcomes
from qanchor.eval.zero_shot import yes_minus_no
from qanchor.train.corpus import PrefixCorpus
from qanchor.train.setup import material, render_users
from qanchor.train.triples import read_triple_texts
from tests.unit.data.conftest import AS_OF_S, event_of, history_of, write_tiny  # noqa: F401

QUESTIONS = ("Will they ride a shared bike?", "A bike soon?")
BIKE = Outcome(kind="frequency", days=14, event_types=("shared_bike",), questions=QUESTIONS)


@pytest.fixture(scope="module")
def dataset(wallet: Path) -> Dataset:
    return open_dataset(wallet)


@pytest.fixture(scope="module")
def trained(run_dir: Path) -> Checkpoint:
    return load_checkpoint(run_dir / "checkpoint")


@pytest.fixture(scope="module")
def everybody(dataset: Dataset, trained: Checkpoint) -> PrefixCorpus:
    users = [user for split in ("test", "train") for user in dataset.user_ids(split)]
    return encoded_corpus(trained, render_users(dataset, users))


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"kind": "frequency", "modality": "order"}, 1),
        ({"kind": "frequency", "modality": "order", "days": 2}, 0),
        ({"kind": "stop", "event_types": ("shop",)}, 1),
        ({"kind": "at_least", "event_types": ("home",), "count": 3}, 1),
        ({"kind": "at_least", "event_types": ("home",), "count": 4}, 0),
        ({"kind": "at_most", "count": 4}, 1),
        ({"kind": "at_most", "count": 3}, 0),
        ({"kind": "churn"}, 0),
        ({"kind": "churn", "event_types": ("buy",)}, 1),
        ({"kind": "grow"}, 0),
        ({"kind": "grow", "event_types": ("buy",)}, 1),
        ({"kind": "fall", "event_types": ("home",)}, 1),
        ({"kind": "value_at_least", "event_types": ("buy",), "level": 5}, 1),
        ({"kind": "value_below", "event_types": ("buy",), "level": 5}, 0),
        ({"kind": "value_below", "event_types": ("home",), "level": 5}, -1),
        ({"kind": "explore"}, 0),
    ],
)
def test_what_comes_says_yes_no_or_neither(
    write_tiny: Any,  # noqa: F811
    rule: dict[str, Any],
    says: int,
) -> None:
    dataset = open_dataset(write_tiny())
    pool = load_topics(dataset.path, "tiny", dataset.schema, ())
    later = [event_of(day, "home") for day in (0, 1, 9)] + [event_of(2, "buy", "tea", 5.0)]
    user = FutureUser(
        history=history_of(*(event_of(day, "home") for day in range(-28, 0))),
        future=collect(later, AS_OF_S, 0, 14),
    )
    outcome = Outcome(**{"days": 14, "questions": ("?",), **rule})
    assert label(outcome, user, pool) == says


def test_who_training_left_out_is_asked_first(
    dataset: Dataset, trained: Checkpoint, run_dir: Path, everybody: PrefixCorpus
) -> None:
    texts = read_triple_texts(run_dir.parent / "triples.parquet")
    rendered = render_users(dataset, list(dataset.user_ids("train")))
    left_out = material(trained, rendered, texts).heldout.users
    expected = {rendered.user_ids[row] for row in left_out}
    assert 1 < len(expected) < 20
    users = everybody.rendered.user_ids
    for limit in (len(expected), 20):
        asked = asked_users(dataset, {"bike": BIKE}, trained, users, limit)
        names = np.array([users[row] for row in asked.rows])
        assert set(names[asked.is_heldout]) == expected
        assert len(set(names)) == limit
        assert {dataset.split_of[user] for user in names} == {"train"}
    known = dataset.user_ids("train")[3]
    asked = asked_users(dataset, {"bike": BIKE}, trained, ("nobody", known), 20)
    assert asked.rows.tolist() == [1]


def test_every_wording_is_scored_by_what_came(
    dataset: Dataset,
    trained: Checkpoint,
    everybody: PrefixCorpus,
    caplog: pytest.LogCaptureFixture,
) -> None:
    never = Outcome(kind="at_least", days=7, count=8, questions=("On eight days of seven?",))
    settings = EvalConfig(num_draws=20)
    with caplog.at_level(logging.WARNING):
        outcomes = {"never": never, "bike": BIKE}
        found = judge_outcomes(dataset, outcomes, trained, everybody, settings)
    assert "outcome never is not judged" in caplog.text
    (bike,) = found.outcomes
    train = dataset.user_ids("train")
    future = dict(dataset.future(train))
    as_of = {profile.user_id: profile.as_of_s for profile in dataset.profiles(user_ids=train)}
    came = [
        any(
            event.event_type == "shared_bike" and event.time_s < as_of[user] + 14 * 86_400
            for event in future[user]
        )
        for user in train
    ]
    labels = np.array(came, dtype=np.int64)
    embeddings = embed_users(trained, render_users(dataset, list(train)), QUESTIONS)
    yes, no = (
        embed_answers(trained, texts) for texts in (settings.answers.yes, settings.answers.no)
    )
    expected = [auc(labels, yes_minus_no(embeddings[:, place], yes, no)) for place in (0, 1)]
    assert [one.question for one in bike.wordings] == list(QUESTIONS)
    assert [one.auc for one in bike.wordings] == pytest.approx(expected, abs=1e-6)
    assert bike.auc == found.average_auc == pytest.approx(np.mean(expected))
    together = auc(labels, yes_minus_no(embeddings.mean(axis=1), yes, no))
    assert bike.together_auc == found.average_together_auc == pytest.approx(together, abs=1e-6)
    assert (bike.num_users, found.num_users) == (len(train), len(train))
    assert bike.base_rate == pytest.approx(labels.mean())
    assert found.average_heldout_auc == bike.heldout_auc
    assert found.heldout_auc_interval is not None
    with pytest.raises(DataError, match="alike for all users asked"):
        judge_outcomes(dataset, {"never": never}, trained, everybody, settings)


def test_an_outcome_that_cannot_be_told_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "outcomes.toml"
    head = '[bike]\nquestions = ["A bike?"]\n'
    path.write_text(head + 'kind = "stop"\ndays = 30\nevent_types = ["shared_bike"]\n')
    assert read_outcomes(path, dataset)["bike"].event_types == ("shared_bike",)
    for rest, said in (
        ('kind = "stop"\ndays = 3000\n', "bike: days"),
        ('kind = "stops"\ndays = 30\n', "Invalid enum value 'stops'"),
        (
            'kind = "stop"\ndays = 30\nevent_types = ["shared_bikes"]\n',
            "did you mean 'shared_bike'",
        ),
        ('kind = "stop"\ndays = 30\nmodality = "bil"\n', "no such modality"),
        ('kind = "explore"\ndays = 30\nmodality = "bill"\n', "told of everything"),
    ):
        path.write_text(head + rest)
        with pytest.raises(ConfigError, match=said):
            read_outcomes(path, dataset)
    path.write_text('[bike]\nquestions = [" "]\nkind = "stop"\ndays = 30\n')
    with pytest.raises(ConfigError, match="ask something"):
        read_outcomes(path, dataset)


def test_a_data_set_without_futures_is_told(dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "outcomes.json"
    path.write_text('{"quiet": {"kind": "stop", "days": 7, "questions": ["Nothing?"]}}')
    silent = replace(dataset, config=msgspec.structs.replace(dataset.config, future_days=0))
    with pytest.raises(DataError, match="leave --outcomes out"):
        read_outcomes(path, silent)
