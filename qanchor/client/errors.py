"""A failed call as one exception, with code, message and the fields the server named."""

from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

from qanchor.errors import QAnchorError

_DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of the request that breaks a rule."""

    field: str
    """Dotted path into the request, e.g. `queries[2].scenario`."""
    description: str
    """The rule and the remedy."""


class ClientError(QAnchorError):
    """A call, or one item of a stream, failed."""

    def __init__(
        self, code: str, message: str, field_violations: tuple[FieldViolation, ...] = ()
    ) -> None:
        self.code = code
        """Name of the gRPC code, e.g. `NOT_FOUND`."""
        self.message = message
        self.field_violations = field_violations
        super().__init__(f"{code}: {message}")


def from_rpc_error(error: grpc.RpcError) -> ClientError:
    """The exception of a failed call."""
    violations: tuple[FieldViolation, ...] = ()
    metadata: Any = error.trailing_metadata()
    for key, value in metadata or ():
        if key == _DETAILS_KEY:
            violations = _violations(_parse(value))
    return ClientError(error.code().name, error.details() or "", violations)


def from_status(status: status_pb2.Status) -> ClientError:
    """The exception of a failed stream item."""
    return ClientError(code_pb2.Code.Name(status.code), status.message, _violations(status))


def _parse(value: bytes) -> status_pb2.Status:
    try:
        return status_pb2.Status.FromString(value)
    except DecodeError:
        # A proxy may put anything here; code and message stand without it.
        return status_pb2.Status()


def _violations(status: status_pb2.Status) -> tuple[FieldViolation, ...]:
    found: list[FieldViolation] = []
    for detail in status.details:
        bad_request = error_details_pb2.BadRequest()
        if detail.Unpack(bad_request):
            found.extend(
                FieldViolation(violation.field, violation.description)
                for violation in bad_request.field_violations
            )
    return tuple(found)
