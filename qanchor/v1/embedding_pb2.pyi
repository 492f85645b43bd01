import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class VectorEncoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VECTOR_ENCODING_UNSPECIFIED: _ClassVar[VectorEncoding]
    VECTOR_ENCODING_FLOAT32_BYTES: _ClassVar[VectorEncoding]
    VECTOR_ENCODING_FLOAT16_BYTES: _ClassVar[VectorEncoding]
    VECTOR_ENCODING_FLOAT_LIST: _ClassVar[VectorEncoding]

class ElementType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ELEMENT_TYPE_UNSPECIFIED: _ClassVar[ElementType]
    ELEMENT_TYPE_FLOAT32: _ClassVar[ElementType]
    ELEMENT_TYPE_FLOAT16: _ClassVar[ElementType]

class CacheState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CACHE_STATE_UNSPECIFIED: _ClassVar[CacheState]
    CACHE_STATE_DEVICE: _ClassVar[CacheState]
    CACHE_STATE_HOST: _ClassVar[CacheState]
    CACHE_STATE_ENCODED_NOW: _ClassVar[CacheState]
    CACHE_STATE_ABSENT: _ClassVar[CacheState]
    CACHE_STATE_DISK: _ClassVar[CacheState]
VECTOR_ENCODING_UNSPECIFIED: VectorEncoding
VECTOR_ENCODING_FLOAT32_BYTES: VectorEncoding
VECTOR_ENCODING_FLOAT16_BYTES: VectorEncoding
VECTOR_ENCODING_FLOAT_LIST: VectorEncoding
ELEMENT_TYPE_UNSPECIFIED: ElementType
ELEMENT_TYPE_FLOAT32: ElementType
ELEMENT_TYPE_FLOAT16: ElementType
CACHE_STATE_UNSPECIFIED: CacheState
CACHE_STATE_DEVICE: CacheState
CACHE_STATE_HOST: CacheState
CACHE_STATE_ENCODED_NOW: CacheState
CACHE_STATE_ABSENT: CacheState
CACHE_STATE_DISK: CacheState

class Query(_message.Message):
    __slots__ = ("scenario", "text")
    SCENARIO_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    scenario: str
    text: str
    def __init__(self, scenario: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class Vector(_message.Message):
    __slots__ = ("dtype", "dimension", "data", "values")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    dtype: ElementType
    dimension: int
    data: bytes
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, dtype: _Optional[_Union[ElementType, str]] = ..., dimension: _Optional[int] = ..., data: _Optional[bytes] = ..., values: _Optional[_Iterable[float]] = ...) -> None: ...

class EmbedResult(_message.Message):
    __slots__ = ("vector", "scenario", "scenario_version")
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    SCENARIO_FIELD_NUMBER: _ClassVar[int]
    SCENARIO_VERSION_FIELD_NUMBER: _ClassVar[int]
    vector: Vector
    scenario: str
    scenario_version: int
    def __init__(self, vector: _Optional[_Union[Vector, _Mapping]] = ..., scenario: _Optional[str] = ..., scenario_version: _Optional[int] = ...) -> None: ...

class Provenance(_message.Message):
    __slots__ = ("model_id", "export_id", "prefix_version", "as_of", "cache_state", "num_prefix_tokens", "queue_seconds", "prefill_seconds", "suffix_seconds")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    EXPORT_ID_FIELD_NUMBER: _ClassVar[int]
    PREFIX_VERSION_FIELD_NUMBER: _ClassVar[int]
    AS_OF_FIELD_NUMBER: _ClassVar[int]
    CACHE_STATE_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SUFFIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    export_id: str
    prefix_version: int
    as_of: _timestamp_pb2.Timestamp
    cache_state: CacheState
    num_prefix_tokens: int
    queue_seconds: float
    prefill_seconds: float
    suffix_seconds: float
    def __init__(self, model_id: _Optional[str] = ..., export_id: _Optional[str] = ..., prefix_version: _Optional[int] = ..., as_of: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., cache_state: _Optional[_Union[CacheState, str]] = ..., num_prefix_tokens: _Optional[int] = ..., queue_seconds: _Optional[float] = ..., prefill_seconds: _Optional[float] = ..., suffix_seconds: _Optional[float] = ...) -> None: ...

class EmbedRequest(_message.Message):
    __slots__ = ("user_id", "queries", "encoding")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    queries: _containers.RepeatedCompositeFieldContainer[Query]
    encoding: VectorEncoding
    def __init__(self, user_id: _Optional[str] = ..., queries: _Optional[_Iterable[_Union[Query, _Mapping]]] = ..., encoding: _Optional[_Union[VectorEncoding, str]] = ...) -> None: ...

class EmbedResponse(_message.Message):
    __slots__ = ("results", "provenance")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[EmbedResult]
    provenance: Provenance
    def __init__(self, results: _Optional[_Iterable[_Union[EmbedResult, _Mapping]]] = ..., provenance: _Optional[_Union[Provenance, _Mapping]] = ...) -> None: ...

class StreamEmbedRequest(_message.Message):
    __slots__ = ("request_id", "user_id", "queries", "encoding")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    user_id: str
    queries: _containers.RepeatedCompositeFieldContainer[Query]
    encoding: VectorEncoding
    def __init__(self, request_id: _Optional[str] = ..., user_id: _Optional[str] = ..., queries: _Optional[_Iterable[_Union[Query, _Mapping]]] = ..., encoding: _Optional[_Union[VectorEncoding, str]] = ...) -> None: ...

class StreamEmbedResponse(_message.Message):
    __slots__ = ("request_id", "status", "results", "provenance")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    status: _status_pb2.Status
    results: _containers.RepeatedCompositeFieldContainer[EmbedResult]
    provenance: Provenance
    def __init__(self, request_id: _Optional[str] = ..., status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., results: _Optional[_Iterable[_Union[EmbedResult, _Mapping]]] = ..., provenance: _Optional[_Union[Provenance, _Mapping]] = ...) -> None: ...
