"""Behaviour prediction (D_future): what a train user did after the as-of moment, in words.

Q-Anchor section 2.1: later events are aggregated into temporal bins x action categories; a subset
that is frequent and diverse is taken and verbalised. A fixed set of template queries asks for it.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from random import Random

from qanchor.data.activity import (
    Activity,
    Category,
    active_days,
    frequency_word,
    item_of,
    join_words,
    level_word,
    trend_word,
)
from qanchor.data.grounded import Answered, capitalised, days_phrase
from qanchor.data.topics import TopicPool, is_asked_of_future

HORIZONS_DAYS = (14, 30, 60)
_PERIODS = {
    14: ("two weeks", "fortnight"),
    30: ("month", "four weeks", "thirty days"),
    60: ("two months", "eight weeks", "sixty days"),
}
"""Horizons in other words, to stand after "the next" or "the coming"."""
_OWN_PHRASING_SHARE = 0.5
"""Of the questions for which the data set has phrasings of its own."""

_BINS = ((0, 6, "week 1"), (7, 13, "week 2"), (14, 29, "weeks 3-4"), (30, 59, "month 2"))
_PER_BIN = 2
_PER_ANSWER = 4
_MODALITY_DISCOUNT = 0.5
_WIDE = ("outlook", "change", "novelty")
_WIDE_SHARE = 0.25
"""Of the questions; their answers are long, those of narrow ones a few words."""
_OUTCOME_SHARE = 0.2
"""Of the questions; few kinds, which would hardly come up among those of habits."""
_SOON_DAYS = (1, 3, 7, 14, 30)
_COUNTS = (1, 2, 3, 5, 8, 12, 20)
"""Active days that `at_least` asks for."""
_OFTEN_SHARE = 0.2
"""Of the days: active on so many or more is often."""
_HEAVY_SHARE = 0.4
"""Likewise for very often, as few users are."""
_NEW_PER_DAY = (0.1, 1 / 3)
"""New things: fewer are little, from the second number on they are much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FutureUser:
    """A train user before and after the as-of moment."""

    history: Activity
    future: Activity
    """Days 0 .. horizon - 1."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What a question about what comes is about: everything, a modality, or a topic's events."""

    name: str
    about: str
    modality: str = ""
    event_types: tuple[str, ...] = ()
    phrasings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Its own, by kind of question."""

    def days(self, activity: Activity, pool: TopicPool) -> list[int]:
        """Active days, ascending. What befalls the user counts where it is what is asked about."""
        if self.event_types:
            return active_days(activity.select(self.modality, self.event_types))
        return active_days(activity.acts(pool.words.passive, self.modality))

    def befalls(self, pool: TopicPool) -> bool:
        """Whether it is nothing a user does, uses, skips or drops: only words made for it fit."""
        return bool(self.event_types) and set(self.event_types) <= set(pool.words.passive)

    def templates(self, kind: str, pool: TopicPool, rng: Random) -> tuple[str, ...]:
        """Phrasings to choose one from."""
        own = (*self.phrasings.get(kind, ()), *pool.words.futures.get(kind, ()))
        is_own = self.befalls(pool) or (own and rng.random() < _OWN_PHRASING_SHARE)
        return own if is_own else pool.futures[kind]


_Question = tuple[str, Subject, int]
"""Kind, what it is about, days."""


def answer_futures(
    history: Activity, future: Activity, pool: TopicPool, num_answers: int, rng: Random
) -> list[Answered]:
    """Answer up to `num_answers` different questions about what comes, each over some horizon.

    Wide questions (what will happen, what changes); habits (whether, how often, on so many days or
    more, when, whether more or less than before) of everything, each modality and each topic that
    asks for one; outcomes (how high values are, how much is new, what befalls the user): together
    they cover what may be asked of a user's future. Of some, yes means more activity, of others
    less, so that yes has to be read with its question.
    """
    horizons = [days for days in HORIZONS_DAYS if days <= future.num_days] or [future.num_days]
    modalities = sorted({modality for modality, _ in (*history.by_category, *future.by_category)})
    modalities = [name for name in modalities if name not in pool.words.history_only]
    details = [Subject(name, pool.word(name), name) for name in modalities]
    overall = Subject("overall", pool.words.everything)
    subjects = [overall, *details]
    subjects += [
        Subject(topic.name, topic.about, topic.modality, topic.event_types, topic.futures)
        for topic in pool.topics
        if is_asked_of_future(topic, pool.words)
    ]
    wide = [(kind, overall, days) for kind in _WIDE for days in horizons]
    wide += [("detail", subject, horizons[-1]) for subject in details]
    habits = [
        (kind, subject, days)
        for subject in subjects
        for kind, spans in (
            ("frequency", horizons),
            ("often", horizons[:2]),
            ("heavy", horizons[:2]),
            ("at_least", horizons[:2]),
            ("trend", horizons[:2]),
            ("stop", horizons[:2]),
            ("fall", horizons[:2]),
            ("grow", horizons[:2]),
            ("next", horizons[-1:]),
        )
        for days in spans
        if not subject.befalls(pool)
    ]
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
    num_wide, num_outcomes = (round(num_answers * share) for share in (_WIDE_SHARE, _OUTCOME_SHARE))
    questions = [
        *_some(wide, num_wide, rng),
        *_some(outcomes, num_outcomes, rng),
        *_some(habits, num_answers - num_wide - num_outcomes, rng),
    ]
    answered = []
    for kind, subject, days in questions:
        user = FutureUser(history=history, future=future.between(0, days - 1))
        count = rng.choice([count for count in _COUNTS if count <= days])
        template = rng.choice(subject.templates(kind, pool, rng))
        about = rng.choice((subject.about, *pool.words.synonyms.get(subject.about, ())))
        meaning = pool.words.values.get(subject.modality)
        query = template.format(
            **_names(template, about, days, pool),
            about=about,
            days=days,
            count=count,
            unit=meaning.unit if meaning else "",
        )
        answer = (_ANSWERS | {"at_least": partial(_at_least, count=count)})[kind](
            user, pool, subject
        )
        topic = f"future_{kind}_{subject.name}_{days}d"
        answered.append(Answered(topic, capitalised(query), capitalised(answer)))
    return answered


def _value_kinds(pool: TopicPool, subject: Subject) -> tuple[str, ...]:
    is_passed = pool.words.values[subject.modality].pass_mark is not None
    return ("value", "low", "high", *(("fail",) if is_passed else ()))


def _some(questions: list[_Question], count: int, rng: Random) -> list[_Question]:
    return rng.sample(questions, min(count, len(questions)))


def _names(template: str, about: str, days: int, pool: TopicPool) -> dict[str, str]:
    """What the user and the span are called in a question: always the same in the same question.

    So there are many names, but not many times as many questions to read.
    """
    code = zlib.crc32(f"{template} {about}".encode())
    names = (*pool.subjects, *[pool.words.subject] * len(pool.subjects))
    periods = _PERIODS.get(days, (f"{days} days",))
    return {
        "subject": names[code % len(names)],
        "period": periods[code // len(names) % len(periods)],
    }


def select_categories(days_by_category: dict[Category, int], limit: int) -> list[Category]:
    """Frequent and diverse categories: by active days, each further one of a modality halved.

    >>> select_categories({("a", "x"): 9, ("a", "y"): 8, ("b", "z"): 5, ("c", "w"): 1}, 3)
    [('a', 'x'), ('b', 'z'), ('a', 'y')]
    """
    left = dict(sorted(days_by_category.items()))
    taken: Counter[str] = Counter()
    chosen: list[Category] = []
    while left and len(chosen) < limit:
        best = max(left, key=lambda name: left[name] * _MODALITY_DISCOUNT ** taken[name[0]])
        taken[best[0]] += 1
        chosen.append(best)
        del left[best]
    return chosen


def _activity_sentence(user: FutureUser, pool: TopicPool) -> str:
    span = user.future.num_days
    days = len(active_days(user.future.acts(pool.words.passive)))
    return f"{frequency_word(days, span)} active, on {days} of {span} days"


def _nothing(user: FutureUser) -> str:
    return f"no activity at all in the next {user.future.num_days} days"


def _outlook(user: FutureUser, pool: TopicPool, _: Subject) -> str:
    """Bins x categories, then what is used in the history but does not come again."""
    future = user.future
    if not future.by_category:
        return f"nothing: {_nothing(user)}."
    parts = []
    for first, last, name in _BINS:
        if first >= future.num_days:
            break
        part = future.between(first, min(last, future.num_days - 1))
        chosen = select_categories(part.days_by_category(), _PER_BIN)
        parts.append(f"{name} {join_words(pool.word(kind) for _, kind in chosen) or 'nothing'}")
    return f"{_activity_sentence(user, pool)}: {'; '.join(parts)}.{_absent(user, pool)}"


def _absent(user: FutureUser, pool: TopicPool) -> str:
    """Categories of the history that do not come."""
    habits = user.history.days_by_category()
    gone = {name: days for name, days in habits.items() if name not in user.future.by_category}
    chosen = select_categories(gone, 2)
    return f" No {join_words(pool.word(kind) for _, kind in chosen)}." if chosen else ""


def _frequency(user: FutureUser, pool: TopicPool, subject: Subject) -> str:
    """Whether and on how many days."""
    days, span = len(subject.days(user.future, pool)), user.future.num_days
    if not days:
        return f"no, never in {span} days."
    return f"yes, {frequency_word(days, span)}: {days} of {span} days."


def _at_share(user: FutureUser, pool: TopicPool, subject: Subject, *, share: float) -> str:
    """Whether it happens on that share of the days or more."""
    days, span = len(subject.days(user.future, pool)), user.future.num_days
    return f"{'yes' if days >= share * span else 'no'}: {days} of {span} days."


def _at_least(user: FutureUser, pool: TopicPool, subject: Subject, *, count: int) -> str:
    """Whether it happens on `count` days or more."""
    days, span = len(subject.days(user.future, pool)), user.future.num_days
    return f"{'yes' if days >= count else 'no'}: {days} of {span} days."


def _stop(user: FutureUser, pool: TopicPool, subject: Subject) -> str:
    """Whether it does not happen at all."""
    days, span = len(subject.days(user.future, pool)), user.future.num_days
    if not days:
        return f"yes, never in {span} days."
    return f"no, {frequency_word(days, span)}: {days} of {span} days."


def _churn(user: FutureUser, pool: TopicPool, subject: Subject) -> str:
    """Whether nothing happens any more in the second half of the days."""
    days, span = subject.days(user.future, pool), user.future.num_days
    if not days:
        return f"yes, never in {span} days."
    is_gone = days[-1] < span // 2
    return f"{'yes' if is_gone else 'no'}: last on day {days[-1] + 1} of {span}."


def _fall(user: FutureUser, pool: TopicPool, subject: Subject) -> str:
    """Whether it comes to less than half of an equally long stretch of history."""
    before, now = _before_and_now(user, pool, subject)
    return f"{'yes' if 2 * now < before else 'no'}: {now} after {before}."


def _grow(user: FutureUser, pool: TopicPool, subject: Subject) -> str:
    """Whether it comes to more than in an equally long stretch of history."""
    before, now = _before_and_now(user, pool, subject)
    return f"{'yes' if now > before else 'no'}: {now} after {before}."


def _trend(user: FutureUser, pool: TopicPool, subject: Subject) -> str:
    """Set against an equally long stretch of history."""
    before, now = _before_and_now(user, pool, subject)
    return f"it {trend_word(now, before)}: {now} after {before}."


def _before_and_now(user: FutureUser, pool: TopicPool, subject: Subject) -> tuple[int, int]:
    """Active days in the last of the history, as long a stretch as what comes, and in that."""
    before = subject.days(user.history.between(-user.future.num_days, -1), pool)
    return len(before), len(subject.days(user.future, pool))


def _next(user: FutureUser, pool: TopicPool, subject: Subject) -> str:
    """When it happens first."""
    days = subject.days(user.future, pool)
    if not days:
        return f"not in {user.future.num_days} days."
    within = next(limit for limit in (*_SOON_DAYS, user.future.num_days) if days[0] < limit)
    return f"within {days_phrase(within)}."


def _value(user: FutureUser, pool: TopicPool, subject: Subject) -> str:
    """The mean value, where the topic file says what values mean."""
    meaning, mean = pool.words.values[subject.modality], _mean_value(user, subject)
    if mean is None:
        return "none."
    return f"{level_word(mean, meaning.low, meaning.high)}, {mean:.0f} on average."


def _at_level(user: FutureUser, pool: TopicPool, subject: Subject, *, level: str) -> str:
    """Whether the mean value is low, or high; nothing valued is neither yes nor no."""
    meaning, mean = pool.words.values[subject.modality], _mean_value(user, subject)
    if mean is None:
        return "none."
    is_yes = level_word(mean, meaning.low, meaning.high) == level
    return f"{'yes' if is_yes else 'no'}: {mean:.0f} on average."


def _fail(user: FutureUser, pool: TopicPool, subject: Subject) -> str:
    """Whether the mean value, with 0 for what was not done, is below the pass mark."""
    meaning = pool.words.values[subject.modality]
    mean = _mean_value(user, subject, as_zero=meaning.as_zero)
    if mean is None or meaning.pass_mark is None:
        return "none."
    return f"{'yes' if mean < meaning.pass_mark else 'no'}: {mean:.0f} on average."


def _mean_value(
    user: FutureUser, subject: Subject, *, as_zero: tuple[str, ...] = ()
) -> float | None:
    records = user.future.select(subject.modality)
    events = [event for _, event in records]
    values = [event.value for event in events if event.value is not None]
    values += [0.0] * sum(event.event_type in as_zero for event in events)
    return sum(values) / len(values) if values else None


def _change(user: FutureUser, pool: TopicPool, _: Subject) -> str:
    """Categories that stop, begin, grow or shrink against an equally long stretch of history."""
    span = user.future.num_days
    before = user.history.between(-span, -1).days_by_category()
    after = user.future.days_by_category()
    if not after:
        return f"everything stops: {_nothing(user)}."
    changes: dict[str, dict[Category, int]] = {"begins": {}, "stops": {}, "grows": {}, "falls": {}}
    for name in before.keys() | after.keys():
        then, now = before.get(name, 0), after.get(name, 0)
        word = trend_word(now, then)
        word = "grows" if word.startswith("rises") else word.partition(" ")[0]
        if word in changes:
            changes[word][name] = abs(now - then)
    told = [
        f"{word}: {join_words(pool.word(kind) for _, kind in select_categories(found, 3))}"
        for word, found in changes.items()
        if found
    ]
    told_or_not = "; ".join(told) or "no change of habits"
    return f"{told_or_not}. {capitalised(_activity_sentence(user, pool))}."


def _novelty(user: FutureUser, pool: TopicPool, _: Subject) -> str:
    """How many things come that the history does not have, and of which categories."""
    fresh = _new_items(user, pool)
    count = len(set().union(*fresh.values()))
    if not count:
        return f"nothing new. {capitalised(_activity_sentence(user, pool))}."
    top = select_categories({name: len(items) for name, items in fresh.items()}, 3)
    levels = {"low": "little", "medium": "some", "high": "much"}
    level = levels[level_word(count / user.future.num_days, *_NEW_PER_DAY)]
    listed = join_words(pool.word(kind) for _, kind in top)
    told = capitalised(_activity_sentence(user, pool))
    return f"{level} new: {_things(count)}, mostly {listed}. {told}."


def _explore(user: FutureUser, pool: TopicPool, _: Subject) -> str:
    """Whether much comes that the history does not have."""
    count = _num_new(user, pool)
    is_much = count >= _NEW_PER_DAY[1] * user.future.num_days
    return f"{'yes' if is_much else 'no'}: {_things(count)}."


def _repeat(user: FutureUser, pool: TopicPool, _: Subject) -> str:
    """Whether what comes is known already; who does nothing neither repeats nor tries anything."""
    if not user.future.by_category:
        return "none."
    count = _num_new(user, pool)
    is_little = count < _NEW_PER_DAY[0] * user.future.num_days
    return f"{'yes' if is_little else 'no'}: {_things(count)}."


def _num_new(user: FutureUser, pool: TopicPool) -> int:
    return len(set().union(*_new_items(user, pool).values()))


def _new_items(user: FutureUser, pool: TopicPool) -> dict[Category, set[str]]:
    """What comes that the history does not have, by category."""
    ends = pool.words.item_ends_before
    seen = {item_of(event.text, ends) for _, event in user.history.select()}
    fresh: dict[Category, set[str]] = {}
    for name, records in user.future.by_category.items():
        items = {item_of(event.text, ends) for _, event in records} - seen
        if items:
            fresh[name] = items
    return fresh


def _things(count: int) -> str:
    return "1 new thing" if count == 1 else f"{count} new things"


def _detail(user: FutureUser, pool: TopicPool, subject: Subject) -> str:
    """One subject: days, trend, its categories with levels, values, what does not come."""
    span, about, modality = user.future.num_days, subject.about, subject.modality
    records = user.future.select(modality)
    before = len(subject.days(user.history.between(-span, -1), pool))
    if not records:
        word = "stops" if before else "stays away"
        return f"no {about} activity in the next {span} days; it {word}."
    now = len(subject.days(user.future, pool))
    days = {n: count for n, count in user.future.days_by_category().items() if n[0] == modality}
    top = select_categories(days, _PER_ANSWER)
    listed = join_words(f"{pool.word(n[1])} {frequency_word(days[n], span)}" for n in top)
    sentences = [
        f"{frequency_word(now, span)}, on {now} of {span} days: {listed}",
        f"{about} activity {trend_word(now, before)}",
    ]
    values = [event.value for _, event in records if event.value is not None]
    meaning = pool.words.values.get(modality)
    if meaning and values:
        mean = sum(values) / len(values)
        level = level_word(mean, meaning.low, meaning.high)
        sentences.append(f"{level} {meaning.unit}, {mean:.0f} on average")
    return f"{'. '.join(capitalised(sentence) for sentence in sentences)}."


_ANSWERS: dict[str, Callable[[FutureUser, TopicPool, Subject], str]] = {
    "outlook": _outlook,
    "change": _change,
    "novelty": _novelty,
    "detail": _detail,
    "frequency": _frequency,
    "often": partial(_at_share, share=_OFTEN_SHARE),
    "heavy": partial(_at_share, share=_HEAVY_SHARE),
    "busy": partial(_at_share, share=_HEAVY_SHARE),
    "stop": _stop,
    "fall": _fall,
    "grow": _grow,
    "trend": _trend,
    "next": _next,
    "value": _value,
    "low": partial(_at_level, level="low"),
    "high": partial(_at_level, level="high"),
    "fail": _fail,
    "churn": _churn,
    "explore": _explore,
    "repeat": _repeat,
}
