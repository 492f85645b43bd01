"""The suffix graph's inputs: all queries of a step's users packed into one row.

`scenario_suffix` is the one place that says what a scenario's suffix is made of: server, exporter,
verifier, tuning and evaluation call it.

Pure numpy; must not know ONNX Runtime. The meaning of each input stands at
`qanchor.bundle.manifest.suffix_spec`.

Legend: S packed length, B users, R longest user row, Q queries, L longest query, K prompt rows,
D hidden_dim.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from qanchor.config import Scenario
from qanchor.errors import ConfigError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

ROW_PADDING = -1


@dataclass(frozen=True, slots=True)
class SuffixQuery:
    """One query: its text tokens, then prompt rows, then <USER_EMB> (not in `token_ids`)."""

    token_ids: tuple[int, ...]
    prompt_rows_KD: FloatArray | None = None
    """Rows in place of tokens: what a query encoder made of the text, then the soft prompt. The
    same array object for every query of one scenario: a step carries its rows once."""

    @property
    def suffix_len(self) -> int:
        """Tokens the query costs, prompt rows and <USER_EMB> included."""
        return len(self.token_ids) + self.num_prompt_rows + 1

    @property
    def num_prompt_rows(self) -> int:
        """Prompt rows; 0 for a query of text tokens alone."""
        return 0 if self.prompt_rows_KD is None else len(self.prompt_rows_KD)

    def with_rows(self, rows_KD: FloatArray) -> "SuffixQuery":
        """The same with these rows behind its own."""
        own_KD = self.prompt_rows_KD
        joined_KD = rows_KD if own_KD is None else np.concatenate([own_KD, rows_KD])
        return SuffixQuery(self.token_ids, joined_KD)


def scenario_suffix(
    scenario: Scenario, query: Callable[[str], SuffixQuery], hidden_dim: int
) -> SuffixQuery:
    """A scenario's question (nothing where it is compiled) and its soft-prompt rows.

    `query` gives the suffix of a question. Raises ConfigError for rows that are not `hidden_dim`
    wide.
    """
    asked = SuffixQuery(()) if scenario.is_compiled else query(scenario.question)
    if not scenario.soft_prompt:
        return asked
    width = len(scenario.soft_prompt[0])
    if width != hidden_dim:
        raise ConfigError(
            f"{scenario.name}.soft_prompt",
            width,
            f"numbers per row; the model's hidden_dim is {hidden_dim}",
            "tune it again with this model",
        )
    return asked.with_rows(np.array(scenario.soft_prompt, dtype=np.float32))


def check_questions(
    scenarios: Iterable[Scenario], encode_query: Callable[[str], Sequence[int]], max_query_len: int
) -> None:
    """Raise ConfigError for a scenario whose text has more than `max_query_len` tokens.

    A model was trained on none so long. Compiled scenarios send no text. `encode_query` gives the
    token ids a question is read as.
    """
    for scenario in scenarios:
        num_tokens = 0 if scenario.is_compiled else len(encode_query(scenario.question))
        if num_tokens > max_query_len:
            raise ConfigError(
                f"{scenario.name}.question",
                scenario.question,
                f"is read as {num_tokens} tokens, the model takes {max_query_len}",
                "shorten it, or train with a larger train.max_query_len",
            )


@dataclass(frozen=True, slots=True)
class UserSuffix:
    """One user's queries in a step."""

    prefix_len: int
    """True length of the user's prefix; positions continue from here."""
    queries: tuple[SuffixQuery, ...]

    @property
    def num_tokens(self) -> int:
        """Suffix tokens of all queries."""
        return sum(query.suffix_len for query in self.queries)


@dataclass(frozen=True, slots=True)
class PackedSuffix:
    """Graph inputs by the manifest's names; int64 and float32, C-order, dense."""

    token_ids_S: IntArray
    positions_S: IntArray
    segment_ids_S: IntArray
    prompt_index_S: IntArray
    prompt_rows_KD: FloatArray
    row_index_BR: IntArray
    flat_index_S: IntArray
    query_index_QL: IntArray
    query_place_S: IntArray
    emb_index_Q: IntArray
    prefix_len_B: IntArray

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    def inputs(
        self, *, by_query: bool
    ) -> dict[str, npt.NDArray[np.int64] | npt.NDArray[np.float32]]:
        """Arrays by graph input name in the graph's order, past keys and values left out.

        `by_query` as `qanchor.bundle.manifest.asks_by_query` says of the bundle's precision.
        """
        of_query = {"segment_ids": self.segment_ids_S}
        if by_query:
            of_query = {"query_index": self.query_index_QL, "query_place": self.query_place_S}
        return {
            "token_ids": self.token_ids_S,
            "positions": self.positions_S,
            "prompt_index": self.prompt_index_S,
            "prompt_rows": self.prompt_rows_KD,
            "row_index": self.row_index_BR,
            "flat_index": self.flat_index_S,
            **of_query,
            "emb_index": self.emb_index_Q,
            "prefix_len": self.prefix_len_B,
        }


def pack(users: Sequence[UserSuffix], *, user_emb: int, hidden_dim: int) -> PackedSuffix:
    """Pack the queries of one or several users, user by user, query by query.

    `user_emb` is the id of <USER_EMB>. Without soft prompts one zero row stands in `prompt_rows`,
    so that no graph input is empty.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    segment_ids: list[int] = []
    prompt_index: list[int] = []
    emb_index: list[int] = []
    user_lens: list[int] = []
    prompts = PromptTable()
    for user in users:
        user_start = len(token_ids)
        for query in user.queries:
            rows = query.num_prompt_rows
            first_row = prompts.first_row(query.prompt_rows_KD, rows)
            token_ids.extend(query.token_ids)
            token_ids.extend([0] * rows)
            token_ids.append(user_emb)
            prompt_index.extend([0] * len(query.token_ids))
            prompt_index.extend(range(first_row, first_row + rows))
            prompt_index.append(0)
            positions.extend(range(user.prefix_len, user.prefix_len + query.suffix_len))
            segment_ids.extend([len(emb_index)] * query.suffix_len)
            emb_index.append(len(token_ids) - 1)
        user_lens.append(len(token_ids) - user_start)
    row_index_BR, flat_index_S = _rows(user_lens)
    query_index_QL, query_place_S = _rows(
        [query.suffix_len for user in users for query in user.queries]
    )
    # One conversion for all: each of its rows is dense.
    per_token_4S = np.array([token_ids, positions, segment_ids, prompt_index], dtype=np.int64)
    return PackedSuffix(
        token_ids_S=per_token_4S[0],
        positions_S=per_token_4S[1],
        segment_ids_S=per_token_4S[2],
        prompt_index_S=per_token_4S[3],
        prompt_rows_KD=prompts.rows_KD(hidden_dim),
        row_index_BR=row_index_BR,
        flat_index_S=flat_index_S,
        query_index_QL=query_index_QL,
        query_place_S=query_place_S,
        emb_index_Q=_int64(emb_index),
        prefix_len_B=_int64([user.prefix_len for user in users]),
    )


class Packer:
    """`pack` for a server, where the same queries are asked of one user after another.

    What depends on the queries and the prefix's length alone is made once and kept within
    `max_bytes`, the least recently used being dropped. Whoever gets a PackedSuffix must not change
    it; the same object stands for the same inputs. One thread only.
    """

    def __init__(self, *, user_emb: int, hidden_dim: int, max_bytes: int) -> None:
        self._user_emb = user_emb
        self._hidden_dim = hidden_dim
        self._max_bytes = max_bytes
        self._kept_bytes = 0
        self._kept: OrderedDict[tuple[int, ...], tuple[UserSuffix, PackedSuffix]] = OrderedDict()

    def pack(self, users: Sequence[UserSuffix]) -> PackedSuffix:
        """The step of these users. Only steps of one user are kept: others hardly come again."""
        if len(users) > 1:
            return pack(users, user_emb=self._user_emb, hidden_dim=self._hidden_dim)
        user = users[0]
        # Queries are told apart by identity: the entry holds them, so no other can take their ids.
        key = (user.prefix_len, *map(id, user.queries))
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
            return kept[1]
        packed = pack(users, user_emb=self._user_emb, hidden_dim=self._hidden_dim)
        self._kept[key] = user, packed
        self._kept_bytes += packed.num_bytes
        while self._kept_bytes > self._max_bytes:
            _, (_, dropped) = self._kept.popitem(last=False)
            self._kept_bytes -= dropped.num_bytes
        return packed


class PromptTable:
    """Distinct prompts of a step and where the rows of each begin, counted from 1."""

    def __init__(self) -> None:
        self.arrays: list[FloatArray] = []
        """Each prompt's rows [K, D], or whatever they are made of."""
        self._first: dict[int, int] = {}
        self._next = 1

    def first_row(self, prompt: FloatArray | None, num_rows: int) -> int:
        """Number of the prompt's first row, one array object being one prompt; 0 for None."""
        if prompt is None:
            return 0
        if id(prompt) not in self._first:
            self._first[id(prompt)] = self._next
            self.arrays.append(prompt)
            self._next += num_rows
        return self._first[id(prompt)]

    def rows_KD(self, hidden_dim: int) -> FloatArray:
        """All prompts' rows one below the other; row n - 1 is number n. One zero row for none."""
        if not self.arrays:
            return np.zeros((1, hidden_dim), dtype=np.float32)
        return np.ascontiguousarray(np.concatenate(self.arrays), dtype=np.float32)


def _rows(lens: list[int]) -> tuple[IntArray, IntArray]:
    """A grid with a row of packed places for each of some runs of tokens, and its inverse."""
    lens_B, columns_R = _int64(lens), np.arange(max(lens))
    starts_B = np.cumsum(lens_B) - lens_B
    is_token_BR = columns_R < lens_B[:, None]
    index_BR = np.where(is_token_BR, starts_B[:, None] + columns_R, ROW_PADDING)
    return index_BR, np.flatnonzero(is_token_BR)


def _int64(values: list[int]) -> IntArray:
    return np.array(values, dtype=np.int64)
