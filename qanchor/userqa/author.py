"""What every author of questions and answers does for a user, in three steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from qanchor.data.profile import Profile
from qanchor.userqa.replies import Draft, Verdict


@dataclass(frozen=True, slots=True)
class QaUser:
    """A user as an author sees it."""

    user_id: str
    """For the file and for random generators; never sent."""
    profile: Profile
    """Nothing of it lies at or after the as-of moment."""


class Author(Protocol):
    """Writes questions and answers. Each step may raise Unfinished, Refused or ConfigError."""

    async def pick(self, user: QaUser) -> Sequence[str]:
        """The topics the profile says most about, most relevant first."""

    async def draft(self, user: QaUser, topics: Sequence[str]) -> Mapping[str, Draft]:
        """A question and an answer by topic; a topic without a usable one is missing."""

    async def reflect(self, user: QaUser, drafts: Sequence[Draft]) -> Mapping[str, Verdict]:
        """Each answer checked against the profile; one without a usable verdict is missing."""
