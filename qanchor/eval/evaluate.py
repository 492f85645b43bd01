"""Probes of query-conditioned embeddings and of baselines, per scenario and on average."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from qanchor.bundle.scenario_file import with_replaced
from qanchor.checkpoint import Checkpoint
from qanchor.config import Config, Scenario, nearest
from qanchor.data.dataset import Dataset
from qanchor.environment import Environment, environment
from qanchor.errors import ConfigError, DataError
from qanchor.eval.embed import embed_users
from qanchor.eval.handmade import features, learn_space
from qanchor.eval.probe import Features, ProbeResult, SplitData, boosting_probe, linear_probe
from qanchor.train.setup import render_users

log = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
Probe = Callable[[Mapping[str, SplitData]], ProbeResult]


class ScenarioScore(Config, frozen=True, kw_only=True):
    """Probe quality of one scenario on the test users that have a label."""

    scenario: str
    auc: float
    ks: float
    valid_auc: float
    """AUC on valid, by which the probe was chosen; compare recipes by this, not by test."""
    num_test: int
    base_rate: float


class MethodScore(Config, frozen=True, kw_only=True):
    """One method over all scenarios."""

    method: str
    average_auc: float
    average_ks: float
    average_valid_auc: float
    scenarios: tuple[ScenarioScore, ...]


class Evaluation(Config, frozen=True, kw_only=True):
    """All methods on one data set; the JSON behind every table."""

    dataset: str
    num_users: int
    recipe: str
    step: int
    environment: Environment
    methods: tuple[MethodScore, ...]


def evaluate(
    checkpoints: Mapping[str, Checkpoint],
    dataset: Dataset,
    with_handmade: bool,
    max_users: int,
    tuned: Sequence[Scenario] = (),
) -> Evaluation:
    """Probe every checkpoint (by display name) and, if asked, hand-made features.

    `max_users` keeps the first users of each split; 0 keeps all. `tuned`: scenarios of a scenario
    file of the first checkpoint, probed beside the untuned ones. Raises ConfigError for a
    checkpoint of another schema or a scenario the data set does not have, DataError when the data
    set has no scenarios or labels.
    """
    if not dataset.scenarios:
        raise DataError(
            "scenarios.json", str(dataset.path), "the data set has no scenarios", "add them"
        )
    for name, checkpoint in checkpoints.items():
        if checkpoint.meta.profile_schema != dataset.schema:
            raise ConfigError(
                "checkpoint",
                name,
                "was trained with another profile schema than the data set's",
                "evaluate it on the data set it was trained with",
            )
    chosen = [user for split in SPLITS for user in _first(dataset.user_ids(split), max_users)]
    rendered = render_users(dataset, chosen)
    users = list(rendered.user_ids)
    questions = [scenario.question for scenario in dataset.scenarios]
    asked: list[str | Scenario] = [*questions, *_tuned_rows(dataset, tuned)]
    methods = []
    for name, checkpoint in checkpoints.items():
        # Tuned and untuned in one pass: a user's prefix is encoded once for both.
        embeddings_UQZ = embed_users(checkpoint, rendered, asked)
        by_scenario = [embeddings_UQZ[:, index] for index in range(len(asked))]
        plain, soft = by_scenario[: len(questions)], by_scenario[len(questions) :]
        methods.append(_score(name, dataset, users, plain, linear_probe))
        if soft:
            methods.append(_score(_tuned_title(tuned), dataset, users, soft, linear_probe))
        asked = [*questions]
    if with_handmade:
        matrix = handmade_matrix(dataset, users)
        same = [matrix] * len(questions)
        methods.append(_score("hand-made, logistic regression", dataset, users, same, linear_probe))
        methods.append(_score("hand-made, gradient boosting", dataset, users, same, boosting_probe))
    main = next(iter(checkpoints.values()))
    return Evaluation(
        dataset=dataset.name,
        num_users=len(users),
        recipe=main.meta.recipe.name,
        step=main.meta.step,
        environment=environment(),
        methods=tuple(methods),
    )


def _tuned_title(tuned: Sequence[Scenario]) -> str:
    """What a scenario file's method is called in tables."""
    return "compiled" if all(scenario.is_compiled for scenario in tuned) else "prompt-tuned"


def _tuned_rows(dataset: Dataset, tuned: Sequence[Scenario]) -> list[Scenario]:
    """The data set's scenarios, those of `tuned` in place of their namesakes; none for none."""
    if not tuned:
        return []
    names = [scenario.name for scenario in dataset.scenarios]
    for scenario in tuned:
        if scenario.name not in names:
            raise ConfigError(
                "--scenarios", scenario.name, "not in the data set", nearest(scenario.name, names)
            )
    left = sorted(set(names) - {scenario.name for scenario in tuned})
    if left:
        log.warning("not in the scenario file, so judged untuned: %s", ", ".join(left))
    return list(with_replaced(dataset.scenarios, tuned))


def probe_scenario(
    dataset: Dataset, scenario: str, users: list[str], matrix: Features, probe: Probe = linear_probe
) -> ProbeResult:
    """Fit and judge one probe; row i of `matrix` [U, F] belongs to users[i]. Raises DataError."""
    row_of = {user: row for row, user in enumerate(users)}
    return probe(_splits(dataset, scenario, row_of, matrix))


def handmade_matrix(dataset: Dataset, users: list[str]) -> Features:
    """Hand-made features [U, F]; columns are learnt from the train users among `users`."""
    by_user = {profile.user_id: profile for profile in dataset.profiles(user_ids=users)}
    space = learn_space([by_user[user] for user in users if dataset.split_of[user] == "train"])
    return np.stack([features(by_user[user], space) for user in users])


def markdown_table(evaluation: Evaluation) -> str:
    """Methods as columns, scenarios as rows, `AUC / KS` in the cells."""
    header = ["scenario", "base rate", *(method.method for method in evaluation.methods)]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in zip(*(method.scenarios for method in evaluation.methods), strict=True):
        cells = [f"{score.auc:.4f} / {score.ks:.4f}" for score in row]
        lines.append(f"| {row[0].scenario} | {row[0].base_rate:.3f} | {' | '.join(cells)} |")
    averages = [f"**{m.average_auc:.4f} / {m.average_ks:.4f}**" for m in evaluation.methods]
    lines.append(f"| **average** | | {' | '.join(averages)} |")
    return "\n".join(lines)


def _score(
    name: str, dataset: Dataset, users: list[str], by_scenario: list[Features], probe: Probe
) -> MethodScore:
    row_of = {user: row for row, user in enumerate(users)}
    scores = []
    for scenario, matrix in zip(dataset.scenarios, by_scenario, strict=True):
        splits = _splits(dataset, scenario.name, row_of, matrix)
        result = probe(splits)
        test = splits["test"].labels
        scores.append(
            ScenarioScore(
                scenario=scenario.name,
                auc=result.auc,
                ks=result.ks,
                valid_auc=result.valid_auc,
                num_test=len(test),
                base_rate=float(test.mean()),
            )
        )
        log.info("%s, %s: AUC %.4f, KS %.4f", name, scenario.name, result.auc, result.ks)
    return MethodScore(
        method=name,
        average_auc=float(np.mean([score.auc for score in scores])),
        average_ks=float(np.mean([score.ks for score in scores])),
        average_valid_auc=float(np.mean([score.valid_auc for score in scores])),
        scenarios=tuple(scores),
    )


def _splits(
    dataset: Dataset, scenario: str, row_of: Mapping[str, int], matrix: Features
) -> dict[str, SplitData]:
    labelled, labels = dataset.labels(scenario)
    splits = {}
    for split in SPLITS:
        picks = [
            index
            for index, user in enumerate(labelled)
            if user in row_of and dataset.split_of[user] == split
        ]
        chosen = np.asarray(labels, dtype=np.int64)[picks]
        if len(np.unique(chosen)) < 2:
            raise DataError(
                "labels.parquet",
                scenario,
                f"split {split} needs users of both classes, has {len(picks)} users",
                "evaluate more users",
            )
        rows = [row_of[labelled[index]] for index in picks]
        splits[split] = SplitData(matrix[rows], chosen)
    return splits


def _first(user_ids: list[str], max_users: int) -> list[str]:
    return user_ids[:max_users] if max_users else user_ids


def untrained_beside(checkpoint_dir: Path) -> Path | None:
    """The run's untrained checkpoint, if `checkpoint_dir` lies in a run directory."""
    candidate = checkpoint_dir.resolve().parent / "untrained"
    return candidate if candidate.is_dir() else None
