"""Behaviour prediction (D_future): questions about what a train user does after the as-of moment.

Q-Anchor section 2.1 asks a fixed set of template queries; here a choice among kinds of question,
what they are about, how many days ahead, and in which words. The answers: `future_answers`.
"""

import math
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from random import Random

from qanchor.data.activity import Activity
from qanchor.data.future_answers import Asked, FutureUser, Subject, answer, often_days
from qanchor.data.grounded import Answered, capitalised
from qanchor.data.number_words import digits, spelled
from qanchor.data.topics import TopicPool, ValueMeaning, is_asked_of_future

_HORIZONS_DAYS = (7, 10, 14, 21, 30, 45, 60)
_PERIODS = {
    7: ("week",),
    14: ("two weeks", "fortnight"),
    21: ("three weeks",),
    30: ("month", "four weeks"),
    45: ("month and a half",),
    60: ("two months", "eight weeks"),
}
"""Horizons in other words, to stand after "the next" or "the coming"."""
_WORDINGS = (40, 10)
"""Of a question, and of one with a number in it, for each number: each is one more to read for a
query encoder, and to be kept in memory."""
_TYPE_WORDINGS = (14, 4)
"""The same for questions about event types, which are many."""
_OUTCOME_WORDINGS = (160, 24)
"""The same for outcomes, which are few and have to be told apart by how they are put."""
_MOST_TEMPLATES = 1 << 12
"""What a wording's code says beyond this chooses other words than the template."""

_WIDE = ("outlook", "change", "novelty")
_WIDE_SHARE = 0.2
"""Of the questions; their answers are long, those of narrow ones a few words."""
_TYPE_SHARE = 0.2
"""Of the questions; about an event type or two, of which there may be any number."""
_OUTCOME_SHARE = 0.25
"""Of the questions; few kinds, which would hardly come up among those of habits."""
_HABITS = (
    "frequency", "often", "heavy", "at_least", "at_most", "trend", "stop", "fade", "fall", "grow",
    "next",
)  # fmt: skip
_OVERALL_OUTCOMES = ("explore", "repeat", "busy", "churn")
_TOP_KINDS = ("heavy", "busy")
"""Whether a user is among the most active."""
_HEAVY_SHARE = 0.4
"""Of the days: active on so many or more is very often, where no others are known."""
_VALUE_KINDS = ("value", "low", "high", "value_at_least", "value_below")
_SLOW_KINDS = ("churn", "fail", *_VALUE_KINDS)
"""Asked over the longer spans alone: in a week hardly anybody has a value, or is gone for good."""
_COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20)
"""Active days that `at_least` and `at_most` ask for."""
_LEVELS = (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Values asked for: low is 0, high is 1."""
_LEAST_SPREAD = 0.02
"""What hardly varies is asked now and then; half is the most that yes or no can vary."""
_DIGITS_ONLY = re.compile(r"[<>=≤≥+/%|]|\w\{|\}\w")
"""Marks templates whose numbers stay digits: "{days}d", "≥ {count}"."""
_HEAD = re.compile("[,:.]")
"""Ends what answers are told apart by: "yes", "no", "it rises"."""
_OPEN = 0.4
"""By how much the spread of other answers counts: there are more of them to differ in."""

_Question = tuple[str, Subject, int]
"""Kind, what it is about, days."""
_Numbers = tuple[int, float]
"""Count and level in a question; kinds that have none take no notice."""


class FutureQuestions:
    """What may be asked of futures, and how much users differ in the answers.

    Wide questions (what will happen, what changes); habits (whether, how often, on so many days or
    more or at most, when, whether more or less than before) of everything, each modality, each
    topic that asks for one, each event type and pairs of those; outcomes (how high values are, how
    much is new, what befalls the user): together they cover what may be asked of a user's future.
    Of some, yes means more activity, of others less, so that yes has to be read with its question.

    Whether a rare page is read often has one answer for all and teaches little. So questions come
    the more often, the more users of a sample differ in the answer. It must not depend on the
    user's own future who is asked what: a question asked only of those it is true of would always
    be answered yes.
    """

    def __init__(
        self,
        pool: TopicPool,
        known_types: Mapping[str, tuple[str, ...]],
        sample: Sequence[FutureUser],
    ) -> None:
        """`known_types`: event types by modality. Without a `sample` all come equally often."""
        self.pool = pool
        self._sample = sample
        words = pool.words
        self._overall = Subject("overall", words.everything)
        self._details = [
            Subject(name, pool.word(name), name)
            for name in sorted(known_types)
            if name not in words.history_only
        ]
        self._topics = [
            Subject(topic.name, topic.about, topic.modality, topic.event_types, topic.futures)
            for topic in pool.topics
            if is_asked_of_future(topic, words)
        ]
        taken = {subject.event_types for subject in self._topics}
        self._types = [
            Subject(f"{modality}_{name}", pool.word(name), modality, (name,))
            for modality, names in known_types.items()
            if modality not in words.history_only
            for name in names
            if name not in words.passive and (name,) not in taken
        ]
        self._shortened: dict[int, list[FutureUser]] = {}
        self._spreads: dict[tuple[str, str, tuple[str, ...], int, _Numbers], float] = {}
        self._groups: dict[tuple[int, ...], tuple[tuple[float, _Group], ...]] = {}

    def drawn(self, num_days: int, num_answers: int, rng: Random) -> "list[_Drawn]":
        """Up to `num_answers` different questions about so long a future."""
        horizons = tuple(days for days in _HORIZONS_DAYS if days <= num_days) or (num_days,)
        if horizons not in self._groups:
            self._groups[horizons] = self._weighed(horizons)
        found: list[_Drawn] = []
        for share, group in self._groups[horizons]:
            count = round(num_answers * share) if share else num_answers - len(found)
            found += group.drawn(count, rng)
        return found

    def _weighed(self, horizons: tuple[int, ...]) -> "tuple[tuple[float, _Group], ...]":
        """Groups of questions and their shares; the last takes what is left."""
        wide = [(kind, self._overall, days) for kind in _WIDE for days in horizons]
        wide += [("detail", subject, horizons[-1]) for subject in self._details]
        subjects = [self._overall, *self._details, *self._topics]
        habits = _habits([of for of in subjects if not of.befalls(self.pool)], horizons)
        types = _habits([*self._types, *_pairs(self._types)], horizons)
        return (
            (_WIDE_SHARE, self._group(wide, _WORDINGS)),
            (_OUTCOME_SHARE, self._group(self._outcomes(horizons), _OUTCOME_WORDINGS)),
            (_TYPE_SHARE, self._group(types, _TYPE_WORDINGS)),
            (0.0, self._group(habits, _WORDINGS)),
        )

    def _outcomes(self, horizons: tuple[int, ...]) -> list[_Question]:
        values = self.pool.words.values
        kinds_of: list[tuple[Subject, tuple[str, ...]]] = [(self._overall, _OVERALL_OUTCOMES)]
        kinds_of += [(of, _value_kinds(self.pool, of)) for of in self._details if of.name in values]
        kinds_of += [(of, _VALUE_KINDS) for of in self._types if of.modality in values]
        kinds_of += [(of, tuple(of.phrasings)) for of in self._topics if of.befalls(self.pool)]
        return [
            (kind, subject, days)
            for subject, kinds in kinds_of
            for kind in kinds
            for days in horizons
            if kind not in _SLOW_KINDS or 2 * days >= horizons[-1]
        ]

    def _group(self, questions: Sequence[_Question], num_wordings: tuple[int, int]) -> "_Group":
        weighed = [
            {numbers: self._spread(question, numbers) for numbers in self._numbers(question)}
            for question in questions
        ]
        return _Group(questions, weighed, num_wordings)

    def _numbers(self, question: _Question) -> list[_Numbers]:
        """The numbers that may stand in a question, or that its answers go by."""
        kind, subject, days = question
        if kind in _TOP_KINDS:
            return [(self._top_quarter(subject, days), 0.0)]
        if kind in ("at_least", "at_most"):
            return [(count, 0.0) for count in _COUNTS if count < days] or [(1, 0.0)]
        if kind in ("value_at_least", "value_below"):
            return [(1, level) for level in _levels(self.pool.words.values[subject.modality])]
        return [(1, 0.0)]

    def _top_quarter(self, subject: Subject, days: int) -> int:
        """Active days that three quarters of the sample do not reach.

        No fewer than often: one day of what hardly anybody does is not very often, though it may
        be more than most others have.
        """
        active = sorted(len(subject.days(user.future, self.pool)) for user in self._within(days))
        if not active:
            return math.ceil(_HEAVY_SHARE * days)
        return max(often_days(days), active[3 * len(active) // 4])

    def _spread(self, question: _Question, numbers: _Numbers) -> float:
        """How likely a user has an answer, and another that has one has another."""
        kind, subject, days = question
        key = (kind, subject.name, subject.event_types, days, numbers)
        if key not in self._spreads:
            asked = Asked(subject=subject, count=numbers[0], level=numbers[1])
            told = Counter(
                _HEAD.split(answer(kind, user, self.pool, asked), maxsplit=1)[0]
                for user in self._within(days)
            )
            share = {head: count / len(self._sample) for head, count in told.items()}
            if share.keys() <= {"yes", "no", "none"}:
                yes, no = share.get("yes", 0.0), share.get("no", 0.0)
                spread = 2 * yes * no / (yes + no) if yes + no else 0.0
            else:
                spread = _OPEN * (1.0 - sum(part**2 for part in share.values()))
            self._spreads[key] = max(spread, _LEAST_SPREAD)
        return self._spreads[key]

    def _within(self, days: int) -> list[FutureUser]:
        if days not in self._shortened:
            self._shortened[days] = [user.within(days) for user in self._sample]
        return self._shortened[days]


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A question with its numbers, in one of its wordings."""

    question: _Question
    numbers: _Numbers
    wording: int

    @property
    def code(self) -> int:
        """Decides the words: always the same in the same wording of the same question."""
        kind, subject, days = self.question
        return zlib.crc32(f"{kind} {subject.about} {days} {self.numbers} {self.wording}".encode())


class _Group:
    """Questions to draw from: first one of them, then the numbers in it, then the wording."""

    def __init__(
        self,
        questions: Sequence[_Question],
        weighed: Sequence[Mapping[_Numbers, float]],
        num_wordings: tuple[int, int],
    ) -> None:
        """`num_wordings`: of questions without, and with a number in them, for each number."""
        self._questions = questions
        self._weighed = weighed
        self._cumulated = list(accumulate(max(weights.values()) for weights in weighed))
        self._num_wordings = num_wordings

    def drawn(self, count: int, rng: Random) -> list[_Drawn]:
        """Up to `count` different questions."""
        places = range(len(self._questions))
        chosen = dict.fromkeys(places if count >= len(places) else ())
        while len(chosen) < min(count, len(places)):
            drawn = rng.choices(places, cum_weights=self._cumulated, k=count - len(chosen))
            chosen |= dict.fromkeys(drawn)
        found = []
        for place in chosen:
            weights = self._weighed[place]
            (numbers,) = rng.choices(list(weights), list(weights.values()))
            wording = rng.randrange(self._num_wordings[len(weights) > 1])
            found.append(_Drawn(self._questions[place], numbers, wording))
        return found


def answer_futures(
    history: Activity,
    future: Activity,
    questions: FutureQuestions,
    num_answers: int,
    rng: Random,
) -> list[Answered]:
    """Answer up to `num_answers` different questions about what comes, each over some horizon."""
    user = FutureUser(history=history, future=future)
    return [
        _answered(drawn, user, questions.pool)
        for drawn in questions.drawn(future.num_days, num_answers, rng)
    ]


def _answered(drawn: _Drawn, user: FutureUser, pool: TopicPool) -> Answered:
    kind, subject, days = drawn.question
    count, level = drawn.numbers
    meaning = pool.words.values.get(subject.modality)
    template = _template(drawn, pool)
    words, is_spelled = _names(drawn, pool)
    number = spelled if is_spelled and not _DIGITS_ONLY.search(template) else digits
    query = template.format(
        **words,
        days=number(days),
        count=number(count),
        limit=number(count + 1),
        less=number(count - 1),
        unit=meaning.unit if meaning else "",
        level=number(level),
    )
    asked = Asked(subject=subject, count=count, level=level)
    told = answer(kind, user.within(days), pool, asked)
    topic = f"future_{kind}_{subject.name}_{days}d"
    return Answered(topic, capitalised(query), capitalised(told))


def _template(drawn: _Drawn, pool: TopicPool) -> str:
    kind, subject, _ = drawn.question
    shared = pool.words.futures.get(kind, ())
    if subject.event_types:
        # What names its subject itself was made for the modality or for everything.
        shared = tuple(text for text in shared if "{about}" in text)
    own = (*subject.phrasings.get(kind, ()), *shared)
    # Of phrasings of the data set's own every other question, where it has them.
    is_own = subject.befalls(pool) or (own and drawn.wording % 2)
    templates = own if is_own else pool.futures[kind]
    return templates[drawn.code % len(templates)]


def _names(drawn: _Drawn, pool: TopicPool) -> tuple[dict[str, str], bool]:
    """What user, subject and span are called in a wording, and whether it spells numbers out."""
    _, subject, days = drawn.question
    code = drawn.code // _MOST_TEMPLATES
    names = []
    for choices in (
        (*pool.subjects, *[pool.words.subject] * len(pool.subjects)),
        (subject.about, *pool.words.synonyms.get(subject.about, ())),
        (*_PERIODS.get(days, ()), f"{spelled(days)} days"),
    ):
        code, place = divmod(code, len(choices))
        names.append(choices[place])
    return dict(zip(("subject", "about", "period"), names, strict=True)), bool(code % 2)


def _levels(meaning: ValueMeaning) -> list[float]:
    levels = [meaning.low + level * (meaning.high - meaning.low) for level in _LEVELS]
    # Nobody asks whether a sum is below -20 where 60 is low, or below 61.25.
    return [float(f"{level:.2g}") for level in levels if level >= min(0.0, meaning.low)]


def _pairs(types: Sequence[Subject]) -> list[Subject]:
    """Each event type with the next of its modality: one or the other."""
    return [
        Subject(
            f"{one.modality}_pair",
            f"{one.about} or {other.about}",
            one.modality,
            (*one.event_types, *other.event_types),
        )
        for one, other in pairwise(types)
        if one.modality == other.modality
    ]


def _habits(subjects: Sequence[Subject], horizons: Sequence[int]) -> list[_Question]:
    return [
        (kind, subject, days)
        for subject in subjects
        for kind in _HABITS
        for days in (horizons[-1:] if kind == "next" else horizons)
    ]


def _value_kinds(pool: TopicPool, subject: Subject) -> tuple[str, ...]:
    is_passed = pool.words.values[subject.modality].pass_mark is not None
    return (*_VALUE_KINDS, "fail") if is_passed else _VALUE_KINDS
