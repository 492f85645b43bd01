"""Between the client's values and wire messages. Knows qanchor.v1 messages, but not grpc."""

from collections.abc import Iterable, Sequence

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from qanchor.client.errors import from_status
from qanchor.client.values import (
    AppendResult,
    CacheState,
    EmbedRequestItem,
    EmbedResult,
    FloatArray,
    ItemResult,
    ProfileState,
    Provenance,
    PutResult,
    ReloadResult,
    ScenarioInfo,
    ServerInfo,
    TierUse,
)
from qanchor.config import nearest
from qanchor.data.profile import Event, Profile
from qanchor.errors import InvalidInput
from qanchor.v1 import embedding_pb2, profile_pb2, scenario_pb2, server_info_pb2

_ENCODINGS = {
    "float32": embedding_pb2.VECTOR_ENCODING_FLOAT32_BYTES,
    "float16": embedding_pb2.VECTOR_ENCODING_FLOAT16_BYTES,
}
_NUMPY_DTYPES = {
    embedding_pb2.ELEMENT_TYPE_FLOAT32: "<f4",
    embedding_pb2.ELEMENT_TYPE_FLOAT16: "<f2",
}


def embed_request(
    user_id: str, scenarios: Sequence[str], queries: Sequence[str], dtype: str
) -> embedding_pb2.EmbedRequest:
    """Scenarios first, then free text. Raises InvalidInput for an unknown dtype."""
    return embedding_pb2.EmbedRequest(
        user_id=user_id, queries=_queries(scenarios, queries), encoding=_encoding(dtype)
    )


def stream_request(item: EmbedRequestItem, dtype: str) -> embedding_pb2.StreamEmbedRequest:
    """One item of a stream. Raises InvalidInput for an unknown dtype."""
    return embedding_pb2.StreamEmbedRequest(
        request_id=item.request_id,
        user_id=item.user_id,
        queries=_queries(item.scenarios, item.queries),
        encoding=_encoding(dtype),
    )


def embed_result(
    response: embedding_pb2.EmbedResponse | embedding_pb2.StreamEmbedResponse,
) -> EmbedResult:
    """Vectors in float32 and provenance."""
    versions = tuple(result.scenario_version for result in response.results)
    vectors = np.stack([decode_vector(result.vector) for result in response.results])
    return EmbedResult(vectors, provenance(response.provenance, versions))


def item_result(response: embedding_pb2.StreamEmbedResponse) -> ItemResult:
    """One reply of a stream."""
    if response.status.code:
        return ItemResult(response.request_id, None, from_status(response.status))
    return ItemResult(response.request_id, embed_result(response), None)


def decode_vector(vector: embedding_pb2.Vector) -> FloatArray:
    """float32 [dimension] of any wire form.

    Raises InvalidInput when the bytes do not match dtype and dimension.
    """
    if vector.values:
        return np.array(vector.values, dtype=np.float32)
    if vector.dtype not in _NUMPY_DTYPES:
        raise InvalidInput("vector.dtype", vector.dtype, "unknown dtype", "update the client")
    decoded = np.frombuffer(vector.data, dtype=_NUMPY_DTYPES[vector.dtype])
    if len(decoded) != vector.dimension:
        raise InvalidInput(
            "vector.data", len(decoded), f"dimension says {vector.dimension}", "report a bug"
        )
    return decoded.astype(np.float32)


def provenance(
    message: embedding_pb2.Provenance, scenario_versions: tuple[int, ...] = ()
) -> Provenance:
    """What a reply rests on."""
    return Provenance(
        model_id=message.model_id,
        export_id=message.export_id,
        prefix_version=message.prefix_version,
        as_of_s=message.as_of.seconds,
        cache_state=CacheState(message.cache_state),
        num_prefix_tokens=message.num_prefix_tokens,
        queue_seconds=message.queue_seconds,
        prefill_seconds=message.prefill_seconds,
        suffix_seconds=message.suffix_seconds,
        scenario_versions=scenario_versions,
    )


def put_request(profile: Profile) -> profile_pb2.PutProfileRequest:
    """A profile to store."""
    return profile_pb2.PutProfileRequest(
        user_id=profile.user_id,
        as_of=Timestamp(seconds=profile.as_of_s),
        events=[_event(event) for event in profile.events],
        attributes=[_attribute(name, value) for name, value in profile.attributes.items()],
    )


def append_request(
    user_id: str, events: Sequence[Event], as_of_s: int | None, append_id: str
) -> profile_pb2.AppendEventsRequest:
    """Events to add."""
    return profile_pb2.AppendEventsRequest(
        user_id=user_id,
        events=[_event(event) for event in events],
        as_of=None if as_of_s is None else Timestamp(seconds=as_of_s),
        append_id=append_id,
    )


def put_result(response: profile_pb2.PutProfileResponse) -> PutResult:
    """A stored profile."""
    return PutResult(
        prefix_version=response.prefix_version,
        digest=response.digest,
        as_of_s=response.as_of.seconds,
        num_prefix_tokens=response.num_prefix_tokens,
    )


def append_result(response: profile_pb2.AppendEventsResponse) -> AppendResult:
    """A profile after an append."""
    return AppendResult(
        prefix_version=response.prefix_version,
        digest=response.digest,
        as_of_s=response.as_of.seconds,
        num_prefix_tokens=response.num_prefix_tokens,
        is_duplicate=response.is_duplicate,
    )


def profile_state(response: profile_pb2.GetProfileStateResponse) -> ProfileState:
    """What the server knows of a user."""
    return ProfileState(
        prefix_version=response.prefix_version,
        digest=response.digest,
        as_of_s=response.as_of.seconds,
        num_prefix_tokens=response.num_prefix_tokens,
        num_prefix_events=response.num_prefix_events,
        cache_state=CacheState(response.cache_state),
    )


def scenario_infos(messages: Iterable[scenario_pb2.Scenario]) -> list[ScenarioInfo]:
    """Scenarios."""
    return [
        ScenarioInfo(
            name=message.name,
            version=message.version,
            question=message.question,
            domain=message.domain,
            num_prompt_rows=message.num_prompt_rows,
            num_suffix_tokens=message.num_suffix_tokens,
        )
        for message in messages
    ]


def reload_result(response: scenario_pb2.ReloadScenariosResponse) -> ReloadResult:
    """What a reload changed."""
    return ReloadResult(
        changed=tuple(response.changed),
        removed=tuple(response.removed),
        scenarios=tuple(scenario_infos(response.scenarios)),
    )


def server_info(response: server_info_pb2.GetServerInfoResponse) -> ServerInfo:
    """What the server runs."""
    counters = response.counters
    return ServerInfo(
        server_version=response.server_version,
        model_id=response.model_id,
        export_id=response.export_id,
        recipe=response.recipe,
        embedding_dim=response.embedding_dim,
        max_prefix_len=response.max_prefix_len,
        max_query_len=response.max_query_len,
        max_queries_per_request=response.max_queries_per_request,
        max_message_bytes=response.max_message_bytes,
        window_days=response.window_days,
        modalities=tuple(
            modality.name
            for modality in response.modalities
            if modality.kind == server_info_pb2.MODALITY_KIND_EVENTS
        ),
        tiers={
            CacheState(use.tier): TierUse(
                budget_bytes=use.budget_bytes,
                used_bytes=use.used_bytes,
                num_users=use.num_users,
                num_hits=use.num_hits,
                num_evicted=use.num_evicted,
                num_failed=use.num_failed,
            )
            for use in response.tiers
        },
        counters={
            field.name: getattr(counters, field.name) for field in counters.DESCRIPTOR.fields
        },
        uptime_seconds=response.uptime_seconds,
    )


def _encoding(dtype: str) -> embedding_pb2.VectorEncoding:
    if dtype not in _ENCODINGS:
        raise InvalidInput(
            "dtype", dtype, "must be float32 or float16", nearest(dtype, list(_ENCODINGS))
        )
    return _ENCODINGS[dtype]


def _queries(scenarios: Sequence[str], queries: Sequence[str]) -> list[embedding_pb2.Query]:
    return [
        *(embedding_pb2.Query(scenario=name) for name in scenarios),
        *(embedding_pb2.Query(text=text) for text in queries),
    ]


def _event(event: Event) -> profile_pb2.Event:
    return profile_pb2.Event(
        event_time=Timestamp(seconds=event.time_s),
        modality=event.modality,
        event_type=event.event_type,
        text=event.text,
        value=event.value,
    )


def _attribute(name: str, value: str | float | bool) -> profile_pb2.Attribute:
    if isinstance(value, bool):
        wire_value = profile_pb2.AttributeValue(bool_value=value)
    elif isinstance(value, (int, float)):
        wire_value = profile_pb2.AttributeValue(number_value=value)
    else:
        wire_value = profile_pb2.AttributeValue(string_value=value)
    return profile_pb2.Attribute(name=name, value=wire_value)
