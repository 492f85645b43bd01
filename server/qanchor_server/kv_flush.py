"""Before the process ends: what only the device holds goes to disk, so that the next start is warm.

Pure: moves and waiting are handed in. Must not know numpy, threads or clocks. Call from the worker
thread, after its last step.
"""

from collections.abc import Callable, Iterable

from qanchor_server.kv_pool import KvPool, PrefixRef
from qanchor_server.kv_tiers import KvTiers, Move


def flush_to_disk(
    pool: KvPool,
    tiers: KvTiers,
    *,
    make: Callable[[Iterable[Move]], None],
    wait: Callable[[], bool],
) -> None:
    """Write held prefixes through host memory, the most recently used ones if not all fit.

    `make` makes moves; `wait` waits for the end of one and is False when the time is over.
    """
    for prefix, slot_id in _that_fit(pool, tiers):
        while not tiers.demote(prefix, slot_id):
            if not tiers.is_moving or not wait():
                return
        make(tiers.take_moves())
    while tiers.is_moving and wait():
        pass


def _that_fit(pool: KvPool, tiers: KvTiers) -> list[tuple[PrefixRef, int]]:
    """The most recently used prefixes that the disk has bytes for, least recent first."""
    fitting = []
    room = tiers.disk.space.num_bytes
    for prefix, slot_id in reversed(pool.held()):
        room -= tiers.disk.space.cost(prefix.num_tokens * tiers.budgets.bytes_per_token)
        if room < 0:
            break
        fitting.append((prefix, slot_id))
    return fitting[::-1]
