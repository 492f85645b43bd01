"""Whose prefix comes to the device next, and which way: restored, read from disk, or encoded.

Pure: no clock but the `now_s` passed in. Not thread-safe: call from the worker thread only.

- A prefix in host memory is restored at once; one on disk is read in the background first. Both
  cost about a copy, so they go first in, first out.
- Encodings cost by their length: the shortest goes first, but a longer one may be overtaken only
  for `patience` times its own encoding time. That is the order of (arrival + patience * seconds
  per token * tokens), so nobody starves; the seconds per token are learnt from what was run.
- When no read has ended for `max_read_s`, reads are waited for no longer: their prefixes are
  encoded, and the disk is left alone for a while.
"""

from collections import OrderedDict
from dataclasses import dataclass

from qanchor_server.kv_pool import Found, PrefixRef
from qanchor_server.kv_tiers import KvTiers, Want

LEARNING_RATE = 0.2
"""Weight of the newest encoding in the learnt seconds per token."""


@dataclass(slots=True, eq=False)
class _Waiting:
    prefix: PrefixRef
    arrival_s: float
    want: Want
    found: Found
    read_since_s: float | None = None
    """First time it was seen being read."""


class PrefixQueue:
    """Users whose prefix is not on the device."""

    def __init__(self, tiers: KvTiers, *, patience: float, max_read_s: float) -> None:
        """`patience`: 0 is first in, first out."""
        self._tiers = tiers
        self._patience = patience
        self._max_read_s = max_read_s
        self._waiting: OrderedDict[str, _Waiting] = OrderedDict()
        self._seconds_per_token = 0.0
        self._last_read_s = 0.0
        self._has_read_ended = False

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, prefix: PrefixRef, arrival_s: float) -> None:
        """Queue a user; what the disk holds is read from now on."""
        waiting = _Waiting(prefix, arrival_s, Want.NO_ROOM, Found.DISK)
        self._waiting[prefix.user_id] = waiting
        self._try(waiting)
        if waiting.want is Want.RESTORE:
            waiting.found = Found.HOST

    def discard(self, user_id: str) -> None:
        """Take a user out, if there."""
        if self._waiting.pop(user_id, None) is not None:
            self._tiers.leave(user_id)

    def advance(self, now_s: float) -> None:
        """Give up reads that take too long, start those that had no room."""
        if self._has_read_ended:
            self._last_read_s, self._has_read_ended = now_s, False
        for waiting in self._waiting.values():
            if waiting.want is not Want.READING:
                continue
            if waiting.read_since_s is None:
                waiting.read_since_s = now_s
            if now_s - max(waiting.read_since_s, self._last_read_s) > self._max_read_s:
                self._tiers.rest_disk()
                self._encode(waiting)
        for waiting in self._waiting.values():
            if waiting.want is Want.NO_ROOM:
                self._try(waiting)
                if waiting.want is Want.NO_ROOM:
                    break

    def read_ended(self, user_id: str, digest: str, is_ok: bool) -> None:
        """A read into host memory ended; ignored when nobody waits for it any more."""
        self._has_read_ended = True
        waiting = self._waiting.get(user_id)
        if waiting is None or waiting.want is not Want.READING:
            return
        if waiting.prefix.digest != digest:
            return
        if is_ok:
            waiting.want = Want.RESTORE
        else:
            self._encode(waiting)

    def cannot_restore(self, user_id: str) -> None:
        """A restore failed; what the tiers hold of the user is not to be used again."""
        self._tiers.discard(user_id)
        self._encode(self._waiting[user_id])

    def next_restore(self) -> tuple[PrefixRef, Found] | None:
        """The prefix to restore next and where it came from."""
        for waiting in self._waiting.values():
            if waiting.want is Want.RESTORE:
                return waiting.prefix, waiting.found
        return None

    def next_encoding(self) -> PrefixRef | None:
        """The prefix to encode next."""
        weight = self._patience * self._seconds_per_token
        best: _Waiting | None = None
        best_key = 0.0
        for waiting in self._waiting.values():
            if waiting.want is Want.ENCODE:
                key = waiting.arrival_s + weight * waiting.prefix.num_tokens
                if best is None or key < best_key:
                    best, best_key = waiting, key
        return best.prefix if best else None

    def note_encoding(self, num_tokens: int, seconds: float) -> None:
        """Learn from a whole encoding."""
        found = seconds / num_tokens
        if self._seconds_per_token:
            self._seconds_per_token += LEARNING_RATE * (found - self._seconds_per_token)
        else:
            self._seconds_per_token = found

    def _try(self, waiting: _Waiting) -> None:
        waiting.want = self._tiers.want(waiting.prefix)
        if waiting.want is Want.ENCODE:
            waiting.found = Found.ENCODED

    def _encode(self, waiting: _Waiting) -> None:
        self._tiers.leave(waiting.prefix.user_id)
        waiting.want, waiting.found = Want.ENCODE, Found.ENCODED
