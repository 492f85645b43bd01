"""A user's events by category and day, and the words for how much, how often and whither.

The common ground of `futures` and `grounded`: both turn an `Activity` into sentences.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

from qanchor.data.profile import DAY_SECONDS, Event

Category = tuple[str, str]
"""(modality, event_type)."""
Record = tuple[int, Event]
"""(day, event); day 0 is the as-of day, yesterday is -1."""

_FREQUENCY_LADDER = (
    (0.0, "never"),
    (0.075, "rarely"),
    (0.2, "sometimes"),
    (0.5, "often"),
    (0.8, "very often"),
)
_TREND_LADDER = (
    (0.5, "falls sharply"),
    (0.8, "falls"),
    (1.25, "stays about the same"),
    (2.0, "rises"),
)


@dataclass(frozen=True, slots=True)
class Activity:
    """What one user did from `first_day` on for `num_days` days."""

    first_day: int
    num_days: int
    by_category: Mapping[Category, tuple[Record, ...]]
    """Records of a category in ascending order of day; categories without any are absent."""
    _days: dict[tuple[str, tuple[str, ...], tuple[str, ...]], tuple[int, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """What `days` has found: many questions are about the same days."""

    def select(self, modality: str = "", event_types: tuple[str, ...] = ()) -> list[Record]:
        """Records of a modality ("" = all) and of some event types (none = all), by day."""
        return _merged(self._parts(modality, event_types))

    def acts(self, passive: tuple[str, ...]) -> list[Record]:
        """Records without `passive` event types, in which the user does nothing."""
        return _merged(self._parts(passive=passive))

    def days(
        self,
        modality: str = "",
        event_types: tuple[str, ...] = (),
        passive: tuple[str, ...] = (),
    ) -> tuple[int, ...]:
        """Distinct days with records that `select` finds, ascending; `passive` types left out."""
        asked = (modality, event_types, passive)
        if asked not in self._days:
            self._days[asked] = tuple(active_days(chain.from_iterable(self._parts(*asked))))
        return self._days[asked]

    def _parts(
        self,
        modality: str = "",
        event_types: tuple[str, ...] = (),
        passive: tuple[str, ...] = (),
    ) -> Iterator[tuple[Record, ...]]:
        for (name, event_type), records in self.by_category.items():
            is_asked = modality in ("", name) and (not event_types or event_type in event_types)
            if is_asked and event_type not in passive:
                yield records

    def between(self, first_day: int, last_day: int) -> "Activity":
        """The part from `first_day` to `last_day`, both included."""
        parts = {
            category: tuple(record for record in records if first_day <= record[0] <= last_day)
            for category, records in self.by_category.items()
        }
        kept = {category: records for category, records in parts.items() if records}
        return Activity(first_day, last_day - first_day + 1, kept)

    def days_by_category(self) -> dict[Category, int]:
        """Number of active days of every category."""
        return {name: len(active_days(records)) for name, records in self.by_category.items()}


def _merged(parts: Iterable[tuple[Record, ...]]) -> list[Record]:
    return sorted((record for records in parts for record in records), key=lambda item: item[0])


def collect(events: Iterable[Event], as_of_s: int, first_day: int, num_days: int) -> Activity:
    """Sort events into categories; those outside the span of days are left out."""
    found: dict[Category, list[Record]] = {}
    for event in events:
        day = (event.time_s - as_of_s) // DAY_SECONDS
        if first_day <= day < first_day + num_days:
            found.setdefault((event.modality, event.event_type), []).append((day, event))
    ordered = {
        category: tuple(sorted(found[category], key=lambda record: record[0]))
        for category in sorted(found)
    }
    return Activity(first_day, num_days, ordered)


def active_days(records: Iterable[Record]) -> list[int]:
    """Distinct days, ascending."""
    return sorted({day for day, _ in records})


def frequency_word(num_active: int, num_days: int) -> str:
    """How often something happens, by its share of days.

    >>> [frequency_word(days, 30) for days in (0, 2, 6, 15, 24, 29)]
    ['never', 'rarely', 'sometimes', 'often', 'very often', 'almost daily']
    """
    share = num_active / num_days
    return next((word for limit, word in _FREQUENCY_LADDER if share <= limit), "almost daily")


def trend_word(recent: float, earlier: float) -> str:
    """How a rate changes from an earlier to a recent span.

    >>> trend_word(2, 10), trend_word(10, 9), trend_word(0, 3), trend_word(3, 0)
    ('falls sharply', 'stays about the same', 'stops', 'begins')
    """
    if not earlier:
        return "begins" if recent else "stays absent"
    if not recent:
        return "stops"
    ratio = recent / earlier
    return next((word for limit, word in _TREND_LADDER if ratio <= limit), "rises sharply")


def level_word(value: float, low: float, high: float) -> str:
    """Where a value lies between two bounds.

    >>> level_word(90, 50, 80)
    'high'
    """
    if value < low:
        return "low"
    return "high" if value >= high else "medium"


def item_of(text: str, ends_before: str) -> str:
    """The thing an event text is about: the part before the last `ends_before`, if it has one.

    >>> item_of("visited discussion forum 3, 2 clicks", ", ")
    'visited discussion forum 3'
    """
    return text.rpartition(ends_before)[0] or text if ends_before else text


def join_words(words: Iterable[str]) -> str:
    """A list in prose.

    >>> join_words(["bus", "train", "car"])
    'bus, train and car'
    """
    listed = list(words)
    return " and ".join(filter(None, (", ".join(listed[:-1]), *listed[-1:])))
