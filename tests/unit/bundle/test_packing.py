"""Packing: every graph input of small steps written out by hand."""

from typing import get_args

import numpy as np
import pytest

from qanchor.bundle.manifest import ModelDims, Precision, asks_by_query, suffix_spec
from qanchor.bundle.packing import Packer, SuffixQuery, UserSuffix, check_questions, pack
from qanchor.config import Scenario
from qanchor.errors import ConfigError

USER_EMB = 99
ROWS_2 = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float32)
ROWS_1 = np.array([[7, 8, 9]], dtype=np.float32)


def test_one_user_with_two_queries() -> None:
    user = UserSuffix(10, (SuffixQuery((1, 2)), SuffixQuery((3,))))
    packed = pack([user], user_emb=USER_EMB, hidden_dim=3)
    assert packed.token_ids_S.tolist() == [1, 2, USER_EMB, 3, USER_EMB]
    assert packed.positions_S.tolist() == [10, 11, 12, 10, 11]
    assert packed.segment_ids_S.tolist() == [0, 0, 0, 1, 1]
    assert packed.prompt_index_S.tolist() == [0] * 5
    assert packed.prompt_rows_KD.tolist() == [[0, 0, 0]]
    assert packed.row_index_BR.tolist() == [[0, 1, 2, 3, 4]]
    assert packed.flat_index_S.tolist() == [0, 1, 2, 3, 4]
    assert packed.query_index_QL.tolist() == [[0, 1, 2], [3, 4, -1]]
    assert packed.query_place_S.tolist() == [0, 1, 2, 3, 4]
    assert packed.emb_index_Q.tolist() == [2, 4]
    assert packed.prefix_len_B.tolist() == [10]


def test_users_of_different_length_share_a_padded_row_index() -> None:
    long = UserSuffix(10, (SuffixQuery((1, 2)), SuffixQuery((3,))))
    short = UserSuffix(7, (SuffixQuery((4,)),))
    packed = pack([long, short], user_emb=USER_EMB, hidden_dim=3)
    assert packed.segment_ids_S.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert packed.positions_S.tolist() == [10, 11, 12, 10, 11, 7, 8]
    assert packed.row_index_BR.tolist() == [[0, 1, 2, 3, 4], [5, 6, -1, -1, -1]]
    assert packed.flat_index_S.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert packed.emb_index_Q.tolist() == [2, 4, 6]


def test_places_are_the_inverse_of_the_grids() -> None:
    queries = [SuffixQuery(tuple(range(n))) for n in (1, 4, 2)]
    users = [UserSuffix(5, (query, queries[0])) for query in queries]
    packed = pack(users, user_emb=USER_EMB, hidden_dim=3)
    everything = list(range(len(packed.token_ids_S)))
    assert packed.row_index_BR.reshape(-1)[packed.flat_index_S].tolist() == everything
    assert packed.query_index_QL.reshape(-1)[packed.query_place_S].tolist() == everything


def test_a_soft_prompt_stands_between_query_and_user_emb_and_travels_once() -> None:
    tuned, other = SuffixQuery((1,), ROWS_2), SuffixQuery((2,), ROWS_1)
    packed = pack([UserSuffix(3, (tuned, other, tuned))], user_emb=USER_EMB, hidden_dim=3)
    assert packed.token_ids_S.tolist() == [1, 0, 0, USER_EMB, 2, 0, USER_EMB, 1, 0, 0, USER_EMB]
    assert packed.prompt_index_S.tolist() == [0, 1, 2, 0, 0, 3, 0, 0, 1, 2, 0]
    assert packed.prompt_rows_KD.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert packed.positions_S.tolist() == [3, 4, 5, 6, 3, 4, 5, 3, 4, 5, 6]
    assert packed.emb_index_Q.tolist() == [3, 6, 10]
    assert tuned.suffix_len == 4


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("rows", [None, ROWS_2])
def test_inputs_have_the_manifests_names_order_dtypes_and_ranks(
    rows: np.ndarray | None, precision: Precision
) -> None:
    dims = ModelDims(
        num_layers=1, hidden_dim=3, num_heads=1, num_kv_heads=1, head_dim=1,
        intermediate_dim=1, event_dim=1, embedding_dim=1,
    )  # fmt: skip
    user = UserSuffix(2, (SuffixQuery((1,), rows),))
    packed = pack([user], user_emb=USER_EMB, hidden_dim=3)
    inputs = packed.inputs(by_query=asks_by_query(precision))
    specs = {s.name: s for s in suffix_spec(dims, precision).inputs if "past" not in s.name}
    assert list(inputs) == list(specs)
    for name, array in inputs.items():
        assert str(array.dtype) == specs[name].dtype
        assert array.ndim == len(specs[name].dims)
        assert array.flags.c_contiguous


def test_a_packer_keeps_what_one_user_is_asked_again() -> None:
    queries = SuffixQuery((1, 2)), SuffixQuery((3,), ROWS_2)
    # Room for two such steps, not for three.
    one = pack([UserSuffix(10, queries)], user_emb=USER_EMB, hidden_dim=3).num_bytes
    packer = Packer(user_emb=USER_EMB, hidden_dim=3, max_bytes=5 * one // 2)
    first = packer.pack([UserSuffix(10, queries)])
    assert packer.pack([UserSuffix(10, queries)]) is first
    # The same words in another object, another order and another length are other steps.
    for user in (
        UserSuffix(10, (SuffixQuery((1, 2)), queries[1])),
        UserSuffix(10, queries[::-1]),
        UserSuffix(11, queries),
    ):
        found = packer.pack([user])
        assert found is not first
        wanted = pack([user], user_emb=USER_EMB, hidden_dim=3).inputs(by_query=True)
        for name, array in found.inputs(by_query=True).items():
            assert array.tolist() == wanted[name].tolist(), name
    assert packer.pack([UserSuffix(11, queries)]) is found
    assert packer.pack([UserSuffix(10, queries)]) is not first, "two newer ones took its place"


def test_a_step_beyond_the_budget_is_not_kept() -> None:
    packer = Packer(user_emb=USER_EMB, hidden_dim=3, max_bytes=100)
    user = UserSuffix(10, (SuffixQuery((1, 2)),))
    assert packer.pack([user]) is not packer.pack([user])


def test_a_packer_keeps_no_step_of_several_users() -> None:
    packer = Packer(user_emb=USER_EMB, hidden_dim=3, max_bytes=1 << 20)
    users = [UserSuffix(10, (SuffixQuery((1,)),)), UserSuffix(3, (SuffixQuery((2,)),))]
    found = packer.pack(users)
    assert packer.pack(users) is not found
    assert found.positions_S.tolist() == [10, 11, 3, 4]


def test_a_question_longer_than_the_model_takes_is_told_by_name() -> None:
    def words(text: str) -> tuple[int, ...]:
        return tuple(range(len(text.split())))

    fits = Scenario(name="churn", question="leaves this month", soft_prompt=((1.0,),) * 9)
    silent = Scenario(name="old", question="a b c d e", soft_prompt=((1.0,),), is_compiled=True)
    check_questions([fits, silent], words, 3)
    long = Scenario(name="stay", question="does not leave soon")
    with pytest.raises(ConfigError, match=r"stay\.question.* 4 tokens, .* takes 3; shorten it, or"):
        check_questions([fits, long], words, 3)
