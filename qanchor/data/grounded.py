"""Grounded question answering (D_uqa): answers about a user computed from the history profile.

Q-Anchor section 2.1; differs: an aggregator computes every answer from the profile, where the
paper lets a language model draft it and then check it against the profile. What the profile does
not support yields no answer, which is the paper's reflection step by construction. Knows neither
labels nor anything after the as-of moment.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from qanchor.data.activity import (
    Activity,
    Record,
    active_days,
    frequency_word,
    item_of,
    join_words,
    level_word,
    trend_word,
)
from qanchor.data.profile import Profile
from qanchor.data.topics import Topic, TopicPool

_RECENT_DAYS = 30
_RECENCY_LADDER = ((3, "very recently"), (14, "recently"), (45, "some time ago"))
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_ATTRIBUTE_RELEVANCE = 0.5
_ABSENCE_RELEVANCE = 2.0
_REPEAT_DISCOUNT = 0.3
_MAX_KINDS = 4
_MAX_ITEMS = 3
"""Fewer than kinds, because an item is told in its event's own words."""

Facts = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroundedUser:
    """What an answer may rest on."""

    profile: Profile
    history: Activity
    """The rolling window: days -window .. -1."""
    known_types: Mapping[str, tuple[str, ...]]
    """Event types that occur in the data set, per modality."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One question about a user and its answer."""

    topic: str
    query: str
    answer: str


def answer_topics(
    user: GroundedUser, pool: TopicPool, num_answers: int, rng: Random
) -> list[Answered]:
    """Answer up to `num_answers` topics: those the profile says most about, of different kinds.

    Topics are drawn with weights; a topic of a modality or aggregate already told weighs less.
    """
    weights = {topic.name: _relevance(topic, user) for topic in pool.topics}
    left = [topic for topic in pool.topics if weights[topic.name] > 0]
    answered: list[Answered] = []
    while left and len(answered) < num_answers:
        topic = rng.choices(left, [weights[each.name] for each in left])[0]
        left.remove(topic)
        facts = _AGGREGATORS[topic.aggregate](topic, user, pool)
        if facts is None:
            continue
        answered.append(_verbalise(topic, facts, pool, rng))
        for other in left:
            if other.modality == topic.modality or other.aggregate == topic.aggregate:
                weights[other.name] *= _REPEAT_DISCOUNT
    return answered


def _relevance(topic: Topic, user: GroundedUser) -> float:
    """How much the profile has to say about a topic; grows with the logarithm of its events."""
    if topic.aggregate == "attribute":
        known = any(column in user.profile.attributes for column in topic.columns)
        return _ATTRIBUTE_RELEVANCE if known else 0.0
    if topic.aggregate in ("absence", "frequency") and user.history.by_category:
        return max(_ABSENCE_RELEVANCE, math.log1p(_num_records(topic, user)))
    return math.log1p(_num_records(topic, user))


def _num_records(topic: Topic, user: GroundedUser) -> int:
    return sum(
        len(records)
        for (modality, event_type), records in user.history.by_category.items()
        if topic.modality in ("", modality)
        and (not topic.event_types or event_type in topic.event_types)
    )


def _verbalise(topic: Topic, facts: Facts, pool: TopicPool, rng: Random) -> Answered:
    phrasing = pool.aggregates[topic.aggregate]
    fields = {"subject": pool.words.subject, "about": topic.about, **facts}
    query = rng.choice(topic.queries or phrasing.queries).format(**fields)
    answer = rng.choice(topic.answers or phrasing.answers).format(**fields)
    return Answered(topic.name, capitalised(query), capitalised(answer))


def capitalised(text: str) -> str:
    """The text with its first letter in upper case, the rest as it is."""
    return text[:1].upper() + text[1:]


def _records(topic: Topic, user: GroundedUser, pool: TopicPool) -> list[Record]:
    if topic.modality or topic.event_types:
        return user.history.select(topic.modality, topic.event_types)
    return user.history.acts(pool.words.passive)


def _frequency(topic: Topic, user: GroundedUser, pool: TopicPool) -> Facts | None:
    days = active_days(_records(topic, user, pool))
    span = user.history.num_days
    return {
        "level": frequency_word(len(days), span),
        "days": len(days),
        "span": span,
        "recent": sum(day >= -_RECENT_DAYS for day in days),
    }


def _recency(topic: Topic, user: GroundedUser, pool: TopicPool) -> Facts | None:
    days = active_days(_records(topic, user, pool))
    if not days:
        return None
    age = -days[-1]
    return {
        "level": next((word for limit, word in _RECENCY_LADDER if age <= limit), "long ago"),
        "last": "yesterday" if age == 1 else f"{age} days ago",
        "pause": days_phrase(days[-1] - days[-2]) if len(days) > 1 else "unknown length",
    }


def _trend(topic: Topic, user: GroundedUser, pool: TopicPool) -> Facts | None:
    days = active_days(_records(topic, user, pool))
    recent = sum(day >= -_RECENT_DAYS for day in days)
    earlier = sum(-2 * _RECENT_DAYS <= day < -_RECENT_DAYS for day in days)
    if recent + earlier < 3:
        return None
    return {"trend": trend_word(recent, earlier), "recent": recent, "earlier": earlier}


def _regularity(topic: Topic, user: GroundedUser, pool: TopicPool) -> Facts | None:
    days = active_days(_records(topic, user, pool))
    if len(days) < 4:
        return None
    # The silence up to now is a pause like any other.
    gaps = [later - day for day, later in zip(days, [*days[1:], 0], strict=True)]
    usual, longest = sorted(gaps)[len(gaps) // 2], max(gaps)
    streak = best = 1
    for gap in gaps[:-1]:
        streak = streak + 1 if gap == 1 else 1
        best = max(best, streak)
    even = "regular" if longest <= 7 else "somewhat irregular" if longest <= 16 else "irregular"
    return {
        "level": even,
        "gap": "day" if usual == 1 else days_phrase(usual),
        "pause": days_phrase(longest),
        "streak": days_phrase(best),
    }


def _favourites(topic: Topic, user: GroundedUser, pool: TopicPool) -> Facts | None:
    records = _records(topic, user, pool)
    if not records:
        return None
    kinds: dict[str, set[int]] = {}
    for day, event in records:
        kinds.setdefault(event.event_type, set()).add(day)
    limit = _MAX_KINDS
    if len(kinds) > 1:
        named = {pool.word(name): len(days) for name, days in kinds.items()}
    else:
        limit = _MAX_ITEMS
        ends = pool.words.item_ends_before
        named = Counter(item_of(event.text, ends) for _, event in records)
    span = user.history.num_days
    top = sorted(named.items(), key=lambda item: (-item[1], item[0]))[:limit]
    return {"items": join_words(f"{name} ({frequency_word(n, span)})" for name, n in top)}


def _value(topic: Topic, user: GroundedUser, pool: TopicPool) -> Facts | None:
    meaning = pool.words.values.get(topic.modality)
    values = [event.value for _, event in _records(topic, user, pool) if event.value is not None]
    if meaning is None or not values:
        return None
    mean = sum(values) / len(values)
    return {
        "unit": meaning.unit,
        "level": level_word(mean, meaning.low, meaning.high),
        "mean": f"{mean:.0f}",
        "lowest": f"{min(values):.0f}",
        "highest": f"{max(values):.0f}",
        "latest": f"{values[-1]:.0f}",
    }


def _absence(topic: Topic, user: GroundedUser, pool: TopicPool) -> Facts | None:
    known = [
        (modality, event_type)
        for modality, types in user.known_types.items()
        if topic.modality in ("", modality)
        for event_type in types
        if event_type not in pool.words.passive
    ]
    last = {name: records[-1][0] for name, records in user.history.by_category.items()}
    absent = [pool.word(key[1]) for key in known if key not in last]
    stopped = [pool.word(key[1]) for key in known if last.get(key, 0) < -_RECENT_DAYS]
    if len(known) < 2 or not (absent or stopped):
        return None
    return {
        "absent": join_words(absent[:_MAX_KINDS]) or "none",
        "stopped": join_words(stopped[:_MAX_KINDS]) or "nothing",
    }


def _variety(topic: Topic, user: GroundedUser, pool: TopicPool) -> Facts | None:
    first_seen: dict[str, int] = {}
    for day, event in _records(topic, user, pool):
        first_seen.setdefault(item_of(event.text, pool.words.item_ends_before), day)
    if len(first_seen) < 3:
        return None
    return {
        "level": level_word(len(first_seen), 10, 40),
        "items": len(first_seen),
        "fresh": sum(day >= -_RECENT_DAYS for day in first_seen.values()),
    }


def _rhythm(topic: Topic, user: GroundedUser, pool: TopicPool) -> Facts | None:
    days = active_days(_records(topic, user, pool))
    if len(days) < 7:
        return None
    today = user.profile.as_of_s // 86_400 + 3  # 1 January 1970 was a Thursday, weekday 3
    weekdays = Counter((today + day) % 7 for day in days)
    weekend = round(100 * (weekdays[5] + weekdays[6]) / len(days))
    return {
        "level": "weekend person" if weekend > 40 else "workday person" if weekend < 20 else "both",
        "weekend": weekend,
        "weekday": _WEEKDAYS[min(weekdays, key=lambda day: (-weekdays[day], day))],
    }


def _attribute(topic: Topic, user: GroundedUser, pool: TopicPool) -> Facts | None:
    known = {name: user.profile.attributes.get(name) for name in topic.columns}
    told = [
        f"{pool.word(name)} {_shown(value)}" for name, value in known.items() if value is not None
    ]
    return {"items": ", ".join(told)} if told else None


def _shown(value: str | float | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, (int, float)) else value


def days_phrase(num_days: int) -> str:
    """A number of days in words."""
    return "1 day" if num_days == 1 else f"{num_days} days"


_AGGREGATORS: Mapping[str, Callable[[Topic, GroundedUser, TopicPool], Facts | None]] = {
    "frequency": _frequency,
    "recency": _recency,
    "trend": _trend,
    "regularity": _regularity,
    "favourites": _favourites,
    "value": _value,
    "absence": _absence,
    "variety": _variety,
    "rhythm": _rhythm,
    "attribute": _attribute,
}
