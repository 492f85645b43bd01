"""Static shapes: the bucket a step runs in, and the ranges that plan files are built for.

A GPU engine runs each graph in few fixed shapes, so that a CUDA graph can be captured once per
shape. A step takes the smallest bucket that holds it; `padding.py` fills the rest. Server and
exporter use the same ladders. Pure Python: must not know numpy, ONNX Runtime or TensorRT.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qanchor.bundle.manifest import EVENT_ENCODER, PREFIX, SUFFIX, Limits
from qanchor.config import Config, ProfileSchema
from qanchor.errors import ConfigError

Range = tuple[int, int, int]
"""Least, most usual and greatest size of one dynamic dimension."""

NOTHING_BEFORE = 1
"""prefix_capacity of a first chunk: one masked column instead of a whole slot."""
_FIRST_TOKENS = 32
_FIRST_CHUNK = 64
_FIRST_TEXT_LEN = 16
_FIRST_TEXTS = 8
_QUERY_SHARE = 4
_USUAL_TOKENS = 256


class BucketLimits(Config, frozen=True, kw_only=True):
    """What the largest buckets must hold; the server's settings of the same names."""

    max_step_users: int = 16
    """Most users in one suffix step."""
    max_step_tokens: int = 512
    """Most packed suffix tokens of one suffix step."""
    chunk_len: int = 128
    """Prefix positions per prefill step."""
    max_event_tokens_per_step: int = 1024
    """Padded event-text tokens per step of the event encoder."""
    slab_ladder: tuple[int, ...] = (128, 256, 384, 512, 768, 1024, 1536, 2048)
    """Prefix lengths in tokens; the model's longest is added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuffixBucket:
    """Static sizes of one suffix step."""

    batch: int
    row_len: int
    packed_len: int
    num_queries: int
    query_len: int
    prefix_capacity: int

    def dims(self) -> dict[str, int]:
        """Size by dimension name of the manifest. Each soft-prompt row has a packed token."""
        return {
            "batch": self.batch,
            "row_len": self.row_len,
            "packed_len": self.packed_len,
            "num_queries": self.num_queries,
            "query_len": self.query_len,
            "num_prompt_rows": self.packed_len,
            "prefix_capacity": self.prefix_capacity,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixBucket:
    """Static sizes of one prefill step."""

    chunk_len: int
    prefix_capacity: int

    def dims(self) -> dict[str, int]:
        """Size by dimension name of the manifest."""
        return {"chunk_len": self.chunk_len, "prefix_capacity": self.prefix_capacity}


@dataclass(frozen=True, slots=True, kw_only=True)
class EventBucket:
    """Static sizes of one step of the event encoder."""

    num_texts: int
    text_len: int

    def dims(self) -> dict[str, int]:
        """Size by dimension name of the manifest."""
        return {"num_texts": self.num_texts, "text_len": self.text_len}


class Ladders(Config, frozen=True, kw_only=True):
    """The sizes buckets are made of, each ascending; the last step of each is a hard limit."""

    users: tuple[int, ...]
    tokens: tuple[int, ...]
    """Packed suffix tokens of a step, and of its longest user and longest query."""
    capacities: tuple[int, ...]
    """Prefix lengths: the KV pool's slab classes."""
    chunk_lens: tuple[int, ...]
    text_lens: tuple[int, ...]
    max_event_tokens: int
    """Texts times text length of one step of the event encoder."""

    def suffix_bucket(
        self,
        *,
        num_users: int,
        longest_row: int,
        packed_len: int,
        num_queries: int,
        longest_query: int,
        prefix_len: int,
    ) -> SuffixBucket:
        """The smallest bucket for a step; `prefix_len` is the longest. Raises ConfigError.

        `longest_query` is 1 for a graph that does not ask by query.
        """
        batch = _step_up("max_step_users", num_users, self.users)
        packed = _step_up("max_step_tokens", packed_len, self.tokens)
        # Alone, a user's row is the packed row: no cell of the grid is wasted.
        row_len = packed if batch == 1 else _step_up("max_step_tokens", longest_row, self.tokens)
        few = max(1, packed // _QUERY_SHARE)
        return SuffixBucket(
            batch=batch,
            row_len=row_len,
            packed_len=packed,
            num_queries=few if num_queries <= few else packed,
            query_len=_step_up("max_step_tokens", longest_query, self.tokens),
            prefix_capacity=_step_up("max_prefix_len", prefix_len, self.capacities),
        )

    def prefix_bucket(self, *, chunk_len: int, start: int) -> PrefixBucket:
        """The smallest bucket for a chunk after `start` positions. Raises ConfigError."""
        capacity = (
            NOTHING_BEFORE if start == 0 else _step_up("max_prefix_len", start, self.capacities)
        )
        return PrefixBucket(
            chunk_len=_step_up("chunk_len", chunk_len, self.chunk_lens), prefix_capacity=capacity
        )

    def event_bucket(self, *, num_texts: int, text_len: int) -> EventBucket:
        """The smallest bucket for a batch; where it has fewer texts, split. Raises ConfigError."""
        length = _step_up("max_event_tokens", text_len, self.text_lens)
        classes = self.text_classes(length)
        found = classes[min(bisect_left(classes, num_texts), len(classes) - 1)]
        return EventBucket(num_texts=found, text_len=length)

    def text_classes(self, text_len: int) -> tuple[int, ...]:
        """Numbers of texts that buckets of one text length have."""
        most = max(1, self.max_event_tokens // text_len)
        return steps_up_to(most, first=_FIRST_TEXTS, factor=4)

    def largest(self) -> dict[str, tuple[dict[str, int], ...]]:
        """By graph, dimension sizes that no bucket exceeds; memory is set aside for these."""
        tokens = self.tokens[-1]
        suffix = SuffixBucket(
            batch=self.users[-1],
            row_len=tokens,
            packed_len=tokens,
            num_queries=tokens,
            query_len=tokens,
            prefix_capacity=self.capacities[-1],
        )
        prefix = PrefixBucket(
            chunk_len=self.chunk_lens[-1], prefix_capacity=max(NOTHING_BEFORE, self.capacities[-1])
        )
        texts = tuple(
            EventBucket(num_texts=self.text_classes(length)[-1], text_len=length).dims()
            for length in self.text_lens
        )
        return {SUFFIX: (suffix.dims(),), PREFIX: (prefix.dims(),), EVENT_ENCODER: texts}

    def warm_up(self) -> tuple[SuffixBucket, ...]:
        """Buckets of one user that a server makes ready before it takes requests."""
        return tuple(
            self.suffix_bucket(
                num_users=1,
                longest_row=tokens,
                packed_len=tokens,
                num_queries=1,
                longest_query=1,
                prefix_len=capacity,
            )
            for tokens in self.tokens
            for capacity in self.capacities
        )

    def profiles(self) -> dict[str, tuple[dict[str, Range], ...]]:
        """By graph, the optimization profiles: a range for every dynamic dimension.

        Suffix: one profile for a user alone, one for several. Prefix: first chunk, later chunks.
        Event encoder: one per text length, since tokens, not texts, are bounded.
        """
        return {
            SUFFIX: self._suffix_profiles(),
            PREFIX: self._prefix_profiles(),
            EVENT_ENCODER: tuple(
                {
                    "num_texts": _span(self.text_classes(length)),
                    "text_len": (length, length, length),
                }
                for length in self.text_lens
            ),
        }

    def _suffix_profiles(self) -> tuple[dict[str, Range], ...]:
        low, high = self.tokens[0], self.tokens[-1]
        usual = self.tokens[min(bisect_left(self.tokens, _USUAL_TOKENS), len(self.tokens) - 1)]
        common: dict[str, Range] = {
            "row_len": (low, usual, high),
            "packed_len": (low, usual, high),
            "num_queries": (max(1, low // _QUERY_SHARE), max(1, usual // _QUERY_SHARE), high),
            "query_len": (low, low, high),
            "num_prompt_rows": (low, usual, high),
            "prefix_capacity": (self.capacities[0], self.capacities[-1], self.capacities[-1]),
        }
        profiles = [{**common, "batch": (1, 1, 1)}]
        if len(self.users) > 1:
            profiles.append({**common, "batch": _span(self.users[1:])})
        return tuple(profiles)

    def _prefix_profiles(self) -> tuple[dict[str, Range], ...]:
        chunk = (self.chunk_lens[0], self.chunk_lens[-1], self.chunk_lens[-1])
        first = (NOTHING_BEFORE, NOTHING_BEFORE, NOTHING_BEFORE)
        later = (self.capacities[0], self.capacities[-1], self.capacities[-1])
        return (
            {"chunk_len": chunk, "prefix_capacity": first},
            {"chunk_len": chunk, "prefix_capacity": later},
        )


def make_ladders(limits: BucketLimits, model: Limits, schema: ProfileSchema) -> Ladders:
    """The ladders of one model under `limits`."""
    longest_text = max(spec.max_event_tokens for spec in schema.modalities)
    longest = model.max_prefix_len
    return Ladders(
        users=steps_up_to(limits.max_step_users, first=1),
        tokens=steps_up_to(limits.max_step_tokens, first=_FIRST_TOKENS),
        capacities=(*sorted({step for step in limits.slab_ladder if step < longest}), longest),
        chunk_lens=steps_up_to(limits.chunk_len, first=_FIRST_CHUNK),
        text_lens=steps_up_to(longest_text, first=_FIRST_TEXT_LEN),
        max_event_tokens=limits.max_event_tokens_per_step,
    )


def find_profile(profiles: Sequence[Mapping[str, Range]], dims: Mapping[str, int]) -> int:
    """Number of the first profile whose ranges hold every size. Raises ConfigError."""
    for index, ranges in enumerate(profiles):
        if all(ranges[dim][0] <= size <= ranges[dim][2] for dim, size in dims.items()):
            return index
    raise ConfigError("bucket", dict(dims), "no optimization profile holds it", "build plans again")


def steps_up_to(top: int, *, first: int, factor: int = 2) -> tuple[int, ...]:
    """first, first * factor, ... below `top`, then `top` itself."""
    steps = []
    step = first
    while step < top:
        steps.append(step)
        step *= factor
    return (*steps, top)


def _step_up(field: str, value: int, ladder: tuple[int, ...]) -> int:
    place = bisect_left(ladder, value)
    if place == len(ladder):
        raise ConfigError(
            field, value, f"the largest bucket holds {ladder[-1]}", "raise it, build plans again"
        )
    return ladder[place]


def _span(ladder: tuple[int, ...]) -> Range:
    return ladder[0], ladder[-1], ladder[-1]
