"""Suite `peers`: queries of a cached user, our packed step beside what others would run.

One process, the same weights and inputs, roads in turns. llama.cpp and vLLM run where they are
installed; otherwise a note says that they did not run.

Legend: P prefix length, N queries, S query length with <USER_EMB>, Z embedding_dim.
"""

from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch

from qanchor_bench.bench import Bench, Road, Samples, run_rounds
from qanchor_bench.bundles import source_of
from qanchor_bench.floors import StepSize, suffix_floor
from qanchor_bench.machine import Rates
from qanchor_bench.peer_llama import Llama, find_llama, llama_points
from qanchor_bench.peer_vllm import vllm_note
from qanchor_bench.result import Check, Findings, Point
from qanchor_bench.spread import median
from qanchor_bench.transformers_roads import transformers_roads
from qanchor_bench.workload import (
    agreement,
    distinctness,
    encode_tokens,
    queries_of,
    random_tokens,
    suffix_step,
)
from qanchor_export.kv_store import TORCH_DTYPES

TITLES = {
    "packed": "ours: all queries in one packed suffix step",
    "packed_one": "ours: one query",
    "reuse_one": "transformers, cache reused, one query",
    "reuse_one_by_one": "transformers, cache reused, query by query",
    "reuse_batch": "transformers, cache reused, all queries as a batch of copies",
    "full_pass_one": "transformers, one full pass",
    "full_pass_all": "transformers, a full pass per query (the authors' way)",
}
ONE_QUERY = {"packed_one", "reuse_one", "full_pass_one"}
_SPEEDUPS = {
    "speedup_over_reuse_one_by_one": ("reuse_one_by_one", "packed"),
    "speedup_over_reuse_batch": ("reuse_batch", "packed"),
    "speedup_over_full_passes": ("full_pass_all", "packed"),
    "one_query_speedup_over_reuse": ("reuse_one", "packed_one"),
    "one_query_speedup_over_full_pass": ("full_pass_one", "packed_one"),
}
_LLAMA_SPEEDUPS = ("speedup_over_llama", "one_query_speedup_over_llama")


def run(bench: Bench) -> Findings:
    """Measure all roads, compare every answer with ours, relate medians."""
    scenario = bench.scenario
    torch.set_num_threads(bench.threads)
    size = StepSize(
        prefix_len=scenario.prefix_lens[0],
        num_queries=scenario.queries[0],
        query_len=scenario.suffix_lens[0],
    )
    rates = bench.rates(size.num_queries * size.query_len)
    source = source_of(scenario)
    roads = _roads(bench, source, size)
    fewer = {
        "full_pass_all": scenario.full_repeats,
        "full_pass_one": max(2, scenario.full_repeats),
    }
    samples = run_rounds(roads, repeats=scenario.repeats, warmup=scenario.warmup, fewer=fewer)
    points = [_point(bench, name, size, samples, rates) for name in roads]
    roads.clear()
    program = Llama("", "it would run on the CPU") if scenario.is_on_gpu else find_llama()
    llama, llama_note = llama_points(
        program, source, size, scenario.repeats, bench.threads, bench.scratch
    )
    return Findings(
        points=(*points, *llama),
        checks=_checks(bench, samples),
        figures=figures([*points, *llama], size),
        rates=asdict(rates),
        notes=(
            "prefills are not timed, nor the copies of the cache that the batch needs",
            llama_note,
            vllm_note(),
        ),
        not_run=() if llama else _LLAMA_SPEEDUPS,
    )


def figures(points: list[Point], size: StepSize) -> dict[str, float | None]:
    """Speedups: the peer's median over ours."""
    medians = {str(point.labels["road"]): point.median for point in points}
    found: dict[str, float | None] = {
        name: medians[theirs] / medians[ours] for name, (theirs, ours) in _SPEEDUPS.items()
    }
    for point in points[:2]:
        if point.floor:
            found[f"{point.labels['road']}_over_floor"] = point.median / point.floor
    if "llama_all" in medians:
        best = min(medians["llama_all"], size.num_queries * medians["llama_one"])
        speedups = best / medians["packed"], medians["llama_one"] / medians["packed_one"]
        found |= dict(zip(_LLAMA_SPEEDUPS, speedups, strict=True))
    cpu = {str(p.labels["road"]): median(p.cpu_seconds) for p in points if p.cpu_seconds}
    for name, (theirs, ours) in _SPEEDUPS.items():
        found[f"{name}_cpu_time"] = cpu[theirs] / cpu[ours] if cpu[ours] else None
    return found


def _roads(bench: Bench, source: Any, size: StepSize) -> dict[str, Road]:
    scenario, manifest = bench.scenario, bench.bundle.manifest
    rng = np.random.default_rng(scenario.seed)
    highest = source.tokenizer.get_vocab_size()
    prefix_P = random_tokens(rng, highest, (size.prefix_len,))
    queries_NS = random_tokens(rng, highest, (size.num_queries, size.query_len))
    engine, queries = bench.engine(), queries_of(queries_NS)
    user = encode_tokens(engine, manifest, prefix_P)
    place: dict[str, Any] = {}
    if scenario.is_on_gpu:
        place = {"device": "cuda", "dtype": TORCH_DTYPES[manifest.precision]}
    return {
        "packed": partial(suffix_step, engine, manifest, [(user, queries)]),
        "packed_one": partial(suffix_step, engine, manifest, [(user, queries[:1])]),
        **transformers_roads(source, prefix_P, queries_NS, **place),
    }


def _point(bench: Bench, name: str, size: StepSize, samples: Samples, rates: Rates) -> Point:
    floor = None
    if name in ("packed", "packed_one"):
        asked = size if name == "packed" else StepSize(**{**asdict(size), "num_queries": 1})
        manifest = bench.bundle.manifest
        floor = suffix_floor(manifest.dims, asked, rates, manifest.precision).seconds
    return Point(
        name=TITLES[name],
        group="one query" if name in ONE_QUERY else "all queries",
        labels={"road": name},
        unit="s",
        values=tuple(samples.seconds[name]),
        cpu_seconds=tuple(samples.cpu_seconds[name]),
        floor=floor,
    )


def _checks(bench: Bench, samples: Samples) -> tuple[Check, ...]:
    ours = samples.answers["packed"]
    return (
        *(
            agreement(f"{name} = packed", found, ours[: len(found)], bench.allowed.torch)
            for name, found in samples.answers.items()
            if name != "packed"
        ),
        distinctness("queries differ", ours),
    )
