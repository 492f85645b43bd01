"""What the server does with a request, whatever the transport: find, admit, embed, store.

Must not know grpc or wire messages. Coroutines run on the event loop.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qanchor.bundle.packing import SuffixQuery
from qanchor.bundle.reader import Bundle
from qanchor.data.profile import Profile
from qanchor_server.admission import Admission, check_append_id, check_user_id
from qanchor_server.config import ServerConfig
from qanchor_server.prefix_source import PreparedPrefix
from qanchor_server.profiles.directory import ProfileDirectory
from qanchor_server.profiles.store import Append
from qanchor_server.resolve import Resolver
from qanchor_server.worker import Answer, Worker


@dataclass(frozen=True, slots=True)
class ProfileState:
    """What is stored of a user and whether exactly that is encoded."""

    prepared: PreparedPrefix
    is_held: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """The parts of a server and what they do together."""

    config: ServerConfig
    bundle: Bundle
    resolver: Resolver
    admission: Admission
    directory: ProfileDirectory
    worker: Worker[Any]
    now_s: Callable[[], float]
    """Unix seconds."""

    async def embed(
        self, user_id: str, queries: tuple[SuffixQuery, ...], timeout_s: float | None
    ) -> Answer:
        """Embed a user's current profile under queries, at least one.

        Raises InvalidInput, UnknownUser, and all that `Worker.embed` and `Admission.enter` raise.
        """
        self.admission.check_num_queries(len(queries))
        return await self._on_device(user_id, queries, timeout_s)

    async def warm(self, user_id: str, timeout_s: float | None) -> Answer:
        """Encode a user's current prefix. Raises as `embed`."""
        return await self._on_device(user_id, (), timeout_s)

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
        held = await self.worker.find(user_id)
        return ProfileState(prepared, held is not None and held.digest == prepared.ref.digest)

    async def delete(self, user_id: str) -> bool:
        """Delete a user everywhere; True when a profile was stored.

        Goes on when the caller leaves: keys and values never outlive the stored profile. Raises
        InvalidInput, Unavailable.
        """
        self.admission.check_open()
        check_user_id(user_id)
        return await asyncio.shield(asyncio.ensure_future(self._delete(user_id)))

    async def _delete(self, user_id: str) -> bool:
        version, was_stored = await self.directory.delete(user_id)
        await self.worker.forget(user_id, version)
        return was_stored

    async def _on_device(
        self, user_id: str, queries: tuple[SuffixQuery, ...], timeout_s: float | None
    ) -> Answer:
        check_user_id(user_id)
        with self.admission.enter(max(1, len(queries))):
            prepared = await self.directory.current(user_id)
            return await self.worker.embed(prepared, queries, timeout_s=timeout_s)
