"""Suite `static`: what follows from sizes and the machine's rates, before any step is timed."""

from dataclasses import asdict

from qanchor_bench.bench import Bench
from qanchor_bench.floors import StepSize, prefill_floor, suffix_floor
from qanchor_bench.machine import measure_rates
from qanchor_bench.result import Check, Findings, Point
from qanchor_server.config import ServerConfig, slab_capacities
from qanchor_server.kv_pool import KvPool, PrefixRef, Reservation

_GIB = 1 << 30


def run(bench: Bench) -> Findings:
    """Bytes per user, users that fit a budget (counted in the server's own pool), floors."""
    scenario, manifest = bench.scenario, bench.bundle.manifest
    dims = manifest.dims
    base = StepSize(
        prefix_len=scenario.prefix_lens[0],
        num_queries=scenario.queries[0],
        query_len=scenario.suffix_lens[0],
    )
    tokens = base.num_queries * base.query_len
    rates = measure_rates(tokens, dims.hidden_dim, dims.intermediate_dim, bench.threads)
    points = [_bytes_point("weights on disk", manifest.files["weights.bin"].num_bytes)]
    checks = []
    for prefix_len in scenario.prefix_lens:
        num_bytes = prefix_len * dims.kv_bytes_per_token
        points.append(_bytes_point(f"keys and values, prefix {prefix_len}", num_bytes))
        for gib in scenario.budget_gib:
            fits, is_right = _users_that_fit(bench, int(gib * _GIB), prefix_len)
            points.append(_fit_point(gib, prefix_len, fits))
            checks.append(
                Check(
                    name=f"pool of {gib:g} GiB, prefix {prefix_len}",
                    is_ok=is_right,
                    detail=f"{fits} users, one more is deferred or evicts",
                )
            )
    for num_queries in scenario.queries:
        size = StepSize(
            prefix_len=base.prefix_len, num_queries=num_queries, query_len=base.query_len
        )
        floor = suffix_floor(dims, size, rates, manifest.precision)
        points.append(_floor_point(f"suffix step, {num_queries} queries", floor.seconds))
    floor = prefill_floor(dims, base.prefix_len, rates, manifest.precision)
    points.append(_floor_point(f"prefill, {base.prefix_len} positions", floor.seconds))
    return Findings(points=tuple(points), checks=tuple(checks), rates=asdict(rates))


def _users_that_fit(bench: Bench, budget_bytes: int, prefix_len: int) -> tuple[int, bool]:
    """Fill the server's pool until it must evict; whether it kept to its budget all along."""
    manifest = bench.bundle.manifest
    longest = max(manifest.limits.max_prefix_len, prefix_len)
    pool = KvPool(
        budget_bytes=budget_bytes,
        bytes_per_token=manifest.dims.kv_bytes_per_token,
        capacities=slab_capacities(ServerConfig().slab_ladder, longest),
    )
    is_within = True
    while True:
        num_users = pool.num_users
        outcome = pool.reserve(
            PrefixRef(
                user_id=str(num_users), digest="", version=1, num_tokens=prefix_len, as_of_s=0
            )
        )
        if pool.num_evicted or not isinstance(outcome, Reservation):
            return num_users, is_within
        pool.commit(outcome)
        is_within = is_within and pool.used_bytes <= budget_bytes


def _bytes_point(name: str, num_bytes: float) -> Point:
    return Point(name=name, group="bytes", unit="bytes", values=(float(num_bytes),))


def _fit_point(gib: float, prefix_len: int, fits: int) -> Point:
    return Point(
        name=f"users in {gib:g} GiB, prefix {prefix_len}",
        group="users that fit",
        labels={"budget_gib": gib, "prefix_len": prefix_len},
        unit="1",
        values=(float(fits),),
        better="more",
    )


def _floor_point(name: str, seconds: float) -> Point:
    return Point(name=name, group="floors", unit="s", values=(seconds,))
