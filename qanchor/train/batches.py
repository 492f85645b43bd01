"""Users and their query segments as padded tensors: the batches of both towers.

Legend as in qanchor.towers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qanchor.bundle.packing import FloatArray, PromptTable
from qanchor.data.prefix import PrefixLayout, PrefixTokens
from qanchor.towers import PAD_SEGMENT, AnchorBatch
from qanchor.train.corpus import IntArray, PrefixCorpus

NO_LABEL = -100
PAD_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Segment:
    """One query of a user, and in training its answer; token ids without specials."""

    query: tuple[int, ...]
    answer: tuple[int, ...] = ()
    prompt_rows_RD: FloatArray | None = field(default=None, compare=False)
    """Rows between query tokens and <USER_EMB>; one array object for all segments that share it."""
    query_states_TE: FloatArray | None = field(default=None, compare=False)
    """What a query encoder read, where the model's query map is to make such rows of it; one array
    object for all segments of a question."""
    num_query_rows: int = 0
    """How many rows it makes."""
    is_yes_no_only: bool = False
    """Only the yes/no loss hears of it: no pair, and no answer to predict."""

    @property
    def num_rows(self) -> int:
        """Rows between query tokens and <USER_EMB>."""
        given = 0 if self.prompt_rows_RD is None else len(self.prompt_rows_RD)
        return given + self.num_query_rows


def anchor_batch(
    corpus: PrefixCorpus, users: Sequence[int], segments: Sequence[Sequence[Segment]]
) -> AnchorBatch:
    """Batch of `users` (rows of the corpus), `segments[i]` being the queries of users[i].

    <USER_EMB> places are listed user by user, in segment order. Rows in place of tokens are either
    given in all segments or made of a question's states in all.
    """
    layouts = [corpus.layout(user) for user in users]
    rows = [corpus.event_rows(layout, user) for layout, user in zip(layouts, users, strict=True)]
    texts, event_rows = _distinct_texts(rows, corpus)
    prompts = PromptTable()
    suffix = [
        _pack(list(items), len(layout), corpus.tokens, prompts)
        for items, layout in zip(segments, layouts, strict=True)
    ]
    emb = [(user, column) for user, packed in enumerate(suffix) for column in packed.emb_columns]
    known = corpus.event_vectors
    to_encode = texts if known is None else texts[:0]
    is_read = any(one.query_states_TE is not None for of_user in segments for one in of_user)
    states, lens = _states(prompts.arrays) if is_read else (None, None)
    has_rows = bool(prompts.arrays)
    return AnchorBatch(
        event_token_ids_NT=torch.from_numpy(corpus.padded_texts(to_encode)),
        prefix_token_ids_BP=_stack([layout.token_ids_P for layout in layouts], 0),
        adapter_BP=_stack([layout.adapter_P for layout in layouts], 0),
        event_row_BP=_stack(event_rows, 0),
        prefix_len_B=torch.tensor([len(layout) for layout in layouts]),
        suffix_token_ids_BS=_stack([packed.token_ids for packed in suffix], corpus.tokens.pad),
        segment_BS=_stack([packed.segment for packed in suffix], PAD_SEGMENT),
        position_BS=_stack([packed.position for packed in suffix], 0),
        labels_BS=_stack([packed.labels for packed in suffix], NO_LABEL),
        emb_user_Q=torch.tensor([user for user, _ in emb], dtype=torch.long),
        emb_column_Q=torch.tensor([column for _, column in emb], dtype=torch.long),
        event_vectors_NE=None if known is None else torch.from_numpy(known[texts]),
        prompt_index_BS=_stack([p.prompt_index for p in suffix], 0) if has_rows else None,
        prompt_rows_RD=torch.from_numpy(prompts.rows_KD(0)) if has_rows and not is_read else None,
        query_states=states,
        query_lens=lens,
        measures_BPF=_measures(corpus, users, layouts) if corpus.rendered.measures else None,
    )


def _measures(
    corpus: PrefixCorpus, users: Sequence[int], layouts: Sequence[PrefixLayout]
) -> Tensor:
    """The numbers beside the events [B, P, F], zeros elsewhere."""
    rows = [corpus.measures_at(layout, user) for user, layout in zip(users, layouts, strict=True)]
    stacked = np.zeros(
        (len(rows), _padded_len([len(row) for row in rows]), rows[0].shape[1]), dtype=np.float32
    )
    for index, row in enumerate(rows):
        stacked[index, : len(row)] = row
    return torch.from_numpy(stacked)


def _states(arrays: Sequence[FloatArray]) -> tuple[Tensor, Tensor]:
    """States [N, T, E] of questions (float32), zeros behind each, and their lengths [N]."""
    lens = [len(states_TE) for states_TE in arrays]
    states_NTE = torch.zeros(len(arrays), max(lens), arrays[0].shape[1])
    # Copied and widened at once: a step of a thousand questions moves 100 MB here.
    for row, states_TE in enumerate(arrays):
        states_NTE[row, : len(states_TE)] = torch.from_numpy(states_TE)
    return states_NTE, torch.tensor(lens)


def answer_batch(segments: Sequence[Segment], tokens: PrefixTokens) -> tuple[Tensor, Tensor]:
    """Answers closed by eos [Q, A] and their lengths [Q], both int64."""
    answers = [np.array([*segment.answer, tokens.eos], dtype=np.int64) for segment in segments]
    return _stack(answers, tokens.pad), torch.tensor([len(answer) for answer in answers])


def _distinct_texts(rows: list[IntArray], corpus: PrefixCorpus) -> tuple[IntArray, list[IntArray]]:
    """Distinct text rows, shortest text first, and each user's places in that list."""
    distinct_N, inverse = np.unique(np.concatenate(rows), return_inverse=True)
    # Row -1 stands for "no event"; any text may take its place, nothing reads it.
    distinct_N = np.maximum(distinct_N, 0)
    order_N = np.argsort(corpus.text_lens(distinct_N), kind="stable")
    place_N = np.empty_like(order_N)
    place_N[order_N] = np.arange(len(order_N))
    ends = np.cumsum([len(row) for row in rows])
    return distinct_N[order_N], np.split(place_N[inverse], ends[:-1])


@dataclass(frozen=True, slots=True)
class _Packed:
    token_ids: IntArray
    segment: IntArray
    position: IntArray
    labels: IntArray
    prompt_index: IntArray
    emb_columns: list[int]


def _pack(
    segments: list[Segment], prefix_len: int, tokens: PrefixTokens, prompts: PromptTable
) -> _Packed:
    """[query, rows, <USER_EMB>, answer] per segment; eos is a label, never an input."""
    ids: list[int] = []
    numbers: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    prompt_index: list[int] = []
    emb_columns: list[int] = []
    for number, segment in enumerate(segments):
        num_rows = segment.num_rows
        first_row = prompts.first_row(_prompt(segment), num_rows)
        before = [*segment.query, *[tokens.pad] * num_rows]
        here = [*before, tokens.user_emb, *segment.answer]
        emb_columns.append(len(ids) + len(before))
        prompt_index.extend([0] * len(segment.query))
        prompt_index.extend(range(first_row, first_row + num_rows))
        prompt_index.extend([0] * (1 + len(segment.answer)))
        ids.extend(here)
        numbers.extend([number] * len(here))
        positions.extend(range(prefix_len, prefix_len + len(here)))
        targets = [*segment.answer, tokens.eos] if segment.answer else [NO_LABEL]
        labels.extend([NO_LABEL] * len(before) + targets)
    return _Packed(
        token_ids=np.array(ids, dtype=np.int64),
        segment=np.array(numbers, dtype=np.int64),
        position=np.array(positions, dtype=np.int64),
        labels=np.array(labels, dtype=np.int64),
        prompt_index=np.array(prompt_index, dtype=np.int64),
        emb_columns=emb_columns,
    )


def _prompt(segment: Segment) -> FloatArray | None:
    assert segment.prompt_rows_RD is None or segment.query_states_TE is None, (
        "This is a bug: soft prompts are tuned on rows, not on what rows are made of."
    )
    return segment.query_states_TE if segment.prompt_rows_RD is None else segment.prompt_rows_RD


def _padded_len(lengths: Sequence[int]) -> int:
    longest = max(lengths)
    return longest + -longest % PAD_MULTIPLE


def _stack(rows: list[IntArray], fill: int) -> Tensor:
    width = _padded_len([len(row) for row in rows])
    stacked = np.full((len(rows), width), fill, dtype=np.int64)
    for index, row in enumerate(rows):
        stacked[index, : len(row)] = row
    return torch.from_numpy(stacked)
