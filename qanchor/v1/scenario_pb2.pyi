from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Scenario(_message.Message):
    __slots__ = ("name", "version", "question", "domain", "num_prompt_rows", "num_suffix_tokens")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_SUFFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    question: str
    domain: str
    num_prompt_rows: int
    num_suffix_tokens: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., question: _Optional[str] = ..., domain: _Optional[str] = ..., num_prompt_rows: _Optional[int] = ..., num_suffix_tokens: _Optional[int] = ...) -> None: ...

class ListScenariosRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListScenariosResponse(_message.Message):
    __slots__ = ("scenarios",)
    SCENARIOS_FIELD_NUMBER: _ClassVar[int]
    scenarios: _containers.RepeatedCompositeFieldContainer[Scenario]
    def __init__(self, scenarios: _Optional[_Iterable[_Union[Scenario, _Mapping]]] = ...) -> None: ...

class ReloadScenariosRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReloadScenariosResponse(_message.Message):
    __slots__ = ("changed", "removed", "scenarios")
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    SCENARIOS_FIELD_NUMBER: _ClassVar[int]
    changed: _containers.RepeatedScalarFieldContainer[str]
    removed: _containers.RepeatedScalarFieldContainer[str]
    scenarios: _containers.RepeatedCompositeFieldContainer[Scenario]
    def __init__(self, changed: _Optional[_Iterable[str]] = ..., removed: _Optional[_Iterable[str]] = ..., scenarios: _Optional[_Iterable[_Union[Scenario, _Mapping]]] = ...) -> None: ...
