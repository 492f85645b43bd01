"""Behaviour prediction (D_future): what a train user did after the as-of moment, in words.

Q-Anchor section 2.1: later events are aggregated into temporal bins x action categories; a subset
that is frequent and diverse is taken and verbalised. A fixed set of template queries asks for it.
"""

from collections import Counter
from dataclasses import dataclass
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
from qanchor.data.grounded import Answered, capitalised
from qanchor.data.topics import TopicPool

HORIZONS_DAYS = (14, 30, 60)

_BINS = ((0, 6, "week 1"), (7, 13, "week 2"), (14, 29, "weeks 3-4"), (30, 59, "month 2"))
_PER_BIN = 2
_PER_ANSWER = 4
_MODALITY_DISCOUNT = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class FutureUser:
    """A train user before and after the as-of moment."""

    history: Activity
    future: Activity
    """Days 0 .. horizon - 1."""


def answer_futures(
    history: Activity, future: Activity, pool: TopicPool, num_answers: int, rng: Random
) -> list[Answered]:
    """Answer up to `num_answers` different questions about what comes, each over some horizon."""
    horizons = [days for days in HORIZONS_DAYS if days <= future.num_days] or [future.num_days]
    modalities = sorted({modality for modality, _ in (*history.by_category, *future.by_category)})
    # One question about every modality, so that no modality drowns in the general ones.
    kinds = ["outlook", "activity", "change", "novelty", *(f"modality:{m}" for m in modalities)]
    answered = []
    questions = [(kind, days) for kind in kinds for days in horizons]
    for kind, days in rng.sample(questions, min(num_answers, len(questions))):
        user = FutureUser(history=history, future=future.between(0, days - 1))
        name, _, modality = kind.partition(":")
        about = pool.word(modality) if modality else pool.words.everything
        query = rng.choice(pool.futures[name]).format(
            subject=pool.words.subject, about=about, days=days
        )
        answer = _modality(user, pool, modality) if modality else _GENERAL[name](user, pool)
        topic = f"future_{modality or name}_{days}d"
        answered.append(Answered(topic, capitalised(query), capitalised(answer)))
    return answered


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


def _outlook(user: FutureUser, pool: TopicPool) -> str:
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


def _activity(user: FutureUser, pool: TopicPool) -> str:
    """Active days in all and by bin, set against an equally long stretch of history."""
    future, passive = user.future, pool.words.passive
    span = future.num_days
    if not future.by_category:
        return f"not at all: {_nothing(user)}."
    before = len(active_days(user.history.between(-span, -1).acts(passive)))
    now = active_days(future.acts(passive))
    bins = [
        f"{name} {frequency_word(sum(first <= day <= last for day in now), last - first + 1)}"
        for first, last, name in _BINS
        if last < span
    ]
    trend = trend_word(len(now), before)
    in_bins = f" {capitalised(', '.join(bins))}." if bins else ""
    return f"{_activity_sentence(user, pool)}; activity {trend}.{in_bins}"


def _change(user: FutureUser, pool: TopicPool) -> str:
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


def _novelty(user: FutureUser, pool: TopicPool) -> str:
    """How many things come that the history does not have, and of which categories."""
    ends = pool.words.item_ends_before
    seen = {item_of(event.text, ends) for _, event in user.history.select()}
    fresh: dict[Category, set[str]] = {}
    for name, records in user.future.by_category.items():
        items = {item_of(event.text, ends) for _, event in records} - seen
        if items:
            fresh[name] = items
    count = len(set().union(*fresh.values()))
    if not count:
        return f"nothing new. {capitalised(_activity_sentence(user, pool))}."
    top = select_categories({name: len(items) for name, items in fresh.items()}, 3)
    level = {"low": "little", "medium": "some", "high": "much"}[level_word(count, 5, 25)]
    listed = join_words(pool.word(kind) for _, kind in top)
    things = "1 new thing" if count == 1 else f"{count} new things"
    return f"{level} new: {things}, mostly {listed}. {capitalised(_activity_sentence(user, pool))}."


def _modality(user: FutureUser, pool: TopicPool, modality: str) -> str:
    """One modality: days, trend, its categories with levels, values, what does not come."""
    span, about = user.future.num_days, pool.word(modality)
    records = user.future.select(modality)
    before = len(active_days(user.history.between(-span, -1).select(modality)))
    if not records:
        word = "stops" if before else "stays away"
        return f"no {about} activity in the next {span} days; it {word}."
    now = len(active_days(records))
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


_GENERAL = {
    "outlook": _outlook,
    "activity": _activity,
    "change": _change,
    "novelty": _novelty,
}
