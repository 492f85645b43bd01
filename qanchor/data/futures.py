"""Behaviour prediction (D_future): questions about what a train user does after the as-of moment.

Q-Anchor section 2.1 asks a fixed set of template queries; here a choice among kinds of question,
what they are about, how many days ahead, and in which words. The answers: `future_answers`.
"""

import zlib
from collections.abc import Mapping, Sequence
from random import Random

from qanchor.data.activity import Activity
from qanchor.data.future_answers import Asked, FutureUser, Subject, answer
from qanchor.data.grounded import Answered, capitalised
from qanchor.data.topics import TopicPool, ValueMeaning, is_asked_of_future

HORIZONS_DAYS = (14, 30, 60)
_PERIODS = {
    14: ("two weeks", "fortnight"),
    30: ("month", "four weeks", "thirty days"),
    60: ("two months", "eight weeks", "sixty days"),
}
"""Horizons in other words, to stand after "the next" or "the coming"."""
_OWN_PHRASING_SHARE = 0.5
"""Of the questions for which the data set has phrasings of its own."""

_WIDE = ("outlook", "change", "novelty")
_WIDE_SHARE = 0.25
"""Of the questions; their answers are long, those of narrow ones a few words."""
_TYPE_SHARE = 0.2
"""Of the questions; about one event type each, of which there may be any number."""
_OUTCOME_SHARE = 0.2
"""Of the questions; few kinds, which would hardly come up among those of habits."""
_HABITS = (
    "frequency", "often", "heavy", "at_least", "at_most", "trend", "stop", "fall", "grow", "next",
)  # fmt: skip
_VALUE_KINDS = ("value", "low", "high", "value_at_least", "value_below")
_COUNTS = (1, 2, 3, 5, 8, 12, 20)
"""Active days that `at_least` and `at_most` ask for."""
_COUNTS_PER_QUESTION = 2
"""Of those, in one wording about one thing: each is a question more to read."""
_LEVELS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
"""Values asked for: low is 0, high is 1."""


_Question = tuple[str, Subject, int]
"""Kind, what it is about, days."""


def answer_futures(
    history: Activity,
    future: Activity,
    pool: TopicPool,
    known_types: Mapping[str, tuple[str, ...]],
    num_answers: int,
    rng: Random,
) -> list[Answered]:
    """Answer up to `num_answers` different questions about what comes, each over some horizon.

    Wide questions (what will happen, what changes); habits (whether, how often, on so many days or
    more or at most, when, whether more or less than before) of everything, each modality, each
    topic that asks for one and each event type; outcomes (how high values are, how much is new,
    what befalls the user): together they cover what may be asked of a user's future. Of some, yes
    means more activity, of others less, so that yes has to be read with its question.

    `known_types`: the data set's event types by modality. Who is asked what must not depend on
    what comes: a question asked only of those it is true of would always be answered yes.
    """
    horizons = [days for days in HORIZONS_DAYS if days <= future.num_days] or [future.num_days]
    details = [
        Subject(name, pool.word(name), name)
        for name in sorted(known_types)
        if name not in pool.words.history_only
    ]
    overall = Subject("overall", pool.words.everything)
    subjects = [overall, *details]
    subjects += [
        Subject(topic.name, topic.about, topic.modality, topic.event_types, topic.futures)
        for topic in pool.topics
        if is_asked_of_future(topic, pool.words)
    ]
    types = _type_subjects(pool, known_types, subjects)
    wide = [(kind, overall, days) for kind in _WIDE for days in horizons]
    wide += [("detail", subject, horizons[-1]) for subject in details]
    habits = _habits([of for of in subjects if not of.befalls(pool)], horizons)
    outcomes = [
        (kind, subject, days)
        for subject, kinds in (
            (overall, ("explore", "repeat", "busy", "churn")),
            *((of, _value_kinds(pool, of)) for of in details if of.name in pool.words.values),
            *((of, tuple(of.phrasings)) for of in subjects if of.befalls(pool)),
        )
        for kind in kinds
        for days in (horizons[-2:] if kind == "churn" else horizons)
    ]
    questions = [
        *_some(wide, round(num_answers * _WIDE_SHARE), rng),
        *_some(outcomes, round(num_answers * _OUTCOME_SHARE), rng),
        *_some(_habits(types, horizons), round(num_answers * _TYPE_SHARE), rng),
    ]
    questions += _some(habits, num_answers - len(questions), rng)
    return [
        _answered(question, FutureUser(history=history, future=future), pool, rng)
        for question in questions
    ]


def _answered(question: _Question, user: FutureUser, pool: TopicPool, rng: Random) -> Answered:
    kind, subject, days = question
    meaning = pool.words.values.get(subject.modality)
    template = rng.choice(_templates(kind, subject, pool, rng))
    about = rng.choice((subject.about, *pool.words.synonyms.get(subject.about, ())))
    code = zlib.crc32(f"{template} {about}".encode())
    counts = [count for count in _COUNTS if count < days] or [1]
    asked = Asked(
        subject=subject,
        count=counts[(code + rng.randrange(_COUNTS_PER_QUESTION)) % len(counts)],
        level=_level(meaning, rng) if meaning else 0.0,
    )
    query = template.format(
        **_names(code, days, pool),
        about=about,
        days=days,
        count=asked.count,
        limit=asked.count + 1,
        unit=meaning.unit if meaning else "",
        level=f"{asked.level:.0f}",
    )
    told = answer(kind, user.within(days), pool, asked)
    topic = f"future_{kind}_{subject.name}_{days}d"
    return Answered(topic, capitalised(query), capitalised(told))


def _templates(kind: str, subject: Subject, pool: TopicPool, rng: Random) -> tuple[str, ...]:
    """Phrasings to choose one from."""
    own = (*subject.phrasings.get(kind, ()), *pool.words.futures.get(kind, ()))
    is_own = subject.befalls(pool) or (own and rng.random() < _OWN_PHRASING_SHARE)
    return own if is_own else pool.futures[kind]


def _level(meaning: ValueMeaning, rng: Random) -> float:
    levels = [meaning.low + level * (meaning.high - meaning.low) for level in _LEVELS]
    # Nobody asks whether a sum is below -20 where 60 is low.
    return rng.choice([level for level in levels if level >= min(0.0, meaning.low)])


def _type_subjects(
    pool: TopicPool, known_types: Mapping[str, tuple[str, ...]], known: Sequence[Subject]
) -> list[Subject]:
    """Event types that no subject is about already and in which the user does something."""
    words = pool.words
    taken = {subject.event_types for subject in known}
    return [
        Subject(f"{modality}_{name}", pool.word(name), modality, (name,))
        for modality, names in known_types.items()
        if modality not in words.history_only
        for name in names
        if name not in words.passive and (name,) not in taken
    ]


def _habits(subjects: Sequence[Subject], horizons: Sequence[int]) -> list[_Question]:
    spans = {"frequency": horizons, "next": horizons[-1:]}
    return [
        (kind, subject, days)
        for subject in subjects
        for kind in _HABITS
        for days in spans.get(kind, horizons[:2])
    ]


def _value_kinds(pool: TopicPool, subject: Subject) -> tuple[str, ...]:
    is_passed = pool.words.values[subject.modality].pass_mark is not None
    return (*_VALUE_KINDS, "fail") if is_passed else _VALUE_KINDS


def _some(questions: list[_Question], count: int, rng: Random) -> list[_Question]:
    return rng.sample(questions, min(count, len(questions)))


def _names(code: int, days: int, pool: TopicPool) -> dict[str, str]:
    """What the user and the span are called in a question: always the same in the same question.

    So there are many names, but not many times as many questions to read.
    """
    names = (*pool.subjects, *[pool.words.subject] * len(pool.subjects))
    periods = _PERIODS.get(days, (f"{days} days",))
    return {
        "subject": names[code % len(names)],
        "period": periods[code // len(names) % len(periods)],
    }
