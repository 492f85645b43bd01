"""Deadlines, cancellation, overload, failing steps: who gets what, and what the device sees."""

import asyncio
import contextlib

import pytest

from qanchor.client import CacheState, ClientError
from qanchor_server.failures import Retryable, UnknownUser


@pytest.fixture
async def busy(start_server, profile):
    """A server whose device is held by a query of ada until the gate opens; bob is stored."""
    running = await start_server(max_queue=3)
    await running.client.put_profile(profile())
    await running.client.put_profile(profile("bob"))
    await running.client.warm_profile("ada")
    running.engine.gate.clear()
    running.holder = asyncio.create_task(running.client.embed("ada", scenarios=["tea_fan"]))
    await _until(lambda: _queued(running) == 1)
    # The worker has taken the query and waits at the gate.
    await asyncio.sleep(0.05)
    yield running
    running.engine.gate.set()
    with contextlib.suppress(ClientError):
        await running.holder


async def test_work_that_expires_in_the_queue_never_reaches_the_device(busy):
    prefills = busy.engine.num_prefill_calls
    with pytest.raises(ClientError) as caught:
        await busy.client.embed("bob", scenarios=["coffee_fan"], timeout=0.1)
    assert caught.value.code == "DEADLINE_EXCEEDED"
    # The server's clock for the call ends some milliseconds after the caller's.
    await _until(lambda: _queued(busy) == 1)
    busy.engine.gate.set()
    await busy.holder
    counters = (await busy.client.server_info()).counters
    assert counters["num_expired"] + counters["num_cancelled"] == 1
    assert busy.engine.num_prefill_calls == prefills
    assert busy.engine.suffix_steps == [(1, 1)]


async def test_cancelled_work_never_reaches_the_device(busy):
    task = asyncio.create_task(busy.client.embed("bob", scenarios=["coffee_fan"]))
    await _until(lambda: _queued(busy) == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await _until(lambda: _queued(busy) == 1)
    busy.engine.gate.set()
    await busy.holder
    assert (await busy.client.server_info()).counters["num_cancelled"] == 1
    assert busy.engine.suffix_steps == [(1, 1)]


async def test_a_full_queue_refuses_with_resource_exhausted_and_recovers(busy):
    waiting = asyncio.create_task(busy.client.embed("bob", scenarios=["coffee_fan", "tea_fan"]))
    await _until(lambda: _queued(busy) == 3)
    with pytest.raises(ClientError, match="at most 3 queries") as caught:
        await busy.client.embed("ada", scenarios=["coffee_fan"])
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    busy.engine.gate.set()
    await waiting
    await busy.client.embed("ada", scenarios=["coffee_fan"])
    assert (await busy.client.server_info()).counters["num_overloaded"] == 1


async def test_a_user_deleted_while_a_request_waits_is_not_found_and_leaves_nothing(busy):
    waiting = asyncio.create_task(busy.client.embed("bob", scenarios=["coffee_fan"]))
    await _until(lambda: _queued(busy) == 2)
    deleting = asyncio.create_task(busy.client.delete_profile("bob"))
    # The deletion is on disk before the worker, which is held, hears of it.
    with pytest.raises(UnknownUser):
        await asyncio.wait_for(_ask_until_unknown(busy.server.core.directory, "bob"), 5)
    # The request waits in the worker's inbox, then the deletion does.
    await _until(lambda: busy.server.core.worker._inbox.qsize() == 2)
    busy.engine.gate.set()
    assert await deleting
    with pytest.raises(ClientError, match="NOT_FOUND"):
        await waiting
    assert (await busy.client.server_info()).tiers[CacheState.DEVICE].num_users == 1


async def test_a_step_out_of_memory_is_unavailable_and_the_next_try_succeeds(running, profile):
    await running.client.put_profile(profile())
    for _ in range(2):
        running.engine.failures.append(Retryable("out of memory"))
        with pytest.raises(ClientError, match="out of memory") as caught:
            await running.client.embed("ada", scenarios=["coffee_fan"])
        assert caught.value.code == "UNAVAILABLE"
        await running.client.warm_profile("ada")
    result = await running.client.embed("ada", scenarios=["coffee_fan"])
    assert result.vectors.tolist() == [[540, 13, 4, 0]]
    assert result.provenance.cache_state is CacheState.DEVICE


async def test_a_profile_changed_while_a_request_waits_leaves_no_stale_prefix(busy, profile):
    old = asyncio.create_task(busy.client.embed("bob", scenarios=["coffee_fan"]))
    await _until(lambda: _queued(busy) == 2)
    put = await busy.client.put_profile(profile("bob", days_ago=4))
    new = asyncio.create_task(busy.client.embed("bob", scenarios=["coffee_fan"]))
    await _until(lambda: _queued(busy) == 3)
    busy.engine.gate.set()
    assert (await old).vectors[0, 0] == 540
    result = await new
    assert result.vectors[0, 0] == 550
    assert result.provenance.prefix_version == put.prefix_version


async def test_an_encoding_given_up_midway_does_not_leak_into_the_next_one(start_server, profile):
    running = await start_server(chunk_len=1)
    await running.client.put_profile(profile("ada"))
    await running.client.put_profile(profile("bob", days_ago=4))
    running.engine.step_seconds = 0.03
    given_up = asyncio.create_task(running.client.embed("ada", scenarios=["coffee_fan"]))
    await _until(lambda: running.engine.num_prefill_calls >= 3)
    given_up.cancel()
    result = await running.client.embed("bob", scenarios=["coffee_fan"])
    assert result.vectors[0, 0] == 550
    assert running.engine.num_prefill_calls < 9 + 9
    assert (await running.client.embed("ada", scenarios=["coffee_fan"])).vectors[0, 0] == 540


async def _ask_until_unknown(directory, user_id):
    while await directory.current(user_id):
        await asyncio.sleep(0.002)


def _queued(running):
    return running.server.core.admission.num_queued


async def _until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)
