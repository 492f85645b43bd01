"""Real servers in this process whose tiers hold a chosen number of users, and users for them."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np

from qanchor.client import AsyncClient, CacheState
from qanchor.config import ProfileSchema
from qanchor.data.profile import DAY_SECONDS, Event, Profile
from qanchor_bench.bench import Bench
from qanchor_bench.engines import server_config
from qanchor_server.disk_files import HEADER_BYTES
from qanchor_server.main import KV_DIR, Server
from qanchor_server.prefix_source import prepare

NOW_S = 20_000 * DAY_SECONDS
_NUM_TEXTS = 32
_NUM_OWN_TEXTS = 3
_WORDS_PER_TEXT = 4
_ARENA_ALIGNMENT = 64
_SETTLE_SECONDS = 0.2


class Stage:
    """Servers over one bundle, one after the other, and the users they know."""

    def __init__(self, bench: Bench, users: list[Profile]) -> None:
        self.bench = bench
        self.users = users
        manifest = bench.bundle.manifest
        self.num_tokens = max(prepare(user, 1, manifest).ref.num_tokens for user in users)
        self.user_bytes = self.num_tokens * manifest.dims.kv_bytes_per_token
        self._longest_bytes = manifest.limits.max_prefix_len * manifest.dims.kv_bytes_per_token

    def num_on_host(self, wanted: int) -> int:
        """Users that host memory holds when it is to hold `wanted`: room for two of the longest."""
        return max(wanted, -(-2 * self._longest_bytes // self._host_bytes))

    def server(self, name: str, *, device: int, host: int, disk: int) -> Server:
        """A server whose tiers hold so many users; `name` is the directory of its data."""
        budgets = {
            "address": "127.0.0.1:0",
            "data_dir": str(self.bench.scratch / name),
            # One slab class, so that every slot has the size of the longest prefix.
            "slab_ladder": (),
            "kv_pool_bytes": device * self._longest_bytes,
            "kv_host_bytes": self.num_on_host(host) * self._host_bytes,
            "kv_disk_bytes": disk * (self.user_bytes + HEADER_BYTES),
            "kv_flush_seconds": 0,
        }
        own = server_config(self.bench.scenario, self.bench.bundle, self.bench.threads)
        config = msgspec.structs.replace(own, **budgets)
        make_engine = self.bench.engine
        return Server(config, self.bench.bundle, make_engine, now_s=lambda: float(NOW_S))

    def drop_page_cache(self, name: str) -> None:
        """Have the system read a server's files from the disk again."""
        for path in (self.bench.scratch / name / KV_DIR).glob("*.kv"):
            _drop(path)

    @property
    def _host_bytes(self) -> int:
        """Of one user in host memory."""
        return -(-self.user_bytes // _ARENA_ALIGNMENT) * _ARENA_ALIGNMENT


def make_users(schema: ProfileSchema, num_users: int, prefix_len: int, seed: int) -> list[Profile]:
    """Users with prefixes of about `prefix_len`, each of a few texts of his own, out of a few.

    So a user differs from all others, and his event vectors are soon known: what remains is the
    least that an encoding costs.
    """
    specs = [spec for spec in schema.modalities if spec.kind == "events"]
    total = sum(spec.max_events for spec in specs)
    # Header, user token, and a token and two delimiters per modality.
    wanted = max(1, min(total, prefix_len - 2 - 3 * len(schema.modalities)))
    num_events = {spec.name: max(1, wanted * spec.max_events // total) for spec in specs}
    rng = np.random.default_rng(seed)
    return [
        Profile(
            user_id=f"user-{number}",
            as_of_s=NOW_S,
            events=tuple(_events(num_events, rng)),
        )
        for number in range(num_users)
    ]


def _events(num_events: Mapping[str, int], rng: np.random.Generator) -> Iterator[Event]:
    own = rng.choice(_NUM_TEXTS, _NUM_OWN_TEXTS, replace=False)
    for modality, count in num_events.items():
        for place, word in enumerate(rng.choice(own, count).tolist()):
            # A word alone would leave the vectors of two texts nearly the same.
            text = " ".join([str(word)] * _WORDS_PER_TEXT)
            time_s = NOW_S - 600 * place
            yield Event(time_s=time_s, modality=modality, event_type="pays", text=text)


@asynccontextmanager
async def running(server: Server) -> AsyncIterator[AsyncClient]:
    """A client of a server that is started, and ended on exit. Raises RuntimeError."""
    port = await server.start()
    if not await server.wait_ready():
        raise RuntimeError("the server did not start; its log says why")
    try:
        async with AsyncClient(f"127.0.0.1:{port}", timeout_s=600.0) as client:
            yield client
    finally:
        server.request_stop()
        await server.wait_closed()


async def settled(client: AsyncClient) -> None:
    """Wait until the disk has all that was to be written."""
    before = -1
    while (users := (await client.server_info()).tiers[CacheState.DISK].num_users) != before:
        before = users
        await asyncio.sleep(_SETTLE_SECONDS)


def _drop(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
