"""Suite `engine`: prefill and suffix steps of the server's engine, alone in its process.

From the base point one size varies at a time: queries, tokens per query, prefix length, users.

Legend: P prefix length, N queries, S query length with <USER_EMB>, Z embedding_dim.
"""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from qanchor.bundle.packing import SuffixQuery
from qanchor_bench.bench import Bench, Road, Samples, run_rounds
from qanchor_bench.bundles import source_of
from qanchor_bench.floors import StepSize, prefill_floor, suffix_floor
from qanchor_bench.machine import Rates
from qanchor_bench.profiles import prefix_encoder
from qanchor_bench.result import Check, Findings, Point
from qanchor_bench.scenario import BenchScenario
from qanchor_bench.spread import percentile
from qanchor_bench.workload import (
    EncodedUser,
    FloatArray,
    IntArray,
    agreement,
    distinctness,
    encode_tokens,
    prefill,
    queries_of,
    random_tokens,
    suffix_step,
)
from qanchor_server.engine import Engine
from qanchor_server.engine.static import StaticEngine
from qanchor_server.failures import Retryable
from qanchor_server.parity import check_parity

logger = logging.getLogger(__name__)

_NUM_CHECKED = 2
_RUNS_OF_A_TAIL = 100


def run(bench: Bench) -> Findings:
    """Measure every point, compare with torch, and relate times to their floors."""
    scenario, manifest = bench.scenario, bench.bundle.manifest
    sizes = list(step_sizes(scenario))
    base = sizes[0]
    users = _Users(bench, bench.engine())
    checks = _checks(bench, users, base)
    rates = bench.rates(base.num_queries * base.query_len)
    roads: dict[str, Road] = {}
    for size in sizes:
        roads[suffix_name(size)] = _suffix_road(bench, users, size)
    for prefix_len in scenario.prefix_lens:
        user, tokens_P = users.one(prefix_len, 0), users.tokens(prefix_len, 0)
        roads[prefill_name(prefix_len)] = partial(prefill, users.engine, manifest, user, tokens_P)
    samples = run_rounds(roads, repeats=scenario.repeats, warmup=scenario.warmup)
    points = [_suffix_point(bench, size, samples, rates) for size in sizes]
    points += [_prefill_point(bench, length, samples, rates) for length in scenario.prefix_lens]
    return Findings(
        points=(*points, *_memory_points(users, base.prefix_len)),
        checks=(*checks, _anew(bench, users, base, samples.answers[suffix_name(base)])),
        figures=figures(scenario, points) | tail(samples.run_seconds[suffix_name(base)]),
        rates=asdict(rates),
        notes=(
            "a suffix step includes packing and binding; a prefill has text tokens alone, so no "
            "event text is encoded",
        ),
    )


def step_sizes(scenario: BenchScenario) -> Iterator[StepSize]:
    """The base, then one size varied at a time."""
    base = StepSize(
        prefix_len=scenario.prefix_lens[0],
        num_queries=scenario.queries[0],
        query_len=scenario.suffix_lens[0],
        num_users=scenario.users[0],
    )
    yield base
    varied = {
        "num_queries": scenario.queries,
        "query_len": scenario.suffix_lens,
        "prefix_len": scenario.prefix_lens,
        "num_users": scenario.users,
    }
    for name, values in varied.items():
        for value in values[1:]:
            yield StepSize(**{**asdict(base), name: value})


def suffix_name(size: StepSize) -> str:
    """The point's name."""
    return (
        f"suffix step: {size.num_users} users x {size.num_queries} queries x {size.query_len} "
        f"tokens, prefix {size.prefix_len}"
    )


def prefill_name(prefix_len: int) -> str:
    """The point's name."""
    return f"prefill: {prefix_len} positions"


def figures(scenario: BenchScenario, points: list[Point]) -> dict[str, float | None]:
    """The base, over its floor; what more prefix, queries and users cost."""
    medians = {point.name: point.median for point in points}
    sizes = list(step_sizes(scenario))
    base, floor = medians[suffix_name(sizes[0])], points[0].floor
    assert floor is not None
    found: dict[str, float | None] = {"base_ms": 1e3 * base, "suffix_over_floor": base / floor}

    def ratio_of_extremes(name: str) -> float | None:
        values = [size for size in sizes if _differs_in(size, sizes[0]) <= {name}]
        values.sort(key=lambda size: getattr(size, name))
        return medians[suffix_name(values[-1])] / medians[suffix_name(values[0])]

    if len(scenario.prefix_lens) > 1:
        found["longest_over_shortest_prefix"] = ratio_of_extremes("prefix_len")
    if 1 in scenario.queries:
        one = StepSize(**{**asdict(sizes[0]), "num_queries": 1})
        found["base_queries_over_one"] = base / medians[suffix_name(one)]
    if len(scenario.users) > 1:
        most = max(scenario.users) / min(scenario.users)
        found["most_users_over_fewest_per_user"] = (ratio_of_extremes("num_users") or 0.0) / most
    return found


def tail(run_seconds: list[float]) -> dict[str, float | None]:
    """p99 of the base over all its runs, where they are enough to have one."""
    if len(run_seconds) < _RUNS_OF_A_TAIL:
        return {}
    return {"base_p99_ms": 1e3 * percentile(run_seconds, 99.0)}


def _memory_points(users: "_Users", prefix_len: int) -> list[Point]:
    """What an engine of static buckets sets aside, and how many users its memory really holds."""
    if not isinstance(users.engine, StaticEngine):
        return []
    working = float(users.engine.num_working_bytes)
    points = [Point(name="working memory", group="bytes", unit="bytes", values=(working,))]
    if most := users.bench.scenario.max_users:
        points.append(
            Point(
                name=f"users held, prefix {prefix_len}",
                group="users held",
                labels={"prefix_len": prefix_len, "max_users": most},
                unit="1",
                values=(float(_fill(users, prefix_len, most)),),
                better="more",
            )
        )
    return points


def _fill(users: "_Users", prefix_len: int, most: int) -> int:
    """Slots that can be had until memory is full, those of this run included; all are given back.

    The run's users of other prefix lengths take their room and do not count.
    """
    num_held = sum(length == prefix_len for length, _ in users.encoded)
    slots: list[Any] = []
    try:
        while num_held + len(slots) < most:
            slots.append(users.engine.allocate_slot(prefix_len))
    except Retryable:
        logger.info("memory is full after %d more users", len(slots))
    for slot in slots:
        users.engine.free_slot(slot)
    return num_held + len(slots)


@dataclass(slots=True)
class _Users:
    """Encoded users by (prefix length, number), made when first asked for."""

    bench: Bench
    engine: Engine[Any]
    encoded: dict[tuple[int, int], EncodedUser] = field(default_factory=dict)

    def tokens(self, prefix_len: int, number: int) -> IntArray:
        rng = np.random.default_rng((self.bench.scenario.seed, prefix_len, number))
        return random_tokens(rng, _highest(self.bench), (prefix_len,))

    def one(self, prefix_len: int, number: int) -> EncodedUser:
        key = (prefix_len, number)
        if key not in self.encoded:
            manifest, tokens_P = self.bench.bundle.manifest, self.tokens(*key)
            self.encoded[key] = encode_tokens(self.engine, manifest, tokens_P)
        return self.encoded[key]

    def queries(self, num_queries: int, query_len: int) -> tuple[SuffixQuery, ...]:
        return queries_of(self.query_tokens(num_queries, query_len))

    def query_tokens(self, num_queries: int, query_len: int) -> IntArray:
        rng = np.random.default_rng((self.bench.scenario.seed, query_len))
        return random_tokens(rng, _highest(self.bench), (num_queries, query_len))


def _highest(bench: Bench) -> int:
    return int(bench.bundle.tokenizer.get_vocab_size())


def _suffix_road(bench: Bench, users: _Users, size: StepSize) -> Road:
    queries = users.queries(size.num_queries, size.query_len)
    asked = [(users.one(size.prefix_len, number), queries) for number in range(size.num_users)]
    return partial(suffix_step, users.engine, bench.bundle.manifest, asked)


def _suffix_point(bench: Bench, size: StepSize, samples: Samples, rates: Rates) -> Point:
    manifest = bench.bundle.manifest
    floor = suffix_floor(manifest.dims, size, rates, manifest.precision)
    labels: dict[str, str | float] = dict(asdict(size))
    return _point(suffix_name(size), "suffix step", labels, samples, floor.seconds)


def _prefill_point(bench: Bench, prefix_len: int, samples: Samples, rates: Rates) -> Point:
    manifest = bench.bundle.manifest
    floor = prefill_floor(manifest.dims, prefix_len, rates, manifest.precision)
    labels: dict[str, str | float] = {"prefix_len": prefix_len}
    return _point(prefill_name(prefix_len), "prefill", labels, samples, floor.seconds)


def _point(
    name: str, group: str, labels: dict[str, str | float], samples: Samples, floor: float
) -> Point:
    return Point(
        name=name,
        group=group,
        labels=labels,
        unit="s",
        values=tuple(samples.seconds[name]),
        cpu_seconds=tuple(samples.cpu_seconds[name]),
        floor=floor,
    )


def _checks(bench: Bench, users: _Users, base: StepSize) -> list[Check]:
    """Engine = torch; packed = alone; batched with other users = alone."""
    ways, manifest = bench.allowed.ways, bench.bundle.manifest
    queries = users.queries(max(_NUM_CHECKED, base.num_queries), base.query_len)[:_NUM_CHECKED]
    mine, other = users.one(base.prefix_len, 0), users.one(base.prefix_len, 1)
    together = suffix_step(users.engine, manifest, [(mine, queries)])
    alone = [suffix_step(users.engine, manifest, [(mine, (query,))]) for query in queries]
    crowd = suffix_step(users.engine, manifest, [(other, queries), (mine, queries)])
    return [
        _against_torch(bench, users, base, together),
        agreement("packed = alone", together, np.concatenate(alone), ways),
        agreement("with another user = alone", crowd[len(queries) :], together, ways),
        distinctness("queries differ", together),
    ]


def _against_torch(bench: Bench, users: _Users, base: StepSize, found_NZ: FloatArray) -> Check:
    if bench.scenario.bundle:
        return _against_stored(bench, users.engine)
    from qanchor_bench.transformers_roads import full_passes

    queries_NS = users.query_tokens(max(_NUM_CHECKED, base.num_queries), base.query_len)
    wanted_NZ = full_passes(
        source_of(bench.scenario), users.tokens(base.prefix_len, 0), queries_NS[:_NUM_CHECKED]
    )
    return agreement("engine = full torch passes", found_NZ, wanted_NZ, bench.allowed.torch)


def _against_stored(bench: Bench, engine: Engine[Any]) -> Check:
    """A bundle without its torch model: the embeddings torch gave at export stand in it."""
    worst = check_parity(engine, prefix_encoder(bench, engine), bench.bundle)
    return Check(
        name="engine = stored torch embeddings",
        is_ok=True,
        detail=f"max abs difference {worst:.1e}",
    )


def _anew(bench: Bench, users: _Users, base: StepSize, cached_NZ: FloatArray) -> Check:
    """After all rounds the last timed answer still equals a fresh encoding's."""
    manifest = bench.bundle.manifest
    queries = users.queries(base.num_queries, base.query_len)
    fresh = encode_tokens(users.engine, manifest, users.tokens(base.prefix_len, 0))
    fresh_NZ = suffix_step(users.engine, manifest, [(fresh, queries)])
    return agreement(
        "last timed answer = encoded anew",
        cached_NZ[: base.num_queries],
        fresh_NZ,
        bench.allowed.ways,
    )


def _differs_in(size: StepSize, base: StepSize) -> set[str]:
    mine, other = asdict(size), asdict(base)
    return {name for name in mine if mine[name] != other[name]}
