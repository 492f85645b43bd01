"""Packing worked out by hand."""

import numpy as np

from qanchor_export.packing import SuffixQuery, pack

EMB = 9


def test_two_users_lie_side_by_side_each_in_its_row() -> None:
    """User 0: prefix 5, queries [1 2 E] and [3 E]; user 1: prefix 7, query [4 E]."""
    first = [SuffixQuery((1, 2), EMB), SuffixQuery((3,), EMB)]
    packed = pack([(5, first), (7, [SuffixQuery((4,), EMB)])], hidden_dim=3)
    assert packed.token_ids.tolist() == [1, 2, EMB, 3, EMB, 4, EMB]
    assert packed.positions.tolist() == [5, 6, 7, 5, 6, 7, 8]
    assert packed.segment_ids.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert packed.emb_index.tolist() == [2, 4, 6]
    assert packed.prefix_len.tolist() == [5, 7]
    assert packed.row_index.tolist() == [[0, 1, 2, 3, 4], [5, 6, -1, -1, -1]]
    assert packed.flat_index.tolist() == [0, 1, 2, 3, 4, 5, 6]
    flat = packed.row_index.reshape(-1)
    assert flat[packed.flat_index].tolist() == list(range(7))


def test_a_soft_prompt_stands_between_text_and_user_emb() -> None:
    prompt = np.arange(6, dtype=np.float32).reshape(2, 3)
    queries = [SuffixQuery((1,), EMB), SuffixQuery((2,), EMB, prompt), SuffixQuery((), EMB, prompt)]
    packed = pack([(4, queries)], hidden_dim=3)
    assert packed.token_ids.tolist() == [1, EMB, 2, 0, 0, EMB, 0, 0, EMB]
    assert packed.prompt_index.tolist() == [0, 0, 0, 1, 2, 0, 3, 4, 0]
    assert packed.positions.tolist() == [4, 5, 4, 5, 6, 7, 4, 5, 6]
    assert packed.prompt_rows.tolist() == np.concatenate([prompt, prompt]).tolist()
    assert [len(query) for query in queries] == [2, 4, 3]


def test_no_soft_prompt_gives_one_row_that_nothing_points_to() -> None:
    packed = pack([(0, [SuffixQuery((), EMB)])], hidden_dim=3)
    assert packed.prompt_rows.shape == (1, 3)
    assert packed.prompt_rows.dtype == np.float32
    assert packed.prompt_index.tolist() == [0]
