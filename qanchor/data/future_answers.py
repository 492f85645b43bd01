"""What is told of a train user's days after the as-of moment, by kind of question.

Q-Anchor section 2.1: later events are aggregated into temporal bins x action categories; a subset
that is frequent and diverse is taken and verbalised.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from qanchor.data.activity import (
    Activity,
    Category,
    frequency_word,
    item_of,
    join_words,
    level_word,
    trend_word,
)
from qanchor.data.grounded import capitalised, days_phrase
from qanchor.data.topics import TopicPool

_BINS = ((0, 6, "week 1"), (7, 13, "week 2"), (14, 29, "weeks 3-4"), (30, 59, "month 2"))
_PER_BIN = 2
_PER_ANSWER = 4
_MODALITY_DISCOUNT = 0.5
_SOON_DAYS = (1, 3, 7, 14, 30)
_OFTEN_SHARE = 0.2
_NEW_PER_DAY = (0.1, 1 / 3)
"""New things: fewer are little, from the second number on they are much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FutureUser:
    """A train user before and after the as-of moment."""

    history: Activity
    future: Activity
    """Days 0 .. horizon - 1."""

    def within(self, num_days: int) -> "FutureUser":
        """The same with a shorter future."""
        return FutureUser(history=self.history, future=self.future.between(0, num_days - 1))


@dataclass(frozen=True, slots=True)
class Subject:
    """What a question about what comes is about: everything, a modality, or a topic's events."""

    name: str
    about: str
    modality: str = ""
    event_types: tuple[str, ...] = ()
    phrasings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Its own, by kind of question."""

    def days(self, activity: Activity, pool: TopicPool) -> tuple[int, ...]:
        """Active days, ascending. What befalls the user counts where it is what is asked about."""
        if self.event_types:
            return activity.days(self.modality, self.event_types)
        return activity.days(self.modality, passive=pool.words.passive)

    def befalls(self, pool: TopicPool) -> bool:
        """Whether it is nothing a user does, uses, skips or drops: only words made for it fit."""
        return bool(self.event_types) and set(self.event_types) <= set(pool.words.passive)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a question asks about, and the numbers in it, for kinds that have them."""

    subject: Subject
    count: int
    """Active days."""
    level: float
    """A value."""


def often_days(num_days: int) -> int:
    """Active on so many of the days or more is often.

    >>> often_days(30), often_days(7)
    (6, 2)
    """
    return math.ceil(_OFTEN_SHARE * num_days)


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
    days = len(user.future.days(passive=pool.words.passive))
    return f"{frequency_word(days, span)} active, on {days} of {span} days"


def _nothing(user: FutureUser) -> str:
    return f"no activity at all in the next {user.future.num_days} days"


def _outlook(user: FutureUser, pool: TopicPool, _: Asked) -> str:
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


def _frequency(user: FutureUser, pool: TopicPool, asked: Asked) -> str:
    """Whether and on how many days."""
    days, span = len(asked.subject.days(user.future, pool)), user.future.num_days
    if not days:
        return f"no, never in {span} days."
    return f"yes, {frequency_word(days, span)}: {days} of {span} days."


def _often(user: FutureUser, pool: TopicPool, asked: Asked) -> str:
    """Whether it happens on a good share of the days."""
    return _days_told(user, pool, asked, lambda days: days >= often_days(user.future.num_days))


def _at_least(user: FutureUser, pool: TopicPool, asked: Asked) -> str:
    """Whether it happens on so many days or more."""
    return _days_told(user, pool, asked, lambda days: days >= asked.count)


def _at_most(user: FutureUser, pool: TopicPool, asked: Asked) -> str:
    """Whether it happens on so many days or fewer."""
    return _days_told(user, pool, asked, lambda days: days <= asked.count)


def _days_told(
    user: FutureUser, pool: TopicPool, asked: Asked, is_yes: Callable[[int], bool]
) -> str:
    days = len(asked.subject.days(user.future, pool))
    return f"{'yes' if is_yes(days) else 'no'}: {days} of {user.future.num_days} days."


def _stop(user: FutureUser, pool: TopicPool, asked: Asked) -> str:
    """Whether it does not happen at all."""
    days, span = len(asked.subject.days(user.future, pool)), user.future.num_days
    if not days:
        return f"yes, never in {span} days."
    return f"no, {frequency_word(days, span)}: {days} of {span} days."


def _churn(user: FutureUser, pool: TopicPool, asked: Asked) -> str:
    """Whether nothing happens any more in the second half of the days."""
    days, span = asked.subject.days(user.future, pool), user.future.num_days
    if not days:
        return f"yes, never in {span} days."
    is_gone = days[-1] < span // 2
    return f"{'yes' if is_gone else 'no'}: last on day {days[-1] + 1} of {span}."


def _fall(user: FutureUser, pool: TopicPool, asked: Asked) -> str:
    """Whether it comes to less than half of an equally long stretch of history."""
    before, now = _before_and_now(user, pool, asked)
    return f"{'yes' if 2 * now < before else 'no'}: {now} after {before}."


def _grow(user: FutureUser, pool: TopicPool, asked: Asked) -> str:
    """Whether it comes to more than in an equally long stretch of history."""
    before, now = _before_and_now(user, pool, asked)
    return f"{'yes' if now > before else 'no'}: {now} after {before}."


def _trend(user: FutureUser, pool: TopicPool, asked: Asked) -> str:
    """Set against an equally long stretch of history."""
    before, now = _before_and_now(user, pool, asked)
    return f"it {trend_word(now, before)}: {now} after {before}."


def _before_and_now(user: FutureUser, pool: TopicPool, asked: Asked) -> tuple[int, int]:
    """Active days in the last of the history, as long a stretch as what comes, and in that."""
    before = sum(day >= -user.future.num_days for day in asked.subject.days(user.history, pool))
    return before, len(asked.subject.days(user.future, pool))


def _next(user: FutureUser, pool: TopicPool, asked: Asked) -> str:
    """When it happens first."""
    days = asked.subject.days(user.future, pool)
    if not days:
        return f"not in {user.future.num_days} days."
    within = next(limit for limit in (*_SOON_DAYS, user.future.num_days) if days[0] < limit)
    return f"within {days_phrase(within)}."


def _value(user: FutureUser, pool: TopicPool, asked: Asked) -> str:
    """The mean value, where the topic file says what values mean."""
    meaning, mean = pool.words.values[asked.subject.modality], _mean_value(user, asked.subject)
    if mean is None:
        return "none."
    return f"{level_word(mean, meaning.low, meaning.high)}, {mean:.0f} on average."


def _low(user: FutureUser, pool: TopicPool, asked: Asked) -> str:
    """Whether the mean value is low."""
    low = pool.words.values[asked.subject.modality].low
    return _mean_told(_mean_value(user, asked.subject), lambda mean: mean < low)


def _high(user: FutureUser, pool: TopicPool, asked: Asked) -> str:
    """Whether the mean value is high."""
    high = pool.words.values[asked.subject.modality].high
    return _mean_told(_mean_value(user, asked.subject), lambda mean: mean >= high)


def _value_at_least(user: FutureUser, _: TopicPool, asked: Asked) -> str:
    """Whether the mean value is so high or higher."""
    return _mean_told(_mean_value(user, asked.subject), lambda mean: mean >= asked.level)


def _value_below(user: FutureUser, _: TopicPool, asked: Asked) -> str:
    """Whether the mean value is lower."""
    return _mean_told(_mean_value(user, asked.subject), lambda mean: mean < asked.level)


def _fail(user: FutureUser, pool: TopicPool, asked: Asked) -> str:
    """Whether the mean value, with 0 for what was not done, is below the pass mark."""
    meaning = pool.words.values[asked.subject.modality]
    pass_mark = meaning.pass_mark
    assert pass_mark is not None, "This is a bug: failing is asked about where it is possible."
    mean = _mean_value(user, asked.subject, as_zero=meaning.as_zero)
    return _mean_told(mean, lambda mean: mean < pass_mark)


def _mean_told(mean: float | None, is_yes: Callable[[float], bool]) -> str:
    """Nothing valued is neither yes nor no."""
    if mean is None:
        return "none."
    return f"{'yes' if is_yes(mean) else 'no'}: {mean:.0f} on average."


def _mean_value(
    user: FutureUser, subject: Subject, *, as_zero: tuple[str, ...] = ()
) -> float | None:
    records = user.future.select(subject.modality, subject.event_types)
    events = [event for _, event in records]
    values = [event.value for event in events if event.value is not None]
    values += [0.0] * sum(event.event_type in as_zero for event in events)
    return sum(values) / len(values) if values else None


def _change(user: FutureUser, pool: TopicPool, _: Asked) -> str:
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


def _novelty(user: FutureUser, pool: TopicPool, _: Asked) -> str:
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


def _explore(user: FutureUser, pool: TopicPool, _: Asked) -> str:
    """Whether much comes that the history does not have."""
    count = _num_new(user, pool)
    is_much = count >= _NEW_PER_DAY[1] * user.future.num_days
    return f"{'yes' if is_much else 'no'}: {_things(count)}."


def _repeat(user: FutureUser, pool: TopicPool, _: Asked) -> str:
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


def _detail(user: FutureUser, pool: TopicPool, asked: Asked) -> str:
    """One subject: days, trend, its categories with levels, values, what does not come."""
    span, about, modality = user.future.num_days, asked.subject.about, asked.subject.modality
    records = user.future.select(modality)
    before, now = _before_and_now(user, pool, asked)
    if not records:
        word = "stops" if before else "stays away"
        return f"no {about} activity in the next {span} days; it {word}."
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


_ANSWERS: dict[str, Callable[[FutureUser, TopicPool, Asked], str]] = {
    "outlook": _outlook,
    "change": _change,
    "novelty": _novelty,
    "detail": _detail,
    "frequency": _frequency,
    "often": _often,
    "heavy": _at_least,
    "busy": _at_least,
    "at_least": _at_least,
    "at_most": _at_most,
    "stop": _stop,
    "fall": _fall,
    "grow": _grow,
    "trend": _trend,
    "next": _next,
    "value": _value,
    "low": _low,
    "high": _high,
    "value_at_least": _value_at_least,
    "value_below": _value_below,
    "fail": _fail,
    "churn": _churn,
    "fade": _churn,
    "explore": _explore,
    "repeat": _repeat,
}


def answer(kind: str, user: FutureUser, pool: TopicPool, asked: Asked) -> str:
    """The answer to a question of a kind of generic_futures.toml."""
    return _ANSWERS[kind](user, pool, asked)
