"""Suffix steps that go on while the worker reads, plans and encodes: who gets what, and when."""

import asyncio
import random

import numpy as np
import pytest
from fake_engine import FakeEngine

from qanchor.client import CacheState, ClientError
from qanchor_server import suffix_runner
from qanchor_server.failures import Retryable
from qanchor_server.worker import MAX_BEGUN

USERS = {"ada": 540, "bob": 550, "eve": 540}
"""Users and the first number of their vectors: bob's coffee was four days ago."""


@pytest.fixture
async def beside(start_server, profile, monkeypatch):
    """A server with two lanes, a run for each request; three users are warm."""
    monkeypatch.setattr(suffix_runner, "_ROW_TOKENS", 1)
    running = await start_server(FakeEngine(num_lanes=2), max_step_tokens=12)
    for user in USERS:
        await running.client.put_profile(profile(user, days_ago=4 if user == "bob" else 0))
        await running.client.warm_profile(user)
    running.engine.suffix_steps.clear()
    running.engine.side_by_side.most_begun = 0
    return running


def ask(running, user, num_queries=1, **options):
    asked = running.client.embed(user, scenarios=["coffee_fan"] * num_queries, **options)
    return asyncio.create_task(asked)


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


async def queue(running, num_queries):
    """Have users' queries wait until all are there; `num_queries` by user."""
    engine, admission = running.engine, running.server.core.admission
    engine.gate.clear()
    before = engine.num_entered
    holder = ask(running, "eve")
    # At the gate, not only queued: planned together with the others it would wait with them.
    await until(lambda: engine.num_entered > before and admission.num_queued == 1)
    tasks = [ask(running, user, count) for user, count in num_queries.items()]
    await until(lambda: admission.num_queued == 1 + sum(num_queries.values()))
    engine.gate.set()
    await holder
    return tasks


async def hold(running):
    """Five queries of ada and five of bob, in as many steps as there may be, wait at the gate."""
    running.engine.side_by_side.gate.clear()
    # A step has room for six queries.
    tasks = await queue(running, {"ada": 5, "bob": 5})
    await until(lambda: running.engine.side_by_side.num_begun == MAX_BEGUN)
    return tasks


async def test_steps_overlap_within_bounds_and_everybody_gets_the_own_vectors(beside):
    beside.engine.step_seconds = 0.003
    tasks = [(user, ask(beside, user, 3)) for _ in range(10) for user in USERS]
    for user, task in tasks:
        assert (await task).vectors.tolist() == [[USERS[user], 13, 4, 0]] * 3
    assert beside.engine.side_by_side.most_begun == MAX_BEGUN
    assert len(beside.engine.threads) == 3, "two lanes and the worker"


async def test_one_request_alone_needs_no_lane(beside):
    result = await ask(beside, "bob")
    assert result.vectors.tolist() == [[550, 13, 4, 0]]
    assert beside.engine.side_by_side.most_begun == 0


async def test_a_delete_waits_for_the_steps_that_read_its_slot(beside):
    tasks = await hold(beside)
    slots = len(beside.engine.cleared)
    late = ask(beside, "ada")
    await until(lambda: beside.server.core.admission.num_queued == 11)
    deleting = asyncio.create_task(beside.client.delete_profile("ada"))
    await asyncio.sleep(0.05)
    assert not deleting.done()
    assert len(beside.engine.cleared) == slots, "a lane reads it"
    beside.engine.side_by_side.gate.set()
    assert await deleting
    assert len(beside.engine.cleared) == slots + 1
    for user, task in zip(("ada", "bob"), tasks, strict=True):
        assert (await task).vectors[:, 0].tolist() == [USERS[user]] * 5
    with pytest.raises(ClientError, match="NOT_FOUND"):
        await late
    assert (await beside.client.server_info()).tiers[CacheState.DEVICE].num_users == 2


async def test_a_caller_who_leaves_does_not_disturb_the_others(beside):
    tasks = await hold(beside)
    tasks[0].cancel()
    joined = ask(beside, "eve")
    await asyncio.sleep(0.05)
    beside.engine.side_by_side.gate.set()
    assert (await tasks[1]).vectors[:, 0].tolist() == [550] * 5
    assert (await joined).vectors[:, 0].tolist() == [540]
    assert beside.server.core.admission.num_queued == 0


async def test_a_step_out_of_memory_fails_its_own_requests_only(beside):
    tasks = await hold(beside)
    beside.engine.failures.append(Retryable("out of memory"))
    beside.engine.side_by_side.gate.set()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    failed = [each for each in found if isinstance(each, ClientError)]
    assert failed
    assert {each.code for each in failed} == {"UNAVAILABLE"}
    for user in USERS:
        again = await ask(beside, user, 5)
        assert again.provenance.cache_state is CacheState.DEVICE
        assert set(again.vectors[:, 0]) == {USERS[user]}


async def test_any_other_failure_answers_everyone_and_ends_the_server(beside):
    tasks = await hold(beside)
    waiting = ask(beside, "eve")
    deleting = asyncio.create_task(beside.client.delete_profile("ada"))
    await asyncio.sleep(0.05)
    beside.engine.failures.append(ValueError("the device is gone"))
    beside.engine.side_by_side.gate.set()
    for task in (*tasks, waiting):
        with pytest.raises(ClientError):
            await asyncio.wait_for(task, 5)
    # The profile was deleted before; the memory ends with the process.
    assert await asyncio.wait_for(deleting, 5)
    assert await beside.server.wait_closed() == 1


async def test_a_result_that_cannot_be_booked_ends_the_server_and_hangs_nobody(beside):
    tasks = await hold(beside)
    beside.engine.suffix = lambda packed, slots: np.zeros((1, 3), dtype=np.float32)
    beside.engine.side_by_side.gate.set()
    for task in tasks:
        with pytest.raises(ClientError):
            await asyncio.wait_for(task, 5)
    assert await beside.server.wait_closed() == 1


async def test_a_new_user_is_encoded_while_steps_go_on(beside, profile):
    await beside.client.put_profile(profile("zoe"))
    beside.engine.side_by_side.gate.clear()
    tasks = await queue(beside, {"ada": 2, "bob": 2})
    await until(lambda: beside.engine.side_by_side.num_begun == 1)
    new = ask(beside, "zoe")
    # She is encoded, and her own step is begun, while the first still waits at the gate.
    await until(lambda: beside.engine.side_by_side.num_begun == 2)
    beside.engine.side_by_side.gate.set()
    result = await new
    assert result.vectors.tolist() == [[540, 13, 4, 0]]
    assert result.provenance.cache_state is not CacheState.DEVICE
    await asyncio.gather(*tasks)


async def test_a_drain_ends_what_is_begun(beside):
    tasks = await hold(beside)
    beside.server.request_stop()
    await asyncio.sleep(0.05)
    beside.engine.side_by_side.gate.set()
    for user, task in zip(("ada", "bob"), tasks, strict=True):
        assert set((await task).vectors[:, 0]) == {USERS[user]}


@pytest.mark.parametrize("seed", range(3))
async def test_a_storm_of_requests_changes_and_deletes_gives_no_wrong_vector(
    start_server, profile, monkeypatch, seed
):
    """Two slots for four users; the first number tells how many days ago the coffee was."""
    monkeypatch.setattr(suffix_runner, "_ROW_TOKENS", 1)
    engine = FakeEngine(step_seconds=0.001, num_lanes=2)
    running = await start_server(
        engine, max_step_tokens=12, kv_pool_bytes=2 * 14 * 8, kv_host_bytes=4096
    )
    chance = random.Random(seed)
    days: dict[str, int] = {}
    counts = {"right": 0, "refused": 0}

    async def act(user: str) -> None:
        for _ in range(40):
            match chance.choices(range(4), (4, 2, 1, 1))[0]:
                case 0 if user in days:
                    asked = [ask(running, user, chance.randint(1, 5)) for _ in range(4)]
                    for result in await asyncio.gather(*asked):
                        assert set(result.vectors[:, 0]) == {540 + 2.5 * days[user]}
                        counts["right"] += 1
                case 1:
                    day = chance.randint(0, 8)
                    await running.client.put_profile(profile(user, days_ago=day))
                    days[user] = day
                case 2 if user in days:
                    await running.client.delete_profile(user)
                    del days[user]
                    with pytest.raises(ClientError, match="NOT_FOUND"):
                        await ask(running, user)
                    counts["refused"] += 1
                case 3 if user in days:
                    task = ask(running, user, 5)
                    await asyncio.sleep(0.002 * chance.random())
                    task.cancel()

    async with asyncio.timeout(60):
        await asyncio.gather(*(act(user) for user in ("ada", "bob", "eve", "zoe")))
    assert engine.side_by_side.most_begun == MAX_BEGUN
    assert counts["right"] > 20, counts
    assert counts["refused"] > 0, counts
    assert running.server.core.admission.num_queued == 0
