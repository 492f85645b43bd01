"""Keys and values as files of one directory, checked whenever they are read.

A file is one header block, then the bytes as they lie in host memory: one write, one read. It gets
its name when it is complete, so a kill leaves a nameless part that the next start deletes. Nothing
is synced: what a power cut tears fails its checksum, and is encoded again. The header names model,
layout and content; files of anything else are never used, and deleted at start. What bears no name
of ours is left alone.

Must not know engines, schedulers or gRPC. Calls from one thread at a time.
"""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from qanchor.errors import QAnchorError
from qanchor_server.byte_tier import Content

ByteArray = npt.NDArray[np.uint8]

HEADER_BYTES = 4096
"""A page, so that keys and values start aligned."""
SUFFIX = ".kv"
PART_SUFFIX = ".part"
LOCK_FILE = "lock"
_OUR_NAME = re.compile(rf"(0|[1-9][0-9]*)({re.escape(SUFFIX)}|{re.escape(PART_SUFFIX)})")
_MAGIC = b"qanchorK"
_CHECKSUM_BYTES = 16
_START = len(_MAGIC) + _CHECKSUM_BYTES


class BadFile(QAnchorError):
    """A file does not hold what it should."""


class FileIdentity(msgspec.Struct, frozen=True):
    """What must be equal for bytes to mean the same."""

    model_id: str
    layout: str
    """Element type and dimensions of the engine's slots."""


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format_version: int
    model_id: str
    layout: str
    user_id: str
    digest: str
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file of an earlier run that may be used."""

    file_id: int
    content: Content
    used_unix_s: float


class DiskFiles:
    """Writes, reads and deletes the files of one model in one directory."""

    def __init__(self, directory: Path, identity: FileIdentity) -> None:
        """Make the directory ours. Raises OSError, also when another process uses it."""
        self._directory = directory
        self._identity = identity
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(directory / LOCK_FILE, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Let another process use the directory."""
        os.close(self._lock)

    def scan(self) -> Iterator[FoundFile]:
        """Files of this model and layout; others with names of ours are deleted. Raises OSError."""
        for path in sorted(self._directory.iterdir()):
            if not _OUR_NAME.fullmatch(path.name) or path.is_symlink() or not path.is_file():
                continue
            found = self._look_at(path)
            if found is None:
                path.unlink()
            else:
                yield found

    def write(self, file_id: int, content: Content, data: ByteArray) -> None:
        """Write a file, then give it its name. Raises OSError; then nothing is left."""
        block = self._header_block(content, data)
        part = self._part(file_id)
        try:
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                _write_all(handle, [memoryview(block), data.data])
            finally:
                os.close(handle)
            part.rename(self.path(file_id))
        except OSError:
            part.unlink(missing_ok=True)
            raise

    def read(self, file_id: int, content: Content, out: ByteArray) -> None:
        """Read keys and values into `out` [content.num_bytes]; they are what was written.

        Raises OSError; BadFile when the file is of other content or its bytes were altered.
        """
        path = self.path(file_id)
        block = bytearray(HEADER_BYTES)
        handle = os.open(path, os.O_RDONLY)
        try:
            if os.fstat(handle).st_size != HEADER_BYTES + content.num_bytes:
                raise BadFile(f"{path}: not {HEADER_BYTES + content.num_bytes} bytes long")
            _read_all(handle, [memoryview(block), out.data])
            # The next start sorts files by when they were used.
            os.utime(handle)
        finally:
            os.close(handle)
        if _checksum(block, out) != block[len(_MAGIC) : _START]:
            raise BadFile(f"{path}: the checksum does not fit the bytes")
        if self._parse(block) != self._header(content):
            raise BadFile(f"{path}: holds another content than asked for")

    def unlink(self, file_id: int) -> None:
        """Delete a file, and what a failed write left of it, if there. Raises OSError."""
        self.path(file_id).unlink(missing_ok=True)
        self._part(file_id).unlink(missing_ok=True)

    def path(self, file_id: int) -> Path:
        """Where a complete file lies."""
        return self._directory / f"{file_id}{SUFFIX}"

    def _part(self, file_id: int) -> Path:
        return self._directory / f"{file_id}{PART_SUFFIX}"

    def _header(self, content: Content) -> _Header:
        return _Header(
            format_version=1,
            model_id=self._identity.model_id,
            layout=self._identity.layout,
            user_id=content.user_id,
            digest=content.digest,
            num_tokens=content.num_tokens,
            num_bytes=content.num_bytes,
        )

    def _header_block(self, content: Content, data: ByteArray) -> bytearray:
        fields = msgspec.json.encode(self._header(content))
        if _START + len(fields) > HEADER_BYTES:
            raise OSError(f"a header of {len(fields)} bytes is too long")
        block = bytearray(HEADER_BYTES)
        block[: len(_MAGIC)] = _MAGIC
        block[_START : _START + len(fields)] = fields
        block[len(_MAGIC) : _START] = _checksum(block, data)
        return block

    def _parse(self, block: bytearray) -> _Header | None:
        """The header of a block, or None when it is none of ours."""
        if block[: len(_MAGIC)] != _MAGIC:
            return None
        try:
            return msgspec.json.decode(bytes(block[_START:]).rstrip(b"\0"), type=_Header)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None

    def _look_at(self, path: Path) -> FoundFile | None:
        """What a name in the directory stands for; the bytes are checked when they are read."""
        if path.suffix != SUFFIX:
            return None
        with path.open("rb") as stream:
            header = self._parse(bytearray(stream.read(HEADER_BYTES)))
            status = os.fstat(stream.fileno())
        if header is None or status.st_size != HEADER_BYTES + header.num_bytes:
            return None
        content = Content(
            user_id=header.user_id,
            digest=header.digest,
            num_tokens=header.num_tokens,
            num_bytes=header.num_bytes,
        )
        if header != self._header(content):
            return None
        return FoundFile(int(path.stem), content, min(status.st_mtime, time.time()))


def _checksum(block: bytearray, data: ByteArray) -> bytes:
    """Over header fields and data, the place of the checksum itself left out."""
    digest = xxhash.xxh3_128(bytes(block[_START:]))
    digest.update(data.data)
    return digest.digest()


def _write_all(handle: int, parts: list[memoryview]) -> None:
    """One writev; more only where the system takes less than all at once."""
    while parts:
        parts = _rest(parts, os.writev(handle, parts))


def _read_all(handle: int, parts: list[memoryview]) -> None:
    """One readv; more only where the system gives less than all at once."""
    while parts:
        count = os.readv(handle, parts)
        if not count:
            raise OSError("the file ended early")
        parts = _rest(parts, count)


def _rest(parts: list[memoryview], count: int) -> list[Any]:
    """What is left of the parts after `count` bytes."""
    left = []
    for part in parts:
        taken = min(count, len(part))
        count -= taken
        if taken < len(part):
            left.append(part[taken:])
    return left
