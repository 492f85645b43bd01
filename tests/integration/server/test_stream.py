"""The stream: bad items get their own status, replies may overtake, the stream lives on."""

import asyncio

import pytest

from qanchor.client import ClientError, EmbedRequestItem
from qanchor_server.core import Core


def item(request_id: str, user_id: str = "ada", scenario: str = "coffee_fan") -> EmbedRequestItem:
    return EmbedRequestItem(request_id=request_id, user_id=user_id, scenarios=(scenario,))


async def test_bad_items_get_their_own_status_and_the_stream_lives_on(running, profile):
    await running.client.put_profile(profile())
    items = [
        item("good"),
        item("no user", user_id="bob"),
        item("no scenario", scenario="cofee_fan"),
        EmbedRequestItem(request_id="no queries", user_id="ada"),
        item("good again"),
    ]
    found = {reply.request_id: reply async for reply in running.client.stream_embed(items)}
    assert found.keys() == {sent.request_id for sent in items}
    for name in ("good", "good again"):
        assert found[name].unwrap().vectors.tolist() == [[540, 13, 4, 0]]
        assert found[name].unwrap().provenance.prefix_version == 1
    codes = {name: reply.error.code for name, reply in found.items() if reply.error}
    assert codes == {
        "no user": "NOT_FOUND",
        "no scenario": "INVALID_ARGUMENT",
        "no queries": "INVALID_ARGUMENT",
    }
    assert found["no scenario"].error.field_violations[0].field == "queries[0].scenario"
    with pytest.raises(ClientError):
        found["no user"].unwrap()


async def test_an_unexpected_failure_ends_its_item_alone(running, profile, monkeypatch, caplog):
    await running.client.put_profile(profile())
    await running.client.put_profile(profile("broken"))
    embed = Core.embed

    async def fail(core, user_id, *rest):
        if user_id == "broken":
            raise OverflowError("cannot convert")
        return await embed(core, user_id, *rest)

    monkeypatch.setattr(Core, "embed", fail)
    items = [item("1"), item("2", "broken"), item("3")]
    found = {reply.request_id: reply async for reply in running.client.stream_embed(items)}
    assert found["2"].error.code == "INTERNAL"
    assert "OverflowError" in found["2"].error.message
    assert "cannot convert" in caplog.text
    for name in ("1", "3"):
        assert found[name].unwrap().vectors.tolist() == [[540, 13, 4, 0]]


async def test_a_quick_item_overtakes_a_slow_one(start_server, profile):
    running = await start_server(chunk_len=1)
    await running.client.put_profile(profile("warm"))
    await running.client.put_profile(profile("cold"))
    await running.client.warm_profile("warm")
    running.engine.step_seconds = 0.02
    items = [item("slow", "cold"), item("quick", "warm")]
    replies = [reply.request_id async for reply in running.client.stream_embed(items)]
    assert replies == ["quick", "slow"]


async def test_replies_come_while_the_stream_is_still_being_sent(running, profile):
    await running.client.put_profile(profile())
    first_is_answered = asyncio.Event()

    async def items():
        yield item("first")
        await asyncio.wait_for(first_is_answered.wait(), 5)
        yield item("second")

    seen = []
    async for reply in running.client.stream_embed(items()):
        seen.append(reply.request_id)
        first_is_answered.set()
    assert seen == ["first", "second"]


async def test_a_stream_larger_than_the_bound_in_flight_is_answered_in_full(start_server, profile):
    running = await start_server(max_stream_in_flight=3)
    await running.client.put_profile(profile())
    items = [item(str(number)) for number in range(50)]
    replies = {reply.request_id async for reply in running.client.stream_embed(items)}
    assert replies == {str(number) for number in range(50)}


async def test_a_stream_that_is_left_takes_its_work_out_of_the_queue(running, profile):
    await running.client.put_profile(profile())
    running.engine.gate.clear()
    stream = running.client.stream_embed([item("a"), item("b")])
    waiting = asyncio.create_task(anext(stream))
    async with asyncio.timeout(5):
        while running.server.core.admission.num_queued < 2:
            await asyncio.sleep(0.002)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        while running.server.core.admission.num_queued:
            await asyncio.sleep(0.002)
    running.engine.gate.set()
    assert (await running.client.embed("ada", scenarios=["tea_fan"])).vectors.shape == (1, 4)
    assert sum(queries for _, queries in running.engine.suffix_steps) == 1
