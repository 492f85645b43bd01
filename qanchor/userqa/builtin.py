"""The built-in author: answers computed from the profile by `qanchor.data.grounded`.

Asks nobody. The triples are those of `qanchor data triples --uqa NUM_TOPICS` with the same seed.
"""

from collections.abc import Mapping, Sequence
from random import Random

from qanchor.data.activity import collect
from qanchor.data.dataset import Dataset
from qanchor.data.grounded import Answered, GroundedUser, answer_topics
from qanchor.data.topics import load_topics
from qanchor.data.useru import known_types
from qanchor.userqa.author import QaUser
from qanchor.userqa.replies import Draft, Verdict


class BuiltinAuthor:
    """The rules in the place of a language model."""

    def __init__(self, dataset: Dataset, num_topics: int, seed: int) -> None:
        self.pool = load_topics(
            dataset.path, dataset.name, dataset.schema, dataset.config.attributes
        )
        self._known_types = known_types(dataset)
        self._window_days = dataset.schema.window_days
        self._num_topics = num_topics
        self._seed = seed

    async def pick(self, user: QaUser) -> Sequence[str]:
        """Topics drawn with weights; see `answer_topics`."""
        return [answered.topic for answered in self._answers(user)]

    async def draft(self, user: QaUser, topics: Sequence[str]) -> Mapping[str, Draft]:
        """The picked topics, answered."""
        # Computed again instead of remembered: it is cheap, and leaves nothing behind.
        return {
            each.topic: Draft(each.topic, each.query, each.answer)
            for each in self._answers(user)
            if each.topic in topics
        }

    async def reflect(self, user: QaUser, drafts: Sequence[Draft]) -> Mapping[str, Verdict]:
        """All kept: what the profile does not support was not answered."""
        return {draft.topic: Verdict(draft.topic, "keep") for draft in drafts}

    def _answers(self, user: QaUser) -> list[Answered]:
        profile, days = user.profile, self._window_days
        grounded = GroundedUser(
            profile=profile,
            history=collect(profile.events, profile.as_of_s, -days, days),
            known_types=self._known_types,
        )
        # The generator of qanchor.data.useru, so that both write the same triples.
        rng = Random(f"{self._seed}/uqa/{user.user_id}")
        return answer_topics(grounded, self.pool, self._num_topics, rng)
