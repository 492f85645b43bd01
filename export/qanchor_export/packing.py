"""Queries of one or several users laid out as the inputs of one suffix step. Torch-free.

Legend: T packed_len, B users, R row_len, N queries, D decoder width.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SuffixQuery:
    """One query: text tokens, soft-prompt rows [num_prompt_rows, D] if any, <USER_EMB>."""

    token_ids: tuple[int, ...]
    user_emb: int
    soft_prompt: FloatArray | None = None

    @property
    def num_prompt_rows(self) -> int:
        """Soft-prompt rows, 0 without one."""
        return 0 if self.soft_prompt is None else len(self.soft_prompt)

    def __len__(self) -> int:
        return len(self.token_ids) + self.num_prompt_rows + 1


@dataclass(frozen=True, slots=True)
class Packed:
    """Inputs of a suffix step but the past; int64 and float32 arrays as `suffix_spec` says."""

    token_ids: IntArray
    positions: IntArray
    segment_ids: IntArray
    prompt_index: IntArray
    prompt_rows: FloatArray
    row_index: IntArray
    flat_index: IntArray
    emb_index: IntArray
    prefix_len: IntArray

    def inputs(self) -> dict[str, npt.NDArray[np.generic]]:
        """Arrays by graph input name."""
        return {name: getattr(self, name) for name in self.__slots__}


def pack(users: list[tuple[int, list[SuffixQuery]]], hidden_dim: int) -> Packed:
    """Pack each user's (prefix length, queries); users and queries keep their order."""
    token_ids: list[int] = []
    positions: list[int] = []
    segment_ids: list[int] = []
    prompt_index: list[int] = []
    emb_index: list[int] = []
    prompts: list[FloatArray] = []
    rows: list[range] = []
    for prefix_len, queries in users:
        first = len(token_ids)
        for query in queries:
            num_text, num_prompt = len(query.token_ids), query.num_prompt_rows
            row = 1 + sum(len(prompt) for prompt in prompts)
            token_ids += [*query.token_ids, *[0] * num_prompt, query.user_emb]
            positions += range(prefix_len, prefix_len + len(query))
            segment_ids += [len(emb_index)] * len(query)
            prompt_index += [*[0] * num_text, *range(row, row + num_prompt), 0]
            emb_index.append(len(token_ids) - 1)
            if query.soft_prompt is not None:
                prompts.append(query.soft_prompt)
        rows.append(range(first, len(token_ids)))
    row_index, flat_index = _grid(rows)
    return Packed(
        token_ids=_int(token_ids),
        positions=_int(positions),
        segment_ids=_int(segment_ids),
        prompt_index=_int(prompt_index),
        # One row that nothing points to stands in where there is no prompt: never a size of 0.
        prompt_rows=np.concatenate(prompts or [np.zeros((1, hidden_dim), dtype=np.float32)]),
        row_index=row_index,
        flat_index=flat_index,
        emb_index=_int(emb_index),
        prefix_len=_int([prefix_len for prefix_len, _ in users]),
    )


def _grid(rows: list[range]) -> tuple[IntArray, IntArray]:
    """`row_index` [B, R] and `flat_index` [T] of users that own consecutive packed positions."""
    row_len = max(len(row) for row in rows)
    row_index = np.full((len(rows), row_len), -1, dtype=np.int64)
    for user, row in enumerate(rows):
        row_index[user, : len(row)] = row
    flat = [user * row_len + column for user, row in enumerate(rows) for column in range(len(row))]
    return row_index, _int(flat)


def _int(values: list[int]) -> IntArray:
    return np.array(values, dtype=np.int64)
