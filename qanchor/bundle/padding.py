"""Fills a bucket's input arrays with a step and with padding that changes no result.

Suffix: a packed token that stands in no row of the grid is read by none; a row of -1 is a user
without tokens; a query beyond the real ones repeats place 0 and its vector is dropped. Prefix:
positions after the real ones are seen by none of them. Pure numpy; must not know engines.

Legend: S packed length, B users, R longest row, C chunk length, N texts, T text length.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qanchor.bundle.packing import ROW_PADDING, PackedSuffix

Arrays = Mapping[str, npt.NDArray[Any]]


def fill_suffix(packed: PackedSuffix, into: Arrays) -> None:
    """Write a step into arrays of the bucket's shapes, named as the graph's inputs.

    Of `prompt_rows` only the step's rows are written; whatever stands beyond is never picked.
    """
    for name, array in packed.inputs().items():
        if name not in ("row_index", "flat_index", "prompt_rows"):
            _fill(into[name], array)
    num_rows, num_users = len(packed.prompt_rows_KD), len(packed.row_index_BR)
    into["prompt_rows"][:num_rows] = packed.prompt_rows_KD
    grid, row_len = into["row_index"], packed.row_index_BR.shape[1]
    grid.fill(ROW_PADDING)
    grid[:num_users, :row_len] = packed.row_index_BR
    # A packed token's place in the grid depends on the width of the grid.
    users_S, columns_S = np.divmod(packed.flat_index_S, row_len)
    _fill(into["flat_index"], users_S * grid.shape[1] + columns_S)


def fill_chunk(chunk: Arrays, start: int, into: Arrays) -> None:
    """Write a chunk's `token_ids`, `adapter`, `slot_vectors` and its `past_len`."""
    for name, array in chunk.items():
        _fill(into[name], array)
    into["past_len"][0] = start


def fill_texts(token_ids_NT: npt.NDArray[np.int64], pad: int, into: npt.NDArray[np.int64]) -> None:
    """Write event texts, padded with the tokenizer's `pad` in both directions."""
    into.fill(pad)
    into[: token_ids_NT.shape[0], : token_ids_NT.shape[1]] = token_ids_NT


def _fill(into: npt.NDArray[Any], array: npt.NDArray[Any]) -> None:
    into[: len(array)] = array
    into[len(array) :] = 0
