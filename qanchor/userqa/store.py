"""Every reply of an endpoint on disk before it is used, so that none is paid for twice.

SQLite with a write-ahead log and full synchronisation: what `put` returned from survives a
killed process and a power cut. One run at a time: the file is locked while it is open. Holds
replies and their keys, no question, no profile, no API key.
"""

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from qanchor.errors import ConfigError, DataError

_COLUMNS = "text, num_tokens_in, num_tokens_out, is_estimated"


@dataclass(frozen=True, slots=True)
class Reply:
    """What an endpoint said, and what it charged."""

    text: str
    num_tokens_in: int
    num_tokens_out: int
    is_estimated: bool
    """The endpoint gave no count of tokens; the numbers are guessed from the texts."""


class ReplyStore:
    """Replies by key, in one file; to be closed. For one thread."""

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises ConfigError if another run has it, DataError if it is
        something else."""
        self._path = path
        self._db = sqlite3.connect(path, isolation_level=None, timeout=0.2)
        try:
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("BEGIN EXCLUSIVE")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, text TEXT NOT NULL,"
                " num_tokens_in INTEGER NOT NULL, num_tokens_out INTEGER NOT NULL,"
                " is_estimated INTEGER NOT NULL)"
            )
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            self._db.close()
            rule = f"cannot be opened ({error})"
            remedy = "wait for the other run in this directory, or check the disk"
            raise ConfigError("output", str(path), rule, remedy) from None
        except sqlite3.DatabaseError as error:
            self._db.close()
            rule = f"is no store of replies ({error})"
            raise DataError("output", str(path), rule, "remove it or choose another") from None

    def get(self, key: str) -> Reply | None:
        """The stored reply."""
        row = self._db.execute(f"SELECT {_COLUMNS} FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else Reply(row[0], row[1], row[2], bool(row[3]))

    def put(self, key: str, reply: Reply) -> None:
        """Store a reply; on disk when this returns."""
        # On the event loop's thread: a commit takes milliseconds, a reply seconds.
        row = (key, reply.text, reply.num_tokens_in, reply.num_tokens_out, reply.is_estimated)
        self._db.execute(
            f"INSERT OR REPLACE INTO replies (key, {_COLUMNS}) VALUES (?,?,?,?,?)", row
        )

    def tokens(self) -> tuple[int, int]:
        """Prompt and reply tokens of everything stored."""
        row = self._db.execute(
            "SELECT COALESCE(SUM(num_tokens_in), 0), COALESCE(SUM(num_tokens_out), 0) FROM replies"
        ).fetchone()
        return int(row[0]), int(row[1])

    def close(self) -> None:
        """Close and unlock the file."""
        self._db.close()
