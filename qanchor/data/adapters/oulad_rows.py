"""Tables of OULAD events put together from columns.

`user_id` is the place of the user among the kept users until `oulad_csv` gives it its number;
`day` counts from the start of the presentation.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from qanchor.data.adapters.oulad_tables import FloatArray, IntArray
from qanchor.data.event_stream import EVENT_COLUMNS


def event_table(
    *,
    user: IntArray,
    day: IntArray,
    modality: pa.Array,
    event_type: pa.Array,
    text: pa.Array,
    value: FloatArray,
) -> pa.Table:
    """A table of `EVENT_COLUMNS`; NaN becomes a null value."""
    columns = (user, day, modality, event_type, text, pa.array(value, from_pandas=True))
    return pa.table(dict(zip(EVENT_COLUMNS, columns, strict=True)))


def listed_events(rows: list[tuple[int, int, str, str, float]], modality: str) -> pa.Table:
    """Events of one modality from rows of user, day, type, text and value."""
    users, days, types, texts, values = ([row[index] for row in rows] for index in range(5))
    return event_table(
        user=np.array(users, dtype=np.int64),
        day=np.array(days, dtype=np.int64),
        modality=pa.array([modality] * len(rows), pa.string()).dictionary_encode(),
        event_type=pa.array(types, pa.string()).dictionary_encode(),
        text=pa.array(texts, pa.string()).dictionary_encode(),
        value=np.array(values, dtype=np.float64),
    )


def texts_by_code(codes: IntArray, texts: list[str]) -> pa.DictionaryArray:
    """A dictionary-encoded column: row i reads `texts[codes[i]]`; equal texts become one."""
    distinct = list(dict.fromkeys(texts))
    place = {text: index for index, text in enumerate(distinct)}
    recode = np.array([place[text] for text in texts], dtype=np.int32)
    indices = recode[codes] if len(texts) else np.zeros(0, dtype=np.int32)
    return pa.DictionaryArray.from_arrays(pa.array(indices), pa.array(distinct, pa.string()))


def join_events(parts: Iterable[pa.Table]) -> pa.Table:
    """All events by user, day, modality, type and text: within a day order carries no meaning."""
    table = pa.concat_tables(parts).unify_dictionaries().combine_chunks()
    order = np.lexsort(
        (
            _rank(table, "text"),
            _rank(table, "event_type"),
            _rank(table, "modality"),
            table["day"].to_numpy(),
            table["user_id"].to_numpy(),
        )
    )
    return table.take(pa.array(order))


def _rank(table: pa.Table, column: str) -> IntArray:
    """Alphabetical rank of each row's word."""
    if not table.num_rows:
        return np.zeros(0, dtype=np.int64)
    words = table[column].chunk(0)
    rank_of_code = np.argsort(np.argsort(np.array(words.dictionary.to_pylist(), dtype=object)))
    ranks: IntArray = rank_of_code[words.indices.to_numpy()]
    return ranks
