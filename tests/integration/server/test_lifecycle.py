"""Start, health, reflection, drain and failure of a server in this process."""

import asyncio
import socket

import grpc
import pytest
from fake_engine import FakeEngine, fake_bundle
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from qanchor.client import ClientError
from qanchor.errors import ConfigError
from qanchor_server.config import ServerConfig
from qanchor_server.main import Server
from qanchor_server.profiles.store import StoreError

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def _health(channel: grpc.aio.Channel, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    response = await stub.Check(request, timeout=5)
    return response.status


async def _until_one_is_queued(running):
    async with asyncio.timeout(5):
        while running.server.core.admission.num_queued < 1:
            await asyncio.sleep(0.002)


async def test_health_says_serving_only_after_parity(start_server):
    engine = FakeEngine()
    engine.gate.clear()
    running = await start_server(engine, wait=False)
    assert await _health(running.channel) == NOT_SERVING
    with pytest.raises(ClientError, match="starting") as caught:
        await running.client.embed("ada", scenarios=["coffee_fan"])
    assert caught.value.code == "UNAVAILABLE"
    assert (await running.client.server_info()).model_id == "fake-model"
    engine.gate.set()
    assert await running.server.wait_ready()
    assert await _health(running.channel) == SERVING
    assert await _health(running.channel, "qanchor.v1.EmbeddingService") == SERVING
    # The proof: packed, alone, then again beside the same encoded again.
    assert engine.suffix_steps == [(1, 1)] * 4
    assert engine.num_slots == 0


async def test_an_engine_that_fails_parity_never_serves(start_server):
    running = await start_server(bundle=fake_bundle((540, 13, 4, 0.002)), wait=False)
    assert not await running.server.wait_ready()
    assert await running.server.wait_closed() == 1


async def test_reflection_lists_the_services(running):
    stub = reflection_pb2_grpc.ServerReflectionStub(running.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call = stub.ServerReflectionInfo(iter([request]), timeout=5)
    response = await call.read()
    names = {service.name for service in response.list_services_response.service}
    assert {
        "qanchor.v1.EmbeddingService",
        "qanchor.v1.ProfileService",
        "qanchor.v1.ScenarioService",
        "qanchor.v1.ServerInfoService",
        "grpc.health.v1.Health",
    } <= names
    call.cancel()


async def test_scenarios_and_info_describe_the_bundle(running):
    scenarios = {scenario.name: scenario for scenario in await running.client.list_scenarios()}
    assert list(scenarios) == ["coffee_fan", "tea_fan", "tuned"]
    assert scenarios["coffee_fan"].version == 3
    assert scenarios["coffee_fan"].domain == "drinks"
    assert (scenarios["tuned"].num_prompt_rows, scenarios["tuned"].num_suffix_tokens) == (2, 6)
    info = await running.client.server_info()
    assert info.modalities == ("buy",)
    assert (info.embedding_dim, info.max_query_len, info.max_prefix_len) == (4, 12, 14)


async def test_a_drain_finishes_what_is_in_flight_and_takes_nothing_new(running, profile):
    await running.client.put_profile(profile())
    running.engine.gate.clear()
    stub_call = asyncio.create_task(running.client.embed("ada", scenarios=["coffee_fan"]))
    await _until_one_is_queued(running)
    running.server.request_stop()
    await asyncio.sleep(0.05)
    with pytest.raises(ClientError) as caught:
        await running.client.embed("ada", scenarios=["coffee_fan"])
    assert caught.value.code == "UNAVAILABLE"
    running.engine.gate.set()
    assert (await stub_call).vectors.tolist() == [[540, 13, 4, 0]]
    assert await running.server.wait_closed() == 0


async def test_a_drain_ends_after_the_grace(start_server, profile):
    running = await start_server(grace_seconds=0.1)
    await running.client.put_profile(profile())
    running.engine.gate.clear()
    late = asyncio.create_task(running.client.embed("ada", scenarios=["coffee_fan"]))
    await _until_one_is_queued(running)
    running.server.request_stop()
    with pytest.raises(ClientError) as caught:
        await late
    assert caught.value.code in {"CANCELLED", "UNAVAILABLE"}
    running.engine.gate.set()
    assert await running.server.wait_closed() == 0
    assert running.engine.suffix_steps == []


async def test_a_fatal_failure_answers_everyone_and_ends_the_process_with_1(running, profile):
    await running.client.put_profile(profile())
    running.engine.failures.append(ValueError("device lost"))
    with pytest.raises(ClientError, match="device lost") as caught:
        await running.client.embed("ada", scenarios=["coffee_fan"])
    assert caught.value.code == "INTERNAL"
    assert await running.server.wait_closed() == 1


async def test_a_watcher_of_health_sees_the_failure(running, profile):
    await running.client.put_profile(profile())
    stub = health_pb2_grpc.HealthStub(running.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=""), timeout=5)
    assert (await watch.read()).status == SERVING
    running.engine.failures.append(ValueError("device lost"))
    with pytest.raises(ClientError):
        await running.client.warm_profile("ada")
    assert (await watch.read()).status == NOT_SERVING
    watch.cancel()


async def test_watchers_of_health_hear_of_the_drain_and_do_not_hold_it_up(running, profile):
    await running.client.put_profile(profile())
    stub = health_pb2_grpc.HealthStub(running.channel)
    names = {"": SERVING, "qanchor.v1.EmbeddingService": SERVING, "other": SERVICE_UNKNOWN}
    watches = [stub.Watch(health_pb2.HealthCheckRequest(service=name)) for name in names]
    assert [(await watch.read()).status for watch in watches] == list(names.values())
    running.engine.gate.clear()
    waiting = asyncio.create_task(running.client.embed("ada", scenarios=["coffee_fan"]))
    await _until_one_is_queued(running)
    running.server.request_stop()
    assert [(await watch.read()).status for watch in watches[:2]] == [NOT_SERVING] * 2
    assert [await watch.read() for watch in watches] == [grpc.aio.EOF] * 3
    assert [await watch.code() for watch in watches] == [grpc.StatusCode.OK] * 3
    assert not waiting.done()
    running.engine.gate.set()
    await waiting
    # Much sooner than the grace of five seconds.
    async with asyncio.timeout(2):
        assert await running.server.wait_closed() == 0


async def test_a_service_that_is_not_there_has_no_health(running):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _health(running.channel, "other")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_settings_that_cannot_serve_the_model_are_refused():
    bundle = fake_bundle()
    for settings, field in (
        (ServerConfig(max_step_tokens=11), "max_step_tokens=11"),
        (ServerConfig(kv_pool_bytes=111), "kv_pool_bytes=111"),
    ):
        with pytest.raises(ConfigError, match=field):
            Server(settings, bundle, FakeEngine)
    with pytest.raises(ConfigError, match="max_queue"):
        ServerConfig(max_queue=0)


async def test_a_second_server_on_the_same_data_or_port_refuses_to_start(running, tmp_path):
    data_dir = running.server.core.config.data_dir
    same_data = ServerConfig(address="127.0.0.1:0", data_dir=data_dir)
    with pytest.raises(StoreError, match="one server at a time"):
        await Server(same_data, fake_bundle(), FakeEngine).start()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = ServerConfig(address=address, data_dir=str(tmp_path / "other"))
        with pytest.raises(RuntimeError, match="bind"):
            await Server(config, fake_bundle(), FakeEngine).start()
