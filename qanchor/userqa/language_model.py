"""The author that asks a language model: three requests per user, and more for malformed replies.

One request answers all topics of a step. The profile is most of what is sent: a request per topic
would send it ten times as often, and topics answered apart repeat each other.
"""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Literal, TypeVar

from qanchor.config import ProfileSchema
from qanchor.userqa.asking import Asking
from qanchor.userqa.author import QaUser
from qanchor.userqa.config import UserQaConfig
from qanchor.userqa.pool import QaPool
from qanchor.userqa.prompts import (
    Messages,
    draft_messages,
    mended,
    pick_messages,
    profile_text,
    reflect_messages,
)
from qanchor.userqa.replies import (
    Draft,
    Reading,
    Verdict,
    read_drafts,
    read_pick,
    read_verdicts,
)

T = TypeVar("T")
Step = Literal["pick", "draft", "reflect"]


class LanguageModelAuthor:
    """Asks for topics, drafts and verdicts, and checks every reply."""

    def __init__(
        self, asking: Asking, pool: QaPool, schema: ProfileSchema, config: UserQaConfig
    ) -> None:
        self.pool = pool
        self._asking = asking
        self._schema = schema
        self._config = config

    async def pick(self, user: QaUser) -> Sequence[str]:
        """The model's choice, filled up by lot; none for a profile without any text."""
        profile = profile_text(user.profile, self._schema)
        if not profile:
            return []
        names, num_topics = self.pool.names, self._config.num_topics
        picked = await self._usable(
            "pick",
            pick_messages(profile, self.pool, num_topics),
            lambda text: read_pick(text, names, num_topics),
        )
        left = [name for name in names if name not in picked]
        num_missing = min(num_topics, len(names)) - len(picked)
        # Reflection drops what the profile does not answer, so a topic by lot does no harm.
        filled_in = Random(f"{self._config.seed}/pick/{user.user_id}").sample(left, num_missing)
        self._asking.tally.num_topics_filled_in += num_missing
        return [*picked, *filled_in]

    async def draft(self, user: QaUser, topics: Sequence[str]) -> Mapping[str, Draft]:
        """The model's questions and answers."""
        profile = profile_text(user.profile, self._schema)
        messages = draft_messages(profile, self.pool, topics)
        return await self._usable("draft", messages, lambda text: read_drafts(text, topics))

    async def reflect(self, user: QaUser, drafts: Sequence[Draft]) -> Mapping[str, Verdict]:
        """The model's verdicts on its drafts."""
        profile = profile_text(user.profile, self._schema)
        topics = [draft.topic for draft in drafts]
        messages = reflect_messages(profile, drafts)
        return await self._usable("reflect", messages, lambda text: read_verdicts(text, topics))

    async def _usable(
        self, step: Step, messages: Messages, read: Callable[[str], Reading[T]]
    ) -> dict[str, T]:
        """What the first faultless reply says; without one, what the most complete one says."""
        tally, asked = self._asking.tally, messages
        best: dict[str, T] = {}
        for attempt in range(1 + self._config.max_mendings):
            text = await self._asking.ask(asked, attempt)
            reading = read(text)
            if not reading.problem:
                return reading.found
            if step == "pick":
                tally.num_malformed_pick += 1
            elif step == "draft":
                tally.num_malformed_draft += 1
            else:
                tally.num_malformed_reflect += 1
            best = max(best, reading.found, key=len)
            asked = mended(messages, text, reading.problem)
        return best
