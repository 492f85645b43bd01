"""The engine a scenario asks for, with buckets that hold its steps, and its plan files."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import msgspec

from qanchor import config
from qanchor.bundle.buckets import BucketLimits, make_ladders
from qanchor.bundle.plans import PLANS_FILE
from qanchor.bundle.reader import Bundle
from qanchor_bench.bundles import CACHE_DIR
from qanchor_bench.scenario import BenchScenario
from qanchor_server.config import ServerConfig
from qanchor_server.engine import Engine
from qanchor_server.engine.choice import open_engine
from qanchor_server.engine.cuda import OrtRunner
from qanchor_server.engine.memory import HostMemory
from qanchor_server.engine.static import StaticEngine

logger = logging.getLogger(__name__)


def server_config(scenario: BenchScenario, bundle: Bundle, threads: int = 0) -> ServerConfig:
    """The server's settings for the scenario. Raises ConfigError for a wrong field of `server`."""
    settings: dict[str, Any] = {"intra_op_threads": threads, **_step_limits(scenario)}
    found = config.from_mapping(ServerConfig, settings | scenario.server, "server")
    if scenario.engine in ("cpu", "static"):
        return found
    plans = plans_dir(bundle, found.bucket_limits()) if scenario.engine == "tensorrt" else ""
    return msgspec.structs.replace(found, engine=scenario.engine, plans_dir=str(plans))


def open_scenario_engine(bundle: Bundle, scenario: BenchScenario, threads: int) -> Engine[Any]:
    """The server's engine over `bundle`, as the server makes it. Raises as `open_engine`."""
    settings = server_config(scenario, bundle, threads)
    if scenario.engine != "static":
        return open_engine(bundle, settings)
    manifest, memory = bundle.manifest, HostMemory()
    ladders = make_ladders(settings.bucket_limits(), manifest.limits, manifest.profile_schema)
    return StaticEngine(manifest, ladders, memory, OrtRunner(bundle, memory, {}))


def plans_dir(bundle: Bundle, limits: BucketLimits) -> Path:
    """Where the plan files of a bundle with such buckets are."""
    digest = hashlib.sha256(bundle.manifest.export_id.encode() + config.to_json(limits))
    return CACHE_DIR / f"plans-{digest.hexdigest()[:12]}"


def build_plans(scenario: BenchScenario, bundle: Bundle) -> None:
    """Build the scenario's plan files on this machine, unless they are there. Takes minutes.

    Raises ConfigError where TensorRT or a GPU is missing, BundleError for graphs it cannot take.
    """
    from qanchor_export.to_tensorrt import export_plans

    limits = server_config(scenario, bundle).bucket_limits()
    directory = plans_dir(bundle, limits)
    if not any(directory.glob(f"*/{PLANS_FILE}")):
        logger.info("building plan files in %s, once", directory)
        export_plans(bundle, directory, limits)


def _step_limits(scenario: BenchScenario) -> dict[str, int]:
    """Limits that hold every step of suites that measure steps; other suites keep the defaults."""
    if scenario.suite not in ("engine", "peers"):
        return {}
    users, queries, tokens = scenario.users, scenario.queries, scenario.suffix_lens
    # One size varies at a time from the base, the first of each.
    packed = (
        max(users) * queries[0] * tokens[0],
        users[0] * max(queries) * tokens[0],
        users[0] * queries[0] * max(tokens),
    )
    defaults = ServerConfig()
    return {
        "max_step_users": max(defaults.max_step_users, *users),
        "max_step_tokens": max(defaults.max_step_tokens, *packed),
    }
