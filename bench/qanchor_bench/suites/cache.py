"""Suite `cache`: users coming back from each tier, and a crowd over tiers at their budgets.

Returns: in each round one user comes back from disk (out of the page cache), one from host memory,
and one is encoded again with its event vectors known. Trace: in each round requests of many users
by popularity, over tiers far too small for them. Both ask the server's own code in this process,
over a channel.

Legend: Q queries, Z embedding_dim.
"""

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from qanchor.client import AsyncClient, CacheState
from qanchor.errors import ConfigError
from qanchor_bench.bench import Bench
from qanchor_bench.cache_stage import Stage, make_users, running, settled
from qanchor_bench.load import zipf_choices
from qanchor_bench.profiles import ProfileEngine, query_texts
from qanchor_bench.result import Check, Findings, Point
from qanchor_bench.scenario import BenchScenario
from qanchor_bench.spread import median, percentile
from qanchor_bench.workload import FloatArray, agreement, distinctness
from qanchor_server.config import ServerConfig

logger = logging.getLogger(__name__)

RETURNS = {
    "host": "back from host memory",
    "disk": "back from disk, out of the page cache",
    "encoding": "encoded again, event vectors known",
}
_CHECK_EVERY = 5
_NUM_ON_HOST = 3


def run(bench: Bench) -> Findings:
    """Measure returns, then the trace; compare sampled replies with fresh encodings."""
    scenario, schema = bench.scenario, bench.bundle.manifest.profile_schema
    users = make_users(schema, scenario.users[0], scenario.prefix_lens[0], scenario.seed)
    stage = Stage(bench, users)
    seconds = asyncio.run(_measure_returns(stage))
    trace = asyncio.run(_measure_trace(stage, query_texts(scenario.queries[0])))
    return Findings(
        points=(
            *(_point(RETURNS[name], "a user comes back", seconds[name]) for name in RETURNS),
            *_trace_points(trace, scenario),
            _point("keys and values per user", "bytes", [float(stage.user_bytes)], unit="bytes"),
        ),
        checks=_checks(stage, trace),
        figures=figures(seconds, trace),
        counts={**trace.counts, "compared": len(trace.sampled)},
        notes=(
            f"prefixes of {stage.num_tokens} positions; the trace's tiers hold "
            "{} users on the device, {} in host memory, {} on disk".format(*scenario.tier_users),
            "a return includes a round trip over the channel; the writing of files is not timed",
        ),
    )


def figures(seconds: dict[str, list[float]], trace: "_Trace") -> dict[str, float | None]:
    """Returns against encoding again; where the trace found its users; budgets."""
    encoding_s = median(seconds["encoding"])
    found: dict[str, float | None] = {
        f"{name}_over_encoding_speedup": encoding_s / median(seconds[name])
        for name in ("host", "disk")
    }
    for tier, budget in trace.budgets.items():
        found[f"{tier}_peak_over_budget"] = trace.peaks[tier] / budget if budget else None
    asked = sum(trace.counts.values())
    return found | {f"share_{state}": n / asked for state, n in sorted(trace.counts.items())}


async def _measure_returns(stage: Stage) -> dict[str, list[float]]:
    """Seconds of each kind of return, one per round.

    Users in a circle: whose turn it is has been away longest, so that neither the device (one user)
    nor host memory has him any more.
    """
    scenario = stage.bench.scenario
    num_users = 2 + stage.num_on_host(_NUM_ON_HOST)
    if num_users > len(stage.users):
        raise ConfigError(
            "users", len(stage.users), f"prefixes so short need {num_users} users", "add users"
        )
    circle = stage.users[:num_users]
    seconds: dict[str, list[float]] = defaultdict(list)
    server = stage.server("returns", device=1, host=_NUM_ON_HOST, disk=2 * num_users)
    async with running(server) as client:
        for user in circle:
            await client.put_profile(user)
            await client.warm_profile(user.user_id)
        for turn in range(scenario.warmup + scenario.repeats):
            user, held = circle[turn % num_users], circle[(turn - 1) % num_users]
            await settled(client)
            stage.drop_page_cache("returns")
            taken = {"disk": await _warm(client, user.user_id, CacheState.DISK)}
            # The disk thread has written what `user` drove out before the next clock starts.
            await settled(client)
            taken["host"] = await _warm(client, held.user_id, CacheState.HOST)
            await client.delete_profile(user.user_id)
            await client.put_profile(user)
            await settled(client)
            taken["encoding"] = await _warm(client, user.user_id, CacheState.ENCODED_NOW)
            if turn >= scenario.warmup:
                for name, value in taken.items():
                    seconds[name].append(value)
            logger.info("returns: round %d", turn + 1 - scenario.warmup)
    return seconds


async def _warm(client: AsyncClient, user_id: str, expected: CacheState) -> float:
    """Seconds of one WarmProfile. Raises RuntimeError where the user was elsewhere."""
    start = time.perf_counter()
    state = (await client.warm_profile(user_id)).cache_state
    seconds = time.perf_counter() - start
    if state is not expected:
        raise RuntimeError(f"{user_id}: found in {state.name}, expected {expected.name}")
    return seconds


@dataclass(slots=True)
class _Trace:
    """What a crowd met: one entry per counted round, but budgets and samples of all rounds."""

    latencies: list[dict[str, list[float]]] = field(default_factory=list)
    """Seconds of the requests of a round by where the user was."""
    rates: list[float] = field(default_factory=list)
    """Answers per second."""
    counts: Counter[str] = field(default_factory=Counter)
    sampled: list[tuple[int, FloatArray]] = field(default_factory=list)
    """User's number and the reply [Q, Z]."""
    budgets: dict[str, int] = field(default_factory=dict)
    peaks: Counter[str] = field(default_factory=Counter)

    async def watch(self, client: AsyncClient) -> None:
        """Keep the most bytes that each tier was seen to use."""
        for tier, use in (await client.server_info()).tiers.items():
            name = tier.name.lower()
            self.budgets[name] = use.budget_bytes
            self.peaks[name] = max(self.peaks[name], use.used_bytes)


async def _measure_trace(stage: Stage, queries: tuple[str, ...]) -> _Trace:
    scenario, trace = stage.bench.scenario, _Trace()
    device, host, disk = scenario.tier_users
    room = asyncio.Semaphore(scenario.concurrency)

    async def ask(place: int, number: int, latencies: dict[str, list[float]]) -> None:
        async with room:
            start = time.perf_counter()
            result = await client.embed(stage.users[number].user_id, queries=queries)
            state = result.provenance.cache_state.name.lower()
            latencies[state].append(time.perf_counter() - start)
            if place % _CHECK_EVERY == 0:
                trace.sampled.append((number, result.vectors))
            await trace.watch(client)

    async with running(stage.server("trace", device=device, host=host, disk=disk)) as client:
        for user in stage.users:
            await client.put_profile(user)
        for turn in range(-scenario.warmup, scenario.repeats):
            numbers = zipf_choices(
                len(stage.users), scenario.zipf, scenario.requests, scenario.seed + turn + 1000
            )
            latencies: dict[str, list[float]] = defaultdict(list)
            start = time.perf_counter()
            await asyncio.gather(*(ask(*asked, latencies) for asked in enumerate(numbers)))
            if turn >= 0:
                trace.rates.append(len(numbers) / (time.perf_counter() - start))
                trace.latencies.append(latencies)
                trace.counts.update({state: len(values) for state, values in latencies.items()})
            logger.info("trace: round %d of %d", turn + 1, scenario.repeats)
    return trace


def _trace_points(trace: _Trace, scenario: BenchScenario) -> list[Point]:
    """Percentiles by where a user was found; a round that found nobody there has no value."""
    points = []
    for state in sorted(trace.counts):
        rounds = [latencies[state] for latencies in trace.latencies if latencies[state]]
        for word, percent in (("p50", 50.0), ("p99", 99.0)):
            values = [percentile(one, percent) for one in rounds]
            points.append(_point(f"found {state}: {word}", "trace: latency", values))
    points.append(_point("trace: answers", "requests per second", trace.rates, unit="1/s"))
    points += [
        _point(f"{tier}: most used", "bytes", [float(trace.peaks[tier])], unit="bytes")
        for tier in trace.budgets
    ]
    return points


def _checks(stage: Stage, trace: _Trace) -> tuple[Check, ...]:
    # Opened when the servers are gone: two engines of a large model are a lot of memory.
    right = ProfileEngine(stage.bench, max_cached_texts=ServerConfig().event_vector_cache)
    asked = sorted({number for number, _ in trace.sampled})
    fresh = {number: right.answer(stage.users[number]) for number in asked}
    found_QZ = np.concatenate([vectors for _, vectors in trace.sampled])
    wanted_QZ = np.concatenate([fresh[number] for number, _ in trace.sampled])
    users_Z = np.stack([fresh[number][0] for number in asked])
    return (
        within_budgets(trace.budgets, trace.peaks),
        agreement("sampled reply = fresh encoding", found_QZ, wanted_QZ, stage.bench.allowed.ways),
        distinctness("users differ", users_Z),
    )


def within_budgets(budgets: Mapping[str, int], peaks: Mapping[str, int]) -> Check:
    """Whether no tier was ever seen to use more than it may."""
    over = [tier for tier, budget in budgets.items() if peaks[tier] > budget]
    return Check(
        name="no tier exceeded its budget",
        is_ok=bool(budgets) and not over,
        detail=f"over: {', '.join(over) or 'none'}; read after every request",
    )


def _point(name: str, group: str, values: list[float], unit: str = "s") -> Point:
    return Point(
        name=name,
        group=group,
        unit=unit,  # type: ignore[arg-type] # one of Point's units
        values=tuple(values),
        better="more" if unit == "1/s" else "less",
    )
