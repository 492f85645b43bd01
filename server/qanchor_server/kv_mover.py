"""Moves keys and values between slots, host memory and disk: one copy, one write or one read each.

Copies between device and host run on the worker thread, between two steps. Files are written, read
and deleted on a thread of its own: reads and urgent deletions first, then the rest in order, so the
worker never waits for a disk. A move that fails is told and logged, never raised. Must not know
schedulers; what is moved whither is decided in `kv_tiers`.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic

from qanchor_server.byte_tier import Entry
from qanchor_server.disk_files import BadFile, ByteArray, DiskFiles
from qanchor_server.engine import Engine, SlotT
from qanchor_server.failures import Retryable
from qanchor_server.kv_tiers import Demote, Move, Read, Scrub, Unlink, Write

log = logging.getLogger(__name__)

CLOSE_SECONDS = 2.0
"""How long the end of the process waits for a move that hangs."""


class KvMover(Generic[SlotT]):
    """Makes moves; `make`, `restore` and `close` are called from the worker thread."""

    def __init__(self, engine: Engine[SlotT], files: DiskFiles | None, *, host_bytes: int) -> None:
        """`files`: None where there is no disk tier."""
        self._engine = engine
        self._files = files
        self._arena = self._make_arena(host_bytes)
        self._urgent: deque[Read | Unlink] = deque()
        self._normal: deque[Write | Unlink] = deque()
        self._wake = threading.Condition()
        self._is_closed = files is None
        self._thread: threading.Thread | None = None

    def start(self, on_done: Callable[[Move, bool], None]) -> None:
        """Start the background; it calls `on_done` on its own thread as each move ends."""
        if self._files is None:
            return
        self._on_done = on_done
        # A disk that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="qanchor-disk", daemon=True)
        self._thread.start()

    def make(self, move: Move, slot: SlotT | None) -> bool | None:
        """Make a move, or begin it in the background and return None; False when it failed.

        `slot`: the one that a Demote copies from.
        """
        match move:
            case Demote(host=host):
                assert slot is not None
                return self._demote(slot, host.content.num_tokens, self._bytes(host))
            case Scrub(offset=offset, num_bytes=num_bytes):
                if self._arena is not None:
                    self._arena[offset : offset + num_bytes] = 0
                return True
        return self._in_background(move)

    def restore(self, slot: SlotT, num_tokens: int, place: int, num_bytes: int) -> None:
        """Copy host memory into a slot. Raises Retryable."""
        assert self._arena is not None
        self._engine.import_slot(slot, num_tokens, self._arena[place : place + num_bytes])

    def close(self) -> None:
        """Drop writes that have not begun, end the thread; later moves are made by the caller."""
        with self._wake:
            self._is_closed = True
            self._normal = deque(move for move in self._normal if isinstance(move, Unlink))
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
        if self._files is not None:
            self._files.close()

    def _make_arena(self, host_bytes: int) -> ByteArray | None:
        if not host_bytes:
            return None
        try:
            return self._engine.host_arena(host_bytes)
        except (MemoryError, Retryable) as error:
            log.error("kv_host_bytes=%d: %s; evicted users are encoded again", host_bytes, error)
            return None

    def _demote(self, slot: SlotT, num_tokens: int, out: ByteArray | None) -> bool:
        if out is None:
            return False
        try:
            self._engine.export_slot(slot, num_tokens, out)
        except Retryable as error:
            log.warning("copy to host memory failed: %s", error)
            return False
        return True

    def _bytes(self, entry: Entry) -> ByteArray | None:
        if self._arena is None:
            return None
        return self._arena[entry.place : entry.place + entry.content.num_bytes]

    def _in_background(self, move: Write | Read | Unlink) -> bool | None:
        with self._wake:
            if not self._is_closed:
                if isinstance(move, Read) or (isinstance(move, Unlink) and move.is_urgent):
                    self._urgent.append(move)
                else:
                    self._normal.append(move)
                self._wake.notify()
                return None
        return self._make_file_move(move)

    # What follows runs on the background thread.

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._urgent or self._normal or self._is_closed):
                    self._wake.wait()
                if self._urgent:
                    move: Write | Read | Unlink = self._urgent.popleft()
                elif self._normal:
                    move = self._normal.popleft()
                else:
                    return
            is_ok = self._make_file_move(move)
            self._on_done(move, is_ok)

    def _make_file_move(self, move: Write | Read | Unlink) -> bool:
        if self._files is None:
            # No file was ever written or taken in.
            return isinstance(move, Unlink)
        try:
            match move:
                case Unlink(file_id=file_id):
                    self._files.unlink(file_id)
                    return True
                case Write(host=host, disk=disk):
                    data = self._bytes(host)
                    if data is None:
                        return False
                    self._files.write(disk.place, disk.content, data)
                case Read(host=host, disk=disk):
                    data = self._bytes(host)
                    if data is None:
                        return False
                    self._files.read(disk.place, disk.content, data)
        except (OSError, BadFile) as error:
            log.warning("%s failed: %s", type(move).__name__.lower(), error)
            return False
        return True
