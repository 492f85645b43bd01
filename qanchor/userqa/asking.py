"""Questions put to an endpoint: from the store if it was asked before, else once, within limits.

Two users with the same question share one request. After a request that shows that no other can
succeed (a wrong key), or too many failures in a row, nothing more is sent.
"""

import asyncio
import hashlib
import logging
from typing import Any, Protocol

import msgspec

from qanchor.errors import ConfigError
from qanchor.userqa.budget import Budget, estimated_tokens
from qanchor.userqa.config import EndpointConfig
from qanchor.userqa.outcomes import Refused, Tally, Unfinished
from qanchor.userqa.prompts import Messages, prompts
from qanchor.userqa.store import Reply, ReplyStore

logger = logging.getLogger(__name__)


class Completer(Protocol):
    """What answers in the end; see `Endpoint`."""

    def options(self) -> dict[str, Any]:
        """Everything sent with the messages."""

    async def complete(self, messages: Messages) -> Reply:
        """Ask once. Raises Unfinished, Refused or ConfigError."""


def request_key(options: dict[str, Any], messages: Messages, attempt: int) -> str:
    """Under which a reply is stored: model, sampling, messages, version of the prompts, attempt."""
    content = msgspec.json.encode([prompts().version, attempt, options, messages], order="sorted")
    return hashlib.sha256(content).hexdigest()


class Asking:
    """All requests of a run. For one event loop."""

    def __init__(
        self,
        completer: Completer,
        store: ReplyStore,
        budget: Budget,
        tally: Tally,
        config: EndpointConfig,
    ) -> None:
        self.tally = tally
        self._completer = completer
        self._store = store
        self._budget = budget
        self._config = config
        self._slots = asyncio.Semaphore(config.concurrency)
        self._pending: dict[str, asyncio.Task[Reply]] = {}
        self._failures_in_a_row = 0
        self._hopeless: ConfigError | None = None

    @property
    def stopped_by(self) -> str:
        """Why nothing more is sent; empty while something may be."""
        return self._budget.reached or ("endpoint" if self._is_failing else "")

    async def ask(self, messages: Messages, attempt: int) -> str:
        """The reply's text; on disk before it is returned.

        Raises Unfinished, Refused or ConfigError as `Endpoint.complete` does.
        """
        key = request_key(self._completer.options(), messages, attempt)
        stored = self._store.get(key)
        if stored is not None:
            self.tally.num_replies_from_store += 1
            return stored.text
        task = self._pending.get(key)
        if task is None:
            task = asyncio.create_task(self._fetch(key, messages))
            self._pending[key] = task
            task.add_done_callback(lambda _: self._pending.pop(key, None))
        return (await task).text

    @property
    def _is_failing(self) -> bool:
        return self._failures_in_a_row >= self._config.max_failures_in_a_row

    async def _fetch(self, key: str, messages: Messages) -> Reply:
        async with self._slots:
            if self._hopeless is not None:
                raise self._hopeless
            if self._is_failing:
                raise Unfinished("the endpoint kept failing")
            tokens_in = sum(estimated_tokens(content) for _, content in messages)
            reserved = (tokens_in, self._config.max_reply_tokens)
            await self._budget.reserve(*reserved)
            spent = (0, 0)
            try:
                reply = await self._send(key, messages)
                spent = (reply.num_tokens_in, reply.num_tokens_out)
            finally:
                await self._budget.settle(reserved, spent)
            return reply

    async def _send(self, key: str, messages: Messages) -> Reply:
        self.tally.num_requests += 1
        try:
            reply = await self._completer.complete(messages)
        except ConfigError as error:
            self._hopeless = error
            raise
        except (Unfinished, Refused) as error:
            self._failures_in_a_row += 1
            logger.warning("%s", error)
            raise
        self._store.put(key, reply)
        self._failures_in_a_row = 0
        self.tally.num_replies_without_usage += reply.is_estimated
        return reply
