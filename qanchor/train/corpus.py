"""Profiles of a data set as token tables, so that batches are built by indexing alone.

Event texts repeat across users and days: each distinct text is tokenised once.
Legend: N events, M modalities, P prefix length, T text length, F measures.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tqdm import tqdm

from qanchor.config import ProfileSchema
from qanchor.data.measures import NUM_MEASURES
from qanchor.data.prefix import (
    ADAPTER_FIRST_EVENT,
    PrefixLayout,
    PrefixTokens,
    build_layout,
    prefix_len,
)
from qanchor.data.profile import Profile
from qanchor.data.render import RenderedProfile, render_profile

IntArray = npt.NDArray[np.int64]
ENCODE_CHUNK = 50_000


@dataclass(frozen=True, slots=True)
class RenderedCorpus:
    """Rendered users: `texts` are distinct; `rows[u]` are a user's N texts in prefix order."""

    user_ids: tuple[str, ...]
    num_events: tuple[tuple[int, ...], ...]
    rows: tuple[npt.NDArray[np.int32], ...]
    texts: tuple[str, ...]
    text_limits: npt.NDArray[np.int32]
    """Tokens to keep of each distinct text."""
    measures: tuple[npt.NDArray[np.float32], ...] = ()
    """`measures[u]` [N, F]: the numbers beside a user's texts; empty where the schema has none."""
    statistics: npt.NDArray[np.float16] | None = None
    """Behaviour statistics of each user [U, S], where the statistics loss wants them."""


@dataclass(frozen=True, slots=True)
class PrefixCorpus:
    """A rendered corpus with its texts tokenised."""

    rendered: RenderedCorpus
    tokens: PrefixTokens
    event_pad: int
    text_tokens: npt.NDArray[np.int32]
    """All texts' token ids, end to end."""
    text_offsets: IntArray
    """Start of each text in `text_tokens`, and the end of the last."""
    event_vectors: npt.NDArray[np.float32] | None = None
    """Event vectors [texts, E], if an unchanging event encoder has made them ahead."""

    def prefix_len(self, user: int) -> int:
        """Prefix positions of user number `user`."""
        return prefix_len(self.rendered.num_events[user], self.tokens)

    def layout(self, user: int) -> PrefixLayout:
        """Prefix layout of user number `user`."""
        return build_layout(self.rendered.num_events[user], self.tokens)

    def event_rows(self, layout: PrefixLayout, user: int) -> IntArray:
        """Distinct-text row at each event position of the layout, -1 elsewhere."""
        rows_P = np.full(len(layout), -1, dtype=np.int64)
        is_event = layout.adapter_P >= ADAPTER_FIRST_EVENT
        rows_P[is_event] = self.rendered.rows[user][layout.source_P[is_event]]
        return rows_P

    def measures_at(self, layout: PrefixLayout, user: int) -> npt.NDArray[np.float32]:
        """The numbers [P, F] beside each event of the layout, zeros elsewhere."""
        rows_NF = self.rendered.measures[user]
        measures_PF = np.zeros((len(layout), rows_NF.shape[1]), dtype=np.float32)
        is_event = layout.adapter_P >= ADAPTER_FIRST_EVENT
        measures_PF[is_event] = rows_NF[layout.source_P[is_event]]
        return measures_PF

    def text_lens(self, text_rows: IntArray) -> IntArray:
        """Tokens of the given distinct texts."""
        return self.text_offsets[text_rows + 1] - self.text_offsets[text_rows]

    def padded_texts(self, text_rows: IntArray) -> IntArray:
        """Token ids [N, T] of the given distinct texts, padded with `event_pad`."""
        starts = self.text_offsets[text_rows]
        lengths = self.text_lens(text_rows)
        columns_T = np.arange(max(int(lengths.max(initial=1)), 1))
        inside_NT = columns_T < lengths[:, None]
        index_NT = np.where(inside_NT, starts[:, None] + columns_T, 0)
        return np.where(inside_NT, self.text_tokens[index_NT], self.event_pad)


def render_corpus(
    profiles: Iterable[Profile], schema: ProfileSchema, num_users: int
) -> RenderedCorpus:
    """Render every profile, with a progress bar over `num_users`."""
    bar = tqdm(profiles, total=num_users, desc="rendering profiles", unit="user")
    return collect_rendered(
        ((profile.user_id, render_profile(profile, schema)) for profile in bar), schema
    )


def collect_rendered(
    users: Iterable[tuple[str, RenderedProfile]], schema: ProfileSchema
) -> RenderedCorpus:
    """Number the distinct texts of rendered users (id, profile)."""
    row_of: dict[tuple[str, int], int] = {}
    user_ids, num_events, rows = [], [], []
    measures: list[npt.NDArray[np.float32]] = []
    for user_id, rendered in users:
        user_ids.append(user_id)
        num_events.append(rendered.num_events)
        rows.append(_rows(rendered, schema, row_of))
        if schema.has_measures:
            numbers = np.array(rendered.flat_measures(), dtype=np.float32)
            measures.append(numbers.reshape(-1, NUM_MEASURES))
    return RenderedCorpus(
        tuple(user_ids),
        tuple(num_events),
        tuple(rows),
        tuple(text for text, _ in row_of),
        np.array([limit for _, limit in row_of], dtype=np.int32),
        tuple(measures),
    )


def _rows(
    rendered: RenderedProfile, schema: ProfileSchema, row_of: dict[tuple[str, int], int]
) -> npt.NDArray[np.int32]:
    rows = [
        row_of.setdefault((text, spec.max_event_tokens), len(row_of))
        for spec, texts in zip(schema.modalities, rendered.texts, strict=True)
        for text in texts
    ]
    return np.array(rows, dtype=np.int32)


def tokenize_corpus(
    rendered: RenderedCorpus, tokenizer: Tokenizer, event_pad: int, tokens: PrefixTokens
) -> PrefixCorpus:
    """Tokenise the distinct texts of a rendered corpus, cut to their limits."""
    pieces: list[Sequence[int]] = []
    starts = range(0, len(rendered.texts), ENCODE_CHUNK)
    for start in tqdm(starts, desc="tokenising event texts", unit="chunk"):
        chunk = list(rendered.texts[start : start + ENCODE_CHUNK])
        limits = rendered.text_limits[start : start + ENCODE_CHUNK]
        for encoding, limit in zip(tokenizer.encode_batch_fast(chunk), limits, strict=True):
            ids = encoding.ids
            pieces.append(ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]])
    offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
    flat = np.fromiter((token for piece in pieces for token in piece), np.int32, int(offsets[-1]))
    return PrefixCorpus(rendered, tokens, event_pad, flat, offsets)
