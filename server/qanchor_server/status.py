"""The one table from failure class to gRPC code, and the details a caller can act on."""

from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from qanchor.errors import InvalidInput, QAnchorError
from qanchor_server.failures import (
    Cancelled,
    Expired,
    Fatal,
    NotFinite,
    Overloaded,
    Retryable,
    Unavailable,
    UnknownUser,
    Unserviceable,
)
from qanchor_server.profiles.store import StoreError

_CODES: tuple[tuple[type[QAnchorError], grpc.StatusCode], ...] = (
    # Rejected and unserviceable: wrong whatever the load.
    (InvalidInput, grpc.StatusCode.INVALID_ARGUMENT),
    (Unserviceable, grpc.StatusCode.INVALID_ARGUMENT),
    (UnknownUser, grpc.StatusCode.NOT_FOUND),
    # The same request may succeed later.
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Retryable, grpc.StatusCode.UNAVAILABLE),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
    # The caller gave up.
    (Expired, grpc.StatusCode.DEADLINE_EXCEEDED),
    (Cancelled, grpc.StatusCode.CANCELLED),
    # The server or its model is broken.
    (StoreError, grpc.StatusCode.INTERNAL),
    (NotFinite, grpc.StatusCode.INTERNAL),
    (Fatal, grpc.StatusCode.INTERNAL),
)


def code_of(error: QAnchorError) -> grpc.StatusCode:
    """The gRPC code of a failure; INTERNAL for one the table does not know."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


def to_status(error: QAnchorError) -> status_pb2.Status:
    """The status of a failure; a rejected field stands in a google.rpc.BadRequest."""
    status = status_pb2.Status(code=code_of(error).value[0], message=str(error))
    if isinstance(error, InvalidInput):
        rule = f"{error.rule}; {error.remedy}" if error.remedy else error.rule
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=rule)
        detail = AnyMessage()
        detail.Pack(error_details_pb2.BadRequest(field_violations=[violation]))
        status.details.append(detail)
    return status


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: QAnchorError) -> NoReturn:
    """End a call with the status of a failure."""
    status = rpc_status.to_status(to_status(error))
    await context.abort(status.code, status.details, tuple(status.trailing_metadata or ()))
    raise AssertionError("abort always raises")
