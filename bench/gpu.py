"""The suffix step on a GPU: the commands for the table, the 1.0 ms target and the users held.

    python bench/gpu.py --engine cuda --precision float16 --bundle DIR      (made once, then kept)
    python bench/gpu.py --engine tensorrt --precision bfloat16 --bundle DIR --plans PLANS
    python bench/gpu.py --engine host --shape tiny                          (the script's own proof)

Plan files for the second are built with the sizes measured:

    qanchor export DIR PLANS --target tensorrt --set max_step_users=16 --set max_step_tokens=3200

One process, random weights, Qwen2.5-0.5B shape unless --shape says otherwise. Times are wall time
of one engine call: packing, upload, copy of the user's keys and values, graph, download. `--peers`
adds transformers on the same device. Every road's vectors are compared in the same run; the exit
code is 1 when one is wrong. Not run on a GPU yet.

Legend: N queries, S query length with <USER_EMB>, P prefix length, Z embedding_dim.
"""

import argparse
import dataclasses
import datetime
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np

from qanchor.bundle.buckets import make_ladders
from qanchor.bundle.manifest import Manifest, Precision
from qanchor.bundle.packing import SuffixQuery, UserSuffix, pack
from qanchor.bundle.reader import Bundle, open_bundle
from qanchor.bundle.tolerance import tolerances
from qanchor.data.prefix import ADAPTER_TOKEN
from qanchor.environment import environment
from qanchor_server.config import ServerConfig
from qanchor_server.engine import PrefixChunk
from qanchor_server.engine.choice import open_engine
from qanchor_server.engine.cuda import OrtRunner
from qanchor_server.engine.memory import HostMemory
from qanchor_server.engine.static import StaticEngine, StaticSlot
from qanchor_server.failures import Retryable
from qanchor_server.parity import check_parity
from qanchor_server.prefix_encoder import PrefixEncoder

logger = logging.getLogger("bench.gpu")

MAX_TEN_MS = 1.0
MAX_TEN_OVER_ONE = 1.6
MIN_REPEATS = 5
Vectors = Any
Road = Callable[[], Vectors]


@dataclass(frozen=True, slots=True)
class Size:
    """One measured step."""

    users: int
    queries: int
    query_len: int
    prefix_len: int

    @property
    def name(self) -> str:
        """The row's name."""
        return (
            f"{self.users} users x {self.queries} queries x {self.query_len} tokens, "
            f"prefix {self.prefix_len}"
        )


def main(argv: list[str] | None = None) -> int:
    """Measure, print a Markdown table and the result as JSON; 1 when a road is wrong."""
    args = _parse(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    with tempfile.TemporaryDirectory() as scratch:
        bundle = _bundle(args, Path(scratch))
        settings = _settings(args, bundle.manifest)
        engine = _engine(args.engine, bundle, settings)
        result = measure(engine, bundle, args)
    result["config"] = {
        key: value for key, value in vars(args).items() if key not in ("bundle", "results", "plans")
    }
    result["settings"] = msgspec.to_builtins(settings)
    result["environment"] = msgspec.to_builtins(environment())
    print(markdown(result))
    is_ok = all(check["is_ok"] for check in result["checks"].values())
    last: dict[str, Any] = {"ok": is_ok, **result["figures"]}
    if args.results:
        args.results.mkdir(parents=True, exist_ok=True)
        today = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d")
        commit = result["environment"]["commit"]
        name = f"gpu_{args.engine}-{args.precision}-{args.shape}_{today}_{commit}.json"
        (args.results / name).write_text(json.dumps(result, indent=2, default=str) + "\n")
        last["result"] = name
    print(json.dumps(last))
    return 0 if is_ok else 1


def measure(engine: StaticEngine, bundle: Bundle, args: argparse.Namespace) -> dict[str, Any]:
    """All sizes, the checks and the users that fit."""
    users = _Users(engine, bundle, args.seed)
    checks = {"engine = torch at export": _against_stored(engine, bundle)}
    sizes = step_sizes(args)
    base, one = sizes[0], dataclasses.replace(sizes[0], queries=1)
    packed_NZ = users.step(base)()
    alone = [users.step(one, first_query=number)() for number in range(base.queries)]
    allowed = tolerances(bundle.manifest)
    checks["packed = alone"] = _agree(packed_NZ, np.concatenate(alone), allowed.ways.max_abs)
    roads: dict[str, Road] = {size.name: users.step(size) for size in sizes}
    roads |= {f"prefill of {size}": users.prefill_road(size) for size in args.prefix_lens}
    if args.peers:
        peers = _peer_roads(users, base, args)
        for name, road in peers.items():
            found_NZ = road()
            wanted_NZ = packed_NZ[: len(found_NZ)]
            checks[f"{name} = engine"] = _agree(found_NZ, wanted_NZ, allowed.torch.max_abs)
        roads |= peers
    seconds, answers = time_roads(roads, args.repeats)
    checks["last timed answer = first"] = _agree(answers[base.name], packed_NZ, 0.0)
    checks["kept = encoded anew"] = _agree(
        users.step(base, is_fresh=True)(), packed_NZ, allowed.ways.max_abs
    )
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    figures = {
        "base_ms": 1e3 * medians[base.name],
        "base_over_one_query": medians[base.name] / medians[one.name],
        "users_held": users.fill(base.prefix_len, args.max_users),
    }
    # Stated for the method's shape on a GPU.
    is_target = args.shape == "qwen2.5-0.5b" and args.engine != "host"
    targets = {"base_ms": MAX_TEN_MS, "base_over_one_query": MAX_TEN_OVER_ONE}
    return {
        "seconds": seconds,
        "checks": checks,
        "figures": figures,
        "targets": targets if is_target else {},
        "bytes": _static_bytes(engine, bundle.manifest, base.prefix_len),
    }


def step_sizes(args: argparse.Namespace) -> list[Size]:
    """The base, one query, then one size varied at a time."""
    base = Size(1, args.queries, args.query_len, args.prefix_lens[0])
    sizes = [base, dataclasses.replace(base, queries=1)]
    sizes += [dataclasses.replace(base, prefix_len=length) for length in args.prefix_lens[1:]]
    sizes += [dataclasses.replace(base, users=count) for count in args.users]
    return list(dict.fromkeys(sizes))


class _Users:
    """Users of text tokens alone, encoded when first asked for, and steps over them."""

    def __init__(self, engine: StaticEngine, bundle: Bundle, seed: int) -> None:
        self.engine, self.bundle, self.seed = engine, bundle, seed
        self.slots: dict[tuple[int, int], StaticSlot] = {}

    def tokens(self, *shape_and_number: int) -> Any:
        """Random tokens; the cost of a step does not depend on which."""
        *shape, number = shape_and_number
        rng = np.random.default_rng((self.seed, *shape_and_number))
        assert number >= 0, "This is a bug: numbers count from 0."
        return rng.integers(0, self.bundle.tokenizer.get_vocab_size(), tuple(shape))

    def encode(self, prefix_len: int, number: int) -> StaticSlot:
        """A new slot with the prefix."""
        manifest, slot = self.bundle.manifest, self.engine.allocate_slot(prefix_len)
        tokens_P = self.tokens(prefix_len, number)
        chunk_len = ServerConfig().chunk_len
        for start in range(0, prefix_len, chunk_len):
            tokens = tokens_P[start : start + chunk_len]
            vectors = np.zeros((len(tokens), manifest.dims.slot_vector_dim), dtype=np.float32)
            adapter = np.full(len(tokens), ADAPTER_TOKEN, dtype=np.int64)
            self.engine.prefill(slot, PrefixChunk(tokens, adapter, vectors, start))
        return slot

    def slot(self, prefix_len: int, number: int) -> StaticSlot:
        """The kept slot of a user."""
        key = (prefix_len, number)
        if key not in self.slots:
            self.slots[key] = self.encode(*key)
        return self.slots[key]

    def queries_NS(self, size: Size) -> Any:
        """Token ids of the queries, the last of each is <USER_EMB>."""
        tokens_NS = self.tokens(size.query_len * 64, 0).reshape(64, size.query_len)
        tokens_NS[:, -1] = self.bundle.manifest.tokens.user_emb
        return tokens_NS

    def step(self, size: Size, *, first_query: int = 0, is_fresh: bool = False) -> Road:
        """A suffix step, packing included."""
        manifest = self.bundle.manifest
        rows = self.queries_NS(size)[first_query : first_query + size.queries].tolist()
        get = self.encode if is_fresh else self.slot
        slots = [get(size.prefix_len, number) for number in range(size.users)]

        def run() -> Vectors:
            queries = tuple(SuffixQuery(tuple(row[:-1])) for row in rows)
            packed = pack(
                [UserSuffix(size.prefix_len, queries)] * size.users,
                user_emb=manifest.tokens.user_emb,
                hidden_dim=manifest.dims.hidden_dim,
            )
            return self.engine.suffix(packed, slots)

        return run

    def prefill_road(self, prefix_len: int) -> Road:
        """Encoding a prefix into a new slot, which is given back."""

        def run() -> None:
            self.engine.free_slot(self.encode(prefix_len, 0))

        return run

    def fill(self, prefix_len: int, most: int) -> int:
        """Slots that can really be had, those in use included; the new ones are given back."""
        slots = []
        try:
            while len(slots) < most:
                slots.append(self.engine.allocate_slot(prefix_len))
        except Retryable:
            logger.info("memory is full after %d slots", len(slots))
        for slot in slots:
            self.engine.free_slot(slot)
        return len(slots) + len(self.slots)


def _peer_roads(users: _Users, base: Size, args: argparse.Namespace) -> dict[str, Road]:
    """transformers on the same device: cache reused one by one, and a full pass per query."""
    import torch
    from transformers import DynamicCache

    device = "cpu" if args.engine == "host" else "cuda"
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(
        args.precision, torch.float32
    )
    model: Any = _source(args).model
    decoder, head = model.decoder.to(device, dtype), model.head.to(device, dtype)
    prefix = torch.from_numpy(users.tokens(base.prefix_len, 0))[None].to(device)
    queries = torch.from_numpy(users.queries_NS(base)[: base.queries]).to(device)
    with torch.inference_mode():
        cache = DynamicCache(config=decoder.config)
        decoder(input_ids=prefix, past_key_values=cache, use_cache=True)

    def vectors(states: list[Any]) -> Vectors:
        # The copy to the host waits for the device.
        return head(torch.cat(states)).float().cpu().numpy()

    @torch.inference_mode()
    def one_by_one() -> Vectors:
        states = []
        for row in queries:
            out = decoder(input_ids=row[None], past_key_values=cache, use_cache=True)
            states.append(out.last_hidden_state[:, -1])
            cache.crop(-len(row))
        return vectors(states)

    @torch.inference_mode()
    def full_passes() -> Vectors:
        return vectors(
            [
                decoder(
                    input_ids=torch.cat([prefix, row[None]], dim=1), use_cache=False
                ).last_hidden_state[:, -1]
                for row in queries
            ]
        )

    return {
        "transformers, cache reused, query by query": one_by_one,
        "transformers, a full pass per query": full_passes,
    }


def time_roads(
    roads: dict[str, Road], repeats: int
) -> tuple[dict[str, list[float]], dict[str, Vectors]]:
    """In each round every road runs once; two rounds before that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in roads}
    answers: dict[str, Vectors] = {}
    for turn in range(repeats + 2):
        for name, road in roads.items():
            start = time.perf_counter()
            answers[name] = road()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds, answers


def markdown(result: dict[str, Any]) -> str:
    """The result as a table for documents."""
    env, config = result["environment"], result["config"]
    lines = [
        f"engine {config['engine']}, {config['precision']}, shape {config['shape']}, commit "
        f"{env['commit']}; {result['bytes']['per_user'] / 2**20:.2f} MiB per user, "
        f"{result['figures']['users_held']} users held.",
        "",
        "| step | p50 ms | p95 ms | p99 ms | repeats |",
        "|---|---|---|---|---|",
    ]
    for name, values in result["seconds"].items():
        p50, p95, p99 = (1e3 * float(np.percentile(values, p)) for p in (50, 95, 99))
        lines.append(f"| {name} | {p50:.3f} | {p95:.3f} | {p99:.3f} | {len(values)} |")
    lines.append("")
    for name, bound in result["targets"].items():
        value = result["figures"][name]
        lines.append(
            f"- {name} {value:.3f}, at most {bound}: {'met' if value <= bound else 'MISSED'}"
        )
    for name, check in result["checks"].items():
        verdict = "right" if check["is_ok"] else "WRONG"
        lines.append(f"- {verdict}: {name} (max abs difference {check['max_abs']:.1e})")
    return "\n".join(lines)


def _against_stored(engine: StaticEngine, bundle: Bundle) -> dict[str, Any]:
    defaults = ServerConfig()
    encoder: PrefixEncoder[StaticSlot] = PrefixEncoder(
        engine,
        bundle,
        chunk_len=defaults.chunk_len,
        max_event_tokens_per_step=defaults.max_event_tokens_per_step,
        max_cached_texts=defaults.event_vector_cache,
    )
    # Raises where a difference exceeds what the bundle's types allow.
    return {"is_ok": True, "max_abs": check_parity(engine, encoder, bundle)}


def _agree(found_NZ: Vectors, wanted_NZ: Vectors, max_abs: float) -> dict[str, Any]:
    worst = float(np.abs(found_NZ - wanted_NZ).max())
    return {"is_ok": bool(worst <= max_abs), "max_abs": worst}


def _static_bytes(engine: StaticEngine, manifest: Manifest, prefix_len: int) -> dict[str, int]:
    return {
        "per_user": prefix_len * manifest.dims.kv_bytes_per_token,
        "weights": manifest.files["weights.bin"].num_bytes,
        "working": engine.num_working_bytes,
    }


def _bundle(args: argparse.Namespace, scratch: Path) -> Bundle:
    path = args.bundle or scratch / "bundle"
    if not path.exists():
        from qanchor_export.bundle_writer import export_bundle
        from qanchor_export.weights import Numbers

        export_bundle(_source(args), path, numbers=Numbers(precision=args.precision))
    return open_bundle(path)


def _source(args: argparse.Namespace) -> Any:
    """A random model whose schema has room for the longest prefix measured."""
    from qanchor_export.random_source import method_schema, random_source, shape_named

    schema = method_schema()
    first, *rest = schema.modalities
    roomy = msgspec.structs.replace(first, max_events=max(first.max_events, *args.prefix_lens))
    schema = msgspec.structs.replace(schema, modalities=(roomy, *rest))
    return random_source(shape_named(args.shape), schema, args.seed)


def _settings(args: argparse.Namespace, manifest: Manifest) -> ServerConfig:
    tokens = args.query_len * max(args.queries, 1) * max([1, *args.users])
    return ServerConfig(
        engine="cpu" if args.engine == "host" else args.engine,
        plans_dir=str(args.plans or ""),
        max_step_users=max([1, *args.users]),
        max_step_tokens=max(tokens, 3 * manifest.limits.max_query_len),
    )


def _engine(name: str, bundle: Bundle, settings: ServerConfig) -> StaticEngine:
    if name != "host":
        opened = open_engine(bundle, settings)
        assert isinstance(opened, StaticEngine), "This is a bug: GPU engines are static."
        return opened
    manifest, memory = bundle.manifest, HostMemory()
    ladders = make_ladders(settings.bucket_limits(), manifest.limits, manifest.profile_schema)
    return StaticEngine(manifest, ladders, memory, OrtRunner(bundle, memory, {}))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/gpu.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--engine", choices=("cuda", "tensorrt", "host"), default="cuda")
    parser.add_argument("--shape", default="qwen2.5-0.5b", help="qwen2.5-0.5b or tiny")
    parser.add_argument("--precision", choices=get_args(Precision), default="float16")
    parser.add_argument("--bundle", type=Path, help="bundle of the shape; exported if absent")
    parser.add_argument("--plans", type=Path, help="tensorrt: of `export --target tensorrt`")
    parser.add_argument("--queries", type=int, default=10, help="per user; at most 64")
    parser.add_argument("--query-len", type=int, default=20, help="<USER_EMB> included")
    parser.add_argument("--prefix-lens", type=int, nargs="+", default=[760, 128, 256, 512, 1024])
    parser.add_argument("--users", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--repeats", type=int, default=200, help=f"at least {MIN_REPEATS}")
    parser.add_argument("--peers", action="store_true", help="also transformers on this device")
    parser.add_argument("--max-users", type=int, default=1_000_000, help="stop filling memory here")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    parser.add_argument("--results", type=Path, help="folder for the result file")
    args = parser.parse_args(argv)
    if args.repeats < MIN_REPEATS:
        parser.error(f"--repeats {args.repeats}: at least {MIN_REPEATS}")
    return args


if __name__ == "__main__":
    sys.exit(main())
