"""What only a GPU can show; `tests/parity/test_static_engine.py` runs its tests there as well.

QANCHOR_REQUIRE_GPU=1 turns the skips into failures.
"""

from pathlib import Path

import numpy as np
import pytest

from qanchor.bundle.buckets import BucketLimits, make_ladders
from qanchor.bundle.packing import SuffixQuery, UserSuffix, pack
from qanchor.bundle.reader import Bundle, open_bundle
from qanchor.bundle.tolerance import tolerances
from qanchor_server.config import ServerConfig
from qanchor_server.engine.choice import open_engine
from qanchor_server.engine.static import StaticEngine, StaticSlot
from qanchor_server.parity import check_parity
from qanchor_server.prefix_encoder import PrefixEncoder
from qanchor_server.prefix_source import prepare_rendered

PRECISIONS = ("float32", "float16", "bfloat16")


@pytest.fixture(scope="module", params=PRECISIONS)
def bundle(request, tmp_path_factory) -> Bundle:
    """A tiny random bundle; its stored embeddings are torch's in float32."""
    from qanchor_export.bundle_writer import export_bundle
    from qanchor_export.random_source import method_schema, random_source, shape_named
    from qanchor_export.weights import Numbers

    path = tmp_path_factory.mktemp("gpu") / request.param
    numbers = Numbers(precision=request.param)
    export_bundle(random_source(shape_named("tiny"), method_schema()), path, numbers=numbers)
    return open_bundle(path)


def encoder_of(engine: StaticEngine, bundle: Bundle) -> PrefixEncoder[StaticSlot]:
    return PrefixEncoder(
        engine, bundle, chunk_len=64, max_event_tokens_per_step=1024, max_cached_texts=999
    )


def embed_case(engine: StaticEngine, bundle: Bundle, number: int) -> np.ndarray:
    """The embeddings of a stored case over a fresh slot."""
    case, manifest = bundle.parity[number], bundle.manifest
    prepared = prepare_rendered(case.rendered, user_id="", version=1, as_of_s=0, manifest=manifest)
    slot = engine.allocate_slot(len(prepared.layout))
    encoder_of(engine, bundle).encode(prepared, slot)
    queries = tuple(SuffixQuery(tuple(bundle.encode_query(query))) for query in case.queries)
    packed = pack(
        [UserSuffix(len(prepared.layout), queries)],
        user_emb=manifest.tokens.user_emb,
        hidden_dim=manifest.dims.hidden_dim,
    )
    found = engine.suffix(packed, [slot])
    engine.free_slot(slot)
    return found


@pytest.mark.gpu
def test_the_cuda_engine_reproduces_torch(bundle):
    engine = open_engine(bundle, ServerConfig(engine="cuda"))
    worst = check_parity(engine, encoder_of(engine, bundle), bundle)
    assert worst < max(1e-3, tolerances(bundle.manifest).torch.max_abs)


@pytest.mark.gpu
def test_a_replayed_cuda_graph_gives_what_the_graph_gives_without(bundle):
    plain = open_engine(bundle, ServerConfig(engine="cuda", cuda_graphs=False))
    captured = open_engine(bundle, ServerConfig(engine="cuda", cuda_graphs=True))
    for number in (0, 1, 2, 1, 0):
        wanted = embed_case(plain, bundle, number)
        assert np.abs(embed_case(captured, bundle, number) - wanted).max() < 1e-5


@pytest.mark.gpu
def test_slots_are_on_the_device_and_freed(bundle):
    from cuda.bindings import runtime

    engine = open_engine(bundle, ServerConfig(engine="cuda"))
    num_bytes = 1 << 26
    capacity = num_bytes // bundle.manifest.dims.kv_bytes_per_token
    before = runtime.cudaMemGetInfo()[1]
    slot = engine.allocate_slot(capacity)
    status, attributes = runtime.cudaPointerGetAttributes(slot.address)
    assert status == runtime.cudaError_t.cudaSuccess
    assert attributes.type == runtime.cudaMemoryType.cudaMemoryTypeDevice
    assert before - runtime.cudaMemGetInfo()[1] >= num_bytes * 0.9
    engine.free_slot(slot)
    assert before - runtime.cudaMemGetInfo()[1] < num_bytes * 0.1


@pytest.mark.tensorrt
def test_the_tensorrt_engine_reproduces_torch(bundle, tmp_path: Path):
    from qanchor_export.to_tensorrt import export_plans

    limits = BucketLimits(max_step_users=2, max_step_tokens=256)
    directory, plans = export_plans(bundle, tmp_path, limits)
    manifest = bundle.manifest
    assert plans.ladders == make_ladders(limits, manifest.limits, manifest.profile_schema)
    assert directory.parent == tmp_path
    for cuda_graphs in (False, True):
        config = ServerConfig(
            engine="tensorrt",
            plans_dir=str(tmp_path),
            cuda_graphs=cuda_graphs,
            max_step_users=2,
            max_step_tokens=256,
        )
        engine = open_engine(bundle, config)
        worst = check_parity(engine, encoder_of(engine, bundle), bundle)
        assert worst < max(1e-3, tolerances(bundle.manifest).torch.max_abs)
