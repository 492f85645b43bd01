"""Which requests may enter: limits of a request and the bound of the queue.

Pure: no grpc, no clock. Call from the event loop thread only. A request beyond a limit is
rejected whatever the load; beyond the queue bound it is overload and may succeed later.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from qanchor.errors import InvalidInput
from qanchor_server.failures import Overloaded, Unavailable

MAX_USER_ID_CHARS = 256
MAX_APPEND_ID_CHARS = 128


class Admission:
    """Counts queries between arrival and reply, and closes the door while draining."""

    def __init__(self, *, max_queue: int, max_queries_per_request: int) -> None:
        self._max_queue = max_queue
        self._max_queries_per_request = max_queries_per_request
        self._closed = "the server is starting; retry"
        self.num_queued = 0
        self.num_overloaded = 0

    def open(self) -> None:
        """Let requests in from now on."""
        self._closed = ""

    def close(self, why: str) -> None:
        """Let no request in from now on; `why` is told to the callers."""
        self._closed = why

    def check_open(self) -> None:
        """Raises Unavailable while the server is starting or draining."""
        if self._closed:
            raise Unavailable(self._closed)

    def check_num_queries(self, num_queries: int) -> None:
        """Raises InvalidInput unless a request has a number of queries the server takes."""
        if num_queries == 0:
            raise InvalidInput("queries", 0, "at least one query is required", "add a query")
        if num_queries > self._max_queries_per_request:
            raise InvalidInput(
                "queries",
                num_queries,
                f"at most {self._max_queries_per_request} queries per request",
                "split the request",
            )

    @contextmanager
    def enter(self, num_queries: int) -> Iterator[None]:
        """Hold a place in the queue for a request's queries.

        Raises Overloaded when there is no room, Unavailable while the door is closed.
        """
        self.check_open()
        # An empty queue takes any request that its own limit allows.
        if self.num_queued and self.num_queued + num_queries > self._max_queue:
            self.num_overloaded += 1
            raise Overloaded(
                f"queue={self.num_queued}: at most {self._max_queue} queries may wait; retry later"
            )
        self.num_queued += num_queries
        try:
            yield
        finally:
            self.num_queued -= num_queries


def check_user_id(user_id: str) -> None:
    """Raises InvalidInput for an empty or too long user id."""
    if not user_id:
        raise InvalidInput("user_id", user_id, "must not be empty", "name the user")
    if len(user_id) > MAX_USER_ID_CHARS:
        raise InvalidInput(
            "user_id", user_id, f"at most {MAX_USER_ID_CHARS} characters", "use a shorter id"
        )


def check_append_id(append_id: str) -> None:
    """Raises InvalidInput for a too long idempotency key."""
    if len(append_id) > MAX_APPEND_ID_CHARS:
        raise InvalidInput(
            "append_id", append_id, f"at most {MAX_APPEND_ID_CHARS} characters", "hash it"
        )


def check_pin_seconds(pin_seconds: int, max_pin_seconds: int) -> None:
    """Raises InvalidInput for a longer pin than the server gives."""
    if pin_seconds > max_pin_seconds:
        raise InvalidInput(
            "pin_seconds", pin_seconds, f"at most {max_pin_seconds}", "pin again before it ends"
        )
