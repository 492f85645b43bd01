"""A profile in words: which events are kept and the text of each, per modality. Torch-free.

The same function feeds training and serving, so that both see identical texts. Must not know
tokenizers or tensors.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from qanchor.config import ModalitySpec, ProfileSchema
from qanchor.data.profile import DAY_SECONDS, Event, Profile

T = TypeVar("T")

_COUNT_LADDER = (20, 25, 30, 40, 50, 70, 100, 150, 200, 300, 500, 700, 1000, 1500, 2000, 3000)


@dataclass(frozen=True, slots=True)
class RenderedProfile:
    """Event texts per modality, in schema order, oldest first."""

    texts: tuple[tuple[str, ...], ...]

    @property
    def num_events(self) -> tuple[int, ...]:
        """Kept events per modality, in schema order."""
        return tuple(len(texts) for texts in self.texts)

    def flat(self) -> list[str]:
        """All texts in prefix order."""
        return [text for texts in self.texts for text in texts]


def render_profile(profile: Profile, schema: ProfileSchema) -> RenderedProfile:
    """Keep each modality's newest events inside the window and put them into words."""
    by_modality: dict[str, list[Event]] = {spec.name: [] for spec in schema.modalities}
    oldest_s = profile.as_of_s - schema.window_days * DAY_SECONDS
    for event in profile.events:
        if oldest_s <= event.time_s <= profile.as_of_s:
            by_modality[event.modality].append(event)
    rendered = []
    for spec in schema.modalities:
        if spec.kind == "attributes":
            texts = _attribute_texts(profile)
            rendered.append(tuple(texts[: spec.max_events]))
        else:
            events = sorted(by_modality[spec.name], key=_event_order)
            rendered.append(tuple(_modality_texts(events, spec, profile.as_of_s)))
    return RenderedProfile(tuple(rendered))


def coarse_count(count: float) -> str:
    """A count in words: exact up to 20, then rounded down to a ladder, so that texts repeat.

    >>> coarse_count(7), coarse_count(64)
    ('7', '50+')
    """
    if count <= _COUNT_LADDER[0]:
        return f"{count:g}" if count == int(count) else f"{count:.1f}"
    return f"{max(step for step in _COUNT_LADDER if step <= count)}+"


def _modality_texts(events: list[Event], spec: ModalitySpec, as_of_s: int) -> list[str]:
    render = _render_days if spec.group_by == "day" else _render_events
    if not (events and spec.summary_template):
        return render(events, spec.max_events, spec, as_of_s)
    summary = _summary(events, spec.summary_template, as_of_s)
    return [summary, *render(events, spec.max_events - 1, spec, as_of_s)]


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


def _render_events(events: list[Event], limit: int, spec: ModalitySpec, as_of_s: int) -> list[str]:
    return [
        spec.template.format(
            days_ago=_days_ago(event, as_of_s),
            text=event.text,
            event_type=event.event_type,
            value="" if event.value is None else coarse_count(event.value),
        )
        for event in _newest(events, limit)
    ]


def _render_days(events: list[Event], limit: int, spec: ModalitySpec, as_of_s: int) -> list[str]:
    texts = []
    days = [
        (days_ago, list(group))
        for days_ago, group in groupby(events, key=lambda event: _days_ago(event, as_of_s))
    ]
    for days_ago, group in _newest(days, limit):
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
        texts.append(
            spec.template.format(
                days_ago=days_ago, items=items, num_events=coarse_count(len(group)), text=items
            )
        )
    return texts


def _attribute_texts(profile: Profile) -> list[str]:
    texts = []
    for name, value in profile.attributes.items():
        if isinstance(value, bool):
            shown = "yes" if value else "no"
        elif isinstance(value, (int, float)):
            shown = f"{value:g}"
        else:
            shown = str(value)
        texts.append(f"{name.replace('_', ' ')}: {shown}")
    return texts
