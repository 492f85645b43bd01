import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from qanchor.v1 import embedding_pb2 as _embedding_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Event(_message.Message):
    __slots__ = ("event_time", "modality", "event_type", "text", "value")
    EVENT_TIME_FIELD_NUMBER: _ClassVar[int]
    MODALITY_FIELD_NUMBER: _ClassVar[int]
    EVENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    event_time: _timestamp_pb2.Timestamp
    modality: str
    event_type: str
    text: str
    value: float
    def __init__(self, event_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., modality: _Optional[str] = ..., event_type: _Optional[str] = ..., text: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class Attribute(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: AttributeValue
    def __init__(self, name: _Optional[str] = ..., value: _Optional[_Union[AttributeValue, _Mapping]] = ...) -> None: ...

class AttributeValue(_message.Message):
    __slots__ = ("string_value", "number_value", "bool_value")
    STRING_VALUE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_VALUE_FIELD_NUMBER: _ClassVar[int]
    BOOL_VALUE_FIELD_NUMBER: _ClassVar[int]
    string_value: str
    number_value: float
    bool_value: bool
    def __init__(self, string_value: _Optional[str] = ..., number_value: _Optional[float] = ..., bool_value: _Optional[bool] = ...) -> None: ...

class PutProfileRequest(_message.Message):
    __slots__ = ("user_id", "as_of", "events", "attributes")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    AS_OF_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    as_of: _timestamp_pb2.Timestamp
    events: _containers.RepeatedCompositeFieldContainer[Event]
    attributes: _containers.RepeatedCompositeFieldContainer[Attribute]
    def __init__(self, user_id: _Optional[str] = ..., as_of: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ..., attributes: _Optional[_Iterable[_Union[Attribute, _Mapping]]] = ...) -> None: ...

class PutProfileResponse(_message.Message):
    __slots__ = ("prefix_version", "digest", "as_of", "num_prefix_tokens")
    PREFIX_VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    AS_OF_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prefix_version: int
    digest: str
    as_of: _timestamp_pb2.Timestamp
    num_prefix_tokens: int
    def __init__(self, prefix_version: _Optional[int] = ..., digest: _Optional[str] = ..., as_of: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., num_prefix_tokens: _Optional[int] = ...) -> None: ...

class AppendEventsRequest(_message.Message):
    __slots__ = ("user_id", "events", "as_of", "append_id")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    AS_OF_FIELD_NUMBER: _ClassVar[int]
    APPEND_ID_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    events: _containers.RepeatedCompositeFieldContainer[Event]
    as_of: _timestamp_pb2.Timestamp
    append_id: str
    def __init__(self, user_id: _Optional[str] = ..., events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ..., as_of: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., append_id: _Optional[str] = ...) -> None: ...

class AppendEventsResponse(_message.Message):
    __slots__ = ("prefix_version", "digest", "as_of", "num_prefix_tokens", "is_duplicate")
    PREFIX_VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    AS_OF_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IS_DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    prefix_version: int
    digest: str
    as_of: _timestamp_pb2.Timestamp
    num_prefix_tokens: int
    is_duplicate: bool
    def __init__(self, prefix_version: _Optional[int] = ..., digest: _Optional[str] = ..., as_of: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., num_prefix_tokens: _Optional[int] = ..., is_duplicate: _Optional[bool] = ...) -> None: ...

class WarmProfileRequest(_message.Message):
    __slots__ = ("user_id", "pin_seconds")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    PIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    pin_seconds: int
    def __init__(self, user_id: _Optional[str] = ..., pin_seconds: _Optional[int] = ...) -> None: ...

class WarmProfileResponse(_message.Message):
    __slots__ = ("provenance",)
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    provenance: _embedding_pb2.Provenance
    def __init__(self, provenance: _Optional[_Union[_embedding_pb2.Provenance, _Mapping]] = ...) -> None: ...

class GetProfileStateRequest(_message.Message):
    __slots__ = ("user_id",)
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    def __init__(self, user_id: _Optional[str] = ...) -> None: ...

class GetProfileStateResponse(_message.Message):
    __slots__ = ("prefix_version", "digest", "as_of", "num_prefix_tokens", "num_prefix_events", "cache_state")
    PREFIX_VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    AS_OF_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIX_EVENTS_FIELD_NUMBER: _ClassVar[int]
    CACHE_STATE_FIELD_NUMBER: _ClassVar[int]
    prefix_version: int
    digest: str
    as_of: _timestamp_pb2.Timestamp
    num_prefix_tokens: int
    num_prefix_events: int
    cache_state: _embedding_pb2.CacheState
    def __init__(self, prefix_version: _Optional[int] = ..., digest: _Optional[str] = ..., as_of: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., num_prefix_tokens: _Optional[int] = ..., num_prefix_events: _Optional[int] = ..., cache_state: _Optional[_Union[_embedding_pb2.CacheState, str]] = ...) -> None: ...

class DeleteProfileRequest(_message.Message):
    __slots__ = ("user_id",)
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    def __init__(self, user_id: _Optional[str] = ...) -> None: ...

class DeleteProfileResponse(_message.Message):
    __slots__ = ("was_stored",)
    WAS_STORED_FIELD_NUMBER: _ClassVar[int]
    was_stored: bool
    def __init__(self, was_stored: _Optional[bool] = ...) -> None: ...
