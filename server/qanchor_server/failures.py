"""Why a request gets no embedding. Pure; `status.py` maps each class to a gRPC code.

Rejected requests are `qanchor.errors.InvalidInput`; a deferred prefix is no failure, it waits.
"""

from qanchor.errors import QAnchorError


class UnknownUser(QAnchorError):
    """No profile is stored for the user, or it was deleted while the request waited."""

    def __init__(self, user_id: str) -> None:
        super().__init__(f"user_id={user_id!r}: no profile is stored; send PutProfile first")


class Overloaded(QAnchorError):
    """The queue is full; the same request may succeed later."""


class Unserviceable(QAnchorError):
    """The prefix fits no slot, whatever the load."""


class Retryable(QAnchorError):
    """A step was rolled back; nothing was lost, the caller may retry."""


class Unavailable(QAnchorError):
    """The server is starting or draining."""


class Expired(QAnchorError):
    """The deadline passed before the device was used."""


class Cancelled(QAnchorError):
    """The caller went away before the device was used."""


class NotFinite(QAnchorError):
    """The model makes something of the user's numbers that is no embedding."""

    def __init__(self, user_id: str) -> None:
        super().__init__(
            f"user_id={user_id!r}: an embedding is not finite; put the profile without its largest "
            "values, or serve in float32 if this bundle is in float16"
        )


class Fatal(QAnchorError):
    """The engine failed; the process is shutting down."""
