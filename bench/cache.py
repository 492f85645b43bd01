"""How fast a user comes back from each tier, and what a crowd does to tiers at their budgets.

    python -m bench.cache [--shape tiny] [--bundle DIR] [--users 40] [--requests 400]

One process: a real server, asked over a channel. First `return`: one user after the other is
brought back from host memory, from disk (out of the page cache), and by encoding again, its event
vectors being known, which is the least an encoding costs. Then `zipf`: requests of many users over
tiers far too small for them; budgets are read after each, sampled replies are compared with fresh
encodings afterwards. See README.md for the terms.
"""

import argparse
import asyncio
import datetime
import json
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from qanchor.bundle.packing import SuffixQuery, UserSuffix, pack
from qanchor.bundle.reader import Bundle, open_bundle
from qanchor.client import AsyncClient, CacheState
from qanchor.config import ProfileSchema
from qanchor.data.profile import DAY_SECONDS, Event, Profile
from qanchor.environment import environment
from qanchor_bench.machine import Busy, hardware_slug
from qanchor_server.config import ServerConfig
from qanchor_server.disk_files import HEADER_BYTES
from qanchor_server.engine.ort import OrtEngine, OrtOptions
from qanchor_server.main import Server
from qanchor_server.prefix_encoder import PrefixEncoder
from qanchor_server.prefix_source import prepare

logger = logging.getLogger("bench.cache")

NOW_S = 20_000 * DAY_SECONDS
MAX_ABS_DIFFERENCE = 1e-4
"""A reply against a fresh encoding, which may have been cut into other steps."""
QUERY = "Does this user pay with the wallet when travelling, and for what?"
GOALS = {"host": 20.0, "disk": 5.0}
"""How many times faster than encoding again a return is to be."""
NUM_AT_A_TIME = 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes that a number of users of the given length take in each tier."""

    slot_bytes: int
    host_bytes: int
    file_bytes: int


class Stage:
    """Servers over one bundle, one after the other, with tiers for so many users."""

    def __init__(self, bundle: Bundle, users: list[Profile], threads: int, scratch: Path) -> None:
        self._bundle = bundle
        self._threads = threads
        self._scratch = scratch
        self.users = users
        manifest = bundle.manifest
        self.num_tokens = max(prepare(user, 1, manifest).ref.num_tokens for user in users)
        num_bytes = self.num_tokens * manifest.dims.kv_bytes_per_token
        largest = manifest.limits.max_prefix_len * manifest.dims.kv_bytes_per_token
        self.sizes = Sizes(largest, -(-num_bytes // 64) * 64, num_bytes + HEADER_BYTES)

    def make_engine(self) -> OrtEngine:
        """An engine of its own."""
        return OrtEngine(self._bundle, OrtOptions(intra_op_threads=self._threads))

    def server(self, name: str, *, device: int, host: int, disk: int) -> Server:
        """A server whose tiers hold so many users, its profiles in a directory of that name."""
        slots, sizes = device * self.sizes.slot_bytes, self.sizes
        # The server wants room for two of the model's longest prefixes where there is a disk tier.
        least = 2 * sizes.slot_bytes if disk else 0
        config = ServerConfig(
            address="127.0.0.1:0",
            data_dir=str(self._scratch / name),
            intra_op_threads=self._threads,
            slab_ladder=(),
            kv_pool_bytes=slots,
            kv_host_bytes=max(host * sizes.host_bytes, least),
            kv_disk_bytes=disk * sizes.file_bytes,
            kv_flush_seconds=0,
        )
        return Server(config, self._bundle, self.make_engine, now_s=lambda: float(NOW_S))

    def fresh(self, numbers: list[int]) -> dict[int, np.ndarray]:
        """Embeddings of users over prefixes encoded for this."""
        engine, manifest = self.make_engine(), self._bundle.manifest
        encoder = PrefixEncoder(
            engine, self._bundle, chunk_len=256, max_event_tokens_per_step=4096,
            max_cached_texts=65_536,
        )  # fmt: skip
        query = SuffixQuery(tuple(self._bundle.encode_query(QUERY)))
        found = {}
        for number in numbers:
            prepared = prepare(self.users[number], 1, manifest)
            slot = engine.allocate_slot(len(prepared.layout))
            encoder.encode(prepared, slot)
            packed = pack(
                [UserSuffix(len(prepared.layout), (query,))],
                user_emb=manifest.tokens.user_emb,
                hidden_dim=manifest.dims.hidden_dim,
            )
            found[number] = engine.suffix(packed, [slot])
            engine.free_slot(slot)
        return found


def make_users(schema: ProfileSchema, num_users: int, prefix_len: int) -> list[Profile]:
    """Profiles whose prefixes are about `prefix_len` long, most of their texts shared."""
    specs = [spec for spec in schema.modalities if spec.kind == "events"]
    total = sum(spec.max_events for spec in specs)
    # Header, user token, and a token and two delimiters per modality.
    wanted = max(1, min(total, prefix_len - 2 - 3 * len(schema.modalities)))
    users = []
    for number in range(num_users):
        events = [
            Event(
                time_s=NOW_S - 600 * place,
                modality=spec.name,
                event_type="pays",
                text=f"{place % 50} {'everybody' if place % 10 else f'user {number}'}",
            )
            for spec in specs
            for place in range(max(1, wanted * spec.max_events // total))
        ]
        users.append(Profile(user_id=f"user-{number}", as_of_s=NOW_S, events=tuple(events)))
    return users


async def measure_returns(stage: Stage, repeats: int) -> dict[str, Any]:
    """Seconds to bring a user back, by where it was; also of a first encoding."""
    seconds: dict[str, list[float]] = {"first": [], "encoded": [], "disk": [], "host": []}
    # Six users in a circle never find themselves in host memory, which holds few of them.
    server = stage.server("return", device=1, host=3, disk=16)
    async with running(server) as client:
        num_circle = 2 + server.core.config.kv_host_bytes // stage.sizes.host_bytes
        for user in stage.users[:num_circle]:
            await client.put_profile(user)
            seconds["first"].append(await warm(client, user.user_id, CacheState.ENCODED_NOW))
        await settled(client)
        for turn in range(repeats):
            user = stage.users[turn % num_circle].user_id
            await settled(client)
            drop_page_cache(Path(server.core.config.data_dir) / "kv")
            seconds["disk"].append(await warm(client, user, CacheState.DISK))
        pair = [stage.users[number].user_id for number in (0, 1, 0)]
        for user in pair:
            await client.warm_profile(user, timeout=600)
        for turn in range(repeats):
            seconds["host"].append(await warm(client, pair[turn % 2 + 1], CacheState.HOST))
    async with running(stage.server("encode", device=1, host=0, disk=0)) as client:
        for user in stage.users[:2]:
            await client.put_profile(user)
            await client.warm_profile(user.user_id, timeout=600)
        for turn in range(max(3, repeats // 3)):
            user_id = stage.users[turn % 2].user_id
            seconds["encoded"].append(await warm(client, user_id, CacheState.ENCODED_NOW))
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    return {
        "seconds": seconds,
        "median_ms": {name: 1e3 * value for name, value in median.items()},
        "speedup_over_encoding": {name: median["encoded"] / median[name] for name in GOALS},
        "bytes_per_user": stage.sizes.file_bytes - HEADER_BYTES,
    }


async def warm(client: AsyncClient, user_id: str, expected: CacheState) -> float:
    """Seconds of one WarmProfile, which must find the user where it is expected."""
    start = time.perf_counter()
    state = (await client.warm_profile(user_id, timeout=600)).cache_state
    seconds = time.perf_counter() - start
    logger.info("%s: %s in %.1f ms", user_id, state.name, 1e3 * seconds)
    if state is not expected:
        raise RuntimeError(f"{user_id}: found in {state.name}, expected {expected.name}")
    return seconds


async def measure_zipf(stage: Stage, args: argparse.Namespace) -> dict[str, Any]:
    """A crowd over small tiers: where prefixes were found, how long it took, what was right."""
    rng = np.random.default_rng(args.seed)
    weights = 1.0 / np.arange(1, args.users + 1) ** args.zipf
    trace = rng.choice(args.users, size=args.requests, p=weights / weights.sum())
    latencies: dict[str, list[float]] = {}
    sampled: list[tuple[int, np.ndarray]] = []
    peak: Counter[str] = Counter()
    server = stage.server(
        "zipf", device=args.device_users, host=args.host_users, disk=args.disk_users
    )
    async with running(server) as client:
        for user in stage.users:
            await client.put_profile(user)
        room = asyncio.Semaphore(NUM_AT_A_TIME)

        async def ask(place: int, number: int) -> None:
            async with room:
                start = time.perf_counter()
                result = await client.embed(f"user-{number}", queries=[QUERY], timeout=600)
                state = result.provenance.cache_state.name.lower()
                latencies.setdefault(state, []).append(time.perf_counter() - start)
                logger.info("request %d of %d: %s", place + 1, args.requests, state)
                if place % args.sample_every == 0:
                    sampled.append((number, result.vectors))
                for tier, use in (await client.server_info()).tiers.items():
                    over = use.used_bytes - use.budget_bytes
                    peak[tier.name.lower()] = max(peak[tier.name.lower()], use.used_bytes)
                    peak["most over a budget"] = max(peak["most over a budget"], over)

        start = time.perf_counter()
        await asyncio.gather(*(ask(place, int(n)) for place, n in enumerate(trace)))
        seconds = time.perf_counter() - start
        tiers = (await client.server_info()).tiers
    fresh = stage.fresh(sorted({number for number, _ in sampled}))
    differences = [float(np.abs(found - fresh[number]).max()) for number, found in sampled]
    return {
        "requests_per_second": args.requests / seconds,
        "share_by_state": {k: len(v) / args.requests for k, v in sorted(latencies.items())},
        "latency_ms": {
            state: {f"p{q}": 1e3 * float(np.percentile(values, q)) for q in (50, 95, 99)}
            for state, values in sorted(latencies.items())
        },
        "tiers": {
            tier.name.lower(): {
                "budget_bytes": use.budget_bytes,
                "peak_bytes": peak[tier.name.lower()],
                "num_users": use.num_users,
                "num_hits": use.num_hits,
                "num_evicted": use.num_evicted,
                "num_failed": use.num_failed,
            }
            for tier, use in tiers.items()
        },
        "num_sampled": len(sampled),
        "max_abs_difference": max(differences),
        # If all users had the same vector, agreement would prove nothing.
        "max_abs_between_users": float(np.ptp(np.concatenate(list(fresh.values())), axis=0).max()),
        "is_within_budgets": peak["most over a budget"] <= 0,
    }


@asynccontextmanager
async def running(server: Server) -> AsyncIterator[AsyncClient]:
    """A client of a server that is started, and ended on exit."""
    port = await server.start()
    if not await server.wait_ready():
        raise RuntimeError("the server did not start")
    try:
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            yield client
    finally:
        server.request_stop()
        await server.wait_closed()


async def settled(client: AsyncClient) -> None:
    """Wait until the disk has all that was to be written."""
    before = -1
    while (users := (await client.server_info()).tiers[CacheState.DISK].num_users) != before:
        before = users
        await asyncio.sleep(0.2)


def drop_page_cache(directory: Path) -> None:
    """Have the system read the files from the disk again."""
    for path in directory.glob("*.kv"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def markdown(result: dict[str, Any]) -> str:
    """The result as the tables that documents show."""
    env, returns, zipf = result["environment"], result["return"], result["zipf"]
    config = result["config"]
    lines = [
        f"{env['cpu']}, {env['cores']} cores, {config['threads']} threads; shape "
        f"{config['shape']}, prefix {result['num_tokens']}, "
        f"{returns['bytes_per_user'] / 1e6:.1f} MB of keys and values per user.",
        "",
        "| a user comes back | median ms | times | x faster than encoding |",
        "|---|---|---|---|",
    ]
    for name in ("host", "disk", "encoded", "first"):
        ratio = returns["speedup_over_encoding"].get(name)
        lines.append(
            f"| {name} | {returns['median_ms'][name]:.1f} | {len(returns['seconds'][name])} | "
            f"{'' if ratio is None else f'{ratio:.1f}'} |"
        )
    lines += [
        "",
        "| Zipf trace: found | share | p50 ms | p95 ms | p99 ms |",
        "|---|---|---|---|---|",
    ]
    for state, share in zipf["share_by_state"].items():
        q = zipf["latency_ms"][state]
        lines.append(
            f"| {state} | {share:.0%} | {q['p50']:.1f} | {q['p95']:.1f} | {q['p99']:.1f} |"
        )
    lines += [
        "",
        f"{zipf['num_sampled']} replies compared with fresh encodings: largest difference "
        f"{zipf['max_abs_difference']:.1e}. Other processes used "
        f"{result['cpu_share_of_others']:.0%} of the machine meanwhile.",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print Markdown and a line of JSON; 1 when a vector is wrong or a budget passed."""
    args = _parse(argv)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")
    logger.setLevel(logging.INFO)
    args.threads = args.threads or os.cpu_count() or 1
    before = Busy.now()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        bundle = open_bundle(args.bundle or _export(args, Path(scratch) / "bundle"))
        users = make_users(bundle.manifest.profile_schema, args.users, args.prefix_len)
        stage = Stage(bundle, users, args.threads, Path(scratch))
        returns = asyncio.run(measure_returns(stage, args.repeats))
        zipf = asyncio.run(measure_zipf(stage, args))
    result: dict[str, Any] = {
        "bench": "cache",
        "config": {
            key: value
            for key, value in vars(args).items()
            if key not in ("bundle", "results", "scratch")
        },
        "environment": msgspec.to_builtins(environment()),
        "num_tokens": stage.num_tokens,
        "cpu_share_of_others": Busy.now().others_since(before),
        "return": returns,
        "zipf": zipf,
    }
    is_ok = zipf["is_within_budgets"] and zipf["max_abs_difference"] <= MAX_ABS_DIFFERENCE
    print(markdown(result))
    args.results.mkdir(parents=True, exist_ok=True)
    today = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d")
    variant = "" if args.shape == "qwen2.5-0.5b" else f"-{args.shape}"
    commit = result["environment"]["commit"]
    file = args.results / f"cache{variant}_{hardware_slug()}_{today}_{commit}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"ok": is_ok, "result": file.name, **returns["speedup_over_encoding"]}))
    return 0 if is_ok else 1


def _export(args: argparse.Namespace, path: Path) -> Path:
    # Only here: with a bundle at hand no torch is needed.
    from qanchor_export.bundle_writer import export_bundle
    from qanchor_export.random_source import method_schema, random_source, shape_named

    export_bundle(random_source(shape_named(args.shape), method_schema(), args.seed), path)
    return path


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.cache", description=__doc__)
    parser.add_argument("--shape", default="qwen2.5-0.5b", help="qwen2.5-0.5b or tiny")
    parser.add_argument(
        "--bundle", type=Path, help="bundle of the shape's random weights; exported if absent"
    )
    parser.add_argument("--prefix-len", type=int, default=760, help="tokens per user, about")
    parser.add_argument("--repeats", type=int, default=15, help="returns from each tier")
    parser.add_argument("--users", type=int, default=40, help="users of the trace, at least 12")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent; 0: all users alike")
    parser.add_argument("--device-users", type=int, default=4, help="users the device holds")
    parser.add_argument("--host-users", type=int, default=6, help="users host memory holds")
    parser.add_argument("--disk-users", type=int, default=20, help="users the disk holds")
    parser.add_argument("--sample-every", type=int, default=5, help="compare every n-th reply")
    parser.add_argument("--threads", type=int, default=0, help="0 takes all cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results", help="output folder"
    )
    args = parser.parse_args(argv)
    if args.users < 12:
        parser.error(f"--users {args.users}: at least 12, so that tiers overflow")
    return args


if __name__ == "__main__":
    sys.exit(main())
