"""Made-up users of a schema, for proofs and measurements without data. Torch-free."""

import random

from qanchor.config import ModalitySpec, ProfileSchema
from qanchor.data.profile import DAY_SECONDS, Event, Profile
from qanchor.data.render import RenderedProfile, render_profile

_AS_OF_S = 1_700_000_000
_VERBS = ("pays", "opens", "searches", "views", "orders", "books", "reads", "returns")
_THINGS = (
    "coffee", "train ticket", "utility bill", "concert", "groceries", "phone plan", "savings",
    "bicycle", "hotel", "insurance", "lunch", "film", "garden tools", "city map", "shoes",
)  # fmt: skip

SAMPLE_QUERIES = (
    "Will the user take out food next week?",
    "How likely is the user to travel?",
    "What are the user's most likely actions in the next period?",
    "Does the user save money regularly?",
    "Is the user interested in concerts?",
    "Which brand does the user prefer?",
    "Is there a risk of fraud?",
    "How active is the user?",
    "Would a discount change what the user buys?",
    "Will the user log in tomorrow?",
)


def sample_users(
    schema: ProfileSchema, num_users: int, seed: int, fill: float | None = None
) -> list[RenderedProfile]:
    """Rendered random users. `fill` is the share of each modality's limit that is used.

    None draws the share per user and modality, so that prefix lengths differ and some modalities
    are empty.
    """
    profiles = sample_profiles(schema, num_users, seed, fill)
    return [render_profile(profile, schema) for profile in profiles]


def sample_profiles(
    schema: ProfileSchema, num_users: int, seed: int, fill: float | None = None
) -> list[Profile]:
    """The same users as they are stored; ids `sample-0`, `sample-1`, ..."""
    draw = random.Random(seed)
    return [_profile(schema, draw, fill, f"sample-{number}") for number in range(num_users)]


def _profile(
    schema: ProfileSchema, draw: random.Random, fill: float | None, user_id: str
) -> Profile:
    events: list[Event] = []
    attributes: dict[str, str | float | bool] = {}
    for spec in schema.modalities:
        share = draw.choice((0.0, 0.3, 0.6, 1.0)) if fill is None else fill
        count = round(spec.max_events * share)
        if spec.kind == "attributes":
            attributes |= {f"feature_{i}": round(draw.random() * 100, 2) for i in range(count)}
        else:
            events += _events(spec, count, schema.window_days, draw)
    return Profile(user_id=user_id, as_of_s=_AS_OF_S, events=tuple(events), attributes=attributes)


def _events(spec: ModalitySpec, count: int, window_days: int, draw: random.Random) -> list[Event]:
    days = range(window_days)
    # Grouped modalities give one text per day, so their events fall on different days.
    if spec.group_by == "day":
        ages = draw.sample(days, min(count, len(days)))
    else:
        ages = [draw.choice(days) for _ in range(count)]
    return [
        Event(
            time_s=_AS_OF_S - age * DAY_SECONDS,
            modality=spec.name,
            event_type=draw.choice(_VERBS),
            text=" ".join(draw.choice(_THINGS) for _ in range(draw.randint(1, 4))),
            value=round(draw.random() * 200, 2),
        )
        for age in ages
    ]
