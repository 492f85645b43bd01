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
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from qanchor.bundle.reader import Bundle, open_bundle
from qanchor.config import to_json
from qanchor.data.profile import DAY_SECONDS
from qanchor.errors import ConfigError, QAnchorError
from qanchor_server.admission import Admission
from qanchor_server.config import ServerConfig, check_against_model, slab_capacities
from qanchor_server.core import Core
from qanchor_server.disk_files import HEADER_BYTES, DiskFiles, FileIdentity
from qanchor_server.engine import Engine
from qanchor_server.health import Health
from qanchor_server.kv_mover import KvMover
from qanchor_server.kv_pool import KvPool
from qanchor_server.kv_tiers import EXPIRE_EVERY, KvTiers, TierBudgets
from qanchor_server.parity import check_parity
from qanchor_server.prefix_encoder import PrefixEncoder
from qanchor_server.profiles.directory import ProfileDirectory
from qanchor_server.profiles.store import ProfileStore
from qanchor_server.resolve import Resolver
from qanchor_server.scenario_catalog import ScenarioCatalog
from qanchor_server.scheduler import Scheduler, SchedulerLimits
from qanchor_server.service import add_services
from qanchor_server.step_runner import EngineParts, WorkerModel
from qanchor_server.tls import server_credentials
from qanchor_server.worker import Pace, Worker

if TYPE_CHECKING:
    from qanchor_server.metrics import Metrics

log = logging.getLogger(__name__)

KV_DIR = "kv"
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
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable_server_reflection(
            (*names, "grpc.health.v1.Health", reflection.SERVICE_NAME), self._grpc
        )
        try:
            credentials = server_credentials(config)
            if credentials is None:
                port = self._grpc.add_insecure_port(config.address)
            else:
                port = self._grpc.add_secure_port(config.address, credentials)
        except (RuntimeError, ConfigError):
            await self.core.directory.close()
            raise
        await self._grpc.start()
        self._loop = asyncio.get_running_loop()
        self.core.worker.start(
            self._loop,
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

    def request_reload(self) -> None:
        """Begin to read the scenario files again; the outcome is logged."""
        self._reloading = asyncio.create_task(self._reload())

    async def _reload(self) -> None:
        try:
            reloaded = await self.core.reload_scenarios()
        except QAnchorError as error:
            log.error("scenarios not reloaded: %s", error)
            return
        log.info("scenarios changed: %s, removed: %s", reloaded.changed, reloaded.removed)

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
        check_parity(engine, encoder, self._bundle, self.core.resolver.reader)
        files = self._open_disk_tier(engine.slot_layout)
        return EngineParts(
            engine, encoder, KvMover(engine, files, host_bytes=self._config.kv_host_bytes)
        )

    def _open_disk_tier(self, layout: str) -> DiskFiles | None:
        """Take in what an earlier run left of this model; without a usable disk: None.

        Files of users whose profile is no longer stored are deleted, and all where the tier is off:
        nobody would delete a user's there.
        """
        config = self._config
        directory = Path(config.kv_disk_dir or Path(config.data_dir) / KV_DIR)
        if not config.kv_disk_bytes and not directory.is_dir():
            return None
        identity = FileIdentity(self._bundle.manifest.model_id, layout)
        try:
            files = DiskFiles(directory, identity)
            found = list(files.scan())
            user_ids = [file.content.user_id for file in found if config.kv_disk_bytes]
            stored = asyncio.run_coroutine_threadsafe(
                self.core.directory.stored(user_ids), self._loop
            ).result()
            kept = [file for file in found if file.content.user_id in stored]
            for file in found:
                if file.content.user_id not in stored:
                    files.unlink(file.file_id)
        except OSError as error:
            log.error("kv_disk_dir=%s: %s; the disk tier is off", directory, error)
            return None
        if not config.kv_disk_bytes:
            files.close()
            return None
        self.core.worker.adopt(kept, time.time())
        log.info("disk tier: %d users of an earlier run in %s", len(kept), directory)
        return files

    def _on_ready(self) -> None:
        self._serving = asyncio.create_task(self._begin_serving())

    async def _begin_serving(self) -> None:
        if self._stop.is_set():
            return
        self.core.admission.open()
        await self._health.set_serving()
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
        if self.core.metrics is not None:
            await asyncio.to_thread(self.core.metrics.close)


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
    loop.add_signal_handler(signal.SIGHUP, server.request_reload)
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
    """Open a bundle and serve it with the engine of the settings; returns the exit code.

    Raises BundleError, ConfigError, StoreError.
    """
    # Only here: the rest of the server also runs with another engine and without ONNX Runtime.
    from qanchor_server.engine.choice import open_engine

    bundle = open_bundle(bundle_dir)
    log.info("settings: %s", to_json(config).decode())
    sys.setswitchinterval(_SWITCH_SECONDS)
    return asyncio.run(
        run(config, bundle, lambda: open_engine(bundle, config), port_file=port_file)
    )


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
        ttl_s=config.kv_ttl_seconds,
    )
    tiers = KvTiers(
        TierBudgets(
            host_bytes=config.kv_host_bytes,
            disk_bytes=config.kv_disk_bytes,
            bytes_per_token=kv_bytes_per_token,
            header_bytes=HEADER_BYTES,
            ttl_s=config.kv_ttl_seconds,
        )
    )
    limits = SchedulerLimits(
        max_step_tokens=config.max_step_tokens,
        max_step_users=config.max_step_users,
        max_suffix_run=config.max_suffix_run,
        prefill_patience=config.prefill_patience,
        max_read_seconds=config.max_disk_read_seconds,
    )
    ttl_s = config.kv_ttl_seconds
    pace = Pace(idle_s=ttl_s / EXPIRE_EVERY or None, flush_s=config.kv_flush_seconds)
    model = WorkerModel(
        user_emb=manifest.tokens.user_emb,
        hidden_dim=manifest.dims.hidden_dim,
        embedding_dim=manifest.dims.embedding_dim,
    )
    resolver = Resolver(bundle, max_cached_queries=config.query_cache, max_unread=config.max_queue)
    scenarios = Path(config.scenarios) if config.scenarios else None
    catalog = ScenarioCatalog(bundle, scenarios, resolver)
    admission = Admission(
        max_queue=config.max_queue, max_queries_per_request=config.max_queries_per_request
    )
    worker: Worker[Any] = Worker(
        pool=pool,
        tiers=tiers,
        scheduler=Scheduler(pool, tiers, limits),
        model=model,
        pace=pace,
        clock=time.monotonic,
    )
    directory = ProfileDirectory(
        lambda: ProfileStore(
            Path(config.data_dir),
            window_s=manifest.profile_schema.window_days * DAY_SECONDS,
            max_events=config.max_profile_events,
        ),
        manifest,
        max_prepared=config.prepared_prefix_cache,
    )
    return Core(
        config=config,
        bundle=bundle,
        resolver=resolver,
        catalog=catalog,
        admission=admission,
        directory=directory,
        worker=worker,
        now_s=now_s,
        metrics=_make_metrics(config, worker, admission, manifest.model_id),
    )


def _make_metrics(
    config: ServerConfig, worker: Worker[Any], admission: Admission, model_id: str
) -> "Metrics | None":
    if not config.metrics_address:
        return None
    # Only here: a server without metrics runs without the package.
    from qanchor_server.metrics import Metrics

    return Metrics(config.metrics_address, worker=worker, admission=admission, model_id=model_id)
