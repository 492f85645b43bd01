from qanchor.v1 import embedding_pb2 as _embedding_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ModalityKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODALITY_KIND_UNSPECIFIED: _ClassVar[ModalityKind]
    MODALITY_KIND_EVENTS: _ClassVar[ModalityKind]
    MODALITY_KIND_ATTRIBUTES: _ClassVar[ModalityKind]
MODALITY_KIND_UNSPECIFIED: ModalityKind
MODALITY_KIND_EVENTS: ModalityKind
MODALITY_KIND_ATTRIBUTES: ModalityKind

class Modality(_message.Message):
    __slots__ = ("name", "kind", "max_events")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MAX_EVENTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: ModalityKind
    max_events: int
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[_Union[ModalityKind, str]] = ..., max_events: _Optional[int] = ...) -> None: ...

class TierUse(_message.Message):
    __slots__ = ("tier", "budget_bytes", "used_bytes", "num_users", "num_hits", "num_evicted", "num_failed")
    TIER_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_USERS_FIELD_NUMBER: _ClassVar[int]
    NUM_HITS_FIELD_NUMBER: _ClassVar[int]
    NUM_EVICTED_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILED_FIELD_NUMBER: _ClassVar[int]
    tier: _embedding_pb2.CacheState
    budget_bytes: int
    used_bytes: int
    num_users: int
    num_hits: int
    num_evicted: int
    num_failed: int
    def __init__(self, tier: _Optional[_Union[_embedding_pb2.CacheState, str]] = ..., budget_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., num_users: _Optional[int] = ..., num_hits: _Optional[int] = ..., num_evicted: _Optional[int] = ..., num_failed: _Optional[int] = ...) -> None: ...

class Counters(_message.Message):
    __slots__ = ("num_answered", "num_encoded", "num_suffix_steps", "num_prefill_steps", "num_restore_steps", "num_expired", "num_cancelled", "num_overloaded")
    NUM_ANSWERED_FIELD_NUMBER: _ClassVar[int]
    NUM_ENCODED_FIELD_NUMBER: _ClassVar[int]
    NUM_SUFFIX_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFILL_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_RESTORE_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPIRED_FIELD_NUMBER: _ClassVar[int]
    NUM_CANCELLED_FIELD_NUMBER: _ClassVar[int]
    NUM_OVERLOADED_FIELD_NUMBER: _ClassVar[int]
    num_answered: int
    num_encoded: int
    num_suffix_steps: int
    num_prefill_steps: int
    num_restore_steps: int
    num_expired: int
    num_cancelled: int
    num_overloaded: int
    def __init__(self, num_answered: _Optional[int] = ..., num_encoded: _Optional[int] = ..., num_suffix_steps: _Optional[int] = ..., num_prefill_steps: _Optional[int] = ..., num_restore_steps: _Optional[int] = ..., num_expired: _Optional[int] = ..., num_cancelled: _Optional[int] = ..., num_overloaded: _Optional[int] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("server_version", "model_id", "export_id", "recipe", "embedding_dim", "max_prefix_len", "max_query_len", "max_queries_per_request", "max_message_bytes", "window_days", "modalities", "tiers", "counters", "uptime_seconds")
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    EXPORT_ID_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_DIM_FIELD_NUMBER: _ClassVar[int]
    MAX_PREFIX_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_QUERY_LEN_FIELD_NUMBER: _ClassVar[int]
    MAX_QUERIES_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    WINDOW_DAYS_FIELD_NUMBER: _ClassVar[int]
    MODALITIES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    server_version: str
    model_id: str
    export_id: str
    recipe: str
    embedding_dim: int
    max_prefix_len: int
    max_query_len: int
    max_queries_per_request: int
    max_message_bytes: int
    window_days: int
    modalities: _containers.RepeatedCompositeFieldContainer[Modality]
    tiers: _containers.RepeatedCompositeFieldContainer[TierUse]
    counters: Counters
    uptime_seconds: float
    def __init__(self, server_version: _Optional[str] = ..., model_id: _Optional[str] = ..., export_id: _Optional[str] = ..., recipe: _Optional[str] = ..., embedding_dim: _Optional[int] = ..., max_prefix_len: _Optional[int] = ..., max_query_len: _Optional[int] = ..., max_queries_per_request: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., window_days: _Optional[int] = ..., modalities: _Optional[_Iterable[_Union[Modality, _Mapping]]] = ..., tiers: _Optional[_Iterable[_Union[TierUse, _Mapping]]] = ..., counters: _Optional[_Union[Counters, _Mapping]] = ..., uptime_seconds: _Optional[float] = ...) -> None: ...
