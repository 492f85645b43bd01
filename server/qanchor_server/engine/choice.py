"""The engine a server's settings ask for; the libraries of the others are not imported."""

import logging
import os
from typing import Any

from qanchor.bundle.buckets import Ladders, make_ladders
from qanchor.bundle.manifest import WEIGHTS_FILE
from qanchor.bundle.reader import Bundle
from qanchor.errors import ConfigError
from qanchor_server.config import ServerConfig
from qanchor_server.engine import Engine
from qanchor_server.engine.static import StaticEngine

log = logging.getLogger(__name__)


def num_lanes(bundle: Bundle, config: ServerConfig) -> int:
    """engine=cpu: users of a suffix step that run side by side, a thread each; 1: one by one.

    A small model's operators are too short to share: on two cores, two users side by side take two
    thirds of the time of one after the other with both threads on each (docs/log.md).
    """
    if (bundle.path / WEIGHTS_FILE).stat().st_size > config.side_by_side_bytes:
        return 1
    return config.intra_op_threads or os.cpu_count() or 1


def open_engine(bundle: Bundle, config: ServerConfig) -> Engine[Any]:
    """Open the engine. Raises BundleError, ConfigError, and Retryable when out of memory."""
    if config.engine == "cpu":
        from qanchor_server.engine.ort import OrtEngine, OrtOptions

        options = OrtOptions(
            intra_op_threads=config.intra_op_threads,
            allow_spinning=config.allow_spinning,
            lanes=num_lanes(bundle, config),
        )
        return OrtEngine(bundle, options)
    try:
        engine, ladders = _open_gpu(bundle, config)
    except ModuleNotFoundError as error:
        raise ConfigError(
            "engine",
            config.engine,
            f"{error.name} is not installed",
            f"install qanchor[{'gpu' if config.engine == 'cuda' else 'tensorrt'}]",
        ) from None
    log.info("%s: %d bytes of working memory", config.engine, engine.num_working_bytes)
    if config.cuda_graphs:
        engine.warm_up(ladders.warm_up())
    return engine


def _open_gpu(bundle: Bundle, config: ServerConfig) -> tuple[StaticEngine, Ladders]:
    if config.engine == "tensorrt":
        from qanchor_server.engine.trt import TrtOptions, open_trt_engine

        options = TrtOptions(
            plans_dir=config.plans_dir,
            device_id=config.device_id,
            cuda_graphs=config.cuda_graphs,
        )
        return open_trt_engine(bundle, config.bucket_limits(), options)
    from qanchor_server.engine.cuda import CudaOptions, open_cuda_engine

    manifest = bundle.manifest
    ladders = make_ladders(config.bucket_limits(), manifest.limits, manifest.profile_schema)
    cuda = CudaOptions(
        device_id=config.device_id,
        arena_bytes=config.gpu_arena_bytes,
        cuda_graphs=config.cuda_graphs,
    )
    return open_cuda_engine(bundle, ladders, cuda), ladders
