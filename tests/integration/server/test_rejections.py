"""Every wrong input gets INVALID_ARGUMENT and the wrong field's path; the engine never runs."""

import time

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from qanchor.client import ClientError
from qanchor.client.errors import from_rpc_error
from qanchor.v1 import embedding_pb2, embedding_pb2_grpc, profile_pb2, profile_pb2_grpc

NOW_S = 1_000 * 86_400
FLOAT32 = embedding_pb2.VECTOR_ENCODING_FLOAT32_BYTES


def scenario(name: str) -> embedding_pb2.Query:
    return embedding_pb2.Query(scenario=name)


def text(words: str) -> embedding_pb2.Query:
    return embedding_pb2.Query(text=words)


GOOD = scenario("coffee_fan")
EMBED_CASES = {
    "unknown scenario": ("ada", [GOOD, scenario("coffe_fan")], FLOAT32, "queries[1].scenario"),
    "empty text": ("ada", [text("")], FLOAT32, "queries[0].text"),
    "long text": ("ada", [text("tea " * 10)], FLOAT32, "queries[0].text"),
    "query without content": ("ada", [embedding_pb2.Query()], FLOAT32, "queries[0]"),
    "no queries": ("ada", [], FLOAT32, "queries"),
    "too many queries": ("ada", [GOOD] * 5, FLOAT32, "queries"),
    "encoding not set": ("ada", [GOOD], 0, "encoding"),
    "encoding not known": ("ada", [GOOD], 17, "encoding"),
    "empty user id": ("", [GOOD], FLOAT32, "user_id"),
    "long user id": ("u" * 257, [GOOD], FLOAT32, "user_id"),
}


def event(**changes: object) -> profile_pb2.Event:
    fields = {"event_time": Timestamp(seconds=NOW_S), "modality": "buy", "text": "tea", **changes}
    return profile_pb2.Event(**fields)


NAN = float("nan")
PUT_CASES = {
    "neither text nor type": ({"events": [event(text="")]}, "events[0].text"),
    "text too long": ({"events": [event(text="x" * 2001)]}, "events[0].text"),
    "type too long": ({"events": [event(event_type="x" * 2001)]}, "events[0].event_type"),
    "no time": ({"events": [event(event_time=None)]}, "events[0].event_time"),
    "before year 1": (
        {"events": [event(event_time=Timestamp(seconds=-62_135_596_801))]},
        "events[0].event_time",
    ),
    "as_of before year 1": ({"as_of": Timestamp(seconds=-(2**63))}, "as_of"),
    "after as_of": (
        {"events": [event(), event()], "as_of": Timestamp(seconds=NOW_S - 1)},
        "events[0].event_time",
    ),
    "after the clock": (
        {"events": [event(), event(event_time=Timestamp(seconds=NOW_S + 301))]},
        "events[1].event_time",
    ),
    "as_of after the clock": ({"as_of": Timestamp(seconds=NOW_S + 301)}, "as_of"),
    "unknown modality": ({"events": [event(modality="bye")]}, "events[0].modality"),
    "attribute modality": ({"events": [event(modality="about")]}, "events[0].modality"),
    "value not finite": ({"events": [event(value=NAN)]}, "events[0].value"),
    "value too large": ({"events": [event(value=-1e15), event(value=1.1e15)]}, "events[1].value"),
    "too many events": ({"events": [event()] * 7}, "events"),
    "far too many events, none of which is looked at": ({"events": [event(text="")] * 7}, "events"),
    "too many attributes, none of which is looked at": (
        {"attributes": [profile_pb2.Attribute()] * 1001},
        "attributes",
    ),
    "unnamed attribute": (
        {"attributes": [profile_pb2.Attribute(value={"bool_value": True})]},
        "attributes[0].name",
    ),
    "repeated attribute": (
        {"attributes": [profile_pb2.Attribute(name="a", value={"number_value": 1})] * 2},
        "attributes[1].name",
    ),
    "attribute without value": (
        {"attributes": [profile_pb2.Attribute(name="a")]},
        "attributes[0].value",
    ),
    "attribute not finite": (
        {"attributes": [profile_pb2.Attribute(name="a", value={"number_value": NAN})]},
        "attributes[0].value",
    ),
}
APPEND_CASES = {
    "nothing to add": ({}, "events"),
    "too many events, none of which is looked at": ({"events": [event(text="")] * 7}, "events"),
    "long append id": ({"events": [event()], "append_id": "a" * 129}, "append_id"),
    "as_of goes back": (
        {"as_of": Timestamp(seconds=NOW_S - 100)},
        "as_of",
    ),
    "wrong modality": ({"events": [event(modality="x")]}, "events[0].modality"),
}


@pytest.fixture
async def small(start_server, profile):
    """A server with small limits that knows ada."""
    running = await start_server(max_queries_per_request=4, max_profile_events=6)
    await running.client.put_profile(profile())
    return running


async def test_a_wrong_embed_request_names_the_field(small):
    stub = embedding_pb2_grpc.EmbeddingServiceStub(small.channel)
    for name, (user_id, queries, encoding, field) in EMBED_CASES.items():
        request = embedding_pb2.EmbedRequest(user_id=user_id, queries=queries, encoding=encoding)
        error = await _failure(stub.Embed(request, timeout=5))
        assert (name, error.code) == (name, "INVALID_ARGUMENT")
        assert (name, [v.field for v in error.field_violations]) == (name, [field])
    assert small.engine.suffix_steps == []


async def test_an_unknown_scenario_comes_with_the_nearest_name(small):
    with pytest.raises(ClientError) as caught:
        await small.client.embed("ada", scenarios=["coffe_fan"])
    assert "did you mean 'coffee_fan'" in caught.value.message
    assert "did you mean 'coffee_fan'" in caught.value.field_violations[0].description


async def test_a_name_of_megabytes_does_not_hold_up_the_server(small):
    start_s = time.process_time()
    with pytest.raises(ClientError, match="no such scenario"):
        await small.client.embed("ada", scenarios=["coffee" * 1_300_000])
    # Comparing it with the names there are took more than a second.
    assert time.process_time() - start_s < 0.3


async def test_a_wrong_profile_names_the_field_and_is_not_stored(small):
    stub = profile_pb2_grpc.ProfileServiceStub(small.channel)
    for name, (fields, field) in PUT_CASES.items():
        request = profile_pb2.PutProfileRequest(user_id="bob", **fields)
        error = await _failure(stub.PutProfile(request, timeout=5))
        assert (name, error.code) == (name, "INVALID_ARGUMENT")
        assert (name, [v.field for v in error.field_violations]) == (name, [field])
    with pytest.raises(ClientError, match="NOT_FOUND"):
        await small.client.profile_state("bob")


async def test_a_wrong_append_names_the_field(small):
    stub = profile_pb2_grpc.ProfileServiceStub(small.channel)
    for name, (fields, field) in APPEND_CASES.items():
        request = profile_pb2.AppendEventsRequest(user_id="ada", **fields)
        error = await _failure(stub.AppendEvents(request, timeout=5))
        assert (name, error.code) == (name, "INVALID_ARGUMENT")
        assert (name, [v.field for v in error.field_violations]) == (name, [field])


async def test_a_clock_ahead_within_the_tolerance_is_accepted(small):
    stub = profile_pb2_grpc.ProfileServiceStub(small.channel)
    ahead = event(event_time=Timestamp(seconds=NOW_S + 300))
    request = profile_pb2.PutProfileRequest(user_id="bob", events=[ahead])
    response = await stub.PutProfile(request, timeout=5)
    assert response.as_of.seconds == NOW_S + 300


async def test_an_unknown_user_is_not_found(small):
    for call in (
        small.client.embed("bob", scenarios=["coffee_fan"]),
        small.client.warm_profile("bob"),
        small.client.profile_state("bob"),
        small.client.append_events("bob", [], as_of_s=NOW_S),
    ):
        with pytest.raises(ClientError, match="PutProfile first") as caught:
            await call
        assert caught.value.code == "NOT_FOUND"


async def test_an_oversized_message_is_refused_by_grpc(start_server):
    running = await start_server(max_message_bytes=2000)
    with pytest.raises(ClientError) as caught:
        await running.client.embed("ada", queries=["tea " * 1000])
    assert caught.value.code == "RESOURCE_EXHAUSTED"


async def _failure(call: grpc.aio.UnaryUnaryCall) -> ClientError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)
