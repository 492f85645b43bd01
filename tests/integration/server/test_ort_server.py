"""A small exported bundle served by ONNX Runtime: the server's vectors are torch's."""

import asyncio
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from qanchor.bundle.manifest import MANIFEST_FILE, WEIGHTS_FILE
from qanchor.bundle.packing import PackedSuffix, Packer, SuffixQuery, UserSuffix, pack
from qanchor.bundle.reader import Bundle, open_bundle
from qanchor.client import AsyncClient, CacheState, EmbedRequestItem
from qanchor.config import ModalitySpec, ProfileSchema
from qanchor.data.profile import Event, Profile
from qanchor.errors import BundleError, ConfigError
from qanchor_server.config import ServerConfig
from qanchor_server.engine import ort
from qanchor_server.engine.choice import num_lanes, open_engine
from qanchor_server.engine.ort import OrtEngine, OrtOptions
from qanchor_server.main import Server
from qanchor_server.parity import check_parity
from qanchor_server.prefix_encoder import PrefixEncoder
from qanchor_server.prefix_source import prepare, prepare_rendered
from qanchor_server.suffix_runner import SuffixRunner

NOW_S = 1_000 * 86_400
# Float32 sums in another order; components of unit vectors.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def bundle_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bundle of a tiny shape with two modalities."""
    pytest.importorskip("torch")
    from qanchor_export.bundle_writer import export_bundle
    from qanchor_export.random_source import random_source, shape_named

    schema = ProfileSchema(
        modalities=(
            ModalitySpec(name="app", max_events=20, max_event_tokens=12),
            ModalitySpec(name="about", kind="attributes", max_events=4, max_event_tokens=12),
        )
    )
    path = tmp_path_factory.mktemp("ort") / "bundle"
    export_bundle(random_source(shape_named("tiny"), schema), path)
    return path


@pytest.fixture(scope="module")
def bundle(bundle_dir: Path) -> Bundle:
    return open_bundle(bundle_dir)


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> OrtEngine:
    return OrtEngine(bundle, OrtOptions(intra_op_threads=1))


def encoder_of(engine: OrtEngine, bundle: Bundle, chunk_len: int) -> PrefixEncoder:
    return PrefixEncoder(
        engine, bundle, chunk_len=chunk_len, max_event_tokens_per_step=64, max_cached_texts=1000
    )


def embed(engine: OrtEngine, bundle: Bundle, slots, users: list[UserSuffix]) -> np.ndarray:
    manifest = bundle.manifest
    packed = pack(users, user_emb=manifest.tokens.user_emb, hidden_dim=manifest.dims.hidden_dim)
    return engine.suffix(packed, slots)


@pytest.mark.parametrize("chunk_len", [1000, 7])
def test_the_engine_reproduces_torch_whole_and_in_chunks(engine, bundle, chunk_len):
    assert check_parity(engine, encoder_of(engine, bundle, chunk_len), bundle) < TOLERANCE


def test_users_batched_equal_users_alone_with_slots_of_any_capacity(engine, bundle, monkeypatch):
    encoder = encoder_of(engine, bundle, 16)
    slots, users, expected = [], [], []
    for number, case in enumerate(bundle.parity):
        prepared = prepare_rendered(
            case.rendered, user_id="", version=1, as_of_s=0, manifest=bundle.manifest
        )
        slot = engine.allocate_slot(len(prepared.layout) + 13 * number)
        encoder.encode(prepared, slot)
        slots.append(slot)
        queries = tuple(SuffixQuery(tuple(bundle.encode_query(q))) for q in case.queries)
        users.append(UserSuffix(len(prepared.layout), queries[number:]))
        expected.append(np.array(case.embeddings[number:]))
    dims = bundle.manifest.dims
    runner = SuffixRunner(
        engine, user_emb=bundle.manifest.tokens.user_emb, hidden_dim=dims.hidden_dim
    )
    together_len = min(user.num_tokens for user in users) + 1
    # Twice, and in another order: the working copy holds other users' numbers by then.
    for order in ([0, 1, 2], [2, 0], [1, 2, 0]):
        chosen = [users[i] for i in order], [slots[i] for i in order]
        wanted = np.concatenate([expected[i] for i in order])
        found = embed(engine, bundle, chosen[1], chosen[0])
        assert np.abs(found - wanted).max() < TOLERANCE
        # From one token alone, some alone, and all together.
        for tokens_alone in (1, together_len, 10_000):
            monkeypatch.setattr(ort, "_TOKENS_ALONE", tokens_alone)
            assert np.abs(runner.embed(*chosen) - wanted).max() < TOLERANCE


def test_users_side_by_side_equal_users_alone(engine, bundle):
    """Two lanes, more users than lanes, and asked again other things in another order."""
    lanes = OrtEngine(bundle, OrtOptions(intra_op_threads=2, lanes=2))
    encoder = encoder_of(lanes, bundle, 16)
    queries = [tuple(bundle.encode_query(q)) for q in bundle.parity[0].queries]
    users, slots, wanted = [], [], []
    for number in range(5):
        case = bundle.parity[number % len(bundle.parity)]
        prepared = prepare_rendered(
            case.rendered, user_id="", version=1, as_of_s=0, manifest=bundle.manifest
        )
        suffix = UserSuffix(
            len(prepared.layout), tuple(SuffixQuery(ids) for ids in queries[number % 2 :])
        )
        slot, alone = lanes.allocate_slot(700), engine.allocate_slot(700)
        encoder.encode(prepared, slot)
        encoder_of(engine, bundle, 16).encode(prepared, alone)
        users.append(suffix)
        slots.append(slot)
        wanted.append(embed(engine, bundle, [alone], [suffix]))
    dims = bundle.manifest.dims
    runner = SuffixRunner(
        lanes, user_emb=bundle.manifest.tokens.user_emb, hidden_dim=dims.hidden_dim
    )
    # A user asked twice is in two lanes at once, or in one run where that has few tokens.
    for order in ([0, 1, 2, 3, 4], [4, 2], [3], [1, 4, 0], [0, 0, 0, 2, 2], [0, 1, 2, 3, 4]):
        found = runner.embed([users[i] for i in order], [slots[i] for i in order])
        assert np.abs(found - np.concatenate([wanted[i] for i in order])).max() < TOLERANCE


def test_a_number_that_is_none_stays_with_its_user(engine, bundle):
    """The working copy is shared: columns beyond a shorter slot must not hold another's numbers."""
    case = bundle.parity[0]
    prepared = prepare_rendered(
        case.rendered, user_id="", version=1, as_of_s=0, manifest=bundle.manifest
    )
    query = SuffixQuery(tuple(bundle.encode_query(case.queries[0])))
    long = engine.allocate_slot(len(prepared.layout) + 40)
    short = engine.allocate_slot(len(prepared.layout))
    for slot in (long, short):
        encoder_of(engine, bundle, 16).encode(prepared, slot)
    user = UserSuffix(len(prepared.layout), (query,))
    wanted = embed(engine, bundle, [short], [user])
    long.kv_L2GCK.fill(np.nan)
    embed(engine, bundle, [long, long], [user, user])
    other = engine.allocate_slot(len(prepared.layout) + 40)
    encoder_of(engine, bundle, 16).encode(prepared, other)
    found = embed(engine, bundle, [other, short], [user, user])
    assert np.abs(found - np.concatenate([wanted, wanted])).max() < TOLERANCE


def test_small_models_have_a_lane_per_thread(bundle):
    size = (bundle.path / WEIGHTS_FILE).stat().st_size
    threads = {"intra_op_threads": 3}
    assert num_lanes(bundle, ServerConfig(**threads, side_by_side_bytes=size)) == 3
    assert num_lanes(bundle, ServerConfig(**threads, side_by_side_bytes=size - 1)) == 1
    assert num_lanes(bundle, ServerConfig(**threads, side_by_side_bytes=0)) == 1
    config = ServerConfig(**threads, side_by_side_bytes=size)
    beside = open_engine(bundle, config).side_by_side
    assert beside is not None
    assert beside.num_lanes == 3
    assert open_engine(bundle, ServerConfig(**threads, side_by_side_bytes=0)).side_by_side is None


def test_threads_are_bound_to_processors_only_where_all_are_used(monkeypatch):
    monkeypatch.setattr(ort.os, "sched_getaffinity", lambda _: {5, 2, 3})
    assert ort._affinities(3) == "4;6", "the caller is the third; numbers count from 1"
    assert [ort._affinities(count) for count in (0, 1, 2, 4)] == [""] * 4


def test_users_of_many_tokens_run_alone(engine):
    assert engine.runs([10, 64, 30, 200]) == [[1], [3], [0, 2]]
    assert engine.runs([64, 64]) == [[0], [1]]
    assert engine.runs([63, 63]) == [[0, 1]]


def test_a_slot_asked_again_answers_from_what_it_holds_now(engine, bundle, monkeypatch):
    """Its binding is kept from step to step; results must not be, nor the slot's old numbers."""
    encoder = encoder_of(engine, bundle, 16)
    cases = bundle.parity[:2]
    prepared = [
        prepare_rendered(case.rendered, user_id="", version=1, as_of_s=0, manifest=bundle.manifest)
        for case in cases
    ]
    lens = [len(prefix.layout) for prefix in prepared]
    slot = engine.allocate_slot(max(lens))
    packer = Packer(
        user_emb=bundle.manifest.tokens.user_emb,
        hidden_dim=bundle.manifest.dims.hidden_dim,
        max_bytes=1 << 20,
    )
    queries = [tuple(SuffixQuery(tuple(bundle.encode_query(q))) for q in c.queries) for c in cases]

    def ask(number: int, some: slice = slice(None)) -> np.ndarray:
        packed = packer.pack([UserSuffix(lens[number], queries[number][some])])
        return engine.suffix(packed, [slot])

    bindings = []
    inputs = PackedSuffix.inputs

    def counted(packed: PackedSuffix, *, by_query: bool) -> dict[str, np.ndarray]:
        bindings.append(packed)
        return inputs(packed, by_query=by_query)

    monkeypatch.setattr(PackedSuffix, "inputs", counted)
    for number in (0, 1, 0):
        bindings.clear()
        engine.clear_slot(slot)
        encoder.encode(prepared[number], slot)
        wanted = np.array(cases[number].embeddings)
        first = ask(number)
        kept = first.copy()
        assert np.abs(first - wanted).max() < TOLERANCE
        assert np.abs(ask(number, slice(1, None)) - wanted[1:]).max() < TOLERANCE
        # The same prefix length and queries, so the same step, over other numbers.
        slot.kv_L2GCK *= 0.5
        other = ask(number)
        assert np.abs(other - ask(number)).max() == 0
        assert np.abs(other - kept).max() > 10 * TOLERANCE
        assert (first == kept).all(), "an earlier answer must not change"
        assert len(bindings) == 3, "all, some, all again; the last of four is bound already"


def test_a_soft_prompt_changes_its_own_query_only(engine, bundle):
    case = bundle.parity[0]
    prepared = prepare_rendered(
        case.rendered, user_id="", version=1, as_of_s=0, manifest=bundle.manifest
    )
    slot = engine.allocate_slot(len(prepared.layout))
    encoder_of(engine, bundle, 16).encode(prepared, slot)
    plain = SuffixQuery(tuple(bundle.encode_query(case.queries[0])))
    rows = np.full((2, bundle.manifest.dims.hidden_dim), 0.5, dtype=np.float32)
    tuned = SuffixQuery(plain.token_ids, rows)
    user = UserSuffix(len(prepared.layout), (plain, tuned, plain))
    found = embed(engine, bundle, [slot], [user])
    assert np.abs(found[[0, 2]] - np.array(case.embeddings[0])).max() < TOLERANCE
    assert np.abs(found[1] - found[0]).max() > 1e-3


def test_a_cleared_slot_holds_nothing(engine, bundle):
    slot = engine.allocate_slot(5)
    slot.kv_L2GCK.fill(7)
    engine.clear_slot(slot)
    assert not slot.kv_L2GCK.any()


def test_graphs_of_another_export_refuse_to_load(bundle_dir, tmp_path):
    altered = tmp_path / "altered"
    shutil.copytree(bundle_dir, altered)
    manifest = json.loads((altered / MANIFEST_FILE).read_text())
    manifest["export_id"] = "another"
    (altered / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="graphs of different exports"):
        OrtEngine(open_bundle(altered), OrtOptions())


def test_an_engine_that_is_not_installed_is_named(bundle):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA execution provider")
    with pytest.raises(ConfigError, match=r"qanchor\[gpu\]"):
        open_engine(bundle, ServerConfig(engine="cuda"))


def profile(number: int) -> Profile:
    events = tuple(
        Event(time_s=NOW_S - day * 86_400, modality="app", event_type="pays", text=f"{number} film")
        for day in range(number + 1)
    )
    return Profile(user_id=f"user-{number}", as_of_s=NOW_S, events=events, attributes={"a": 1.0})


async def test_the_server_gives_each_user_the_same_vectors_however_they_are_run(bundle, tmp_path):
    dims, limits = bundle.manifest.dims, bundle.manifest.limits
    config = ServerConfig(
        address="127.0.0.1:0",
        data_dir=str(tmp_path),
        intra_op_threads=1,
        chunk_len=8,
        kv_pool_bytes=4 * limits.max_prefix_len * dims.kv_bytes_per_token,
        slab_ladder=(16, 24),
    )
    options = OrtOptions(intra_op_threads=1)
    server = Server(config, bundle, lambda: OrtEngine(bundle, options), now_s=lambda: NOW_S)
    address = f"127.0.0.1:{await server.start()}"
    try:
        assert await server.wait_ready()
        async with AsyncClient(address) as client:
            await _compare_alone_and_crowded(client)
    finally:
        server.request_stop()
        await server.wait_closed()


async def _compare_alone_and_crowded(client: AsyncClient) -> None:
    queries = ("Does the user like films?", "travel")
    alone = {}
    for number in range(12):
        await client.put_profile(profile(number))
        user = f"user-{number}"
        cold = await client.embed(user, queries=queries)
        cached = await client.embed(user, queries=queries)
        assert cached.provenance.cache_state is CacheState.DEVICE
        assert np.abs(cached.vectors - cold.vectors).max() < TOLERANCE
        assert np.abs(np.linalg.norm(cold.vectors, axis=1) - 1).max() < TOLERANCE
        alone[user] = cold.vectors
    assert np.abs(alone["user-0"] - alone["user-11"]).max() > 1e-3
    items = [
        EmbedRequestItem(request_id=f"{user}/{n}", user_id=user, queries=queries)
        for n in range(3)
        for user in alone
    ]
    async with asyncio.timeout(30):
        async for reply in client.stream_embed(items):
            user = reply.request_id.partition("/")[0]
            assert np.abs(reply.unwrap().vectors - alone[user]).max() < TOLERANCE
    info = await client.server_info()
    device = info.tiers[CacheState.DEVICE]
    assert device.num_evicted > 0
    assert device.used_bytes <= device.budget_bytes


async def test_every_tier_gives_what_a_fresh_encoding_gives(bundle, engine, tmp_path):
    """A Zipf trace over twelve users, two of them on the device; the same after a restart."""
    dims, limits = bundle.manifest.dims, bundle.manifest.limits
    prefix_bytes = limits.max_prefix_len * dims.kv_bytes_per_token
    config = ServerConfig(
        address="127.0.0.1:0",
        data_dir=str(tmp_path),
        intra_op_threads=1,
        chunk_len=8,
        slab_ladder=(16, 24),
        kv_pool_bytes=2 * prefix_bytes,
        kv_host_bytes=4 * prefix_bytes,
        kv_disk_bytes=100 * prefix_bytes,
    )
    fresh = {number: fresh_vectors(engine, bundle, profile(number)) for number in range(12)}
    chance = random.Random(7)

    def make_engine() -> OrtEngine:
        return OrtEngine(bundle, OrtOptions(intra_op_threads=1))

    seen: Counter[CacheState] = Counter()
    for turn in range(2):
        server = Server(config, bundle, make_engine, now_s=lambda: NOW_S)
        address = f"127.0.0.1:{await server.start()}"
        try:
            assert await server.wait_ready()
            async with AsyncClient(address) as client:
                if turn == 0:
                    for number in range(12):
                        await client.put_profile(profile(number))
                        await client.warm_profile(f"user-{number}")
                seen = await _run_trace(client, chance, fresh)
        finally:
            server.request_stop()
            assert await server.wait_closed() == 0
        assert seen.keys() >= {CacheState.DEVICE, CacheState.HOST, CacheState.DISK}
    # Where a write was still under way, host memory had no room for somebody.
    assert seen[CacheState.ENCODED_NOW] <= 2


QUERIES = ("Does the user like films?", "travel")


def fresh_vectors(engine: OrtEngine, bundle: Bundle, user: Profile) -> np.ndarray:
    """The user's embeddings over a prefix encoded for this."""
    prepared = prepare(user, 1, bundle.manifest)
    slot = engine.allocate_slot(len(prepared.layout))
    encoder_of(engine, bundle, 8).encode(prepared, slot)
    queries = tuple(SuffixQuery(tuple(bundle.encode_query(query))) for query in QUERIES)
    return embed(engine, bundle, [slot], [UserSuffix(len(prepared.layout), queries)])


async def _run_trace(
    client: AsyncClient, chance: random.Random, fresh: dict[int, np.ndarray]
) -> Counter[CacheState]:
    """120 requests, some at a time; how often the prefix was found where."""
    seen: Counter[CacheState] = Counter()

    async def ask() -> None:
        number = min(int(chance.paretovariate(0.6)) - 1, 11)
        result = await client.embed(f"user-{number}", queries=QUERIES)
        assert np.abs(result.vectors - fresh[number]).max() < TOLERANCE
        seen[result.provenance.cache_state] += 1

    for _ in range(40):
        await asyncio.gather(ask(), ask(), ask())
        info = await client.server_info()
        for use in info.tiers.values():
            assert use.used_bytes <= use.budget_bytes
            assert use.num_failed == 0
    return seen


def test_an_export_is_dense_and_comes_back_to_the_bit(engine, bundle):
    """Into a slot of another class, over another user's numbers."""
    dims = bundle.manifest.dims
    short, long = engine.allocate_slot(9), engine.allocate_slot(17)
    short.kv_L2GCK[:] = np.random.default_rng(0).standard_normal(short.kv_L2GCK.shape)
    long.kv_L2GCK[:] = 5
    out = engine.host_arena(7 * dims.kv_bytes_per_token)
    engine.export_slot(short, 7, out)
    assert (out.view(np.float32) == short.kv_L2GCK[:, :, :, :7].reshape(-1)).all()
    engine.import_slot(long, 7, out)
    assert (long.kv_L2GCK[:, :, :, :7] == short.kv_L2GCK[:, :, :, :7]).all()
    assert (long.kv_L2GCK[:, :, :, 7:] == 5).all()
