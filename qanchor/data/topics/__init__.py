"""Topics: what UserU asks about users, and in which words. Data files, no code per topic.

`generic.toml` and, for what comes, `generic_futures.toml` hold the phrasings of every kind of
question; `<data set>.toml` (or `topics.toml` in the data set's own directory, which wins) names the
data set's modalities and event types in words and adds topics of its own. The answers are computed
in `grounded` and `future_answers`.
"""

from collections.abc import Iterable
from pathlib import Path
from string import Formatter
from typing import Literal

import msgspec

from qanchor.config import Config, ProfileSchema, load, nearest
from qanchor.errors import ConfigError

Aggregate = Literal[
    "frequency",
    "recency",
    "trend",
    "regularity",
    "favourites",
    "value",
    "absence",
    "variety",
    "rhythm",
    "attribute",
]
TOPICS_FILE = "topics.toml"

_PER_MODALITY: tuple[Aggregate, ...] = (
    "frequency",
    "recency",
    "trend",
    "regularity",
    "favourites",
    "absence",
    "variety",
)
_OVERALL: tuple[Aggregate, ...] = ("frequency", "trend", "regularity", "favourites", "rhythm")


class Topic(Config, frozen=True, kw_only=True):
    """One thing to know about a user."""

    name: str
    aggregate: Aggregate
    """How the answer is computed."""
    about: str
    """What it is about, in words that fit before "activity"."""
    modality: str = ""
    """Only this modality counts; empty: all."""
    event_types: tuple[str, ...] = ()
    """Only these event types count; empty: all of the modality."""
    columns: tuple[str, ...] = ()
    """Attributes told, for aggregate `attribute`."""
    queries: tuple[str, ...] = ()
    """Phrasings of the question; empty: the generic ones. Fields: subject, about."""
    answers: tuple[str, ...] = ()
    """Phrasings of the answer; empty: the generic ones. Fields: as in generic.toml."""
    futures: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    """For aggregate `frequency` with event types: phrasings of questions about what comes, by kind,
    used beside the generic ones. Kinds and fields: as in generic_futures.toml."""


class ValueMeaning(Config, frozen=True, kw_only=True):
    """What `value` means in a modality."""

    unit: str
    """Noun for the value, e.g. score."""
    low: float
    """Values below are called low."""
    high: float
    """Values from here on are called high."""
    pass_mark: float | None = None
    """A mean below it fails; empty: nothing is passed or failed."""
    as_zero: tuple[str, ...] = ()
    """Event types that count as 0 in that mean, e.g. work not handed in."""


class Phrasing(Config, frozen=True, kw_only=True):
    """Ways to ask and to answer one kind of question."""

    queries: tuple[str, ...]
    answers: tuple[str, ...]


class TopicFile(Config, frozen=True, kw_only=True):
    """A data set's own words and topics."""

    subject: str = "user"
    """What a user is called in queries."""
    everything: str = "overall"
    """Stands for all modalities together; fits before "activity"."""
    item_ends_before: str = ""
    """The thing an event text is about ends before the last occurrence of this; empty: never."""
    passive: tuple[str, ...] = ()
    """Event types in which the user does nothing, e.g. a missed deadline: no active day."""
    history_only: tuple[str, ...] = ()
    """Modalities of which the data have nothing after the as-of moment: no question is asked about
    what comes of them."""
    words: dict[str, str] = msgspec.field(default_factory=dict)
    """Modality or event type in words: modalities fit before "activity", event types in lists."""
    synonyms: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    """Other words for the subject, or for what a topic, modality or event type is about, by those
    words; questions about what comes use them in turn. The latter too fit before "activity"."""
    values: dict[str, ValueMeaning] = msgspec.field(default_factory=dict)
    """Per modality whose `value` is worth telling."""
    futures: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    """Phrasings of questions about what comes, by kind, used beside the generic ones whatever the
    question is about."""
    topics: tuple[Topic, ...] = ()


class _Generic(Config, frozen=True, kw_only=True):
    subjects: tuple[str, ...]
    aggregates: dict[str, Phrasing]


class TopicPool(Config, frozen=True, kw_only=True):
    """Everything UserU may ask about the users of one data set."""

    words: TopicFile
    topics: tuple[Topic, ...]
    """The data set's own topics, then the generic ones."""
    aggregates: dict[str, Phrasing]
    """Phrasings by aggregate."""
    futures: dict[str, tuple[str, ...]]
    """Queries about what comes, by kind. Fields: as in generic_futures.toml."""
    subjects: tuple[str, ...]
    """What a user is called beside `words.subject`."""

    def word(self, name: str) -> str:
        """A modality or event type in words."""
        return self.words.words.get(name, name.replace("_", " "))


def is_asked_of_future(topic: Topic, words: TopicFile) -> bool:
    """Whether questions about what comes are asked of a topic."""
    is_habit = topic.aggregate == "frequency" and bool(topic.event_types)
    return is_habit and topic.modality not in words.history_only


def load_topics(
    directory: Path, name: str, schema: ProfileSchema, attributes: tuple[str, ...]
) -> TopicPool:
    """The topic pool of a data set. Raises ConfigError for a file that does not fit the schema."""
    packaged = Path(__file__).parent
    generic = load(_Generic, packaged / "generic.toml")
    futures = load(dict[str, tuple[str, ...]], packaged / "generic_futures.toml")
    candidates = (directory / TOPICS_FILE, packaged / f"{name}.toml")
    path = next((path for path in candidates if path.is_file()), None)
    own = load(TopicFile, path) if path else TopicFile()
    others = (*own.synonyms.get(own.subject, ()), *generic.subjects)
    pool = TopicPool(
        words=own,
        topics=(),
        aggregates=generic.aggregates,
        futures=futures,
        subjects=tuple(name for name in others if name != own.subject),
    )
    _check(pool, schema, attributes, str(path))
    topics = (*own.topics, *_generic_topics(pool, schema, attributes))
    distinct = {topic.name: topic for topic in reversed(topics)}
    return msgspec.structs.replace(pool, topics=tuple(distinct.values())[::-1])


def _generic_topics(
    pool: TopicPool, schema: ProfileSchema, attributes: tuple[str, ...]
) -> list[Topic]:
    """One topic per modality and aggregate, some over all modalities, one per attribute."""
    topics = [
        Topic(name=f"overall_{kind}", aggregate=kind, about=pool.words.everything)
        for kind in _OVERALL
    ]
    for spec in schema.modalities:
        if spec.kind == "events":
            kinds = (*_PER_MODALITY, *(("value",) if spec.name in pool.words.values else ()))
            topics += [
                Topic(
                    name=f"{spec.name}_{kind}",
                    aggregate=kind,
                    about=pool.word(spec.name),
                    modality=spec.name,
                )
                for kind in kinds
            ]
    topics += [
        Topic(name=f"is_{name}", aggregate="attribute", about=pool.word(name), columns=(name,))
        for name in attributes
    ]
    return topics


def _check(pool: TopicPool, schema: ProfileSchema, attributes: tuple[str, ...], where: str) -> None:
    own, remedy = pool.words, "correct the topic file"
    modalities = {spec.name for spec in schema.modalities if spec.kind == "events"}
    for topic in own.topics:
        field = f"{where}: topics.{topic.name}"
        if topic.modality and topic.modality not in modalities:
            rule = f"modality must be one of {', '.join(sorted(modalities))}"
            raise ConfigError(field, topic.modality, rule, remedy)
        for column in topic.columns:
            if column not in attributes:
                rule = "columns must be attributes of the data set"
                raise ConfigError(field, column, rule, remedy)
        generic = pool.aggregates[topic.aggregate]
        fields = {"subject", "about", *_fields((*generic.queries, *generic.answers))}
        for text in (*topic.queries, *topic.answers):
            if not _fields((text,)) <= fields:
                rule = f"may have fields in braces, of these only: {', '.join(sorted(fields))}"
                raise ConfigError(field, text, rule, remedy)
    _check_futures(own.futures, pool, f"{where}: futures")
    for topic in own.topics:
        _check_futures(topic.futures, pool, f"{where}: topics.{topic.name}.futures")
        if topic.futures and not is_asked_of_future(topic, own):
            raise ConfigError(
                f"{where}: topics.{topic.name}.futures",
                [*topic.futures],
                "is for topics of aggregate frequency, with event types, that have a future",
                remedy,
            )
    known = {own.subject, own.everything, *(topic.about for topic in own.topics)}
    known |= {pool.word(name) for name in modalities} | set(own.words.values())
    for words in own.synonyms:
        if words not in known:
            rule = f"must be the subject or among these words: {', '.join(sorted(known))}"
            raise ConfigError(f"{where}: synonyms", words, rule, remedy)
    for field, names in (("values", own.values), ("history_only", own.history_only)):
        for name in names:
            if name not in modalities:
                rule = f"must be one of {', '.join(sorted(modalities))}"
                raise ConfigError(f"{where}: {field}", name, rule, remedy)


def _check_futures(futures: dict[str, tuple[str, ...]], pool: TopicPool, where: str) -> None:
    for kind, queries in futures.items():
        if kind not in pool.futures:
            raise ConfigError(where, kind, "no such kind", nearest(kind, list(pool.futures)))
        fields = {"subject", "about", "days", "period", *_fields(pool.futures[kind])}
        for text in queries:
            if not _fields((text,)) <= fields:
                rule = f"may have fields in braces, of these only: {', '.join(sorted(fields))}"
                raise ConfigError(where, text, rule, "correct the topic file")


def _fields(texts: Iterable[str]) -> set[str]:
    """Names in braces; what is no name where braces do not match."""
    found: set[str] = set()
    for text in texts:
        try:
            found |= {name for _, name, _, _ in Formatter().parse(text) if name is not None}
        except ValueError as error:
            found.add(str(error))
    return found
