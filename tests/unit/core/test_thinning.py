"""Event dropout: fewer events of the same users, everything else as it was."""

from dataclasses import replace

import numpy as np
import pytest

from qanchor.checkpoint import Checkpoint
from qanchor.config import override
from qanchor.errors import ConfigError
from qanchor.train.batches import Segment
from qanchor.train.corpus import PrefixCorpus
from qanchor.train.recipes import Recipe
from qanchor.train.source import Picked
from qanchor.train.thinning import thinned

USERS = (11, 0, 10, 7)


@pytest.fixture
def picked(checkpoint: Checkpoint, corpus: PrefixCorpus) -> Picked:
    """Four users in mixed order, one of them without events, all with statistics of their own."""
    statistics = np.arange(len(corpus.rendered.rows), dtype=np.float16)[:, None].repeat(3, axis=1)
    rendered = replace(corpus.rendered, statistics=statistics)
    segment = Segment(checkpoint.encode_query("How active?"), checkpoint.encode_answer("very"))
    return Picked(replace(corpus, rendered=rendered), USERS, [[segment]] * len(USERS))


def test_a_user_keeps_a_part_of_the_events_in_their_order(picked: Picked) -> None:
    few = thinned(picked, 0.3, np.random.default_rng(5))
    assert list(few.users) == [0, 1, 2, 3]
    assert few.segments == picked.segments
    for place, user in enumerate(USERS):
        whole, left = picked.corpus.layout(user), few.corpus.layout(place)
        assert len(left) <= len(whole)
        # Texts repeat within a user here and there, so look for the rest in order.
        rest = iter(picked.corpus.event_rows(whole, user).tolist())
        assert all(row in rest for row in few.corpus.event_rows(left, place).tolist())
        assert few.corpus.rendered.user_ids[place] == f"u{user}"
    assert sum(map(sum, few.corpus.rendered.num_events)) < sum(
        sum(picked.corpus.rendered.num_events[user]) for user in USERS
    )


def test_measures_stay_beside_their_events_and_statistics_tell_the_whole(picked: Picked) -> None:
    rendered = picked.corpus.rendered
    numbered = replace(rendered, measures=tuple(
        np.stack([rows, rows + 0.5], axis=1).astype(np.float32) for rows in rendered.rows
    ))  # fmt: skip
    picked = replace(picked, corpus=replace(picked.corpus, rendered=numbered))
    few = thinned(picked, 0.3, np.random.default_rng(5)).corpus.rendered
    for rows, measures in zip(few.rows, few.measures, strict=True):
        assert measures[:, 0].tolist() == rows.tolist()
    assert few.statistics is not None
    assert few.statistics[:, 0].tolist() == list(USERS)


def test_users_lack_different_shares_that_average_to_the_wanted_one(picked: Picked) -> None:
    whole = sum(picked.corpus.rendered.num_events[11])
    lost = [
        1
        - sum(thinned(picked, 0.2, np.random.default_rng(n)).corpus.rendered.num_events[0]) / whole
        for n in range(400)
    ]
    assert np.mean(lost) == pytest.approx(0.2, abs=0.03)
    assert min(lost) == 0
    assert max(lost) > 0.4


def test_a_share_of_half_or_more_is_refused(tiny_recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="event_dropout"):
        override(tiny_recipe, ["train.event_dropout=0.5"])
