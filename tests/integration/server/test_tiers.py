"""Users that come back from host memory and disk: values, cache states, failures, restarts.

One slot of 112 bytes on the device, two users in host memory (9 tokens of 8 bytes, on two cache
lines each), the rest on disk.
"""

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from qanchor.client import CacheState, ClientError
from qanchor.data.profile import Event
from qanchor.errors import ConfigError
from qanchor_server.config import ServerConfig
from qanchor_server.failures import Retryable

SMALL = {"kv_pool_bytes": 112, "kv_host_bytes": 256, "kv_disk_bytes": 1 << 20}
USERS = ("ada", "bob", "cyd", "dan", "eve")
NOW_S = 1_000 * 86_400


async def embed(running, user: str) -> CacheState:
    """Embed one of USERS, check the value, tell where the prefix was."""
    result = await running.client.embed(user, scenarios=["coffee_fan"])
    assert result.vectors[0].tolist() == [540 + 2.5 * USERS.index(user), 13, 4, 0]
    return result.provenance.cache_state


async def put_all(running, profile) -> None:
    for days_ago, user in enumerate(USERS):
        await running.client.put_profile(profile(user, days_ago))


def files(running) -> list[Path]:
    directory = Path(running.server.core.config.data_dir) / "kv"
    return sorted(directory.glob("*.kv"))


async def until(condition) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def encode(running, users=USERS) -> None:
    """Encode users one after the other, each when the one before is on disk.

    Otherwise both places in host memory may be taken by writes, and somebody is let go for good.
    """
    for number, user in enumerate(users):
        assert await embed(running, user) is CacheState.ENCODED_NOW
        await until(lambda number=number: len(files(running)) == number)


@pytest.fixture
async def small(start_server, profile):
    running = await start_server(**SMALL)
    await put_all(running, profile)
    return running


async def test_users_come_back_from_the_nearest_tier_unchanged(small):
    await encode(small)
    assert await embed(small, "eve") is CacheState.DEVICE
    assert await embed(small, "dan") is CacheState.HOST
    assert await embed(small, "ada") is CacheState.DISK
    assert small.engine.num_prefill_calls == 5
    states = [(await small.client.profile_state(user)).cache_state for user in USERS]
    assert states[0] is CacheState.DEVICE
    assert states[1] is CacheState.DISK
    assert CacheState.ABSENT not in states
    info = await small.client.server_info()
    host, disk = info.tiers[CacheState.HOST], info.tiers[CacheState.DISK]
    assert (host.num_hits, disk.num_hits) == (1, 1)
    assert (host.budget_bytes, disk.budget_bytes) == (256, 1 << 20)
    assert host.used_bytes <= 256
    assert disk.used_bytes == disk.num_users * (4096 + 72)
    assert info.counters["num_restore_steps"] == 2
    assert host.num_failed == disk.num_failed == 0


async def test_a_changed_profile_is_never_answered_from_an_old_copy(small):
    await embed(small, "ada")
    await embed(small, "bob")
    tea = Event(time_s=NOW_S, modality="buy", event_type="", text="tea")
    await small.client.append_events("ada", [tea])
    assert (await small.client.profile_state("ada")).cache_state is CacheState.ABSENT
    result = await small.client.embed("ada", scenarios=["coffee_fan"])
    assert result.provenance.cache_state is CacheState.ENCODED_NOW
    # Two events of 12 and 13: mean 12.5, user mean 6.25.
    assert result.vectors[0, 0] == 510 + 12.5 + 6.25 + 12 + 13


async def test_a_restart_finds_everybody_on_disk(small, start_server):
    await encode(small)
    small.server.request_stop()
    assert await small.server.wait_closed() == 0
    # The one that was only on the device was written in the end.
    assert len(files(small)) == 5
    again = await start_server(**SMALL)
    for user in USERS:
        assert await embed(again, user) is CacheState.DISK
    assert again.engine.num_prefill_calls == 0


async def test_files_of_another_model_or_of_nobody_are_deleted_at_start(small, start_server):
    await encode(small)
    small.server.request_stop()
    await small.server.wait_closed()
    paths = files(small)
    other = paths[0].read_bytes().replace(b"fake-model", b"FAKE-model")
    paths[0].write_bytes(other)
    (paths[0].parent / "9.part").write_bytes(b"half")
    (paths[0].parent / "17.kv").write_bytes(b"no header")
    nobody = paths[1].read_bytes().replace(b'"bob"', b'"zoe"').replace(b'"ada"', b'"zoe"')
    paths[1].write_bytes(nobody)
    again = await start_server(**SMALL)
    assert files(again) == paths[2:]
    states = [await embed(again, user) for user in USERS]
    assert states.count(CacheState.ENCODED_NOW) == 2


async def test_a_start_without_the_disk_tier_leaves_no_file(small, start_server):
    """Users that are deleted from then on would stay in them."""
    await encode(small)
    small.server.request_stop()
    await small.server.wait_closed()
    beside = files(small)[0].parent / "notes.txt"
    beside.write_text("somebody's own")
    again = await start_server(**{**SMALL, "kv_disk_bytes": 0})
    assert files(again) == []
    assert beside.exists()
    assert await embed(again, "ada") is CacheState.ENCODED_NOW


def test_the_profiles_directory_is_refused_for_the_files(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for disk_dir in ("data", "link", "data/kv/.."):
        with pytest.raises(ConfigError, match="is data_dir, where the profiles"):
            ServerConfig(data_dir=str(tmp_path / "data"), kv_disk_dir=str(tmp_path / disk_dir))


async def test_what_else_lies_beside_the_files_is_left_alone(start_server, profile, tmp_path):
    directory = tmp_path / "data" / "kv"
    (directory / "lost+found").mkdir(parents=True)
    (directory / "notes.txt").write_text("words")
    running = await start_server(**SMALL)
    await put_all(running, profile)
    await encode(running)
    assert (directory / "notes.txt").read_text() == "words"
    assert len(files(running)) == 4


async def test_a_broken_file_costs_an_encoding_and_nothing_else(small):
    await encode(small)
    for path in files(small):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert await embed(small, "ada") is CacheState.ENCODED_NOW
    assert (await small.client.server_info()).tiers[CacheState.DISK].num_failed == 1


async def test_a_disk_that_cannot_be_written_or_read_is_left_alone(small):
    directory = Path(small.server.core.config.data_dir) / "kv"
    (directory / "lock").unlink()
    directory.rmdir()
    for _ in range(2):
        for user in USERS:
            assert await embed(small, user) in {CacheState.ENCODED_NOW, CacheState.HOST}
    disk = (await small.client.server_info()).tiers[CacheState.DISK]
    assert 0 < disk.num_failed <= 4
    assert disk.num_users == 0


async def test_a_disk_that_hangs_is_not_waited_for(start_server, profile, monkeypatch):
    running = await start_server(**SMALL, max_disk_read_seconds=0.1)
    await put_all(running, profile)
    await encode(running)
    hangs, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr("os.readv", lambda *_: hangs.set() or go_on.wait(20) or 0)
    waiting = asyncio.create_task(embed(running, "ada"))
    await until(hangs.is_set)
    # The device works for others meanwhile.
    assert await embed(running, "eve") is CacheState.DEVICE
    assert await waiting is CacheState.ENCODED_NOW
    go_on.set()


async def test_a_copy_that_fails_costs_an_encoding_and_no_request(small):
    await embed(small, "ada")
    small.engine.copy_failures.append(Retryable("out of memory"))
    await embed(small, "bob")
    assert await embed(small, "ada") is CacheState.ENCODED_NOW
    small.engine.copy_failures += [Retryable("out of memory")] * 2
    assert await embed(small, "bob") is CacheState.ENCODED_NOW


async def test_a_slot_that_changes_hands_keeps_nothing_of_who_had_it(small):
    """A deletion clears the slots a user has now; earlier ones must be clear already."""
    await embed(small, "ada")
    assert not small.engine.cleared
    await embed(small, "bob")
    (slot,) = small.engine.cleared
    slot[:, -1] = 9
    assert await embed(small, "ada") is CacheState.HOST
    assert not slot[:, -1].any()


async def test_a_deleted_user_is_gone_from_host_memory_and_disk(small):
    await encode(small, USERS[:3])
    assert small.engine.arena[:128].any()
    assert (await small.client.profile_state("ada")).cache_state is CacheState.HOST
    await small.client.delete_profile("ada")
    assert not small.engine.arena[:128].any()
    (left,) = files(small)
    assert b'"bob"' in left.read_bytes()
    with pytest.raises(ClientError, match="NOT_FOUND"):
        await small.client.embed("ada", scenarios=["coffee_fan"])


async def test_a_deletion_fails_while_a_file_cannot_be_deleted(small, start_server, monkeypatch):
    await encode(small, USERS[:3])
    unlink = os.unlink

    def refuse(path, **where):
        if str(path).endswith(".kv"):
            raise OSError(errno.EROFS, "Read-only file system")
        unlink(path, **where)

    with monkeypatch.context() as patch:
        patch.setattr("os.unlink", refuse)
        with pytest.raises(ClientError, match=r"\(0\.kv\).*delete again") as caught:
            await small.client.delete_profile("ada")
        assert caught.value.code == "UNAVAILABLE"
        assert not small.engine.arena[:128].any()
        with pytest.raises(ClientError, match="NOT_FOUND"):
            await small.client.profile_state("ada")
        with pytest.raises(ClientError, match="delete again"):
            await small.client.delete_profile("bob")
    assert await small.client.delete_profile("ada") is False
    # What is not deleted again is nobody's at the next start.
    assert [b'"bob"' in path.read_bytes() for path in files(small)] == [True]
    small.server.request_stop()
    await small.server.wait_closed()
    again = await start_server(**SMALL)
    assert [b'"cyd"' in path.read_bytes() for path in files(again)] == [True]


async def test_a_deletion_waits_for_a_write_that_is_under_way(small, monkeypatch):
    writev, begun, go_on = os.writev, threading.Event(), threading.Event()

    def slow(handle, parts):
        begun.set()
        go_on.wait(20)
        return writev(handle, parts)

    monkeypatch.setattr("os.writev", slow)
    await embed(small, "ada")
    await embed(small, "bob")
    await until(begun.is_set)
    deleting = asyncio.create_task(small.client.delete_profile("ada"))
    await asyncio.sleep(0.1)
    assert not deleting.done()
    go_on.set()
    assert await deleting
    directory = Path(small.server.core.config.data_dir) / "kv"
    assert not any(b'"ada"' in path.read_bytes() for path in directory.iterdir())
    assert not small.engine.arena[:128].any()


async def test_a_pinned_user_stays_on_the_device(start_server, profile):
    running = await start_server(**{**SMALL, "kv_pool_bytes": 224})
    await put_all(running, profile)
    await running.client.warm_profile("ada", pin_seconds=60)
    for user in USERS[1:]:
        await embed(running, user)
    assert await embed(running, "ada") is CacheState.DEVICE
    with pytest.raises(ClientError, match="pinned") as caught:
        await running.client.warm_profile("bob", pin_seconds=60)
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    with pytest.raises(ClientError, match="86400") as caught:
        await running.client.warm_profile("bob", pin_seconds=86_401)
    assert caught.value.field_violations[0].field == "pin_seconds"


async def test_a_user_is_pinned_before_those_behind_it_can_evict_it(start_server, profile):
    running = await start_server(**{**SMALL, "kv_pool_bytes": 224})
    await put_all(running, profile)
    running.engine.gate.clear()
    async with asyncio.TaskGroup() as tasks:
        for number, user in enumerate(reversed(USERS)):
            pin_seconds = 60 if user == "eve" else 0
            tasks.create_task(running.client.warm_profile(user, pin_seconds=pin_seconds))
            await until(lambda n=number: running.server.core.admission.num_queued > n)
        running.engine.gate.set()
    assert await embed(running, "eve") is CacheState.DEVICE


async def test_what_is_not_used_for_the_time_to_live_is_dropped_while_the_server_idles(
    start_server, profile
):
    running = await start_server(**SMALL, kv_ttl_seconds=0.4)
    await put_all(running, profile)
    for user in USERS[:3]:
        await embed(running, user)
    async with asyncio.timeout(5):
        # Not the files alone: there are none before the first is written, either.
        while any(use.num_users for use in (await running.client.server_info()).tiers.values()):
            await asyncio.sleep(0.005)
    await until(lambda: not files(running))
    assert await embed(running, "ada") is CacheState.ENCODED_NOW
