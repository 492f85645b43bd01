"""How long ten queries of a cached user take: the packed suffix step beside transformers.

    python -m bench.suffix_step [--shape tiny] [--bundle DIR] [--repeats 9]

One process, roads interleaved, random weights, CPU; ours in float32 and int8, peers in float32.
The floor is stated first, with rates measured in the same run; every road's embeddings are
compared. See README.md for the terms.
"""

import argparse
import datetime
import json
import logging
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from bench.machine import Busy, Rates, hardware_slug, measure_rates
from bench.suffix_peers import (
    Road,
    Task,
    make_task,
    noise_prefix,
    our_prefix,
    packed_step,
    transformers_roads,
)
from qanchor.bundle.manifest import PREFIX, ModelDims, Precision
from qanchor.bundle.reader import open_bundle
from qanchor.environment import environment
from qanchor_export.bundle_writer import export_bundle
from qanchor_export.random_source import method_schema, random_source, shape_named
from qanchor_export.runner import BundleRunner
from qanchor_export.source import ExportSource
from qanchor_export.weights import Numbers

logger = logging.getLogger("bench.suffix_step")

MIN_COSINE = 1 - 1e-3
MAX_ABS_DIFFERENCE = 1e-4
MIN_INT8_MEAN_COSINE = 0.995
MIN_REPEATS = 5
_SETTLE_SECONDS = 0.2
PRECISIONS: dict[str, Precision] = {"packed": "float32", "int8": "int8"}
"""Our roads and what they compute in."""
TITLES = {
    "packed": "packed suffix step, ONNX Runtime (ours)",
    "packed_one": "one query, ONNX Runtime (ours)",
    "int8": "packed suffix step, int8 (ours)",
    "int8_one": "one query, int8 (ours)",
    "reuse_one_by_one": "transformers, cache reused, query by query",
    "reuse_batch": "transformers, cache reused, batch of all queries",
    "full_pass_one": "transformers, one full pass, one query",
    "full_pass_all": "transformers, a full pass per query",
}


PREFIX_LENS = (128, 1024)
"""Between which the cost of a longer prefix is stated."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Sizes of the measured step."""

    prefix_len: int
    num_queries: int
    query_len: int
    """Tokens of a query, <USER_EMB> included."""


@dataclass(frozen=True, slots=True)
class Floor:
    """What a step must at least compute and read, and the time the machine's rates give for it."""

    flops: float
    num_bytes: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Timings:
    """Per road: wall-clock and CPU seconds of each repeat (all threads), and the last answer."""

    seconds: dict[str, list[float]]
    cpu_seconds: dict[str, list[float]]
    answers: dict[str, Any]


def step_floor(
    dims: ModelDims, load: Workload, rates: Rates, precision: Precision = "float32"
) -> Floor:
    """The larger of compute and reading: each weight and each key and value read once.

    Counted: matrix products only; in the last layer what follows attention for one row per query.
    In int8 the big products run at the int8 rate, attention at float32's.
    """
    tokens = load.num_queries * load.query_len
    inner = dims.num_heads * dims.head_dim
    qkv = dims.hidden_dim * (inner + 2 * dims.num_kv_heads * dims.head_dim)
    after = dims.hidden_dim * (inner + 3 * dims.intermediate_dim)
    seen = load.prefix_len + (load.query_len + 1) / 2
    attention = 2.0 * tokens * dims.num_layers * 2 * inner * seen
    all_tokens = dims.num_layers * qkv + (dims.num_layers - 1) * after
    dense = 2.0 * (tokens * all_tokens + load.num_queries * after)
    is_int8 = precision == "int8"
    num_bytes = (1.0 if is_int8 else 4.0) * dims.num_layers * (qkv + after)
    num_bytes += float(load.prefix_len * dims.kv_bytes_per_token)
    dense_seconds = dense / (rates.int8_gemm_flops if is_int8 else rates.gemm_flops)
    compute_seconds = dense_seconds + attention / rates.gemm_flops
    seconds = max(compute_seconds, num_bytes / rates.read_bytes)
    return Floor(dense + attention, num_bytes, seconds)


def main(argv: list[str] | None = None) -> int:
    """Measure, print a Markdown table and the result path as JSON; 1 when the roads disagree."""
    args = _parse(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    threads = args.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    result: dict[str, Any] = {
        "bench": "suffix_step",
        # Paths say nothing to a reader elsewhere.
        "config": {
            key: v for key, v in vars(args).items() if "bundle" not in key and key != "results"
        },
        "environment": msgspec.to_builtins(environment())
        | {"threads": threads, "load_average_before": os.getloadavg()[0]},
    }
    source = random_source(shape_named(args.shape), method_schema(), args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        chosen = {"packed": args.bundle, "int8": args.int8_bundle}
        runners = {
            road: open_runner(source, path or Path(scratch) / road, PRECISIONS[road], threads)
            for road, path in chosen.items()
        }
        result |= measure(runners, source, args)
    print(markdown(result))
    args.results.mkdir(parents=True, exist_ok=True)
    today = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d")
    commit = result["environment"]["commit"]
    variant = "" if args.shape == "qwen2.5-0.5b" else f"-{args.shape}"
    variant += "" if threads == os.cpu_count() else f"-{threads}-threads"
    file = args.results / f"suffix_step{variant}_{hardware_slug()}_{today}_{commit}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    is_ok = result["correctness"]["is_ok"]
    print(json.dumps({"ok": is_ok, "result": file.name, **result["ratios"]}))
    return 0 if is_ok else 1


def open_runner(
    source: ExportSource, path: Path, precision: Precision, threads: int
) -> BundleRunner:
    """A runner of the source's bundle at `path`, exported first where there is none."""
    if not path.exists():
        export_bundle(source, path, numbers=Numbers(precision=precision))
    return BundleRunner(open_bundle(path), num_threads=threads)


def our_roads(runners: dict[str, BundleRunner], task: Task) -> dict[str, Road]:
    """All queries and one query in each precision; the same over noise prefixes of two lengths."""
    roads: dict[str, Road] = {}
    for name, runner in runners.items():
        prefix = our_prefix(runner, task)
        runner.close(PREFIX)
        roads[name] = packed_step(runner, prefix, task.queries_NS)
        roads[f"{name}_one"] = packed_step(runner, prefix, task.queries_NS[:1])
        for length in PREFIX_LENS:
            noise = noise_prefix(runner, length)
            roads[f"{name}_prefix_{length}"] = packed_step(runner, noise, task.queries_NS)
    return roads


def measure(
    runners: dict[str, BundleRunner], source: ExportSource, args: argparse.Namespace
) -> dict[str, Any]:
    """Floors, timings, ratios and the comparison of every road's embeddings."""
    load = Workload(args.prefix_len, args.queries, args.query_len)
    dims, threads = runners["packed"].bundle.manifest.dims, torch.get_num_threads()
    tokens = load.num_queries * load.query_len
    rates = measure_rates(tokens, dims.hidden_dim, dims.intermediate_dim, threads)
    one = Workload(load.prefix_len, 1, load.query_len)
    floors = {}
    for name, precision in PRECISIONS.items():
        floors[name] = step_floor(dims, load, rates, precision)
        floors[f"{name}_one"] = step_floor(dims, one, rates, precision)
    for name, floor in floors.items():
        logger.info("floor of %s: %.1f ms", name, 1e3 * floor.seconds)
    task = make_task(source, load.prefix_len, load.num_queries, load.query_len)
    roads = {**our_roads(runners, task), **transformers_roads(source, task)}
    for name, road in roads.items():
        if name != "full_pass_all":  # long, and full_pass_one warms up the same code
            road()
    long = {"full_pass_all": args.full_repeats, "full_pass_one": max(2, args.full_repeats)}
    before = Busy.now()
    times = time_roads(roads, {name: long.get(name, args.repeats) for name in roads})
    others = Busy.now().others_since(before)
    median = {name: float(np.median(values)) for name, values in times.seconds.items()}
    median_cpu = {name: float(np.median(values)) for name, values in times.cpu_seconds.items()}
    return {
        "cpu_share_of_others": others,
        "rates": asdict(rates),
        "floors": {name: asdict(floor) for name, floor in floors.items()},
        "seconds": times.seconds,
        "cpu_seconds": times.cpu_seconds,
        "median_ms": {name: 1e3 * value for name, value in median.items()},
        "median_cpu_ms": {name: 1e3 * value for name, value in median_cpu.items()},
        "p95_ms": {name: 1e3 * float(np.percentile(v, 95)) for name, v in times.seconds.items()},
        "ratios": {
            **{f"{name}_over_floor": median[name] / floors[name].seconds for name in floors},
            **speedups(median, load.num_queries),
        },
        "cpu_time_ratios": speedups(median_cpu, load.num_queries),
        "correctness": agreement(times.answers),
    }


def speedups(median: dict[str, float], num_queries: int) -> dict[str, float]:
    """How many times longer each transformers road takes than ours; what a longer prefix costs."""
    found: dict[str, float] = {}
    for name, precision in PRECISIONS.items():
        peers = {
            "speedup_over_reuse_one_by_one": median["reuse_one_by_one"] / median[name],
            "speedup_over_reuse_batch": median["reuse_batch"] / median[name],
            "speedup_over_full_passes": median["full_pass_all"] / median[name],
            "one_query_speedup_over_reuse": median["reuse_one_by_one"]
            / num_queries
            / median[f"{name}_one"],
        }
        short, long = (median[f"{name}_prefix_{length}"] for length in PREFIX_LENS)
        peers[f"prefix_{PREFIX_LENS[1]}_over_{PREFIX_LENS[0]}"] = long / short
        found |= {f"{precision}_{key}": value for key, value in peers.items()}
    return found


def time_roads(roads: dict[str, Road], repeats: dict[str, int]) -> Timings:
    """In each round every road runs once, until its repeats are used up."""
    times = Timings({name: [] for name in roads}, {name: [] for name in roads}, {})
    for turn in range(max(repeats.values())):
        for name, road in roads.items():
            if turn < repeats[name]:
                # Threads of the other runtime may still spin; let them fall asleep.
                time.sleep(_SETTLE_SECONDS)
                start, cpu_start = time.perf_counter(), time.process_time()
                times.answers[name] = road()
                times.seconds[name].append(time.perf_counter() - start)
                times.cpu_seconds[name].append(time.process_time() - cpu_start)
        logger.info("round %d of %d", turn + 1, max(repeats.values()))
    return times


def agreement(answers: dict[str, Any]) -> dict[str, Any]:
    """Each road's embeddings against the float32 packed step's: cosine and largest difference.

    int8 rounds by design: its mean cosine counts. Steps over noise prefixes have no other side.
    """
    ours = answers["packed"]
    compared = {}
    for name, found in answers.items():
        if "_prefix_" in name:
            continue
        wanted = ours[: len(found)]
        cosines = (found * wanted).sum(-1)
        is_int8 = name.startswith("int8")
        apart = float(np.abs(found - wanted).max())
        is_near = cosines.min() >= MIN_COSINE and apart <= MAX_ABS_DIFFERENCE
        compared[name] = {
            "min_cosine": float(cosines.min()),
            "mean_cosine": float(cosines.mean()),
            "max_abs": apart,
            "is_ok": bool(cosines.mean() >= MIN_INT8_MEAN_COSINE if is_int8 else is_near),
        }
    between = float((ours @ ours.T)[~np.eye(len(ours), dtype=bool)].max()) if len(ours) > 1 else 0.0
    return {
        "is_ok": all(entry["is_ok"] for entry in compared.values()),
        "roads": compared,
        # If all queries had the same answer, agreement would prove nothing.
        "max_cosine_between_queries": between,
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as the table that documents show."""
    env, rates, floors = result["environment"], result["rates"], result["floors"]
    load = result["config"]
    lines = [
        f"{env['cpu']}, {env['cores']} cores, {env['threads']} threads; shape "
        f"{load['shape']}, prefix {load['prefix_len']}, {load['queries']} queries of "
        f"{load['query_len']} tokens. GEMM {rates['gemm_flops'] / 1e9:.0f} GFLOP/s (torch "
        f"{rates['torch_gemm_flops'] / 1e9:.0f}), int8 {rates['int8_gemm_flops'] / 1e9:.0f}, "
        f"reading {rates['read_bytes'] / 1e9:.1f} GB/s.",
        "",
        "| road | median ms | p95 ms | repeats | x floor | x packed | CPU ms | x packed, CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, title in TITLES.items():
        median = result["median_ms"][name]
        floor = floors.get(name)
        over = f"{median / 1e3 / floor['seconds']:.2f}" if floor else ""
        lines.append(
            f"| {title} | {median:.1f} | {result['p95_ms'][name]:.1f} | "
            f"{len(result['seconds'][name])} | {over} | "
            f"{median / result['median_ms']['packed']:.2f} | {result['median_cpu_ms'][name]:.0f} | "
            f"{result['median_cpu_ms'][name] / result['median_cpu_ms']['packed']:.2f} |"
        )
    lines.append("")
    for name, precision in PRECISIONS.items():
        floor, median = floors[name], result["median_ms"]
        lines.append(
            f"Floor of the {precision} step: {1e3 * floor['seconds']:.1f} ms "
            f"({floor['flops'] / 1e9:.0f} GFLOP, {floor['num_bytes'] / 1e9:.2f} GB); prefix of "
            + ", ".join(f"{n}: {median[f'{name}_prefix_{n}']:.1f} ms" for n in PREFIX_LENS)
            + "."
        )
    cosine = result["correctness"]["roads"]["int8"]["mean_cosine"]
    lines.append(
        f"Mean cosine of int8 to float32: {cosine:.5f}. Other processes used "
        f"{result['cpu_share_of_others']:.0%} of the machine meanwhile."
    )
    return "\n".join(lines)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.suffix_step", description=__doc__)
    parser.add_argument("--shape", default="qwen2.5-0.5b", help="qwen2.5-0.5b or tiny")
    parser.add_argument(
        "--bundle", type=Path, help="bundle of the shape's random weights; exported if absent"
    )
    parser.add_argument("--int8-bundle", type=Path, help="the same in int8; exported if absent")
    parser.add_argument("--prefix-len", type=int, default=760)
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--query-len", type=int, default=20, help="<USER_EMB> included")
    parser.add_argument("--repeats", type=int, default=9, help=f"at least {MIN_REPEATS}")
    parser.add_argument(
        "--full-repeats", type=int, default=1, help="of the full passes, which take long"
    )
    parser.add_argument("--threads", type=int, default=0, help="0 takes all cores")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results", help="output folder"
    )
    args = parser.parse_args(argv)
    if args.repeats < MIN_REPEATS:
        parser.error(
            f"--repeats {args.repeats}: at least {MIN_REPEATS}, so that p95 means something"
        )
    return args


if __name__ == "__main__":
    sys.exit(main())
