"""A language model's replies, checked: what can be used of one, and what is wrong with the rest.

One bad entry spoils only itself. Knows nothing of requests.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec

T = TypeVar("T")
Query = Annotated[str, msgspec.Meta(pattern=r"\S", max_length=400)]
Answer = Annotated[str, msgspec.Meta(pattern=r"\S", max_length=1500)]


class Draft(msgspec.Struct, frozen=True):
    """A question and its draft answer."""

    topic: str
    query: Query
    answer: Answer


class Verdict(msgspec.Struct, frozen=True):
    """What reflection makes of a draft; `answer` is the corrected one of `revise`."""

    topic: str
    verdict: Literal["keep", "revise", "drop"]
    answer: Annotated[str, msgspec.Meta(max_length=1500)] = ""


@dataclass(frozen=True, slots=True)
class Reading(Generic[T]):
    """What a reply says, by topic; `problem` is empty where nothing is missing."""

    found: dict[str, T]
    problem: str = ""


class _Picked(msgspec.Struct):
    topics: list[Any]


class _Answers(msgspec.Struct):
    answers: list[msgspec.Raw]


def read_pick(text: str, names: Sequence[str], num_topics: int) -> Reading[str]:
    """Up to `num_topics` names of the pool, in the reply's order."""
    try:
        picked = msgspec.json.decode(_json_object(text), type=_Picked)
    except msgspec.DecodeError as error:
        return Reading({}, f"the reply does not have the form asked for ({error})")
    said = [_as_name(name) for name in picked.topics if isinstance(name, str)]
    known = list(dict.fromkeys(name for name in said if name in names))
    found = {name: name for name in known[:num_topics]}
    wanted = min(num_topics, len(names))
    if len(found) < wanted:
        return Reading(found, f"{len(found)} names of the list were given, {wanted} are needed")
    return Reading(found)


def read_drafts(text: str, topics: Sequence[str]) -> Reading[Draft]:
    """The usable drafts."""

    def convert(raw: msgspec.Raw) -> Draft:
        draft = msgspec.json.decode(raw, type=Draft)
        return Draft(_as_name(draft.topic), _one_line(draft.query), _one_line(draft.answer))

    return _read_answers(text, topics, convert)


def read_verdicts(text: str, topics: Sequence[str]) -> Reading[Verdict]:
    """The usable verdicts; one that revises without a corrected answer is not."""

    def convert(raw: msgspec.Raw) -> Verdict:
        verdict = msgspec.json.decode(raw, type=Verdict)
        answer = _one_line(verdict.answer)
        if verdict.verdict == "revise" and not answer:
            raise msgspec.ValidationError("`revise` needs the corrected answer")
        return Verdict(_as_name(verdict.topic), verdict.verdict, answer)

    return _read_answers(text, topics, convert)


def _read_answers(
    text: str, topics: Sequence[str], convert: Callable[[msgspec.Raw], T]
) -> Reading[T]:
    try:
        raws = msgspec.json.decode(_json_object(text), type=_Answers).answers
    except msgspec.DecodeError as error:
        return Reading({}, f"the reply does not have the form asked for ({error})")
    found: dict[str, T] = {}
    problem = ""
    for raw in raws:
        try:
            item = convert(raw)
        except msgspec.DecodeError as error:
            problem = f"an entry is not as asked for ({error})"
            continue
        name: str = getattr(item, "topic", "")
        if name in topics:
            found.setdefault(name, item)
    missing = [name for name in topics if name not in found]
    if not missing:
        return Reading(found)
    return Reading(found, f"no usable entry for {', '.join(missing)}{problem and '; '}{problem}")


def _json_object(text: str) -> str:
    """The outermost braces: models wrap JSON into fences, greetings and thoughts."""
    text = text.rpartition("</think>")[2]
    return text[text.find("{") : text.rfind("}") + 1] if "{" in text else text


def _as_name(text: str) -> str:
    return text.strip().lower().replace(" ", "_").replace("-", "_")


def _one_line(text: str) -> str:
    return " ".join(text.split())
