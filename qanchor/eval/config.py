"""Settings of an evaluation. Torch-free."""

from pathlib import Path
from typing import Literal, get_args

import msgspec

from qanchor.config import Config, Scenario, load, nearest
from qanchor.errors import ConfigError

Part = Literal[
    "universal", "pooled", "handmade", "zero-shot", "queries", "few-labels", "attention", "plots"
]
PARTS: tuple[Part, ...] = get_args(Part)


class AnswerTexts(Config, frozen=True, kw_only=True):
    """Texts that answer a question with yes or with no; each side's vectors are averaged."""

    yes: tuple[str, ...] = (
        "Yes.",
        "Yes, the user will.",
        "Yes, this will happen.",
        "Yes, very likely.",
        "Yes, many times.",
    )
    no: tuple[str, ...] = (
        "No.",
        "No, the user will not.",
        "No, this will not happen.",
        "No, very unlikely.",
        "No, not at all.",
    )

    def __post_init__(self) -> None:
        for field in ("yes", "no"):
            if not getattr(self, field):
                raise ConfigError(field, (), "needs at least one answer text", "add one")


class AnswerFile(AnswerTexts, frozen=True, kw_only=True):
    """A file for `--answers`: texts for all scenarios, and others for some of them."""

    scenarios: dict[str, AnswerTexts] = msgspec.field(default_factory=dict)
    """By scenario name."""


class EvalConfig(Config, frozen=True, kw_only=True):
    """What an evaluation does."""

    parts: tuple[Part, ...] = PARTS
    """What is judged beside the query-conditioned embeddings and the untrained model."""
    max_users: int = 0
    """Users per split, drawn at random; quicker and noisier (0 = all)."""
    num_draws: int = 1000
    """Bootstrap draws of the test users."""
    seed: int = 0
    """Of the draws."""
    label_counts: tuple[int, ...] = (20, 100, 500)
    """Labels per scenario of the probes with few labels."""
    label_draws: int = 40
    """How often such labels are drawn; at most `num_draws` times, each with its own test users."""
    attention_users: int = 256
    """Test users whose attention is averaged, at most."""
    plot_users: int = 600
    """Test users per plot, at most."""
    answers: AnswerFile = AnswerFile()
    """Answer texts of zero-shot scoring."""
    wordings: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    """By scenario name: other questions that ask the same, for zero-shot scoring."""
    outcome_users: int = 1500
    """Train users whose recorded futures are asked about, at most."""

    def __post_init__(self) -> None:
        if not self.label_counts or min(self.label_counts) < 2:
            raise ConfigError("label_counts", self.label_counts, "at least 2 each", "set 20")
        if self.outcome_users < 2:
            raise ConfigError("outcome_users", self.outcome_users, "at least 2", "set 1500")
        if self.label_draws < 1:
            raise ConfigError("label_draws", self.label_draws, "at least 1", "set 40")


def read_answers(path: Path, scenarios: tuple[Scenario, ...]) -> AnswerFile:
    """The answer texts of a JSON or TOML file. Raises ConfigError for a scenario not there."""
    file = load(AnswerFile, path)
    names = [scenario.name for scenario in scenarios]
    for name in file.scenarios:
        if name not in names:
            raise ConfigError(f"{path}: scenarios", name, "no such scenario", nearest(name, names))
    return file


def read_wordings(path: Path, scenarios: tuple[Scenario, ...]) -> dict[str, tuple[str, ...]]:
    """Other questions by scenario, of a JSON or TOML file.

    Raises ConfigError for a scenario not there and for one without a question.
    """
    wordings = load(dict[str, tuple[str, ...]], path)
    names = [scenario.name for scenario in scenarios]
    for name, questions in wordings.items():
        if name not in names:
            raise ConfigError(str(path), name, "no such scenario", nearest(name, names))
        if not questions or not all(question.strip() for question in questions):
            raise ConfigError(f"{path}: {name}", questions, "needs questions", "ask something")
    return wordings
