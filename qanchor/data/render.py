"""A profile in words: which events are kept, each one's text and numbers. Torch-free.

The same function feeds training and serving, so that both see identical texts. Must not know
tokenizers or tensors.
"""

import math
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeVar

from qanchor.config import ModalitySpec, ProfileSchema, nearest
from qanchor.data.measures import Measures, attribute_measures, event_measures
from qanchor.data.profile import DAY_SECONDS, MAX_VALUE, Event, Profile
from qanchor.errors import InvalidInput

T = TypeVar("T")

_COUNT_LADDER = (20, 25, 30, 40, 50, 70, 100, 150, 200, 300, 500, 700, 1000, 1500, 2000, 3000)


MAX_CHARS_PER_TOKEN = 100
"""Characters kept of a text per token kept of it. WordPiece makes one token of any longer word."""

Told = tuple[str, Measures]
"""A text and the numbers beside it."""


@dataclass(frozen=True, slots=True)
class RenderedProfile:
    """Event texts per modality, in schema order, oldest first."""

    texts: tuple[tuple[str, ...], ...]
    measures: tuple[tuple[Measures, ...], ...] = ()
    """The numbers beside each text, in the same order; empty where the schema has none."""

    @property
    def num_events(self) -> tuple[int, ...]:
        """Kept events per modality, in schema order."""
        return tuple(len(texts) for texts in self.texts)

    def flat(self) -> list[str]:
        """All texts in prefix order."""
        return [text for texts in self.texts for text in texts]

    def flat_measures(self) -> list[Measures]:
        """The numbers beside all texts, in prefix order; empty where the schema has none."""
        return [row for rows in self.measures for row in rows]


def render_profile(profile: Profile, schema: ProfileSchema) -> RenderedProfile:
    """Keep each modality's newest events inside the window and put them into words.

    Values beyond MAX_VALUE count as that. Raises InvalidInput for a modality the schema lacks.
    """
    by_modality: dict[str, list[Event]] = {spec.name: [] for spec in schema.modalities}
    oldest_s = profile.as_of_s - schema.window_days * DAY_SECONDS
    for event in profile.events:
        if event.modality not in by_modality:
            raise InvalidInput(
                "modality",
                event.modality,
                f"the schema has no such modality (user {profile.user_id!r})",
                nearest(event.modality, list(by_modality)),
            )
        if oldest_s <= event.time_s <= profile.as_of_s:
            by_modality[event.modality].append(_bounded(event))
    rendered = []
    for spec in schema.modalities:
        if spec.kind == "attributes":
            rendered.append(_attributes(profile)[: spec.max_events])
        else:
            events = sorted(by_modality[spec.name], key=_event_order)
            rendered.append(_modality(events, spec, profile.as_of_s))
    texts = tuple(
        tuple(cut_text(text, spec.max_event_tokens) for text, _ in told)
        for spec, told in zip(schema.modalities, rendered, strict=True)
    )
    if not schema.has_measures:
        return RenderedProfile(texts)
    return RenderedProfile(texts, tuple(tuple(row for _, row in told) for told in rendered))


def cut_text(text: str, max_tokens: int) -> str:
    """The words of a text from which its first `max_tokens` tokens come; the rest is never read.

    Cut at a blank, so that a tokenizer sees whole words. Tokenising a period's text, which may be
    of megabytes, would hold up everything else.
    """
    blank = text.find(" ", max_tokens * MAX_CHARS_PER_TOKEN)
    return text if blank < 0 else text[:blank]


def coarse_count(count: float) -> str:
    """A count in words: exact up to 20, then rounded down to a ladder, so that texts repeat.

    >>> coarse_count(7), coarse_count(64)
    ('7', '50+')
    """
    if count <= _COUNT_LADDER[0]:
        return f"{count:g}" if count == int(count) else f"{count:.1f}"
    return f"{max(step for step in _COUNT_LADDER if step <= count)}+"


def _bounded(event: Event) -> Event:
    if event.value is None or abs(event.value) <= MAX_VALUE:
        return event
    return replace(event, value=math.copysign(MAX_VALUE, event.value))


def _modality(events: list[Event], spec: ModalitySpec, as_of_s: int) -> list[Told]:
    render = _render_events if spec.group_by == "none" else _render_periods
    if not (events and spec.summary_template):
        return render(events, spec.max_events, spec, as_of_s)
    summary = _summary(events, spec.summary_template, as_of_s)
    numbers = event_measures(events, spec, as_of_s, is_summary=True)
    return [(summary, numbers), *render(events, spec.max_events - 1, spec, as_of_s)]


def _summary(events: list[Event], template: str, as_of_s: int) -> str:
    days = {_days_ago(event, as_of_s) for event in events}
    values = [event.value for event in events if event.value is not None]
    return template.format(
        num_events=coarse_count(len(events)),
        num_days=len(days),
        num_days_7=sum(day <= 7 for day in days),
        num_days_30=sum(day <= 30 for day in days),
        days_since_last=min(days),
        total_value=coarse_count(sum(values)),
        # Two significant digits.
        mean_value=f"{float(f'{sum(values) / len(values):.2g}'):g}" if values else "unknown",
    )


def _newest(items: list[T], limit: int) -> list[T]:
    return items[-limit:] if limit else []


def _event_order(event: Event) -> tuple[int, str, str]:
    return event.time_s, event.event_type, event.text


def _days_ago(event: Event, as_of_s: int) -> int:
    return (as_of_s - event.time_s) // DAY_SECONDS


def _render_events(events: list[Event], limit: int, spec: ModalitySpec, as_of_s: int) -> list[Told]:
    return [
        (
            spec.template.format(
                days_ago=_days_ago(event, as_of_s),
                text=event.text,
                event_type=event.event_type,
                value="" if event.value is None else coarse_count(event.value),
            ),
            event_measures([event], spec, as_of_s),
        )
        for event in _newest(events, limit)
    ]


def _render_periods(
    events: list[Event], limit: int, spec: ModalitySpec, as_of_s: int
) -> list[Told]:
    num_days = 7 if spec.group_by == "week" else 1

    def period(event: Event) -> int:
        # Yesterday is a day ago; what happened today belongs to the newest week.
        days_ago = _days_ago(event, as_of_s)
        return max(days_ago - 1, 0) // 7 if num_days == 7 else days_ago

    periods = [list(group) for _, group in groupby(events, key=period)]
    return [
        (_period_text(group, spec, as_of_s), event_measures(group, spec, as_of_s))
        for group in _newest(periods, limit)
    ]


def _period_text(group: list[Event], spec: ModalitySpec, as_of_s: int) -> str:
    counts: dict[str, tuple[int, float]] = {}
    for event in group:
        num_events, total = counts.get(event.event_type, (0, 0.0))
        counts[event.event_type] = (num_events + 1, total + (event.value or 0.0))
    items = ", ".join(
        spec.item_template.format(
            event_type=event_type,
            num_events=coarse_count(num_events),
            total_value=coarse_count(total),
        )
        for event_type, (num_events, total) in sorted(counts.items())
    )
    days = {_days_ago(event, as_of_s) for event in group}
    return spec.template.format(
        days_ago=min(days),
        weeks_ago=max(min(days) - 1, 0) // 7,
        num_days=len(days),
        items=items,
        num_events=coarse_count(len(group)),
        text=items,
    )


def _attributes(profile: Profile) -> list[Told]:
    told = []
    for name, value in profile.attributes.items():
        if isinstance(value, bool):
            shown = "yes" if value else "no"
        elif isinstance(value, (int, float)):
            shown = f"{value:g}"
        else:
            shown = str(value)
        told.append((f"{name.replace('_', ' ')}: {shown}", attribute_measures(value)))
    return told
