"""A server process: parts put together, started, drained, ended.

1. `start`: listen, health NOT_SERVING, open the profile store, start the worker.
2. The worker opens the engine and proves parity; then the door opens and health says SERVING.
3. `request_stop` (SIGTERM, SIGINT) or a fatal engine failure begins the drain: health NOT_SERVING,
   no new requests, those in flight get `grace_seconds`.
4. `wait_closed` returns the exit code: 0 after a drain, 1 after a failure.
"""

import asyncio
import gc
import logging
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection

from qanchor.bundle.reader import Bundle, open_bundle
from qanchor.config import to_json
from qanchor.data.profile import DAY_SECONDS
from qanchor_server.admission import Admission
from qanchor_server.config import ServerConfig, check_against_model, slab_capacities
from qanchor_server.core import Core
from qanchor_server.engine import Engine
from qanchor_server.health import Health
from qanchor_server.kv_pool import KvPool
from qanchor_server.parity import check_parity
from qanchor_server.prefix_encoder import PrefixEncoder
from qanchor_server.profiles.directory import ProfileDirectory
from qanchor_server.profiles.store import ProfileStore
from qanchor_server.resolve import Resolver
from qanchor_server.scheduler import Scheduler, SchedulerLimits
from qanchor_server.service import add_services
from qanchor_server.worker import EngineParts, Worker, WorkerModel

log = logging.getLogger(__name__)

# After a step the worker needs the interpreter lock to start the next one. At the usual 5 ms it
# waits that long whenever the event loop is busy, and the device with it.
_SWITCH_SECONDS = 0.0005


class Server:
    """One bundle served on one address. All methods run on one event loop."""

    def __init__(
        self,
        config: ServerConfig,
        bundle: Bundle,
        make_engine: Callable[[], Engine[Any]],
        *,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        """`make_engine` is called on the worker thread. Raises ConfigError, BundleError."""
        self._config = config
        self._bundle = bundle
        self._make_engine = make_engine
        self.core = _make_core(config, bundle, now_s)
        self._stop = asyncio.Event()
        self._ready = asyncio.Event()
        self._failure: Exception | None = None
        self._closing: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listen and start the worker; returns the bound port. Raises StoreError, RuntimeError."""
        config = self._config
        await self.core.directory.open()
        self._grpc = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                # Two servers on one port would share the callers by chance.
                ("grpc.so_reuseport", 0),
            ]
        )
        names = add_services(self._grpc, self.core)
        self._health = Health(names)
        await self._health.add_to(self._grpc)
        reflection.enable_server_reflection(
            (*names, "grpc.health.v1.Health", reflection.SERVICE_NAME), self._grpc
        )
        try:
            port = self._grpc.add_insecure_port(config.address)
        except RuntimeError:
            await self.core.directory.close()
            raise
        await self._grpc.start()
        self.core.worker.start(
            asyncio.get_running_loop(),
            self._prepare,
            on_ready=self._on_ready,
            on_fatal=self._on_fatal,
        )
        self._closing = asyncio.create_task(self._close_when_asked())
        return int(port)

    async def wait_ready(self) -> bool:
        """Wait for SERVING; False when the server failed or was stopped before."""
        ready = asyncio.create_task(self._ready.wait())
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait((ready, stop), return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        stop.cancel()
        return self._ready.is_set()

    def request_stop(self) -> None:
        """Begin the drain."""
        self._stop.set()

    async def wait_closed(self) -> int:
        """Wait for the end of the drain; returns the exit code."""
        assert self._closing is not None
        await self._closing
        return 0 if self._failure is None else 1

    def _prepare(self) -> EngineParts[Any]:
        engine = self._make_engine()
        encoder = PrefixEncoder(
            engine,
            self._bundle,
            chunk_len=self._config.chunk_len,
            max_event_tokens_per_step=self._config.max_event_tokens_per_step,
            max_cached_texts=self._config.event_vector_cache,
        )
        check_parity(engine, encoder, self._bundle)
        return EngineParts(engine, encoder)

    def _on_ready(self) -> None:
        self._serving = asyncio.create_task(self._begin_serving())

    async def _begin_serving(self) -> None:
        if self._stop.is_set():
            return
        self.core.admission.open()
        await self._health.set_serving(True)
        self._ready.set()

    def _on_fatal(self, error: Exception) -> None:
        self._failure = error
        self._stop.set()

    async def _close_when_asked(self) -> None:
        await self._stop.wait()
        self.core.admission.close("the server is draining; retry elsewhere")
        await self._health.drain()
        await self._grpc.stop(self._config.grace_seconds)
        self.core.worker.stop()
        await self.core.worker.join()
        await self.core.directory.close()


async def run(
    config: ServerConfig,
    bundle: Bundle,
    make_engine: Callable[[], Engine[Any]],
    *,
    port_file: Path | None = None,
) -> int:
    """Serve until SIGTERM, SIGINT or a fatal failure; returns the exit code."""
    server = Server(config, bundle, make_engine)
    port = await server.start()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.request_stop)
    if await server.wait_ready():
        # What start-up left stays: full collections would walk it again and again, 16 ms each.
        gc.collect()
        gc.freeze()
        host = config.address.rpartition(":")[0]
        manifest = bundle.manifest
        if port_file is not None:
            port_file.write_text(f"{port}\n")
        print(
            f"qanchor: serving {manifest.recipe} {manifest.export_id} on {host}:{port}",
            file=sys.stderr,
            flush=True,
        )
    return await server.wait_closed()


def serve(bundle_dir: Path, config: ServerConfig, *, port_file: Path | None = None) -> int:
    """Open a bundle and serve it with ONNX Runtime; returns the exit code.

    Raises BundleError, ConfigError, StoreError.
    """
    # Only here: the rest of the server also runs with another engine and without ONNX Runtime.
    from qanchor_server.engine.ort import OrtEngine, OrtOptions

    bundle = open_bundle(bundle_dir)
    log.info("settings: %s", to_json(config).decode())
    sys.setswitchinterval(_SWITCH_SECONDS)
    options = OrtOptions(
        execution_provider=config.execution_provider,
        intra_op_threads=config.intra_op_threads,
        allow_spinning=config.allow_spinning,
    )
    return asyncio.run(run(config, bundle, lambda: OrtEngine(bundle, options), port_file=port_file))


def _make_core(config: ServerConfig, bundle: Bundle, now_s: Callable[[], float]) -> Core:
    manifest = bundle.manifest
    kv_bytes_per_token = manifest.dims.kv_bytes_per_token
    check_against_model(
        config,
        max_prefix_len=manifest.limits.max_prefix_len,
        max_query_len=manifest.limits.max_query_len,
        kv_bytes_per_token=kv_bytes_per_token,
    )
    pool = KvPool(
        budget_bytes=config.kv_pool_bytes,
        bytes_per_token=kv_bytes_per_token,
        capacities=slab_capacities(config.slab_ladder, manifest.limits.max_prefix_len),
    )
    limits = SchedulerLimits(
        max_step_tokens=config.max_step_tokens,
        max_step_users=config.max_step_users,
        max_suffix_run=config.max_suffix_run,
    )
    model = WorkerModel(
        user_emb=manifest.tokens.user_emb,
        hidden_dim=manifest.dims.hidden_dim,
        embedding_dim=manifest.dims.embedding_dim,
    )
    return Core(
        config=config,
        bundle=bundle,
        resolver=Resolver(bundle, max_cached_queries=config.query_cache),
        admission=Admission(
            max_queue=config.max_queue, max_queries_per_request=config.max_queries_per_request
        ),
        directory=ProfileDirectory(
            lambda: ProfileStore(
                Path(config.data_dir),
                window_s=manifest.profile_schema.window_days * DAY_SECONDS,
                max_events=config.max_profile_events,
            ),
            manifest,
            max_prepared=config.prepared_prefix_cache,
        ),
        worker=Worker(
            pool=pool, scheduler=Scheduler(pool, limits), model=model, clock=time.monotonic
        ),
        now_s=now_s,
    )
