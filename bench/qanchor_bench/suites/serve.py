"""Suite `serve`: a real server and real clients in processes of their own, over a real channel.

Each round measures, one after the other: the engine alone, an empty round trip and `Embed` in
turns (one in flight), the saturated server unary and streamed, and an open loop per hit ratio.
The engine alone is the same engine with the same threads in this process, while the server is
idle.
"""

import asyncio
import itertools
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec
import numpy as np

from qanchor.client import AsyncClient
from qanchor.data.profile import Profile
from qanchor_bench.bench import Bench
from qanchor_bench.engines import server_config
from qanchor_bench.load import (
    NUM_CHOICES,
    Record,
    latencies,
    outcomes,
    throughput,
    zipf_choices,
)
from qanchor_bench.load_client import ClientPlan, as_records
from qanchor_bench.processes import Clients, echo_server, qanchor_server
from qanchor_bench.profiles import ProfileEngine
from qanchor_bench.result import Check, Findings, Point, finite
from qanchor_bench.scenario import BenchScenario
from qanchor_bench.spread import PERCENTILES, median, percentile
from qanchor_bench.workload import EncodedUser, FloatArray, agreement
from qanchor_export.sample_users import sample_profiles

logger = logging.getLogger(__name__)

_ENGINE_SECONDS = 0.5
_NUM_PUTS_AT_ONCE = 8
_NUM_COLD_CHECKED = 8
_ROOM_FOR_COLD = 2.0
_ECHO_FACTOR = 1.5
_CHECK_EVERY = 5


def run(bench: Bench) -> Findings:
    """Prepare users and right answers, start the processes, measure in rounds."""
    scenario = bench.scenario
    alone = _EngineAlone(bench)
    hot = alone.users(scenario.users[0], seed=scenario.seed)
    step_s, prefill_s = alone.calibrate(hot)
    rate = scenario.arrival_rate or scenario.load / (
        step_s + (1 - min(scenario.hit_ratios)) * prefill_s
    )
    cold = alone.users(_num_cold(scenario, rate), seed=scenario.seed + 1, name="cold")
    expected = bench.scratch / "expected.npz"
    right: dict[str, Any] = alone.expected([*hot, *cold[:_NUM_COLD_CHECKED]])
    np.savez(expected, **right)
    logger.info("engine step %.2f ms, prefill %.1f ms", 1e3 * step_s, 1e3 * prefill_s)
    logger.info("%.0f arrivals/s in the open loop, %d cold users", rate, len(cold))
    settings = _server_settings(bench, len(hot) + len(cold))
    clients = Clients(scenario.clients, bench.scratch)
    try:
        with (
            qanchor_server(bench.bundle.path, bench.scratch, settings) as address,
            echo_server(bench.scratch) as echo_address,
        ):
            asyncio.run(_store(address, [*hot, *cold], len(hot)))
            phases = _Phases(
                bench, clients, address, echo_address, expected, alone.queries, rate,
                [profile.user_id for profile in hot], [profile.user_id for profile in cold],
            )  # fmt: skip
            samples = _measure(bench, phases, alone, hot)
    finally:
        clients.close()
    return _findings(bench, samples, alone, hot, rate)


class _EngineAlone(ProfileEngine):
    """The server's engine in this process: right answers, and what a step costs by itself."""

    def __init__(self, bench: Bench) -> None:
        # Every text is encoded anew: the users of misses have texts never seen.
        super().__init__(bench, max_cached_texts=1)
        self.held: list[EncodedUser] = []
        self.width = 1
        self._asked: Iterator[int] = iter(())

    def users(self, count: int, seed: int, name: str = "hot") -> list[Profile]:
        """Made-up profiles whose prefixes have about the scenario's length."""
        manifest = self.bench.bundle.manifest
        fill = min(1.0, self.bench.scenario.prefix_lens[0] / manifest.limits.max_prefix_len)
        profiles = sample_profiles(manifest.profile_schema, count, seed, fill)
        return [
            Profile(
                user_id=f"{name}-{number}",
                as_of_s=profile.as_of_s,
                events=profile.events,
                attributes=profile.attributes,
            )
            for number, profile in enumerate(profiles)
        ]

    def calibrate(self, hot: Sequence[Profile]) -> tuple[float, float]:
        """Seconds of a step of one user and of a prefill; chooses the best number in a step."""
        bench = self.bench
        limits = server_config(bench.scenario, bench.bundle, bench.threads)
        beside = self.engine.side_by_side
        lanes = beside.num_lanes if beside else 1
        tokens = sum(query.suffix_len for query in self.suffixes)
        widest = min(
            lanes * limits.max_step_users, lanes * limits.max_step_tokens // tokens, len(hot)
        )
        start = time.perf_counter()
        self.held = [self.encode(profile) for profile in hot]
        prefill_s = (time.perf_counter() - start) / len(self.held)
        scenario = bench.scenario
        # As the clients ask, so that the same share of steps finds a user in the processor's cache.
        choices = zipf_choices(len(hot), scenario.zipf, NUM_CHOICES, scenario.seed)
        self._asked = itertools.cycle(choices)
        rates = {}
        for width in range(1, max(1, widest) + 1):
            rates[width] = width / median(self.steps(width))
        self.width = max(rates, key=lambda width: rates[width])
        return median(self.steps(1)), prefill_s

    def requests_per_s(self) -> float:
        """What it answers over a phase, slow moments of the machine included, as of the server."""
        return self.width / fmean(self.steps(self.width, seconds=self.bench.scenario.seconds))

    def steps(
        self, width: int, *, pause_s: float = 0.0, seconds: float = _ENGINE_SECONDS
    ) -> list[float]:
        """How long each step of `width` requests took, with a pause before each."""
        found: list[float] = []
        end = time.perf_counter() + seconds
        while not found or time.perf_counter() < end:
            users = [self.held[next(self._asked)] for _ in range(width)]
            if pause_s:
                time.sleep(pause_s)
            start = time.perf_counter()
            self.step(users)
            found.append(time.perf_counter() - start)
        return found

    def expected(self, profiles: Sequence[Profile]) -> dict[str, FloatArray]:
        """Right vectors by user id."""
        return {profile.user_id: self.answer(profile) for profile in profiles}


@dataclass(slots=True)
class _Phases:
    """Starts phases of the client processes; cold users are used up over all of them."""

    bench: Bench
    clients: Clients
    address: str
    echo_address: str
    expected: Path
    queries: tuple[str, ...]
    rate: float
    hot: list[str]
    cold: list[str]
    num_run: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def run(self, **settings: Any) -> tuple[list[Record], float, list[float]]:
        """Records of all clients, the phase's start, and echo round trips."""
        scenario = self.bench.scenario
        share = {
            "rate": settings.get("rate", 0.0) / scenario.clients,
            "concurrency": max(1, settings.get("concurrency", 1) // scenario.clients),
        }
        plans = [self._plan(number, {**settings, **share}) for number in range(scenario.clients)]
        found, start_s = self.clients.run(plans)
        records = [record for columns in found for record in as_records(columns)]
        self.counts.update(outcomes(records))
        self.counts["compared"] += sum(columns.num_compared for columns in found)
        self.counts["wrong"] += sum(columns.num_wrong for columns in found)
        return records, start_s, [echo for columns in found for echo in columns.echo_s]

    def _plan(self, client: int, settings: dict[str, Any]) -> ClientPlan:
        scenario = self.bench.scenario
        self.num_run += 1
        plan = ClientPlan(
            **{
                "is_stream": False,
                **settings,
                "address": self.address,
                "echo_address": self.echo_address,
                "users": tuple(self.hot),
                "queries": self.queries,
                "zipf": scenario.zipf,
                "seconds": scenario.seconds,
                "deadline": scenario.deadline,
                "seed": scenario.seed + 1000 * self.num_run,
                "expected": str(self.expected),
                "min_cosine": self.bench.allowed.ways.mean_cosine,
                "check_every": _CHECK_EVERY,
            }
        )
        misses = 1 - plan.hit_ratio
        if misses == 0 or plan.kind != "open":
            return plan
        num_cold = _num_cold_of_phase(plan.rate, plan.seconds, misses)
        mine, self.cold = self.cold[:num_cold], self.cold[num_cold:]
        return _with(plan, cold_users=tuple(mine))


@dataclass(slots=True)
class _Samples:
    """Per point name one value per round."""

    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    labels: dict[str, dict[str, str | float]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, value: float, **labels: str | float) -> None:
        self.values[name].append(value)
        self.labels[name] = labels


def _measure(
    bench: Bench, phases: _Phases, alone: _EngineAlone, hot: Sequence[Profile]
) -> _Samples:
    scenario, samples = bench.scenario, _Samples()
    for turn in range(-scenario.warmup, scenario.repeats):
        # The warm-up round leaves its numbers behind.
        into = samples if turn >= 0 else _Samples()
        one_s = median(alone.steps(1))
        into.add("engine step", one_s)
        into.add("engine alone, requests", alone.requests_per_s())
        records, _, echo_s = phases.run(kind="turns")
        into.add("empty round trip", median(echo_s))
        _add_latencies(into, "one client, unary", records)
        _add_shares(into, records)
        # One client leaves the engine idle between steps, for as long as all but the step takes.
        pause_s = max(0.0, percentile(latencies(records, hits_only=True), 50.0) - one_s)
        into.add("engine step after a pause", median(alone.steps(1, pause_s=pause_s)))
        for is_stream, word in ((False, "unary"), (True, "stream")):
            records, start_s, _ = phases.run(
                kind="closed", is_stream=is_stream, concurrency=scenario.concurrency
            )
            into.add(f"saturated, {word}", throughput(records, scenario.seconds, start_s))
        for ratio in scenario.hit_ratios:
            records, _, _ = phases.run(kind="open", rate=phases.rate, hit_ratio=ratio)
            name = f"open loop, hit ratio {ratio:g}"
            _add_latencies(into, name, records, hit_ratio=ratio)
            lag_s = [record.sent_s - record.intended_s for record in records]
            into.add(f"{name}: client's lateness p99", percentile(lag_s, 99.0))
        logger.info("round %d of %d", turn + 1, scenario.repeats)
    samples.counts = phases.counts
    return samples


def _add_latencies(
    samples: _Samples, name: str, records: Sequence[Record], **labels: str | float
) -> None:
    for word, percent in PERCENTILES.items():
        values = latencies(records, hits_only=True)
        samples.add(f"{name}: {word}", percentile(values, percent), **labels, percentile=word)
    values = [record.latency_s for record in records if not record.reply.was_hit]
    if values:
        samples.add(f"{name}: misses p50", percentile(values, 50.0), **labels, percentile="misses")


def _add_shares(samples: _Samples, records: Sequence[Record]) -> None:
    """Where a request's time goes, by what the server says of each; medians, so no exact sum."""
    step_s = [record.reply.step_s for record in records]
    queue_s = [record.reply.queue_s for record in records]
    rest_s = [record.latency_s - record.reply.step_s - record.reply.queue_s for record in records]
    for word, values in (("step", step_s), ("queue", queue_s), ("rest", rest_s)):
        samples.add(f"one request's time: {word}", median(values))


def _findings(
    bench: Bench, samples: _Samples, alone: _EngineAlone, hot: Sequence[Profile], rate: float
) -> Findings:
    counts = samples.counts
    fresh = np.stack([alone.answer(profile)[0] for profile in hot[:2]])
    stored = np.load(bench.scratch / "expected.npz")
    wanted = np.stack([stored[profile.user_id][0] for profile in hot[:2]])
    checks = (
        Check(
            name="replies = engine over fresh encodings",
            is_ok=counts["wrong"] == 0 and counts["compared"] > 0,
            detail=f"{counts['compared']} replies compared, {counts['wrong']} wrong",
        ),
        Check(
            name="every request was answered",
            is_ok=counts["incomplete"] == 0,
            detail=f"{counts['incomplete']} of {_total(counts)} had no answer by the deadline",
        ),
        agreement("engine alone = encoded anew", wanted, fresh, bench.allowed.ways),
    )
    return Findings(
        points=tuple(_point(name, samples) for name in samples.values),
        checks=checks,
        figures=figures(samples.values, bench.scenario.hit_ratios),
        counts=dict(counts),
        notes=(
            f"open loop: {rate:.1f} arrivals/s, about {rate * bench.scenario.seconds:.0f} requests "
            "per phase and round (below 100 the p99 is the slowest); latencies count from the "
            "intended send time",
            f"the engine alone is best with {alone.width} requests in a step, about the users that "
            "the clients ask about",
            "percentiles are over hits; cold users' event texts were never seen before",
        ),
    )


def figures(values: dict[str, list[float]], hit_ratios: Sequence[float]) -> dict[str, float | None]:
    """What the server costs over the engine, the empty round trip and undisturbed hits."""
    found = {name: median(repeats) for name, repeats in values.items()}
    step_s, echo_s = found["engine step"], found["empty round trip"]
    paced_s = found["engine step after a pause"]
    p50_s = found["one client, unary: p50"]
    engine_rate = found["engine alone, requests"]
    ratios: dict[str, float | None] = {
        "p50_over_allowance": finite(p50_s / (step_s + _ECHO_FACTOR * echo_s)),
        "p50_over_allowance_after_a_pause": finite(p50_s / (paced_s + _ECHO_FACTOR * echo_s)),
        "round_trips_above_step": finite((p50_s - step_s) / echo_s),
        "saturated_unary_over_engine": found["saturated, unary"] / engine_rate,
        "saturated_stream_over_engine": found["saturated, stream"] / engine_rate,
    }
    undisturbed = found.get("open loop, hit ratio 1: p99")
    for ratio in hit_ratios:
        if undisturbed and ratio != 1.0:
            disturbed = found[f"open loop, hit ratio {ratio:g}: p99"]
            ratios[f"p99_of_hits_at_{ratio:g}_over_at_1"] = finite(disturbed / undisturbed)
    return ratios


def _point(name: str, samples: _Samples) -> Point:
    is_rate = name.startswith(("saturated", "engine alone"))
    return Point(
        name=name,
        group="requests per second" if is_rate else name.partition(":")[0],
        labels=samples.labels[name],
        unit="1/s" if is_rate else "s",
        values=tuple(finite(value) for value in samples.values[name]),
        better="more" if is_rate else "less",
    )


def _num_cold(scenario: BenchScenario, rate: float) -> int:
    rounds = scenario.repeats + scenario.warmup
    per_client = rate / scenario.clients
    return (
        rounds
        * scenario.clients
        * sum(
            _num_cold_of_phase(per_client, scenario.seconds, 1 - ratio)
            for ratio in scenario.hit_ratios
            if ratio < 1
        )
    )


def _num_cold_of_phase(rate: float, seconds: float, misses: float) -> int:
    """Enough cold users for a Poisson draw well above its mean."""
    mean = rate * seconds * misses
    return int(mean + 4 * mean**0.5 + 4)


def _server_settings(bench: Bench, num_users: int) -> dict[str, Any]:
    """Room for all users, so that only cold ones miss; the scenario's own settings on top."""
    manifest = bench.bundle.manifest
    one = manifest.limits.max_prefix_len * manifest.dims.kv_bytes_per_token
    config = server_config(bench.scenario, bench.bundle, bench.threads)
    return {
        "engine": config.engine,
        "plans_dir": config.plans_dir,
        "intra_op_threads": config.intra_op_threads,
        "kv_pool_bytes": int(_ROOM_FOR_COLD * num_users * one),
        "prepared_prefix_cache": num_users + 1,
        **bench.scenario.server,
    }


async def _store(address: str, profiles: Sequence[Profile], num_hot: int) -> None:
    """Put all profiles, and encode the hot ones."""
    room = asyncio.Semaphore(_NUM_PUTS_AT_ONCE)
    async with AsyncClient(address, timeout_s=120.0) as client:

        async def put(profile: Profile, is_hot: bool) -> None:
            async with room:
                await client.put_profile(profile)
                if is_hot:
                    await client.warm_profile(profile.user_id)

        await asyncio.gather(
            *(put(profile, number < num_hot) for number, profile in enumerate(profiles))
        )


def _total(counts: Counter[str]) -> int:
    return counts["answered"] + counts["rejected"] + counts["incomplete"]


def _with(plan: ClientPlan, **changes: Any) -> ClientPlan:
    return msgspec.structs.replace(plan, **changes)
