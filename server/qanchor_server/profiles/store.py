"""Users' profiles on disk: what is acknowledged survives a kill of the process and of the machine.

SQLite with a write-ahead log, synced on every commit, locked for one process. Must not know
models, prefixes or grpc. Not thread-safe: a store belongs to the thread that made it.

Versions come from one counter over all users: they rise with every change of a profile, also
across deletion, and nothing of a deleted user needs to be kept for it.
"""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qanchor.data.profile import Event, Profile
from qanchor.errors import InvalidInput, QAnchorError
from qanchor_server.failures import UnknownUser

STORE_FILE = "profiles.sqlite3"
MAX_APPEND_IDS = 1024

_SCHEMA = """
CREATE TABLE IF NOT EXISTS counter (value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS profiles (
    user_id TEXT PRIMARY KEY, version INTEGER NOT NULL, as_of_s INTEGER NOT NULL,
    attributes TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
    user_id TEXT NOT NULL, number INTEGER NOT NULL, time_s INTEGER NOT NULL,
    modality TEXT NOT NULL, event_type TEXT NOT NULL, text TEXT NOT NULL, value REAL,
    PRIMARY KEY (user_id, number)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS appends (
    user_id TEXT NOT NULL, append_id TEXT NOT NULL, version INTEGER NOT NULL,
    PRIMARY KEY (user_id, append_id)
) WITHOUT ROWID;
INSERT INTO counter SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM counter);
"""

_PROFILE_TABLES = ("profiles", "events")


class StoreError(QAnchorError):
    """The store's file cannot be used."""


@contextmanager
def _store_errors(outcome: str) -> Iterator[None]:
    """What SQLite raises becomes a StoreError; `outcome`: what is the case then."""
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(f"{STORE_FILE}: {error}; {outcome}") from error


@dataclass(frozen=True, slots=True)
class StoredProfile:
    """A profile and its version."""

    profile: Profile
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Append:
    """Events to add to a stored profile."""

    user_id: str
    events: tuple[Event, ...]
    as_of_s: int | None = None
    """New as-of time; None: the later of the stored one and the newest event."""
    append_id: str = ""
    """Stored once under this id; empty: no such check."""


def check_num_events(num_events: int, max_events: int) -> None:
    """Raises InvalidInput for more events than are stored of a user."""
    if num_events > max_events:
        raise InvalidInput(
            "events", num_events, f"at most {max_events} events per user", "leave out the oldest"
        )


class ProfileStore:
    """Profiles by user id in one SQLite file. Every change is on disk when its method returns.

    Each method raises StoreError when the file cannot be read or written.
    """

    def __init__(self, data_dir: Path, *, window_s: int, max_events: int) -> None:
        """Open or create the store. Raises StoreError when another process uses it.

        `window_s`: seconds before the as-of time after which an append drops an event.
        """
        self._window_s = window_s
        self._max_events = max_events
        self._is_changing = False
        data_dir.mkdir(parents=True, exist_ok=True)
        path = data_dir / STORE_FILE
        try:
            self._db = sqlite3.connect(path, timeout=1.0, isolation_level=None)
            # EXCLUSIVE keeps a second server from the directory; FULL syncs every commit;
            # secure_delete overwrites deleted profiles instead of only unlinking their pages.
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA secure_delete=ON")
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
        except sqlite3.Error as error:
            raise StoreError(
                f"{path}: {error}; one server at a time may use a data directory"
            ) from error

    def put(self, profile: Profile) -> int:
        """Store a profile in place of what was stored; returns its version.

        Append ids stay known. Raises InvalidInput when it has too many events.
        """
        check_num_events(len(profile.events), self._max_events)
        with self.transaction():
            version = self._next_version()
            self._remove(profile.user_id, _PROFILE_TABLES)
            self._db.execute(
                "INSERT INTO profiles VALUES (?, ?, ?, ?)",
                (
                    profile.user_id,
                    version,
                    profile.as_of_s,
                    json.dumps(list(profile.attributes.items())),
                ),
            )
            self._insert_events(profile.user_id, 0, profile.events)
        return version

    def append(self, append: Append) -> tuple[int, bool]:
        """Add events; returns the version and whether `append_id` was stored before.

        Raises UnknownUser; InvalidInput when an as-of time goes back, an event lies after it, or
        the profile would hold too many events.
        """
        user_id = append.user_id
        with self.transaction():
            row = self._row(user_id)
            if row is None:
                raise UnknownUser(user_id)
            stored_version, stored_as_of_s = row
            if append.append_id and self._is_stored(user_id, append.append_id):
                return stored_version, True
            as_of_s = self._as_of(append, stored_as_of_s)
            version = self._next_version()
            self._db.execute(
                "UPDATE profiles SET version = ?, as_of_s = ? WHERE user_id = ?",
                (version, as_of_s, user_id),
            )
            self._db.execute(
                "DELETE FROM events WHERE user_id = ? AND time_s < ?",
                (user_id, as_of_s - self._window_s),
            )
            count, last = self._db.execute(
                "SELECT COUNT(*), COALESCE(MAX(number), -1) FROM events WHERE user_id = ?",
                (user_id,),
            ).fetchone()
            check_num_events(count + len(append.events), self._max_events)
            self._insert_events(user_id, last + 1, append.events)
            if append.append_id:
                self._remember(user_id, append.append_id, version)
        return version, False

    @_store_errors("nothing was read")
    def get(self, user_id: str) -> StoredProfile:
        """The stored profile. Raises UnknownUser."""
        row = self._db.execute(
            "SELECT version, as_of_s, attributes FROM profiles WHERE user_id = ?", (user_id,)
        ).fetchone()
        if row is None:
            raise UnknownUser(user_id)
        version, as_of_s, attributes = row
        events = self._db.execute(
            "SELECT time_s, modality, event_type, text, value FROM events "
            "WHERE user_id = ? ORDER BY number",
            (user_id,),
        )
        profile = Profile(
            user_id=user_id,
            as_of_s=as_of_s,
            events=tuple(
                Event(time_s=time_s, modality=modality, event_type=kind, text=text, value=value)
                for time_s, modality, kind, text, value in events
            ),
            attributes=dict(json.loads(attributes)),
        )
        return StoredProfile(profile, version)

    @_store_errors("nothing was read")
    def stored(self, user_ids: Sequence[str]) -> set[str]:
        """Those of the users who have a profile."""
        return {user_id for user_id in user_ids if self._row(user_id) is not None}

    def delete(self, user_id: str) -> tuple[int, bool]:
        """Delete a user; returns a version above all the user ever had, and whether one was stored.

        `empty_log` then leaves no byte of the profile in the store's files.
        """
        with self.transaction():
            was_stored = self._row(user_id) is not None
            self._remove(user_id, (*_PROFILE_TABLES, "appends"))
            version = self._next_version()
        return version, was_stored

    @_store_errors("bytes of deleted profiles may be left in the log; delete again")
    def empty_log(self) -> None:
        """Overwrite what the write-ahead log still holds of deleted profiles."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Changes made inside are stored together at its end; none is when it raises."""
        if self._is_changing:
            yield
            return
        self._is_changing = True
        try:
            with _store_errors("nothing was stored"):
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
        finally:
            self._is_changing = False

    def close(self) -> None:
        """Close the file; the store must not be used again."""
        self._db.close()

    def _row(self, user_id: str) -> tuple[int, int] | None:
        row: tuple[int, int] | None = self._db.execute(
            "SELECT version, as_of_s FROM profiles WHERE user_id = ?", (user_id,)
        ).fetchone()
        return row

    def _next_version(self) -> int:
        row = self._db.execute("UPDATE counter SET value = value + 1 RETURNING value").fetchone()
        return int(row[0])

    def _remove(self, user_id: str, tables: Sequence[str]) -> None:
        for table in tables:
            self._db.execute(f"DELETE FROM {table} WHERE user_id = ?", (user_id,))

    def _insert_events(self, user_id: str, first: int, events: Sequence[Event]) -> None:
        self._db.executemany(
            "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (user_id, first + n, e.time_s, e.modality, e.event_type, e.text, e.value)
                for n, e in enumerate(events)
            ],
        )

    def _is_stored(self, user_id: str, append_id: str) -> bool:
        query = "SELECT 1 FROM appends WHERE user_id = ? AND append_id = ?"
        return self._db.execute(query, (user_id, append_id)).fetchone() is not None

    def _remember(self, user_id: str, append_id: str, version: int) -> None:
        self._db.execute("INSERT INTO appends VALUES (?, ?, ?)", (user_id, append_id, version))
        self._db.execute(
            "DELETE FROM appends WHERE user_id = ? AND version <= COALESCE((SELECT version "
            "FROM appends WHERE user_id = ? ORDER BY version DESC LIMIT 1 OFFSET ?), 0)",
            (user_id, user_id, MAX_APPEND_IDS),
        )

    def _as_of(self, append: Append, stored_s: int) -> int:
        if append.as_of_s is None:
            return max([stored_s, *(event.time_s for event in append.events)])
        if append.as_of_s < stored_s:
            raise InvalidInput(
                "as_of",
                append.as_of_s,
                f"lies before the stored as-of time {stored_s}",
                "leave it unset or put the whole profile again",
            )
        return append.as_of_s
