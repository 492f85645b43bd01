"""Between wire messages and the server's own values. Knows qanchor.v1 messages, but not grpc.

Every check here names the field as the caller wrote it, e.g. `events[3].event_time`.
"""

import math
from collections.abc import Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from qanchor.bundle.manifest import Manifest
from qanchor.config import ProfileSchema
from qanchor.data.profile import MAX_TEXT_CHARS, Event, Profile, validate_event
from qanchor.errors import InvalidInput
from qanchor.v1 import embedding_pb2, profile_pb2, scenario_pb2
from qanchor_server.answers import Answer
from qanchor_server.kv_pool import Found, PrefixRef
from qanchor_server.profiles.store import Append, check_num_events
from qanchor_server.resolve import ResolvedQuery, Resolver

_ENCODINGS = {
    embedding_pb2.VECTOR_ENCODING_FLOAT32_BYTES: "FLOAT32_BYTES",
    embedding_pb2.VECTOR_ENCODING_FLOAT16_BYTES: "FLOAT16_BYTES",
    embedding_pb2.VECTOR_ENCODING_FLOAT_LIST: "FLOAT_LIST",
}

_YEAR_1_S, _YEAR_9999_S = -62_135_596_800, 253_402_300_799
"""First and last second of a google.protobuf.Timestamp."""
_MAX_ATTRIBUTES = 1000
"""No model words so many; looking at a message full of them would hold up every caller."""

_CACHE_STATES = {
    Found.DEVICE: embedding_pb2.CACHE_STATE_DEVICE,
    Found.HOST: embedding_pb2.CACHE_STATE_HOST,
    Found.DISK: embedding_pb2.CACHE_STATE_DISK,
    Found.ENCODED: embedding_pb2.CACHE_STATE_ENCODED_NOW,
    None: embedding_pb2.CACHE_STATE_ABSENT,
}


def cache_state(found: Found | None) -> embedding_pb2.CacheState:
    """The wire form of where a prefix is; None: nowhere."""
    return _CACHE_STATES[found]


async def parse_queries(
    queries: Sequence[embedding_pb2.Query], resolver: Resolver
) -> tuple[ResolvedQuery, ...]:
    """Resolve a request's queries.

    Raises InvalidInput at the first wrong one, Overloaded when too many new texts wait.
    """
    resolved = []
    for number, query in enumerate(queries):
        kind = query.WhichOneof("query")
        if kind is None:
            raise InvalidInput(
                f"queries[{number}]", None, "scenario or text is required", "set one of them"
            )
        where = f"queries[{number}].{kind}"
        if kind == "scenario":
            resolved.append(resolver.scenario(query.scenario, where))
        else:
            resolved.append(await resolver.text(query.text, where))
    return tuple(resolved)


def scenarios(resolver: Resolver) -> list[scenario_pb2.Scenario]:
    """All scenarios the server knows, by name."""
    return [
        scenario_pb2.Scenario(
            name=scenario.name,
            version=scenario.version,
            question=scenario.question,
            domain=scenario.domain,
            num_prompt_rows=len(scenario.soft_prompt),
            num_suffix_tokens=suffix.suffix_len,
        )
        for scenario, suffix in resolver.scenarios()
    ]


def check_encoding(encoding: int) -> None:
    """Raises InvalidInput unless the vector encoding is one the server writes."""
    if encoding not in _ENCODINGS:
        raise InvalidInput(
            "encoding",
            encoding,
            "no such vector encoding",
            f"one of {', '.join(_ENCODINGS.values())}",
        )


def write_results(
    into: embedding_pb2.EmbedResponse | embedding_pb2.StreamEmbedResponse,
    answer: Answer,
    queries: Sequence[ResolvedQuery],
    encoding: int,
) -> None:
    """Fill a response's `results` with the wire form of an answer's vectors, one per query.

    Written in place and cut from one block of bytes: messages made apart and copied in take
    three times as long.
    """
    vectors_QZ = answer.vectors_QZ
    is_half = encoding == embedding_pb2.VECTOR_ENCODING_FLOAT16_BYTES
    is_list = encoding == embedding_pb2.VECTOR_ENCODING_FLOAT_LIST
    dtype = embedding_pb2.ELEMENT_TYPE_FLOAT16 if is_half else embedding_pb2.ELEMENT_TYPE_FLOAT32
    block = b"" if is_list else vectors_QZ.astype("<f2" if is_half else "<f4").tobytes()
    num_queries, dimension = vectors_QZ.shape
    num_bytes = len(block) // max(1, num_queries)
    for row, query in enumerate(queries):
        result = into.results.add()
        vector = result.vector
        vector.dtype = dtype
        vector.dimension = dimension
        if is_list:
            vector.values.extend(vectors_QZ[row].tolist())
        else:
            vector.data = block[row * num_bytes : (row + 1) * num_bytes]
        if query.scenario is not None:
            result.scenario = query.scenario.name
            result.scenario_version = query.scenario.version


def write_provenance(into: embedding_pb2.Provenance, answer: Answer, manifest: Manifest) -> None:
    """Fill in what a reply rests on."""
    into.model_id = manifest.model_id
    into.export_id = manifest.export_id
    into.prefix_version = answer.prefix.version
    into.as_of.seconds = answer.prefix.as_of_s
    into.cache_state = cache_state(answer.found)
    into.num_prefix_tokens = answer.prefix.num_tokens
    into.queue_seconds = answer.queue_seconds
    into.prefill_seconds = answer.prefill_seconds
    into.suffix_seconds = answer.suffix_seconds


def parse_profile(
    request: profile_pb2.PutProfileRequest,
    schema: ProfileSchema,
    *,
    now_s: int,
    skew_s: int,
    max_events: int,
) -> Profile:
    """A profile to store; without as-of time it is as of now. Raises InvalidInput."""
    # Before all else: half a million of them take seconds to look at.
    check_num_events(len(request.events), max_events)
    has_as_of = request.HasField("as_of")
    limit_s = _as_of(request.as_of, now_s + skew_s) if has_as_of else now_s + skew_s
    events = _parse_events(request.events, schema, limit_s)
    # A caller's clock that runs ahead within the tolerance moves the as-of time along.
    as_of_s = limit_s if has_as_of else max([now_s, *(event.time_s for event in events)])
    return Profile(
        user_id=request.user_id,
        as_of_s=as_of_s,
        events=events,
        attributes=_parse_attributes(request.attributes),
    )


def parse_append(
    request: profile_pb2.AppendEventsRequest,
    schema: ProfileSchema,
    *,
    now_s: int,
    skew_s: int,
    max_events: int,
) -> Append:
    """Events to add. Raises InvalidInput."""
    check_num_events(len(request.events), max_events)
    as_of_s = _as_of(request.as_of, now_s + skew_s) if request.HasField("as_of") else None
    if not request.events and as_of_s is None:
        raise InvalidInput("events", [], "at least one event or as_of is required", "add an event")
    limit_s = now_s + skew_s if as_of_s is None else as_of_s
    return Append(
        user_id=request.user_id,
        events=_parse_events(request.events, schema, limit_s),
        as_of_s=as_of_s,
        append_id=request.append_id,
    )


def timestamp(prefix: PrefixRef) -> Timestamp:
    """A prefix's as-of time."""
    return Timestamp(seconds=prefix.as_of_s)


def _as_of(as_of: Timestamp, limit_s: int) -> int:
    if as_of.seconds > limit_s:
        raise InvalidInput(
            "as_of", as_of.seconds, "lies in the future of the server's clock", "correct it"
        )
    return _seconds(as_of, "as_of")


def _seconds(time: Timestamp, where: str) -> int:
    """Unix seconds, within what a Timestamp may say."""
    if not _YEAR_1_S <= time.seconds <= _YEAR_9999_S:
        raise InvalidInput(
            where, time.seconds, "must lie in the years 1 to 9999", "send Unix seconds"
        )
    return time.seconds


def _parse_events(
    messages: Sequence[profile_pb2.Event], schema: ProfileSchema, limit_s: int
) -> tuple[Event, ...]:
    events = []
    for number, message in enumerate(messages):
        where = f"events[{number}]"
        if not message.HasField("event_time"):
            raise InvalidInput(f"{where}.event_time", None, "is required", "set Unix seconds")
        event = Event(
            time_s=_seconds(message.event_time, f"{where}.event_time"),
            modality=message.modality,
            event_type=message.event_type,
            text=message.text,
            value=message.value if message.HasField("value") else None,
        )
        _check_event(event, where, limit_s)
        validate_event(event, schema, limit_s, where)
        events.append(event)
    return tuple(events)


def _check_event(event: Event, where: str, limit_s: int) -> None:
    if event.time_s > limit_s:
        raise InvalidInput(
            f"{where}.event_time",
            event.time_s,
            f"lies in the future: after {limit_s}, the as-of time or the server's clock",
            "correct the time stamp or send a later as_of",
        )
    if len(event.event_type) > MAX_TEXT_CHARS:
        raise InvalidInput(
            f"{where}.event_type", event.event_type, f"at most {MAX_TEXT_CHARS} characters",
            "shorten it",
        )  # fmt: skip


def _parse_attributes(
    messages: Sequence[profile_pb2.Attribute],
) -> dict[str, str | float | bool]:
    if len(messages) > _MAX_ATTRIBUTES:
        raise InvalidInput(
            "attributes", len(messages), f"at most {_MAX_ATTRIBUTES}", "send those that tell most"
        )
    attributes: dict[str, str | float | bool] = {}
    for number, message in enumerate(messages):
        where = f"attributes[{number}]"
        if not message.name:
            raise InvalidInput(f"{where}.name", "", "must not be empty", "name the attribute")
        if message.name in attributes:
            raise InvalidInput(f"{where}.name", message.name, "must be unique", "send it once")
        kind = message.value.WhichOneof("value")
        if kind is None:
            raise InvalidInput(f"{where}.value", None, "is required", "set one of its fields")
        value = getattr(message.value, kind)
        if kind == "number_value" and not math.isfinite(value):
            raise InvalidInput(f"{where}.value", value, "must be finite", "leave the attribute out")
        if max(len(message.name), len(str(value))) > MAX_TEXT_CHARS:
            raise InvalidInput(
                f"{where}.value", value, f"at most {MAX_TEXT_CHARS} characters", "shorten it"
            )
        attributes[message.name] = value
    return attributes
