"""Outcomes told by train users' recorded futures: any yes/no question, scored without labels.

Scenarios are few; what a question alone is worth shows over many that nobody had in mind when the
model was trained. What came after the as-of day says yes or no by the rules of training's own
questions (qanchor.data.future_answers), whatever words ask. Users held out from training are told
apart: the others' futures were learnt from.

Legend: U users, O outcomes, W an outcome's questions, Z embedding_dim.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from qanchor.checkpoint import Checkpoint
from qanchor.config import Config, load, nearest
from qanchor.data.dataset import Dataset
from qanchor.data.future_answers import Asked, FutureUser, Subject, answer
from qanchor.data.topics import TopicPool, load_topics
from qanchor.data.useru import known_types, recorded_futures
from qanchor.errors import ConfigError, DataError
from qanchor.eval.bootstrap import Bootstrap, Interval, TestScores, interval, over_scenarios
from qanchor.eval.config import EvalConfig
from qanchor.eval.embed import embed_answers, embed_corpus
from qanchor.eval.metrics import Labels, Scores, auc, known_mean
from qanchor.eval.results import OutcomeScore, OutcomeScores, WordingScore
from qanchor.eval.zero_shot import yes_minus_no
from qanchor.train.corpus import PrefixCorpus
from qanchor.train.setup import draw_heldout

log = logging.getLogger(__name__)

Kind = Literal[
    "frequency", "at_least", "at_most", "stop", "churn", "fall", "grow", "value_at_least",
    "value_below", "explore",
]  # fmt: skip
_SAYS = re.compile(r"(yes|no)\b")
_UNKNOWN = -1


class Outcome(Config, frozen=True, kw_only=True):
    """What is asked: yes where it is so in the days after the as-of day."""

    kind: Kind
    """`frequency`: it happens at all; `stop`: it does not; `at_least`, `at_most`: on `count` days;
    `churn`: nothing in the second half; `grow`: on more days than in as many before; `fall`: on
    fewer than half; `value_at_least`, `value_below`: mean value against `level`; `explore`: much
    that is new."""
    days: int
    questions: tuple[str, ...]
    modality: str = ""
    """What it is about: one modality ("" = all) ..."""
    event_types: tuple[str, ...] = ()
    """... or these event types of it; without any, what merely befalls the user does not count."""
    count: int = 1
    level: float = 0.0


@dataclass(frozen=True, slots=True)
class AskedUsers:
    """Train users whose futures are known."""

    rows: npt.NDArray[np.int64]
    """Of the corpus [U]."""
    is_heldout: npt.NDArray[np.bool_]
    """Whether training never met them [U]."""
    labels: npt.NDArray[np.int64]
    """1, 0, or -1 where neither is true, as of a mean without values [O, U]."""


def read_outcomes(path: Path, dataset: Dataset) -> dict[str, Outcome]:
    """Outcomes by name, of a JSON or TOML file.

    Raises ConfigError for what the data set cannot tell, DataError where it has no futures.
    """
    found = load(dict[str, Outcome], path)
    types = known_types(dataset)
    all_types = sorted(set(chain.from_iterable(types.values())))
    horizon = dataset.config.future_days
    if horizon < 1:
        rule = "outcomes are told by what is recorded after the as-of day"
        raise DataError("future_days", horizon, rule, "leave --outcomes out")
    for name, one in found.items():
        where = f"{path}: {name}"
        if not 1 <= one.days <= horizon:
            rule = f"1 to {horizon}, so many days are recorded"
            raise ConfigError(f"{where}: days", one.days, rule, f"set {min(30, horizon)}")
        if one.modality and one.modality not in types:
            remedy = nearest(one.modality, list(types))
            raise ConfigError(f"{where}: modality", one.modality, "no such modality", remedy)
        for event_type in one.event_types:
            if event_type not in types.get(one.modality, all_types):
                remedy = nearest(event_type, all_types)
                raise ConfigError(f"{where}: event_types", event_type, "no event has it", remedy)
        if one.kind == "explore" and (one.modality or one.event_types):
            rule = "explore is told of everything a user meets"
            remedy = "leave modality and event_types out"
            raise ConfigError(where, one.modality or one.event_types, rule, remedy)
        if not one.questions or not all(question.strip() for question in one.questions):
            rule = "needs questions"
            raise ConfigError(f"{where}: questions", one.questions, rule, "ask something")
    return found


def asked_users(
    dataset: Dataset,
    outcomes: Mapping[str, Outcome],
    checkpoint: Checkpoint,
    users: Sequence[str],
    max_users: int,
) -> AskedUsers:
    """Up to `max_users` of the train users among `users`, those held out from training first.

    Who was held out is drawn as a run on all train users draws it; of a run on fewer it is others.
    """
    row_of = {user: row for row, user in enumerate(users)}
    train = dataset.user_ids("train")
    trained, heldout = draw_heldout(len(train), checkpoint.meta.recipe.train)
    known = [train[place] for place in (*heldout, *trained) if train[place] in row_of]
    kept_out = {train[place] for place in heldout}
    pool = load_topics(dataset.path, dataset.name, dataset.schema, dataset.config.attributes)
    chosen, labels_UO = [], []
    for user_id, user in recorded_futures(dataset, known[:max_users]):
        chosen.append(user_id)
        labels_UO.append([label(outcome, user, pool) for outcome in outcomes.values()])
    return AskedUsers(
        rows=np.array([row_of[user] for user in chosen]),
        is_heldout=np.array([user in kept_out for user in chosen]),
        labels=np.array(labels_UO).T,
    )


def label(outcome: Outcome, user: FutureUser, pool: TopicPool) -> int:
    """1 for yes, 0 for no, -1 for neither."""
    subject = Subject("", "", outcome.modality, outcome.event_types)
    asked = Asked(subject=subject, count=outcome.count, level=outcome.level)
    said = _SAYS.match(answer(outcome.kind, user.within(outcome.days), pool, asked))
    return _UNKNOWN if said is None else int(said[0] == "yes")


def judge_outcomes(
    dataset: Dataset,
    outcomes: Mapping[str, Outcome],
    checkpoint: Checkpoint,
    corpus: PrefixCorpus,
    settings: EvalConfig,
) -> OutcomeScores:
    """AUC of every outcome, mean over its questions.

    An outcome that comes out alike for all users asked is left out, with a warning. Raises
    DataError when none is left.
    """
    users = asked_users(
        dataset, outcomes, checkpoint, corpus.rendered.user_ids, settings.outcome_users
    )
    judged = []
    for (name, outcome), labels_U in zip(outcomes.items(), users.labels, strict=True):
        if _has_both(labels_U):
            judged.append((name, outcome, labels_U))
        else:
            log.warning("outcome %s is not judged: it comes out alike for all users asked", name)
    if not judged:
        rule = "every outcome comes out alike for all users asked"
        raise DataError("--outcomes", len(outcomes), rule, "ask more users, or something else")
    questions = [question for _, outcome, _ in judged for question in outcome.questions]
    found_UQZ = embed_corpus(checkpoint, corpus, questions, users.rows.tolist())
    yes_AZ = embed_answers(checkpoint, settings.answers.yes)
    no_AZ = embed_answers(checkpoint, settings.answers.no)
    scores_QU = yes_minus_no(found_UQZ, yes_AZ, no_AZ).T
    ends = np.cumsum([len(outcome.questions) for _, outcome, _ in judged])
    scores, asides = [], []
    for (name, outcome, labels_U), scores_WU in zip(
        judged, np.split(scores_QU, ends[:-1]), strict=True
    ):
        aside = _tests(labels_U[users.is_heldout], scores_WU[:, users.is_heldout])
        scores.append(_score(name, outcome, _tests(labels_U, scores_WU), aside))
        asides.append(aside)
    num_heldout = int(users.is_heldout.sum())
    told = [aside for aside in asides if aside]
    return OutcomeScores(
        num_users=len(users.rows),
        num_heldout=num_heldout,
        average_auc=float(np.mean([one.auc for one in scores])),
        average_heldout_auc=known_mean([one.heldout_auc for one in scores]),
        average_together_auc=known_mean([one.together_auc for one in scores]),
        heldout_auc_interval=_interval(
            told, Bootstrap(num_heldout, settings.num_draws, settings.seed)
        )
        if told
        else None,
        outcomes=tuple(scores),
    )


def _tests(labels_U: Labels, scores_WU: Scores) -> list[TestScores]:
    """Of every question, the users with a yes or a no; none where all have the same."""
    if not _has_both(labels_U):
        return []
    rows = np.flatnonzero(labels_U != _UNKNOWN)
    return [TestScores(rows, labels_U[rows], scores_U[rows]) for scores_U in scores_WU]


def _has_both(labels_U: Labels) -> bool:
    return bool((labels_U == 0).any() and (labels_U == 1).any())


def _score(
    name: str, outcome: Outcome, tests: Sequence[TestScores], aside: Sequence[TestScores]
) -> OutcomeScore:
    aucs = [auc(one.labels, one.scores) for one in tests]
    return OutcomeScore(
        outcome=name,
        kind=outcome.kind,
        days=outcome.days,
        auc=float(np.mean(aucs)),
        heldout_auc=known_mean([auc(one.labels, one.scores) for one in aside]),
        num_users=len(tests[0].labels),
        base_rate=float(np.mean(tests[0].labels)),
        wordings=tuple(
            WordingScore(question=question, auc=value)
            for question, value in zip(outcome.questions, aucs, strict=True)
        ),
        together_auc=auc(tests[0].labels, np.mean([one.scores for one in tests], axis=0)),
    )


def _interval(tests: Sequence[Sequence[TestScores]], bootstrap: Bootstrap) -> Interval:
    """Of the mean over outcomes of the mean over their questions."""
    means_OB = [bootstrap.draws(of_outcome).average[0] for of_outcome in tests]
    return interval(over_scenarios(np.stack(means_OB, axis=1)))
