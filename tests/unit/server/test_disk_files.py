"""Files of keys and values: what comes back is what was written, or a failure."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qanchor_server.byte_tier import Content
from qanchor_server.disk_files import HEADER_BYTES, BadFile, DiskFiles, FileIdentity

IDENTITY = FileIdentity("model-1", "float32 [1, 2, 1, tokens, 1]")


def content_of(user_id: str, num_bytes: int = 3000) -> Content:
    return Content(user_id=user_id, digest=f"{user_id}-1", num_tokens=30, num_bytes=num_bytes)


def data_of(content: Content) -> np.ndarray:
    seed = sum(content.user_id.encode())
    return np.random.default_rng(seed).integers(0, 256, content.num_bytes, dtype=np.uint8)


@pytest.fixture
def files(tmp_path: Path):
    made = DiskFiles(tmp_path / "kv", IDENTITY)
    yield made
    made.close()


def read(files: DiskFiles, file_id: int, content: Content) -> np.ndarray:
    out = np.zeros(content.num_bytes, dtype=np.uint8)
    files.read(file_id, content, out)
    return out


def test_what_is_read_is_what_was_written(files):
    ada = content_of("a\u00e4 \n" * 64)
    files.write(3, ada, data_of(ada))
    assert (read(files, 3, ada) == data_of(ada)).all()
    (found,) = files.scan()
    assert (found.file_id, found.content) == (3, ada)
    part = files.path(3).with_suffix(".part")
    part.write_bytes(b"half")
    files.unlink(3)
    files.unlink(3)
    assert not part.exists()
    assert list(files.scan()) == []


def test_every_altered_byte_is_noticed(files):
    ada = content_of("ada", num_bytes=40)
    files.write(1, ada, data_of(ada))
    path = files.path(1)
    whole = path.read_bytes()
    for place in range(len(whole)):
        altered = bytearray(whole)
        altered[place] ^= 16
        path.write_bytes(altered)
        with pytest.raises(BadFile):
            read(files, 1, ada)
    for length in (0, 10, HEADER_BYTES, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(BadFile):
            read(files, 1, ada)
    path.write_bytes(whole)
    assert (read(files, 1, ada) == data_of(ada)).all()


def test_a_file_of_other_content_or_model_is_refused(files, tmp_path):
    ada = content_of("ada")
    files.write(1, ada, data_of(ada))
    newer = Content(user_id="ada", digest="ada-2", num_tokens=30, num_bytes=3000)
    with pytest.raises(BadFile, match="another content"):
        read(files, 1, newer)
    files.close()
    for identity in (FileIdentity("model-2", IDENTITY.layout), FileIdentity("model-1", "int8")):
        other = DiskFiles(tmp_path / "kv", identity)
        files_before = list((tmp_path / "kv").glob("*.kv"))
        assert len(files_before) == 1
        with pytest.raises(BadFile, match="another content"):
            read(other, 1, ada)
        kept = files_before[0].read_bytes()
        assert list(other.scan()) == []
        assert not files_before[0].exists()
        files_before[0].write_bytes(kept)
        other.close()
    files._lock = os.open(tmp_path / "kv" / "lock", os.O_RDWR)


def test_only_files_with_names_of_ours_are_ever_deleted(files, tmp_path):
    directory = tmp_path / "kv"
    strange = ("profiles.sqlite3", "profiles.sqlite3-wal", "notes.kv", "07.kv", "-1.kv", "8.kv.old")
    for name in strange:
        (directory / name).write_bytes(b"words")
    (directory / "lost+found").mkdir()
    (directory / "9.kv").mkdir()
    (directory / "10.kv").symlink_to(directory / "notes.kv")
    (directory / "11.kv").write_bytes(b"no header")
    (directory / "12.part").write_bytes(b"half")
    before = {path.name for path in directory.iterdir()}
    assert list(files.scan()) == []
    assert {path.name for path in directory.iterdir()} == before - {"11.kv", "12.part"}


def test_a_directory_serves_one_process(files, tmp_path):
    with pytest.raises(OSError, match="unavailable"):
        DiskFiles(tmp_path / "kv", IDENTITY)


WRITER = """
import sys
import numpy as np
from pathlib import Path
from qanchor_server.byte_tier import Content
from qanchor_server.disk_files import DiskFiles, FileIdentity
files = DiskFiles(Path(sys.argv[1]), FileIdentity("model-1", "float32 [1, 2, 1, tokens, 1]"))
content = Content(user_id="ada", digest="ada-1", num_tokens=30, num_bytes=8 << 20)
data = np.full(8 << 20, 7, dtype=np.uint8)
print("ready", flush=True)
number = 0
while True:
    files.write(number % 6, content, data)
    number += 1
"""


def test_a_kill_in_the_middle_of_a_write_leaves_no_wrong_file(tmp_path):
    directory = tmp_path / "kv"
    content = Content(user_id="ada", digest="ada-1", num_tokens=30, num_bytes=8 << 20)
    num_seen = 0
    for turn in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(directory)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            # Kills at odd moments of a write of some milliseconds.
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.05 + 0.0137 * turn)
            process.send_signal(signal.SIGKILL)
        files = DiskFiles(directory, IDENTITY)
        for found in files.scan():
            assert found.content == content
            out = np.zeros(content.num_bytes, dtype=np.uint8)
            files.read(found.file_id, content, out)
            assert (out == 7).all()
            num_seen += 1
        assert not list(directory.glob("*.part"))
        files.close()
    assert num_seen > 0
