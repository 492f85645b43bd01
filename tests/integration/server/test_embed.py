"""Embedding over a real channel: values derived by hand (see fake_engine), provenance, caching."""

import asyncio

import numpy as np
import pytest

from qanchor.client import CacheState, ClientError
from qanchor.data.profile import Event, Profile
from qanchor.v1 import embedding_pb2, embedding_pb2_grpc

NOW_S = 1_000 * 86_400


async def test_each_query_gets_its_vector_and_the_reply_says_what_it_rests_on(running, profile):
    put = await running.client.put_profile(profile())
    result = await running.client.embed(
        "ada", scenarios=["coffee_fan", "tuned", "coffee_fan"], queries=["tea tea"]
    )
    # tuned: "Query: shoes" 5 + 6 + 4, 3 words + 2 prompt rows + <USER_EMB>, rows sum to 10.
    expected = [[540, 13, 4, 0], [540, 15, 6, 10], [540, 13, 4, 0], [540, 17, 5, 0]]
    assert result.vectors.tolist() == expected
    assert result.vectors.dtype == np.float32
    found = result.provenance
    assert (found.model_id, found.export_id) == ("fake-model", "fake-export")
    assert found.scenario_versions == (3, 1, 3, 0)
    assert (found.prefix_version, found.as_of_s) == (put.prefix_version, NOW_S)
    assert found.num_prefix_tokens == put.num_prefix_tokens == 9
    assert found.cache_state is CacheState.ENCODED_NOW
    assert found.prefill_seconds > 0
    assert found.suffix_seconds > 0
    assert found.queue_seconds >= 0


async def test_the_second_request_finds_the_prefix_on_the_device(running, profile):
    await running.client.put_profile(profile())
    cold = await running.client.embed("ada", scenarios=["tea_fan"])
    warm = await running.client.embed("ada", scenarios=["tea_fan"])
    assert warm.provenance.cache_state is CacheState.DEVICE
    assert warm.provenance.prefill_seconds == 0
    assert warm.vectors.tolist() == cold.vectors.tolist()
    assert running.engine.num_prefill_calls == 1


async def test_an_embedding_that_is_not_finite_is_an_error_of_its_user_alone(
    running, profile, monkeypatch
):
    await running.client.put_profile(profile("ada"))
    await running.client.embed("ada", scenarios=["tea_fan"])
    encode = running.engine.encode_events
    monkeypatch.setattr(running.engine, "encode_events", lambda ids: encode(ids) * np.inf)
    tea = Event(time_s=NOW_S - 86_400, modality="buy", event_type="", text="tea")
    await running.client.put_profile(Profile(user_id="bob", as_of_s=NOW_S, events=(tea,)))
    with pytest.raises(ClientError, match="'bob': an embedding is not finite") as caught:
        await running.client.embed("bob", scenarios=["tea_fan"])
    assert caught.value.code == "INTERNAL"
    result = await running.client.embed("ada", scenarios=["coffee_fan"])
    assert result.vectors.tolist() == [[540, 13, 4, 0]]


async def test_vectors_come_in_every_encoding(running, profile):
    await running.client.put_profile(profile())
    half = await running.client.embed("ada", scenarios=["coffee_fan"], dtype="float16")
    assert half.vectors.dtype == np.float32
    assert half.vectors.tolist() == [[540, 13, 4, 0]]
    stub = embedding_pb2_grpc.EmbeddingServiceStub(running.channel)
    request = embedding_pb2.EmbedRequest(
        user_id="ada", queries=[embedding_pb2.Query(scenario="coffee_fan")]
    )
    forms = {}
    for encoding in (1, 2, 3):
        request.encoding = encoding
        forms[encoding] = (await stub.Embed(request, timeout=5)).results[0].vector
    assert forms[1].data == np.array([540, 13, 4, 0], dtype="<f4").tobytes()
    assert forms[2].data == np.array([540, 13, 4, 0], dtype="<f2").tobytes()
    assert list(forms[3].values) == [540, 13, 4, 0]
    assert [form.dtype for form in forms.values()] == [1, 2, 1]
    assert {form.dimension for form in forms.values()} == {4}


async def test_many_requests_of_a_cold_user_share_one_prefill(running, profile):
    await running.client.put_profile(profile())
    running.engine.gate.clear()
    tasks = [
        asyncio.create_task(running.client.embed("ada", scenarios=["coffee_fan"])) for _ in range(8)
    ]
    await _until(lambda: running.server.core.admission.num_queued == 8)
    running.engine.gate.set()
    results = await asyncio.gather(*tasks)
    assert running.engine.num_prefill_calls == 1
    assert all(r.vectors.tolist() == [[540, 13, 4, 0]] for r in results)
    assert results[0].provenance.cache_state is CacheState.ENCODED_NOW
    assert (await running.client.server_info()).counters["num_encoded"] == 1
    assert sum(queries for _, queries in running.engine.suffix_steps) == 8


async def test_queries_of_several_users_run_in_one_suffix_step(running, profile):
    users = ["ada", "bob", "cleo"]
    for days_ago, user in enumerate(users):
        await running.client.put_profile(profile(user, days_ago))
        await running.client.warm_profile(user)
    running.engine.gate.clear()
    blocker = asyncio.create_task(running.client.embed("ada", queries=["shoes"]))
    await _until(lambda: running.server.core.admission.num_queued == 1)
    await asyncio.sleep(0.05)
    tasks = [asyncio.create_task(running.client.embed(u, queries=["tea"])) for u in users]
    await _until(lambda: running.server.core.admission.num_queued == 4)
    running.engine.gate.set()
    await blocker
    results = await asyncio.gather(*tasks)
    assert running.engine.suffix_steps == [(1, 1), (3, 3)]
    # One day more makes the event's first word "1" instead of "0": the event, its modality
    # mean and half of that in the user mean grow by 1 + 1 + 0.5.
    assert [r.vectors[0, 0] for r in results] == [540, 542.5, 545]
    assert len(running.engine.threads) == 1


async def test_an_evicted_user_is_encoded_again_without_the_client_noticing(start_server, profile):
    running = await start_server(kv_pool_bytes=14 * 8)
    for days_ago, user in enumerate(["ada", "bob"]):
        await running.client.put_profile(profile(user, days_ago))
    for _ in range(2):
        for user, total in (("ada", 540), ("bob", 542.5)):
            result = await running.client.embed(user, scenarios=["coffee_fan"])
            assert result.vectors[0, 0] == total
            assert result.provenance.cache_state is CacheState.ENCODED_NOW
    info = await running.client.server_info()
    device = info.tiers[CacheState.DEVICE]
    assert (device.num_evicted, device.used_bytes, device.num_users) == (3, 112, 1)
    assert running.engine.num_slots == 1


async def test_a_prefix_longer_than_a_chunk_is_encoded_in_chunks(start_server, profile):
    running = await start_server(chunk_len=4)
    await running.client.put_profile(profile())
    result = await running.client.embed("ada", scenarios=["coffee_fan"])
    assert result.vectors.tolist() == [[540, 13, 4, 0]]
    assert running.engine.num_prefill_calls == 3


async def test_appended_equals_encoded_anew(running, profile):
    await running.client.put_profile(profile())
    await running.client.embed("ada", scenarios=["tea_fan"])
    tea = Event(time_s=NOW_S - 86_400, modality="buy", event_type="", text="tea")
    appended = await running.client.append_events("ada", [tea])
    after = await running.client.embed("ada", scenarios=["tea_fan"])
    assert after.provenance.cache_state is CacheState.ENCODED_NOW
    assert after.provenance.prefix_version == appended.prefix_version
    anew = profile("bob")
    await running.client.put_profile(
        type(anew)(user_id="bob", as_of_s=NOW_S, events=(tea, *anew.events))
    )
    fresh = await running.client.embed("bob", scenarios=["tea_fan"])
    assert after.vectors.tolist() == fresh.vectors.tolist()
    # Events 12 and 14: mean 13, user mean 6.5; 540 - 18 (12 + 6) + 19.5 - 12 + 26.
    assert after.vectors[0, 0] == 555.5


async def test_event_texts_seen_before_are_not_encoded_again(running, profile):
    await running.client.put_profile(profile("ada", 3))
    await running.client.warm_profile("ada")
    assert running.engine.num_encode_calls == 1
    await running.client.put_profile(profile("bob", 3))
    await running.client.warm_profile("bob")
    assert running.engine.num_encode_calls == 1
    assert running.engine.num_prefill_calls == 2


@pytest.mark.parametrize("num_users", [40])
async def test_many_users_at_once_over_a_small_pool_all_get_their_own_vectors(
    start_server, profile, num_users
):
    running = await start_server(kv_pool_bytes=3 * 14 * 8, chunk_len=4, max_step_tokens=12)
    users = [f"user-{number}" for number in range(num_users)]
    for number, user in enumerate(users):
        await running.client.put_profile(profile(user, number % 9))
    results = await asyncio.gather(
        *(running.client.embed(user, scenarios=["tea_fan"]) for user in users * 3)
    )
    sums = [result.vectors[0, 0] for result in results]
    assert sums == [540 + 2.5 * (number % 9) for number in range(num_users)] * 3


async def _until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)
