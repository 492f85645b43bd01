"""The messages of each step, from the texts in prompts.toml.

The profile comes first and is the same in all steps of a user, so that an endpoint that keeps
common beginnings reads it once.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import msgspec

from qanchor.config import Config, ProfileSchema, load
from qanchor.data.profile import Profile
from qanchor.data.render import render_profile
from qanchor.userqa.pool import QaPool
from qanchor.userqa.replies import Draft

_SHOWN_REPLY_CHARS = 4000

Messages = tuple[tuple[str, str], ...]
"""(role, content), in order."""


class Prompts(Config, frozen=True, kw_only=True):
    """Content of prompts.toml."""

    version: int
    system: str
    profile: str
    pick: str
    draft: str
    reflect: str
    mend: str


@cache
def prompts() -> Prompts:
    """The texts."""
    return load(Prompts, Path(__file__).parent / "prompts.toml")


def profile_text(profile: Profile, schema: ProfileSchema) -> str:
    """The profile as the embedding model sees it, under modality names; empty without any text.

    The user's id is no part of it.
    """
    rendered = render_profile(profile, schema)
    blocks = [
        "\n".join([f"[{spec.name}]", *texts])
        for spec, texts in zip(schema.modalities, rendered.texts, strict=True)
        if texts
    ]
    return "\n".join([schema.header, *blocks]) if blocks else ""


def pick_messages(profile: str, pool: QaPool, num_topics: int) -> Messages:
    """Step 1: which topics?"""
    listed = "\n".join(f"{topic.name}: {topic.about}" for topic in pool.topics)
    return _messages(profile, prompts().pick.format(num_topics=num_topics, pool=listed))


def draft_messages(profile: str, pool: QaPool, topics: Sequence[str]) -> Messages:
    """Steps 2 and 3: a question and an answer for each topic."""
    about = {topic.name: topic.about for topic in pool.topics}
    listed = "\n".join(f"{name}: {about[name]}" for name in topics)
    return _messages(profile, prompts().draft.format(topics=listed))


def reflect_messages(profile: str, drafts: Sequence[Draft]) -> Messages:
    """Step 4: does the profile support the answers?"""
    listed = "\n".join(msgspec.json.encode(draft).decode() for draft in drafts)
    return _messages(profile, prompts().reflect.format(drafts=listed))


def mended(messages: Messages, reply: str, problem: str) -> Messages:
    """The same question again after a reply that could not be used."""
    shown = reply[:_SHOWN_REPLY_CHARS] or "(nothing)"
    again = prompts().mend.format(problem=problem).strip()
    return (*messages, ("assistant", shown), ("user", again))


def _messages(profile: str, task: str) -> Messages:
    # Not format(): a profile may hold braces.
    before = prompts().profile.replace("{profile}", profile)
    return (("system", prompts().system.strip()), ("user", f"{before}{task.strip()}"))
