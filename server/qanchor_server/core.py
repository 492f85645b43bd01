"""What the server does with a request, whatever the transport: find, admit, embed, store.

Must not know grpc or wire messages. Coroutines run on the event loop.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qanchor.bundle.packing import SuffixQuery
from qanchor.bundle.reader import Bundle
from qanchor.data.profile import Profile
from qanchor_server.admission import (
    Admission,
    check_append_id,
    check_pin_seconds,
    check_user_id,
)
from qanchor_server.answers import Answer
from qanchor_server.config import ServerConfig
from qanchor_server.failures import NotFinite, Overloaded
from qanchor_server.kv_pool import Found
from qanchor_server.prefix_source import PreparedPrefix
from qanchor_server.profiles.directory import ProfileDirectory
from qanchor_server.profiles.store import Append
from qanchor_server.resolve import Resolver
from qanchor_server.scenario_catalog import Reloaded, ScenarioCatalog
from qanchor_server.worker import Worker

if TYPE_CHECKING:
    from qanchor_server.metrics import Metrics


@dataclass(frozen=True, slots=True)
class ProfileState:
    """What is stored of a user and where exactly that is encoded; None: nowhere."""

    prepared: PreparedPrefix
    found: Found | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """The parts of a server and what they do together."""

    config: ServerConfig
    bundle: Bundle
    resolver: Resolver
    catalog: ScenarioCatalog
    admission: Admission
    directory: ProfileDirectory
    worker: Worker[Any]
    now_s: Callable[[], float]
    """Unix seconds."""
    metrics: "Metrics | None"

    async def embed(
        self, user_id: str, queries: tuple[SuffixQuery, ...], timeout_s: float | None
    ) -> Answer:
        """Embed a user's current profile under queries, at least one.

        Raises InvalidInput, UnknownUser, and all that `Worker.embed` and `Admission.enter` raise.
        """
        self.admission.check_num_queries(len(queries))
        return await self._on_device(user_id, queries, timeout_s)

    async def warm(self, user_id: str, pin_seconds: int, timeout_s: float | None) -> Answer:
        """Bring a user's current prefix to the device, and keep it there for `pin_seconds`.

        Raises as `embed`; Overloaded when too much is kept already, the prefix being warm.
        """
        check_pin_seconds(pin_seconds, self.config.max_pin_seconds)
        answer = await self._on_device(user_id, (), timeout_s, keep_s=pin_seconds)
        if pin_seconds and not answer.is_kept:
            raise Overloaded(
                f"pin_seconds={pin_seconds}: what is pinned leaves room for one prefix only; the "
                "user is warm, not pinned"
            )
        return answer

    async def put(self, profile: Profile) -> PreparedPrefix:
        """Store a profile durably. Raises InvalidInput, Unavailable."""
        self.admission.check_open()
        check_user_id(profile.user_id)
        return await self.directory.put(profile)

    async def append(self, append: Append) -> tuple[PreparedPrefix, bool]:
        """Add events durably; True when they had been stored before.

        Raises InvalidInput, UnknownUser, Unavailable.
        """
        self.admission.check_open()
        check_user_id(append.user_id)
        check_append_id(append.append_id)
        return await self.directory.append(append)

    async def state(self, user_id: str) -> ProfileState:
        """What is stored of a user. Raises InvalidInput, UnknownUser, Unavailable."""
        self.admission.check_open()
        check_user_id(user_id)
        prepared = await self.directory.current(user_id)
        return ProfileState(prepared, await self.worker.find(prepared.ref))

    async def reload_scenarios(self) -> Reloaded:
        """Read the scenario files again. Raises InvalidInput, Unavailable."""
        self.admission.check_open()
        return await self.catalog.reload()

    async def delete(self, user_id: str) -> bool:
        """Delete a user everywhere; True when a profile was stored.

        Goes on when the caller leaves: keys and values never outlive the stored profile. Raises
        InvalidInput, Unavailable, StoreError; Retryable when a file could not be deleted.
        """
        self.admission.check_open()
        check_user_id(user_id)
        return await asyncio.shield(asyncio.ensure_future(self._delete(user_id)))

    async def _delete(self, user_id: str) -> bool:
        version, was_stored = await self.directory.delete(user_id)
        try:
            await self.directory.empty_log()
        finally:
            # The user is gone from the store: whatever failed, nothing of it may be served.
            await self.worker.forget(user_id, version)
        return was_stored

    async def _on_device(
        self,
        user_id: str,
        queries: tuple[SuffixQuery, ...],
        timeout_s: float | None,
        keep_s: float = 0.0,
    ) -> Answer:
        check_user_id(user_id)
        with self.admission.enter(max(1, len(queries))):
            prepared = await self.directory.current(user_id)
            answer = await self.worker.embed(prepared, queries, timeout_s=timeout_s, keep_s=keep_s)
        if not np.isfinite(answer.vectors_QZ).all():
            raise NotFinite(user_id)
        if self.metrics is not None:
            self.metrics.note(answer)
        return answer
