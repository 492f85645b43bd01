"""The topics a language model picks from: a TOML file of names and what each is about."""

import re
from pathlib import Path

from qanchor.config import Config, load
from qanchor.data.dataset import Dataset
from qanchor.data.topics import load_topics
from qanchor.errors import ConfigError

LIFE_FILE = Path(__file__).parent / "life.toml"


class QaTopic(Config, frozen=True, kw_only=True):
    """One thing to understand about a user."""

    name: str
    """Stands in the column `topic`; training asks topics of all users of a step by it."""
    about: str
    """What is to be found out, for the language model."""


class QaPool(Config, frozen=True, kw_only=True):
    """All topics; the order is the one the language model reads."""

    topics: tuple[QaTopic, ...]

    def __post_init__(self) -> None:
        names = self.names
        for name in names:
            if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
                rule = "must match [a-z][a-z0-9_]{0,63}"
                raise ConfigError("pool.topics.name", name, rule, "rename it")
            if name.startswith("future_"):
                rule = "names that start with future_ belong to future triples"
                raise ConfigError("pool.topics.name", name, rule, "rename it")
        if not names or len(set(names)) != len(names):
            rule = "must be different names, at least one"
            raise ConfigError("pool.topics", len(names), rule, "add or rename a topic")

    @property
    def names(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(topic.name for topic in self.topics)


def load_pool(pool: str, dataset: Dataset) -> QaPool:
    """The pool an option names: `life`, `dataset` or a path. Raises ConfigError."""
    if pool != "dataset":
        return load(QaPool, LIFE_FILE if pool == "life" else Path(pool))
    own = load_topics(dataset.path, dataset.name, dataset.schema, dataset.config.attributes)
    return QaPool(
        topics=tuple(
            QaTopic(
                name=topic.name,
                about=topic.about
                if topic.aggregate == "attribute"
                else f"{topic.aggregate} of {topic.about} activity",
            )
            for topic in own.topics
        )
    )
