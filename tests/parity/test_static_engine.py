"""Static buckets change nothing: padded = unpadded, chunked = whole, replayed = first run.

The same tests run on host memory everywhere, on a GPU through ONNX Runtime (mark gpu) and through
plan files (mark tensorrt). The other side is the plain runner, which pads nothing.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qanchor.bundle.buckets import BucketLimits, Ladders, make_ladders
from qanchor.bundle.manifest import Manifest
from qanchor.bundle.packing import SuffixQuery, UserSuffix, pack
from qanchor.bundle.reader import Bundle, open_bundle
from qanchor.bundle.tolerance import tolerances
from qanchor.data.prefix import build_layout, slot_vectors, with_measures
from qanchor.data.render import RenderedProfile
from qanchor_export.bundle_writer import export_bundle
from qanchor_export.runner import BundleRunner
from qanchor_export.sample_users import SAMPLE_QUERIES, sample_users
from qanchor_export.weights import Numbers
from qanchor_server.engine import PrefixChunk
from qanchor_server.engine.cuda import CudaOptions, OrtRunner, open_cuda_engine
from qanchor_server.engine.memory import HostMemory
from qanchor_server.engine.static import StaticEngine, StaticSlot
from qanchor_server.failures import Retryable
from qanchor_server.parity import check_parity
from qanchor_server.prefix_encoder import PrefixEncoder

# Float32 sums in another order; components of unit vectors.
TOLERANCE = 2e-5
LIMITS = BucketLimits(
    max_step_users=3,
    max_step_tokens=160,
    chunk_len=64,
    max_event_tokens_per_step=48,
    slab_ladder=(16, 32, 48),
)


@pytest.fixture(scope="module")
def bundle(bundle_path: Path) -> Bundle:
    return open_bundle(bundle_path)


@pytest.fixture(scope="module")
def ladders(bundle: Bundle) -> Ladders:
    return make_ladders(LIMITS, bundle.manifest.limits, bundle.manifest.profile_schema)


@pytest.fixture(
    scope="module",
    params=[
        "host",
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("tensorrt", marks=pytest.mark.tensorrt),
    ],
)
def engine(request, bundle: Bundle, ladders: Ladders, tmp_path_factory) -> Iterator[StaticEngine]:
    if request.param == "host":
        memory = HostMemory()
        yield StaticEngine(bundle.manifest, ladders, memory, OrtRunner(bundle, memory, {}))
    elif request.param == "cuda":
        yield open_cuda_engine(bundle, ladders, CudaOptions())
    else:
        from qanchor_export.to_tensorrt import export_plans
        from qanchor_server.engine.trt import TrtOptions, open_trt_engine

        plans = tmp_path_factory.mktemp("plans")
        export_plans(bundle, plans, LIMITS)
        yield open_trt_engine(bundle, LIMITS, TrtOptions(plans_dir=str(plans)))[0]


@pytest.fixture(scope="module")
def users(bundle: Bundle) -> list[RenderedProfile]:
    return sample_users(bundle.manifest.profile_schema, 4, seed=3)


def prefill(
    engine: StaticEngine, runner: BundleRunner, user: RenderedProfile, chunk_len: int
) -> tuple[StaticSlot, int]:
    """A slot a little longer than the prefix, filled in chunks."""
    layout = build_layout(user.num_events, runner.bundle.manifest.tokens)
    vectors_PE = slot_vectors(
        layout, user.num_events, with_measures(runner.event_vectors(user), user)
    )
    slot = engine.allocate_slot(len(layout) + 5)
    for start in range(0, len(layout), chunk_len):
        stop = start + chunk_len
        engine.prefill(
            slot,
            PrefixChunk(
                layout.token_ids_P[start:stop],
                layout.adapter_P[start:stop],
                vectors_PE[start:stop],
                start,
            ),
        )
    return slot, len(layout)


def embed(engine: StaticEngine, bundle: Bundle, slots, suffixes: list[UserSuffix]) -> np.ndarray:
    manifest = bundle.manifest
    packed = pack(suffixes, user_emb=manifest.tokens.user_emb, hidden_dim=manifest.dims.hidden_dim)
    return engine.suffix(packed, slots)


def queries_of(runner: BundleRunner, count: int) -> tuple[SuffixQuery, ...]:
    """Plain and soft-prompted queries, alternating."""
    width = runner.bundle.manifest.dims.hidden_dim
    draw = np.random.default_rng(11)
    prompts = [draw.standard_normal((1 + i % 3, width), dtype=np.float32) for i in range(count)]
    return tuple(
        runner.query(SAMPLE_QUERIES[i % len(SAMPLE_QUERIES)], prompts[i] if i % 2 else None)
        for i in range(count)
    )


@pytest.mark.parametrize("chunk_len", [64, 23, 7])
def test_torch_at_export_is_reproduced(engine, bundle, chunk_len):
    encoder = PrefixEncoder(
        engine, bundle, chunk_len=chunk_len, max_event_tokens_per_step=500, max_cached_texts=999
    )
    assert check_parity(engine, encoder, bundle) < TOLERANCE


@pytest.mark.parametrize("counts", [(1,), (6,), (2, 1), (1, 4, 2), (3, 3, 3)])
def test_a_padded_step_equals_the_unpadded_one(engine, runner, users, counts):
    chosen = users[: len(counts)]
    filled = [prefill(engine, runner, user, 40) for user in chosen]
    queries = [queries_of(runner, count) for count in counts]
    plain = [runner.encode_prefix(user) for user in chosen]
    wanted = runner.suffix([(one, list(few)) for one, few in zip(plain, queries, strict=True)])
    suffixes = [UserSuffix(length, few) for (_, length), few in zip(filled, queries, strict=True)]
    # Twice: the second time the buckets are there and hold other steps' numbers.
    for _ in range(2):
        found = embed(engine, runner.bundle, [slot for slot, _ in filled], suffixes)
        assert np.abs(found - wanted).max() < TOLERANCE
    for slot, _ in filled:
        engine.free_slot(slot)


def test_a_step_leaves_nothing_behind_for_the_next(engine, runner, users):
    queries = queries_of(runner, 2)
    (first, first_len), (other, other_len) = (prefill(engine, runner, u, 64) for u in users[:2])
    alone = embed(engine, runner.bundle, [first], [UserSuffix(first_len, queries)])
    both = [UserSuffix(other_len, queries), UserSuffix(first_len, queries)]
    batched = embed(engine, runner.bundle, [other, first], both)
    again = embed(engine, runner.bundle, [first], [UserSuffix(first_len, queries)])
    assert np.abs(batched[2:] - alone).max() < TOLERANCE
    assert np.array_equal(again, alone)


def test_more_texts_than_a_bucket_holds_are_split(engine, runner):
    pad = runner.bundle.manifest.event_pad
    ids = np.full((21, 9), pad, dtype=np.int64)
    for row in range(21):
        ids[row, : 1 + row % 9] = 5 + row
    parts = [engine.encode_events(ids[row : row + 1]) for row in range(21)]
    together = engine.encode_events(ids)
    assert together.shape == (21, runner.bundle.manifest.dims.event_dim)
    assert np.abs(together - np.concatenate(parts)).max() < 1e-4


def test_a_cleared_slot_is_a_new_slot(engine, runner, users):
    queries = queries_of(runner, 1)
    slot, length = prefill(engine, runner, users[0], 64)
    engine.clear_slot(slot)
    engine.clear_working()
    fresh = engine.allocate_slot(slot.capacity)
    found = [
        embed(engine, runner.bundle, [s], [UserSuffix(length, queries)]) for s in (slot, fresh)
    ]
    assert np.array_equal(*found)


def test_a_slot_exported_and_imported_is_the_same_to_the_bit(engine, runner, users):
    queries = queries_of(runner, 2)
    slot, length = prefill(engine, runner, users[0], 64)
    wanted = embed(engine, runner.bundle, [slot], [UserSuffix(length, queries)])
    num_bytes = length * runner.bundle.manifest.dims.kv_bytes_per_token
    kept = engine.host_arena(num_bytes + 64)[:num_bytes]
    engine.export_slot(slot, length, kept)
    other = engine.allocate_slot(length + 29)
    engine.import_slot(other, length, kept)
    found = embed(engine, runner.bundle, [other], [UserSuffix(length, queries)])
    assert np.array_equal(found, wanted)
    assert kept[:num_bytes].any()


def test_a_slot_there_is_no_memory_for_is_retryable(engine):
    with pytest.raises(Retryable, match="out of memory"):
        engine.allocate_slot(1 << 45)


def test_each_bucket_is_made_ready_once_and_may_run_to_be_captured(bundle, ladders, runner, users):
    ready: list[tuple[str, tuple[tuple[str, int], ...]]] = []

    class Counting(OrtRunner):
        def ready(self, graph, dims, addresses):
            ready.append((graph, tuple(sorted(dims.items()))))
            run = super().ready(graph, dims, addresses)
            # As a capture does: before the step's own numbers are there.
            run()
            return run

    memory = HostMemory()
    engine = StaticEngine(bundle.manifest, ladders, memory, Counting(bundle, memory, {}))
    slot, length = prefill(engine, runner, users[0], 64)
    for count in (1, 2, 1):
        embed(engine, bundle, [slot], [UserSuffix(length, queries_of(runner, count))])
    engine.warm_up(ladders.warm_up())
    assert len(ready) == len(set(ready))


def test_float16_slots_take_half_and_give_the_same(source, users, tmp_path):
    path = tmp_path / "float16"
    manifest = export_bundle(source, path, numbers=Numbers(precision="float16"))
    bundle = open_bundle(path)
    memory, allowed = HostMemory(), tolerances(manifest)
    ladders = make_ladders(LIMITS, manifest.limits, manifest.profile_schema)
    engine = StaticEngine(manifest, ladders, memory, OrtRunner(bundle, memory, {}))
    encoder = PrefixEncoder(
        engine, bundle, chunk_len=23, max_event_tokens_per_step=500, max_cached_texts=999
    )
    assert check_parity(engine, encoder, bundle) < allowed.torch.max_abs
    runner = BundleRunner(bundle, num_threads=1)
    queries = queries_of(runner, 3)
    filled = [prefill(engine, runner, user, 40) for user in users[:2]]
    suffixes = [UserSuffix(length, queries) for _, length in filled]
    found = embed(engine, bundle, [slot for slot, _ in filled], suffixes)
    wanted = runner.suffix([(runner.encode_prefix(user), list(queries)) for user in users[:2]])
    assert np.abs(found - wanted).max() < allowed.ways.max_abs
    assert manifest.dims.kv_bytes_per_token * 2 == kv_bytes_of_float32(manifest)


def kv_bytes_of_float32(manifest: Manifest) -> int:
    dims = manifest.dims
    return 4 * 2 * dims.num_layers * dims.num_kv_heads * dims.head_dim
