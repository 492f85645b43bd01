"""Fills a bucket's input arrays with a step and with padding that changes no result.

Suffix: a packed token that stands in no row of a grid is read by none; a row of -1 is a user or a
query without tokens; the vector of a query beyond the real ones is dropped. Prefix:
positions after the real ones are seen by none of them. Pure numpy; must not know engines.

Legend: S packed length, B users, R longest row, C chunk length, N texts, T text length.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qanchor.bundle.packing import ROW_PADDING, PackedSuffix

Arrays = Mapping[str, npt.NDArray[Any]]

_GRIDS = {"row_index": "flat_index", "query_index": "query_place"}
"""Inputs that list packed places, and the inverse of each."""


def fill_suffix(packed: PackedSuffix, into: Arrays) -> None:
    """Write a step into arrays of the bucket's shapes, named as the graph's inputs.

    Of `prompt_rows` only the step's rows are written; whatever stands beyond is never picked.
    """
    arrays = packed.inputs(by_query="query_index" in into)
    for name in into.keys() - {"prompt_rows", *_GRIDS, *_GRIDS.values()}:
        _fill(into[name], arrays[name])
    into["prompt_rows"][: len(packed.prompt_rows_KD)] = packed.prompt_rows_KD
    for index, place in _GRIDS.items():
        if index in into:
            _fill_grid(arrays[index], into[index], arrays[place], into[place])


def fill_chunk(chunk: Arrays, start: int, into: Arrays) -> None:
    """Write a chunk's `token_ids`, `adapter`, `slot_vectors` and its `past_len`."""
    for name, array in chunk.items():
        _fill(into[name], array)
    into["past_len"][0] = start


def fill_texts(token_ids_NT: npt.NDArray[np.int64], pad: int, into: npt.NDArray[np.int64]) -> None:
    """Write event texts, padded with the tokenizer's `pad` in both directions."""
    into.fill(pad)
    into[: token_ids_NT.shape[0], : token_ids_NT.shape[1]] = token_ids_NT


def _fill_grid(
    index: npt.NDArray[Any],
    into_index: npt.NDArray[Any],
    place_S: npt.NDArray[Any],
    into_place: npt.NDArray[Any],
) -> None:
    num_rows, width = index.shape
    into_index.fill(ROW_PADDING)
    into_index[:num_rows, :width] = index
    # A packed token's place in the grid depends on the width of the grid.
    rows_S, columns_S = np.divmod(place_S, width)
    _fill(into_place, rows_S * into_index.shape[1] + columns_S)


def _fill(into: npt.NDArray[Any], array: npt.NDArray[Any]) -> None:
    into[: len(array)] = array
    into[len(array) :] = 0
