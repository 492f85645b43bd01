"""Pages of the OULAD learning platform and the clicks on them, in words."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qanchor.data.adapters.oulad_rows import event_table, texts_by_code
from qanchor.data.adapters.oulad_tables import IntArray, Presentations, read_csv

_ACTIVITIES = {
    "homepage": ("navigation", "opened the course homepage"),
    "subpage": ("navigation", "opened course sub-page"),
    "sharedsubpage": ("navigation", "opened shared sub-page"),
    "folder": ("navigation", "opened folder"),
    "oucontent": ("content", "studied learning unit"),
    "resource": ("content", "opened resource file"),
    "url": ("content", "followed external link"),
    "page": ("content", "read information page"),
    "dualpane": ("content", "read two-pane page"),
    "glossary": ("content", "looked up glossary"),
    "htmlactivity": ("content", "used interactive activity"),
    "dataplus": ("content", "used course database"),
    "forumng": ("social", "visited discussion forum"),
    "ouwiki": ("social", "opened course wiki"),
    "oucollaborate": ("social", "joined online tutorial room"),
    "ouelluminate": ("social", "joined live session room"),
    "quiz": ("quiz", "worked on quiz"),
    "externalquiz": ("quiz", "worked on external quiz"),
    "questionnaire": ("quiz", "filled in questionnaire"),
    "repeatactivity": ("quiz", "repeated activity"),
}
_CLICK_RANGES = ((11, 15), (16, 20), (21, 30), (31, 50), (51, 100))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sites:
    """Pages of the learning platform, ascending by id."""

    id_site: IntArray
    activity: tuple[str, ...]
    phrase: tuple[str, ...]
    """What a visit is called: `studied learning unit 12 (planned for week 3)`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clicks:
    """Clicks of kept users, summed per (user, page, day)."""

    user: IntArray
    site: IntArray
    """Index into `Sites`."""
    day: IntArray
    clicks: IntArray

    def where(self, keep: npt.NDArray[np.bool_]) -> "Clicks":
        """The rows of a mask."""
        return Clicks(
            user=self.user[keep], site=self.site[keep], day=self.day[keep], clicks=self.clicks[keep]
        )


def read_sites(directory: Path, presentations: Presentations) -> Sites:
    """Read vle.csv; a page's number counts the pages of its type in its presentation, by id."""
    table = read_csv(directory, "vle.csv").sort_by("id_site")
    numbers = presentations.numbers(table, "vle.csv").tolist()
    activities = table["activity_type"].to_pylist()
    weeks = zip(table["week_from"].to_pylist(), table["week_to"].to_pylist(), strict=True)
    counted: dict[tuple[int, str], int] = {}
    phrases = []
    for number, activity, (first, last) in zip(numbers, activities, weeks, strict=True):
        counted[number, activity] = counted.get((number, activity), 0) + 1
        _, verb = _ACTIVITIES.get(activity, ("content", f"opened {activity}"))
        place = "" if activity == "homepage" else f" {counted[number, activity]}"
        plan = "" if first is None else f" (planned for week {first})"
        if first is not None and last not in (None, first):
            plan = f" (planned for weeks {first}-{last})"
        phrases.append(f"{verb}{place}{plan}")
    return Sites(
        id_site=table["id_site"].to_numpy(), activity=tuple(activities), phrase=tuple(phrases)
    )


def click_events(clicks: Clicks, sites: Sites) -> pa.Table:
    """One event per user, page and day; `value` is the number of clicks."""
    # 1..10 are told exactly, then ranges: code 11.. counts the ranges passed.
    starts = np.array([first for first, _ in _CLICK_RANGES] + [_CLICK_RANGES[-1][1] + 1])
    code = np.where(
        clicks.clicks <= 10, clicks.clicks, 10 + np.searchsorted(starts, clicks.clicks, "right")
    )
    pairs, place = np.unique(np.stack([clicks.site, code]), axis=1, return_inverse=True)
    texts = [f"{sites.phrase[site]}, {_clicks_phrase(code)}" for site, code in pairs.T.tolist()]
    modality = [_ACTIVITIES.get(activity, ("content", ""))[0] for activity in sites.activity]
    return event_table(
        user=clicks.user,
        day=clicks.day,
        modality=texts_by_code(clicks.site, modality),
        event_type=texts_by_code(clicks.site, list(sites.activity)),
        text=texts_by_code(place, texts),
        value=clicks.clicks.astype(np.float64),
    )


def _clicks_phrase(code: int) -> str:
    if code == 1:
        return "1 click"
    if code <= 10:
        return f"{code} clicks"
    if code - 11 < len(_CLICK_RANGES):
        first, last = _CLICK_RANGES[code - 11]
        return f"{first}-{last} clicks"
    return f"more than {_CLICK_RANGES[-1][1]} clicks"
