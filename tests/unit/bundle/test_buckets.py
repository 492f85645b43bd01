"""Buckets hold the steps they are chosen for, and every dynamic dimension has a range."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qanchor.bundle.buckets import (
    BucketLimits,
    Ladders,
    find_profile,
    make_ladders,
    steps_up_to,
)
from qanchor.bundle.manifest import (
    EVENT_ENCODER,
    PREFIX,
    SUFFIX,
    Limits,
    ModelDims,
    event_encoder_spec,
    prefix_spec,
    suffix_spec,
)
from qanchor.config import ModalitySpec, ProfileSchema
from qanchor.errors import ConfigError
from qanchor_server.config import ServerConfig

DIMS = ModelDims(
    num_layers=2,
    hidden_dim=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    intermediate_dim=8,
    event_dim=4,
    embedding_dim=4,
)
SPECS = {
    EVENT_ENCODER: event_encoder_spec(DIMS),
    PREFIX: prefix_spec(DIMS),
    SUFFIX: suffix_spec(DIMS, "float32"),
}


def ladders(max_prefix_len: int = 700, **limits: object) -> Ladders:
    schema = ProfileSchema(
        modalities=(ModalitySpec(name="app", max_events=9, max_event_tokens=50),)
    )
    return make_ladders(
        BucketLimits(**limits),  # type: ignore[arg-type] - any limit by keyword
        Limits(max_prefix_len=max_prefix_len, max_query_len=64),
        schema,
    )


def test_ladders_end_with_the_limits_and_nothing_above():
    found = ladders(max_step_users=6, max_step_tokens=100, chunk_len=256)
    assert found.users == (1, 2, 4, 6)
    assert found.tokens == (32, 64, 100)
    assert found.capacities == (128, 256, 384, 512, 700)
    assert found.chunk_lens == (64, 128, 256)
    assert found.text_lens == (16, 32, 50)


def test_a_limit_below_the_first_step_is_the_only_step():
    assert steps_up_to(20, first=32) == (20,)


@given(
    rows=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    num_queries=st.integers(1, 8),
    prefix_len=st.integers(1, 700),
)
def test_a_suffix_step_fits_its_bucket(rows, num_queries, prefix_len):
    packed_len = sum(rows)
    bucket = ladders().suffix_bucket(
        num_users=len(rows),
        longest_row=max(rows),
        packed_len=packed_len,
        num_queries=min(num_queries, packed_len),
        longest_query=max(rows),
        prefix_len=prefix_len,
    )
    assert bucket.query_len >= max(rows)
    assert bucket.batch >= len(rows)
    assert bucket.row_len >= max(rows)
    assert bucket.packed_len >= packed_len
    assert bucket.packed_len >= bucket.num_queries >= min(num_queries, packed_len)
    assert bucket.prefix_capacity >= prefix_len
    assert bucket.batch > 1 or bucket.row_len == bucket.packed_len


def test_a_step_of_one_token_per_query_has_room_for_all_queries():
    bucket = ladders().suffix_bucket(
        num_users=1, longest_row=30, packed_len=30, num_queries=30, longest_query=9, prefix_len=5
    )
    assert bucket.num_queries == bucket.packed_len == 32


def test_what_no_bucket_holds_is_named():
    with pytest.raises(ConfigError, match="max_step_tokens=513: the largest bucket holds 512"):
        ladders().suffix_bucket(
            num_users=1,
            longest_row=513,
            packed_len=513,
            num_queries=1,
            longest_query=9,
            prefix_len=5,
        )


def test_a_first_chunk_reads_one_masked_column_only():
    assert ladders().prefix_bucket(chunk_len=40, start=0).prefix_capacity == 1
    assert ladders().prefix_bucket(chunk_len=40, start=256).prefix_capacity == 256


@given(num_texts=st.integers(1, 5000), text_len=st.integers(1, 50))
def test_a_batch_of_texts_never_exceeds_the_token_budget(num_texts, text_len):
    found = ladders(max_event_tokens_per_step=1000)
    bucket = found.event_bucket(num_texts=num_texts, text_len=text_len)
    assert bucket.text_len >= text_len
    assert bucket.num_texts * bucket.text_len <= 1000
    largest = found.text_classes(bucket.text_len)[-1]
    assert bucket.num_texts >= min(num_texts, largest)


def test_every_dynamic_dimension_of_the_manifest_has_a_range_and_a_size():
    found = ladders()
    for graph, spec in SPECS.items():
        tensors = (*spec.inputs, *spec.outputs)
        dynamic = {dim for tensor in tensors for dim in tensor.dims if isinstance(dim, str)}
        for ranges in found.profiles()[graph]:
            assert set(ranges) == dynamic
            assert all(1 <= low <= usual <= high for low, usual, high in ranges.values())
        for dims in found.largest()[graph]:
            assert set(dims) == dynamic


@given(
    users=st.integers(1, 16),
    tokens=st.integers(16, 512),
    queries=st.integers(1, 512),
    prefix_len=st.integers(1, 700),
)
def test_every_bucket_lies_in_an_optimization_profile(users, tokens, queries, prefix_len):
    found = ladders()
    profiles = found.profiles()
    suffix = found.suffix_bucket(
        num_users=users,
        longest_row=tokens - users + 1 if users <= tokens else 1,
        packed_len=tokens,
        num_queries=min(queries, tokens),
        longest_query=-(-tokens // queries),
        prefix_len=prefix_len,
    )
    assert find_profile(profiles[SUFFIX], suffix.dims()) == (0 if users == 1 else 1)
    for start in (0, prefix_len):
        chunk = found.prefix_bucket(chunk_len=min(tokens, BucketLimits().chunk_len), start=start)
        assert find_profile(profiles[PREFIX], chunk.dims()) == (0 if start == 0 else 1)
    texts = found.event_bucket(num_texts=tokens, text_len=min(prefix_len, 50))
    find_profile(profiles[EVENT_ENCODER], texts.dims())
    for bucket in found.warm_up():
        assert find_profile(profiles[SUFFIX], bucket.dims()) == 0


def test_a_size_beyond_all_profiles_is_refused():
    with pytest.raises(ConfigError, match="no optimization profile holds it"):
        find_profile(ladders().profiles()[PREFIX], {"chunk_len": 257, "prefix_capacity": 1})


def test_the_server_makes_the_buckets_that_plan_files_are_built_for():
    assert ServerConfig().bucket_limits() == BucketLimits()
