"""Train users as they stood on other days: several as-of moments of one user. Labels are not read.

A view is a user at `shift` days from the as-of day: the history is what came before, the future
what came from then on. Views after the as-of day use the train users' futures and so exist for
train users alone; earlier ones are asked of train users too, so that nobody else is learnt from.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qanchor.data.dataset import Dataset
from qanchor.data.profile import DAY_SECONDS, Event, Profile
from qanchor.errors import DataError


@dataclass(frozen=True, slots=True)
class View:
    """A user as of `shift` days from the as-of day."""

    user_id: str
    shift: int = 0

    @property
    def name(self) -> str:
        """Tells views apart where rows are named: the user's id, for a shift with it behind @."""
        return f"{self.user_id}@{self.shift:+d}" if self.shift else self.user_id


def stream_views(
    dataset: Dataset, shifts: Mapping[str, Sequence[int]], *, with_future: bool = True
) -> Iterator[tuple[View, Profile, tuple[Event, ...]]]:
    """Yield (view, its profile, what came after), users ascending, shifts in the order given.

    `shifts` maps a user to the shifts wanted. What came after reaches to the end of the recorded
    future; it is empty for users outside the train split, who may be asked for at shift 0 only,
    and without `with_future`, which then allows shift 0 alone. Raises DataError for another shift.
    """
    for user_id, wanted in shifts.items():
        split = dataset.split_of.get(user_id)
        if any(wanted) and not (split == "train" and with_future):
            rule = f"views exist for train users with futures; this user's split is {split}"
            raise DataError("shift", f"{user_id}: {list(wanted)}", rule, "ask for shift 0")
    learners = [user for user in shifts if dataset.split_of.get(user) == "train"]
    futures = dataset.future(learners if with_future else ())
    for profile in dataset.profiles(user_ids=list(shifts)):
        after: tuple[Event, ...] = ()
        if with_future and dataset.split_of[profile.user_id] == "train":
            user_id, after = next(futures)
            assert user_id == profile.user_id, "This is a bug: both streams ascend by user_id."
        for shift in shifts[profile.user_id]:
            yield View(profile.user_id, shift), *_shifted(profile, after, shift)


def _shifted(
    profile: Profile, after: tuple[Event, ...], shift: int
) -> tuple[Profile, tuple[Event, ...]]:
    if not shift:
        return profile, after
    as_of_s = profile.as_of_s + shift * DAY_SECONDS
    known = [event for event in (*profile.events, *after) if event.time_s < as_of_s]
    later = [event for event in (*profile.events, *after) if event.time_s >= as_of_s]
    moved = Profile(
        user_id=profile.user_id,
        as_of_s=as_of_s,
        events=tuple(known),
        attributes=profile.attributes,
    )
    return moved, tuple(later)
