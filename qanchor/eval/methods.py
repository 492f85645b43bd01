"""The methods an evaluation compares: what each gives a probe to read, and what it is called.

Legend: U users, Q scenarios, M modalities, E event_dim, Z embedding_dim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qanchor.bundle.scenario_file import with_replaced
from qanchor.checkpoint import Checkpoint
from qanchor.config import Scenario
from qanchor.data.dataset import Dataset
from qanchor.data.statistics import learn_space, past_statistics
from qanchor.eval.bootstrap import Bootstrap
from qanchor.eval.embed import embed_corpus, encoded_corpus
from qanchor.eval.judge import Judged, Method, judge, probe_all
from qanchor.eval.pooled import pooled_events
from qanchor.eval.probe import Features, boosting_probe, linear_probe
from qanchor.eval.splits import JudgedUsers
from qanchor.train.corpus import PrefixCorpus, RenderedCorpus

MAIN = "Q-Anchor"
UNIVERSAL_QUESTION = "What kind of user is this?"
"""Asked of every user for every scenario where no query is to be known: query-free embeddings. A
question and not an empty suffix, which the model never meets in training."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The checkpoint under judgement and what stands beside it."""

    checkpoint: Checkpoint
    untrained: Checkpoint | None = None
    others: Mapping[str, Checkpoint] = field(default_factory=dict)
    """Other trained checkpoints by display name, e.g. a user-only model."""
    tuned: tuple[Scenario, ...] = ()
    """Scenarios of a scenario file of `checkpoint`."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """Everybody's embeddings from the checkpoint under judgement."""

    plain_UQZ: Features
    """With the scenarios' own questions."""
    tuned_UQZ: Features | None
    """With the scenario file's; None without one."""
    universal_UZ: Features
    """With the universal question."""


def embed_everybody(subject: Subject, corpus: PrefixCorpus, dataset: Dataset) -> Embedded:
    """All embeddings in one pass over the users, a dozen queries at a time."""
    questions = [scenario.question for scenario in dataset.scenarios]
    tuned = with_replaced(dataset.scenarios, subject.tuned) if subject.tuned else ()
    asked: list[str | Scenario] = [*questions, *tuned, UNIVERSAL_QUESTION]
    found_UQZ = embed_corpus(subject.checkpoint, corpus, asked)
    tuned_UQZ = found_UQZ[:, len(questions) : -1] if tuned else None
    return Embedded(found_UQZ[:, : len(questions)], tuned_UQZ, found_UQZ[:, -1])


@dataclass(frozen=True, slots=True)
class Comparison:
    """Judges methods on the same users, splits and draws."""

    dataset: Dataset
    rendered: RenderedCorpus
    judged: JudgedUsers
    bootstrap: Bootstrap

    def trained(self, subject: Subject, embedded: Embedded, *, is_universal: bool) -> list[Judged]:
        """The checkpoint under judgement: own questions, tuned, universal."""
        about = "the trained model, each scenario asked with its own question"
        method = Method(MAIN, "query-conditioned", about)
        found = [self._probed(method, columns(embedded.plain_UQZ))]
        if embedded.tuned_UQZ is not None:
            method = _tuned_method(subject.tuned)
            found.append(self._probed(method, columns(embedded.tuned_UQZ)))
        if is_universal:
            about = f'the trained model without a query: all scenarios share "{UNIVERSAL_QUESTION}"'
            method = Method("universal", "embedding baseline", about)
            found.append(self._same(method, embedded.universal_UZ))
        return found

    def checkpoint(self, name: str, about: str, checkpoint: Checkpoint) -> Judged:
        """Another checkpoint, asked each scenario's own question."""
        if not checkpoint.meta.profile_schema.query_template:
            about = f"{about}; it hears no query, in training or here"
        corpus = encoded_corpus(checkpoint, self.rendered)
        tables = question_tables(checkpoint, corpus, self.dataset)
        return self._probed(Method(name, "embedding baseline", about), tables)

    def pooled(self, corpus: PrefixCorpus) -> list[Judged]:
        """Mean-pooled event vectors, by modality and over all."""
        means_UME = pooled_events(corpus)
        about = "the event encoder's vectors averaged per modality, the averages side by side"
        by_modality = Method("mean event vectors by modality", "embedding baseline", about)
        overall = Method(
            "mean event vector", "embedding baseline", "these averages averaged over modalities"
        )
        return [
            self._same(by_modality, means_UME.reshape(len(means_UME), -1)),
            self._same(overall, means_UME.mean(axis=1)),
        ]

    def handmade(self, matrix_UF: Features) -> list[Judged]:
        """`handmade_matrix` under a linear and a boosted probe."""
        about = "counts, sums, values, active days, recency by event type and window, attributes"
        tables = [matrix_UF] * len(self.judged.by_scenario)
        found = []
        for name, probe in (
            ("hand-made, logistic regression", linear_probe),
            ("hand-made, gradient boosting", boosting_probe),
        ):
            probed = probe_all(self.judged, tables, name, probe)
            found.append(judge(Method(name, "features baseline", about), probed, self.bootstrap))
        return found

    def _same(self, method: Method, table_UF: Features) -> Judged:
        return self._probed(method, [table_UF] * len(self.judged.by_scenario))

    def _probed(self, method: Method, tables: Sequence[Features]) -> Judged:
        return judge(method, probe_all(self.judged, tables, method.name), self.bootstrap)


def question_tables(
    checkpoint: Checkpoint, corpus: PrefixCorpus, dataset: Dataset
) -> list[Features]:
    """Embeddings [U, Z] of each scenario's own question, in order; one pass over the users."""
    questions = [scenario.question for scenario in dataset.scenarios]
    if not checkpoint.meta.profile_schema.query_template:
        # Without a query all questions are the same.
        return [embed_corpus(checkpoint, corpus, questions[:1])[:, 0]] * len(questions)
    return columns(embed_corpus(checkpoint, corpus, questions))


def columns(embeddings_UQZ: Features) -> list[Features]:
    """One table [U, Z] per scenario."""
    return [embeddings_UQZ[:, index] for index in range(embeddings_UQZ.shape[1])]


def handmade_matrix(dataset: Dataset, users: Sequence[str]) -> Features:
    """Hand-made features [U, F], 0 where unknown; the train users among `users` tell columns.

    Their profiles are read twice, so that none is held.
    """
    train = [user for user in users if dataset.split_of[user] == "train"]
    space = learn_space(dataset.profiles(user_ids=train))
    row_of = {user: row for row, user in enumerate(users)}
    matrix_UF = np.empty((len(users), space.num_past), dtype=np.float32)
    for profile in dataset.profiles(user_ids=list(users)):
        matrix_UF[row_of[profile.user_id]] = past_statistics(profile, space)
    return np.nan_to_num(matrix_UF, copy=False)


def _tuned_method(tuned: Sequence[Scenario]) -> Method:
    if all(scenario.is_compiled for scenario in tuned):
        about = "the trained model, vectors in place of each question's text (`qanchor compile`)"
        return Method("compiled", "query-conditioned", about)
    about = "the trained model, a learnt soft prompt behind each question (`qanchor tune`)"
    return Method("prompt-tuned", "query-conditioned", about)
