"""The current prefix of every user, from the store or from memory; and all changes to it.

Must not know grpc or engines. Coroutines run on the event loop; the store and the rendering run
on one thread of their own, in order: what is read after an acknowledged write rests on it.
"""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from qanchor.bundle.manifest import Manifest
from qanchor.data.profile import Profile
from qanchor_server.prefix_source import PreparedPrefix, prepare
from qanchor_server.profiles.store import Append, ProfileStore

T = TypeVar("T")


class ProfileDirectory:
    """Async face of the profile store, with the most recently used prefixes prepared in memory."""

    def __init__(
        self, open_store: Callable[[], ProfileStore], manifest: Manifest, *, max_prepared: int
    ) -> None:
        """`open_store` is called on the store's thread."""
        self._open_store = open_store
        self._manifest = manifest
        self._max_prepared = max_prepared
        self._prepared: OrderedDict[str, PreparedPrefix] = OrderedDict()
        self._lock = threading.Lock()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="qanchor-store")
        self._store: ProfileStore | None = None
        self._loads: dict[str, asyncio.Future[PreparedPrefix]] = {}

    async def open(self) -> None:
        """Open the store. Raises StoreError."""

        def work() -> None:
            self._store = self._open_store()

        await self._run(work)

    async def close(self) -> None:
        """Finish what was begun and close the store."""
        await self._run(lambda: self._store.close() if self._store else None)
        self._executor.shutdown()

    async def current(self, user_id: str) -> PreparedPrefix:
        """The prefix of the stored profile. Raises UnknownUser."""
        with self._lock:
            prepared = self._prepared.get(user_id)
            if prepared is not None:
                self._prepared.move_to_end(user_id)
                return prepared
        load = self._loads.get(user_id)
        if load is None:
            load = asyncio.ensure_future(self._run(lambda: self._load(user_id)))
            self._loads[user_id] = load
            load.add_done_callback(lambda done: self._loaded(user_id, done))
        # One caller's cancellation must not end the read that others wait for.
        return await asyncio.shield(load)

    async def stored(self, user_ids: Sequence[str]) -> set[str]:
        """Those of the users who have a profile."""
        return await self._run(lambda: self._opened().stored(user_ids))

    async def put(self, profile: Profile) -> PreparedPrefix:
        """Store a profile durably. Raises InvalidInput."""

        def work() -> PreparedPrefix:
            store = self._opened()
            with store.transaction():
                version = store.put(profile)
                # Inside, here and below: what cannot be prepared must not be stored.
                prepared = prepare(profile, version, self._manifest)
            return self._keep(prepared)

        return await self._change(profile.user_id, work)

    async def append(self, append: Append) -> tuple[PreparedPrefix, bool]:
        """Add events durably; True when `append_id` was stored before.

        Raises UnknownUser, InvalidInput.
        """

        def work() -> tuple[PreparedPrefix, bool]:
            store = self._opened()
            with store.transaction():
                _, is_duplicate = store.append(append)
                prepared = self._read(append.user_id)
            return self._keep(prepared), is_duplicate

        return await self._change(append.user_id, work)

    async def delete(self, user_id: str) -> tuple[int, bool]:
        """Delete a user from store and memory: a version above all it had, and whether it was."""

        def work() -> tuple[int, bool]:
            deleted = self._opened().delete(user_id)
            self._discard(user_id)
            return deleted

        return await self._change(user_id, work)

    async def empty_log(self) -> None:
        """Leave no byte of deleted profiles in the store's files. Raises StoreError."""
        await self._run(lambda: self._opened().empty_log())

    async def _change(self, user_id: str, work: Callable[[], T]) -> T:
        # Who asks after this change is acknowledged must not join a read begun before it. The
        # change also goes on when its caller leaves: half of it would be a lie to the next one.
        change = asyncio.ensure_future(self._run(work))
        self._loads.pop(user_id, None)
        try:
            return await asyncio.shield(change)
        finally:
            self._loads.pop(user_id, None)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def _loaded(self, user_id: str, done: asyncio.Future[PreparedPrefix]) -> None:
        if self._loads.get(user_id) is done:
            del self._loads[user_id]
        if not done.cancelled():
            done.exception()

    def _opened(self) -> ProfileStore:
        assert self._store is not None
        return self._store

    def _load(self, user_id: str) -> PreparedPrefix:
        with self._lock:
            prepared = self._prepared.get(user_id)
        if prepared is not None:
            return prepared
        return self._keep(self._read(user_id))

    def _read(self, user_id: str) -> PreparedPrefix:
        stored = self._opened().get(user_id)
        # An earlier bundle may have had modalities that this one lacks.
        names = {spec.name for spec in self._manifest.profile_schema.modalities}
        events = tuple(event for event in stored.profile.events if event.modality in names)
        return prepare(replace(stored.profile, events=events), stored.version, self._manifest)

    def _keep(self, prepared: PreparedPrefix) -> PreparedPrefix:
        with self._lock:
            self._prepared[prepared.ref.user_id] = prepared
            self._prepared.move_to_end(prepared.ref.user_id)
            if len(self._prepared) > self._max_prepared:
                self._prepared.popitem(last=False)
        return prepared

    def _discard(self, user_id: str) -> None:
        with self._lock:
            self._prepared.pop(user_id, None)
