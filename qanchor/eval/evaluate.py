"""The whole evaluation of a checkpoint: methods, zero-shot, effect of the query, attention, plots.

Everybody's embeddings for the scenarios' questions are made first and everything reads them; other
wordings are asked of test users alone.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
from tqdm import tqdm

from qanchor.checkpoint import checkpoint_id
from qanchor.config import Scenario, nearest
from qanchor.data.dataset import Dataset
from qanchor.environment import environment
from qanchor.errors import ConfigError
from qanchor.eval.attention import attention_shares
from qanchor.eval.bootstrap import Bootstrap
from qanchor.eval.config import EvalConfig
from qanchor.eval.embed import embed_corpus, encoded_corpus
from qanchor.eval.few_labels import few_labels
from qanchor.eval.judge import Judged, difference
from qanchor.eval.methods import (
    MAIN,
    Comparison,
    Embedded,
    Subject,
    columns,
    embed_everybody,
    handmade_matrix,
)
from qanchor.eval.outcomes import Outcome, judge_outcomes
from qanchor.eval.probe import Features
from qanchor.eval.projection import Projection, project
from qanchor.eval.query_effect import query_effect
from qanchor.eval.results import (
    Attention,
    Difference,
    Evaluation,
    FewLabels,
    QueryEffect,
    ZeroShot,
)
from qanchor.eval.splits import JudgedUsers, chosen_users, judged_users
from qanchor.eval.zero_shot import zero_shot
from qanchor.train.corpus import PrefixCorpus
from qanchor.train.setup import check_renders_alike, render_users

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The result, and the points of its plots."""

    evaluation: Evaluation
    projections: tuple[Projection, ...]


def evaluate(
    subject: Subject,
    dataset: Dataset,
    settings: EvalConfig,
    outcomes: Mapping[str, Outcome] = MappingProxyType({}),
) -> Evaluated:
    """Judge a checkpoint on a data set, and by `outcomes` of it that no label tells.

    Raises ConfigError for a checkpoint that does not put users into words as the data set does, a
    scenario the data set does not have or a question too long, DataError when no scenario can be
    judged.
    """
    main, parts = subject.checkpoint, settings.parts
    _check_known(dataset, subject.tuned)
    _check_fits(subject, dataset, settings, outcomes)
    rendered = render_users(dataset, chosen_users(dataset, settings.max_users))
    judged = judged_users(dataset, rendered.user_ids)
    dataset, subject = judged.narrowed(dataset), _narrowed(subject, judged)
    bootstrap = Bootstrap(len(judged.test_rows), settings.num_draws, settings.seed)
    corpus = encoded_corpus(main, rendered)
    embedded = embed_everybody(subject, corpus, dataset)
    comparison = Comparison(dataset, rendered, judged, bootstrap)
    methods = comparison.trained(subject, embedded, is_universal="universal" in parts)
    for name, other in subject.others.items():
        methods.append(comparison.checkpoint(name, "another trained model", other))
    if subject.untrained is not None:
        about = "the same model before its first step"
        methods.append(comparison.checkpoint("untrained model", about, subject.untrained))
    if "pooled" in parts:
        methods += comparison.pooled(corpus)
    matrix_UF = handmade_matrix(dataset, judged.users) if "handmade" in parts else None
    if matrix_UF is not None:
        methods += comparison.handmade(matrix_UF)
    evaluation = Evaluation(
        dataset=dataset.name,
        num_users=len(judged.users),
        num_test=len(judged.test_rows),
        recipe=main.meta.recipe.name,
        step=main.meta.step,
        checkpoint_id=checkpoint_id(main),
        num_draws=settings.num_draws,
        environment=environment(),
        methods=tuple(one.score for one in methods),
        differences=_differences(methods),
        zero_shot=_zero_shot(subject, comparison, settings, corpus, embedded),
        outcomes=judge_outcomes(dataset, outcomes, main, corpus, settings) if outcomes else None,
        queries=_queries(settings, judged, embedded, bootstrap),
        few_labels=_few_labels(settings, judged, embedded, matrix_UF, bootstrap),
        attention=_attention(subject, dataset, settings, judged, corpus),
        skipped=judged.skipped,
    )
    return Evaluated(evaluation, _projections(subject, settings, judged, embedded))


def untrained_beside(checkpoint_dir: Path) -> Path | None:
    """The run's untrained checkpoint, if `checkpoint_dir` lies in a run directory."""
    candidate = checkpoint_dir.resolve().parent / "untrained"
    return candidate if candidate.is_dir() else None


def _check_fits(
    subject: Subject, dataset: Dataset, settings: EvalConfig, outcomes: Mapping[str, Outcome]
) -> None:
    """Raise ConfigError where a checkpoint cannot take the data set's users or the questions."""
    for checkpoint in (subject.checkpoint, subject.untrained, *subject.others.values()):
        if checkpoint is not None:
            check_renders_alike(checkpoint, dataset)
            checkpoint.check_questions(dataset.scenarios)
    subject.checkpoint.check_questions(subject.tuned)
    asked = [*settings.wordings.items(), *((name, one.questions) for name, one in outcomes.items())]
    subject.checkpoint.check_questions(
        Scenario(name=name, question=question)
        for name, questions in asked
        for question in questions
    )


def _check_known(dataset: Dataset, tuned: Sequence[Scenario]) -> None:
    names = [scenario.name for scenario in dataset.scenarios]
    for scenario in tuned:
        if scenario.name not in names:
            raise ConfigError(
                "--scenarios", scenario.name, "not in the data set", nearest(scenario.name, names)
            )
    left = sorted(set(names) - {scenario.name for scenario in tuned})
    if tuned and left:
        log.warning("not in the scenario file, so judged untuned: %s", ", ".join(left))


def _narrowed(subject: Subject, judged: JudgedUsers) -> Subject:
    tuned = [scenario for scenario in subject.tuned if scenario.name in judged.by_scenario]
    return replace(subject, tuned=tuple(tuned))


def _differences(methods: Sequence[Judged]) -> tuple[Difference, ...]:
    """The first method minus each baseline, and its tuned form minus itself."""
    main, *others = methods
    return tuple(
        difference(other, main)
        if other.score.kind == "query-conditioned"
        else difference(main, other)
        for other in others
    )


def _zero_shot(
    subject: Subject,
    comparison: Comparison,
    settings: EvalConfig,
    corpus: PrefixCorpus,
    embedded: Embedded,
) -> ZeroShot | None:
    if "zero-shot" not in settings.parts:
        return None
    judged = comparison.judged
    wordings = {
        name: questions
        for name, questions in settings.wordings.items()
        if name in judged.by_scenario
    }
    worded = {}
    if wordings:
        asked = [question for questions in wordings.values() for question in questions]
        test_rows = judged.test_rows.tolist()
        found_UWZ = embed_corpus(subject.checkpoint, corpus, asked, test_rows)
        ends = np.cumsum([len(questions) for questions in wordings.values()])
        worded = dict(zip(wordings, np.split(found_UWZ, ends[:-1], axis=1), strict=True))
    soft = {}
    if embedded.tuned_UQZ is not None:
        columns_of = dict(zip(judged.by_scenario, columns(embedded.tuned_UQZ), strict=True))
        soft = {scenario.name: columns_of[scenario.name] for scenario in subject.tuned}
    return zero_shot(
        subject.checkpoint,
        comparison.dataset.scenarios,
        judged,
        dict(zip(judged.by_scenario, columns(embedded.plain_UQZ), strict=True)),
        settings,
        comparison.bootstrap,
        worded,
        soft,
    )


def _queries(
    settings: EvalConfig, judged: JudgedUsers, embedded: Embedded, bootstrap: Bootstrap
) -> QueryEffect | None:
    # A question alone has no others to be compared with.
    if "queries" not in settings.parts or len(judged.by_scenario) < 2:
        return None
    return query_effect(embedded.plain_UQZ, judged, bootstrap)


def _few_labels(
    settings: EvalConfig,
    judged: JudgedUsers,
    embedded: Embedded,
    handmade_UF: Features | None,
    bootstrap: Bootstrap,
) -> FewLabels | None:
    if "few-labels" not in settings.parts:
        return None
    own = columns(embedded.plain_UQZ)
    tables = {MAIN: [[table] for table in own]}
    if len(own) > 1:
        tables["other scenarios' questions"] = [
            [table for table in own if table is not mine] for mine in own
        ]
    if "universal" in settings.parts:
        tables["universal"] = [[embedded.universal_UZ]] * len(own)
    if handmade_UF is not None:
        tables["hand-made, logistic regression"] = [[handmade_UF]] * len(own)
    return few_labels(tables, judged, settings, bootstrap)


def _attention(
    subject: Subject,
    dataset: Dataset,
    settings: EvalConfig,
    judged: JudgedUsers,
    corpus: PrefixCorpus,
) -> Attention | None:
    if "attention" not in settings.parts:
        return None
    # The lowest ids are often the oldest users.
    drawn = np.random.default_rng([settings.seed, 9]).permutation(len(judged.test_rows))
    users = judged.test_rows[np.sort(drawn[: settings.attention_users])].tolist()
    return attention_shares(subject.checkpoint, corpus, users, dataset.scenarios, subject.tuned)


def _projections(
    subject: Subject, settings: EvalConfig, judged: JudgedUsers, embedded: Embedded
) -> tuple[Projection, ...]:
    """Every scenario's labelled test users in the plane, base and, where it is, tuned."""
    if "plots" not in settings.parts:
        return ()
    tuned_names = {scenario.name for scenario in subject.tuned}
    found = []
    bar = tqdm(list(enumerate(judged.by_scenario.items())), desc="PCA and t-SNE", unit="scenario")
    for index, (name, splits) in bar:
        part = splits["test"]
        drawn = np.random.default_rng([settings.seed, 6]).permutation(len(part.rows))
        drawn = np.sort(drawn[: settings.plot_users])
        rows, labels = part.rows[drawn], part.labels[drawn]
        found.append(project(name, embedded.plain_UQZ[rows, index], labels, is_tuned=False))
        if embedded.tuned_UQZ is not None and name in tuned_names:
            found.append(project(name, embedded.tuned_UQZ[rows, index], labels, is_tuned=True))
    return tuple(found)
