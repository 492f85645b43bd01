"""A user's profile: time-stamped events by modality plus attributes, as of a moment. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qanchor.config import ProfileSchema, nearest
from qanchor.errors import InvalidInput

DAY_SECONDS = 86_400
MAX_TEXT_CHARS = 2_000
MAX_VALUE = 1e15
"""Values lie between -MAX_VALUE and MAX_VALUE: their sums stay finite."""
VALUE_RULE = f"must lie between {-MAX_VALUE:g} and {MAX_VALUE:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One behaviour record."""

    time_s: int
    """Unix seconds."""
    modality: str
    event_type: str
    text: str
    value: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """All that is known of a user at `as_of_s`; events in any order."""

    user_id: str
    as_of_s: int
    """Unix seconds; `days_ago` in event texts counts back from here."""
    events: tuple[Event, ...] = ()
    attributes: Mapping[str, str | float | bool] = field(default_factory=dict)


def validate_event(event: Event, schema: ProfileSchema, as_of_s: int, where: str) -> None:
    """Raise InvalidInput (field path below `where`) unless the event fits the schema."""
    valid = [spec.name for spec in schema.modalities if spec.kind == "events"]
    if event.modality not in valid:
        raise InvalidInput(
            f"{where}.modality",
            event.modality,
            f"must be one of {', '.join(valid)}",
            nearest(event.modality, valid),
        )
    if not event.text and not event.event_type:
        raise InvalidInput(
            f"{where}.text", event.text, "text or event_type is required", "describe it"
        )
    if len(event.text) > MAX_TEXT_CHARS:
        raise InvalidInput(
            f"{where}.text", event.text, f"at most {MAX_TEXT_CHARS} characters", "shorten it"
        )
    # Written so that NaN is refused, too.
    if event.value is not None and not abs(event.value) <= MAX_VALUE:
        raise InvalidInput(f"{where}.value", event.value, VALUE_RULE, "leave it unset if unknown")
    if event.time_s > as_of_s:
        raise InvalidInput(
            f"{where}.time",
            event.time_s,
            f"lies after the profile's as-of time {as_of_s}",
            "send a later as-of time or correct the time stamp",
        )
