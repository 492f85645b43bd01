"""Profile calls: state, warm, append ids, deletion everywhere."""

from dataclasses import replace

import numpy as np
import pytest

from qanchor.client import CacheState, ClientError
from qanchor.data.profile import Event, Profile
from qanchor_server import prefix_source

NOW_S = 1_000 * 86_400


async def test_the_state_follows_put_warm_and_append(running, profile):
    put = await running.client.put_profile(profile())
    state = await running.client.profile_state("ada")
    assert state.cache_state is CacheState.ABSENT
    assert (state.digest, state.prefix_version) == (put.digest, put.prefix_version)
    assert (state.num_prefix_tokens, state.num_prefix_events) == (9, 1)
    warm = await running.client.warm_profile("ada")
    assert (warm.cache_state, warm.suffix_seconds) == (CacheState.ENCODED_NOW, 0)
    assert (await running.client.profile_state("ada")).cache_state is CacheState.DEVICE
    assert (await running.client.warm_profile("ada")).cache_state is CacheState.DEVICE
    tea = Event(time_s=NOW_S, modality="buy", event_type="", text="tea")
    appended = await running.client.append_events("ada", [tea])
    assert appended.digest != put.digest
    assert appended.prefix_version > put.prefix_version
    state = await running.client.profile_state("ada")
    assert (state.cache_state, state.num_prefix_events) == (CacheState.ABSENT, 2)


async def test_equal_content_has_an_equal_digest_and_stays_encoded(running, profile):
    first = await running.client.put_profile(profile())
    await running.client.warm_profile("ada")
    second = await running.client.put_profile(profile())
    assert second.digest == first.digest
    assert second.prefix_version > first.prefix_version
    result = await running.client.embed("ada", scenarios=["tea_fan"])
    assert result.provenance.cache_state is CacheState.DEVICE
    assert result.provenance.prefix_version == second.prefix_version


async def test_an_append_id_is_stored_once(running, profile):
    await running.client.put_profile(profile())
    tea = Event(time_s=NOW_S, modality="buy", event_type="", text="tea")
    first = await running.client.append_events("ada", [tea], append_id="k")
    second = await running.client.append_events("ada", [tea], append_id="k")
    assert (first.is_duplicate, second.is_duplicate) == (False, True)
    assert second.prefix_version == first.prefix_version
    assert (await running.client.profile_state("ada")).num_prefix_events == 2


async def test_a_stored_modality_that_the_bundle_lacks_is_left_out(running, profile):
    """A store outlives the bundle it was filled under."""
    directory = running.server.core.directory
    gone = Event(time_s=NOW_S, modality="gone", event_type="a", text="a")
    coffee = profile()
    both = replace(coffee, events=(*coffee.events, gone))
    await directory._run(lambda: directory._opened().put(both))
    assert (await running.client.profile_state("ada")).num_prefix_events == 1
    result = await running.client.embed("ada", scenarios=["coffee_fan"])
    assert result.vectors.tolist() == [[540, 13, 4, 0]]


async def test_what_cannot_be_prepared_is_not_stored(start_server, profile, monkeypatch):
    first = await start_server()
    before = await first.client.put_profile(profile())
    with monkeypatch.context() as broken:
        broken.setattr(prefix_source, "content_digest", _fail)
        with pytest.raises(ClientError, match="cannot be rendered"):
            await first.client.put_profile(profile(days_ago=1))
        with pytest.raises(ClientError, match="cannot be rendered"):
            await first.client.append_events("ada", profile(days_ago=2).events, append_id="k")
    state = await first.client.profile_state("ada")
    assert (state.digest, state.prefix_version) == (before.digest, before.prefix_version)
    first.server.request_stop()
    assert await first.server.wait_closed() == 0
    second = await start_server()
    assert (await second.client.profile_state("ada")).digest == before.digest
    again = await second.client.append_events("ada", profile(days_ago=2).events, append_id="k")
    assert not again.is_duplicate


def _fail(*_: object) -> str:
    raise OverflowError("cannot be rendered")


async def test_attributes_keep_their_order_and_kind(running):
    profile = Profile(
        user_id="ada", as_of_s=NOW_S, attributes={"tea": True, "coffee": 3.0, "shoes": "tea"}
    )
    put = await running.client.put_profile(profile)
    # The schema keeps the first two: "tea: yes" 3 + 6 + 1, "coffee: 3" 2 + 6 + 13; mean 15.5,
    # user mean 7.75, structure 510.
    assert put.num_prefix_tokens == 10
    result = await running.client.embed("ada", scenarios=["coffee_fan"])
    assert result.vectors[0, 0] == 510 + 10 + 21 + 15.5 + 7.75


async def test_an_as_of_time_alone_ages_the_profile(running, profile):
    before = await running.client.put_profile(profile(days_ago=1))
    after = await running.client.append_events("ada", [], as_of_s=NOW_S + 300)
    assert after.digest == before.digest
    assert after.as_of_s == NOW_S + 300


async def test_a_deleted_user_is_gone_from_store_device_and_memory(running, profile):
    await running.client.put_profile(profile())
    await running.client.warm_profile("ada")
    assert await running.client.delete_profile("ada")
    with pytest.raises(ClientError, match="NOT_FOUND"):
        await running.client.embed("ada", scenarios=["tea_fan"])
    (slot,) = running.engine.cleared
    assert not np.any(slot)
    assert (await running.client.server_info()).tiers[CacheState.DEVICE].num_users == 0
    assert not await running.client.delete_profile("ada")
    await running.client.put_profile(profile())
    result = await running.client.embed("ada", scenarios=["coffee_fan"])
    assert result.vectors[0, 0] == 540


async def test_a_deletion_whose_log_is_not_emptied_fails_and_serves_nothing(running, profile):
    for user_id in ("ada", "bob", "cyd"):
        await running.client.put_profile(profile(user_id))
    await running.client.warm_profile("ada")
    directory = running.server.core.directory
    # An unfinished read keeps SQLite from emptying its log.
    reading = await directory._run(
        lambda: directory._store._db.execute("SELECT user_id FROM profiles")
    )
    with pytest.raises(ClientError, match="delete again") as caught:
        await running.client.delete_profile("ada")
    assert caught.value.code == "INTERNAL"
    assert len(running.engine.cleared) == 1
    with pytest.raises(ClientError, match="NOT_FOUND"):
        await running.client.embed("ada", scenarios=["tea_fan"])
    with pytest.raises(ClientError, match="delete again"):
        await running.client.delete_profile("ada")
    await directory._run(reading.close)
    assert not await running.client.delete_profile("ada")


async def test_profiles_survive_a_restart(start_server, profile):
    first = await start_server()
    put = await first.client.put_profile(profile())
    first.server.request_stop()
    assert await first.server.wait_closed() == 0
    second = await start_server()
    result = await second.client.embed("ada", scenarios=["coffee_fan"])
    assert result.vectors.tolist() == [[540, 13, 4, 0]]
    assert result.provenance.prefix_version == put.prefix_version
