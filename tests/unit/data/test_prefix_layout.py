"""The prefix layout: its length, what stands where, and the pre-adapter vectors."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qanchor.config import ModalitySpec, ProfileSchema
from qanchor.data.prefix import (
    ADAPTER_FIRST_EVENT,
    ADAPTER_MODALITY,
    ADAPTER_TOKEN,
    ADAPTER_USER,
    PrefixTokens,
    build_layout,
    content_digest,
    max_prefix_len,
    prefix_len,
    slot_vectors,
)
from qanchor.data.render import RenderedProfile
from qanchor.errors import ConfigError


def _tokens(num_modalities: int, header_len: int = 3) -> PrefixTokens:
    return PrefixTokens(
        header=tuple(range(100, 100 + header_len)),
        modality_start=tuple(range(200, 200 + num_modalities)),
        modality_end=tuple(range(300, 300 + num_modalities)),
        user_emb=1,
        eos=2,
        pad=0,
    )


counts = st.lists(st.integers(0, 6), min_size=1, max_size=5).map(tuple)


@given(counts, st.integers(1, 5))
def test_length_is_header_plus_user_plus_three_per_modality_plus_events(
    num_events: tuple[int, ...], header_len: int
) -> None:
    tokens = _tokens(len(num_events), header_len)
    layout = build_layout(num_events, tokens)
    assert len(layout) == header_len + 1 + 3 * len(num_events) + sum(num_events)
    assert len(layout) == max_prefix_len(num_events, tokens)
    assert [layout.token_ids_P.dtype, layout.adapter_P.dtype] == [np.int64, np.int64]


@given(counts)
def test_every_event_stands_once_between_its_delimiters(num_events: tuple[int, ...]) -> None:
    layout = build_layout(num_events, _tokens(len(num_events)))
    is_event = layout.adapter_P >= ADAPTER_FIRST_EVENT
    assert layout.source_P[is_event].tolist() == list(range(sum(num_events)))
    ids = layout.token_ids_P.tolist()
    for modality, count in enumerate(num_events):
        start, end = ids.index(200 + modality), ids.index(300 + modality)
        inside = layout.adapter_P[start + 1 : end]
        assert inside.tolist() == [ADAPTER_FIRST_EVENT + modality] * count


def test_coarse_tokens_stand_between_header_and_first_block() -> None:
    layout = build_layout((1, 0), _tokens(2))
    adapters = [ADAPTER_TOKEN] * 3 + [ADAPTER_USER, ADAPTER_MODALITY, ADAPTER_MODALITY]
    assert layout.adapter_P[:6].tolist() == adapters
    assert layout.token_ids_P[6] == 200


def test_means_run_over_events_and_an_empty_modality_counts_as_zeros() -> None:
    layout = build_layout((2, 0), _tokens(2))
    vectors = slot_vectors(layout, (2, 0), np.array([[1.0, 3.0], [3.0, 5.0]], dtype=np.float32))
    np.testing.assert_array_equal(vectors[layout.adapter_P == ADAPTER_USER], [[1.0, 2.0]])
    modality = vectors[layout.adapter_P == ADAPTER_MODALITY]
    np.testing.assert_array_equal(modality, [[2.0, 4.0], [0.0, 0.0]])


@given(counts, st.booleans(), st.booleans())
def test_coarse_tokens_can_be_left_out_and_nothing_else_moves(
    num_events: tuple[int, ...], has_user_token: bool, has_modality_tokens: bool
) -> None:
    whole_tokens = _tokens(len(num_events))
    tokens = msgspec.structs.replace(
        whole_tokens, has_user_token=has_user_token, has_modality_tokens=has_modality_tokens
    )
    whole, layout = build_layout(num_events, whole_tokens), build_layout(num_events, tokens)
    kept = np.ones(len(whole), dtype=bool)
    kept[whole.adapter_P == ADAPTER_USER] = has_user_token
    kept[whole.adapter_P == ADAPTER_MODALITY] = has_modality_tokens
    for name in ("token_ids_P", "adapter_P", "source_P"):
        np.testing.assert_array_equal(getattr(layout, name), getattr(whole, name)[kept])
    assert len(layout) == prefix_len(num_events, tokens) == max_prefix_len(num_events, tokens)
    vectors_NE = np.ones((sum(num_events), 2), dtype=np.float32)
    np.testing.assert_array_equal(
        slot_vectors(layout, num_events, vectors_NE),
        slot_vectors(whole, num_events, vectors_NE)[kept],
    )


def test_a_query_template_asks_the_query_or_is_empty() -> None:
    spec = ModalitySpec(name="app", max_events=1, max_event_tokens=4)
    assert ProfileSchema(modalities=(spec,), query_template="").query_template == ""
    with pytest.raises(ConfigError, match=r"must contain \{query\}"):
        ProfileSchema(modalities=(spec,), query_template="Query:")


def test_the_digest_tells_model_modality_and_text_apart() -> None:
    profiles = [((("a", "b"), ()), "m"), ((("a",), ("b",)), "m"), ((("ab",), ()), "m")]
    digests = [content_digest(RenderedProfile(texts), model) for texts, model in profiles]
    digests.append(content_digest(RenderedProfile((("a", "b"), ())), "other"))
    assert len(set(digests)) == 4


@pytest.mark.parametrize("char", ["\x00", "\x1d", "\x1e", "\x1f", "\n", ",", '"', "é"])
def test_no_character_in_a_text_makes_it_pass_for_two(char: str) -> None:
    contents = [
        ((f"a{char}b",), ()), (("a", "b"), ()), (("a",), ("b",)), ((f"a{char}", "b"), ()),
        (("a", f"{char}b"), ()), ((f"a{char}b{char}",), ()), (("a", "b", ""), ()),
    ]  # fmt: skip
    digests = {content_digest(RenderedProfile(texts), "m") for texts in contents}
    assert len(digests) == len(contents)
