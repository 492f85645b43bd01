"""The bundle that a scenario measures: exported once per shape, seed and exporter, then kept."""

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import qanchor
import qanchor_export
from qanchor.errors import ConfigError
from qanchor_bench.scenario import BenchScenario

if TYPE_CHECKING:
    from qanchor_export.source import ExportSource

logger = logging.getLogger(__name__)

CACHE_DIR = Path(__file__).resolve().parents[2] / "build" / "bench_bundles"


def bundle_of(scenario: BenchScenario, cache: Path = CACHE_DIR) -> Path:
    """The scenario's bundle, exported into `cache` where it is not there yet."""
    if scenario.bundle:
        return Path(scenario.bundle)
    kind = f"{scenario.precision}-{scenario.kv_dtype}" if scenario.kv_dtype else scenario.precision
    path = cache / f"{scenario.shape}-{kind}-{scenario.seed}-{_exporter_digest()}"
    if not path.exists():
        logger.info("exporting %s, once", path.name)
        _export(scenario, path)
    return path


def source_of(scenario: BenchScenario) -> "ExportSource":
    """The torch model of the scenario's random shape.

    Raises ConfigError where the scenario names a bundle, which holds no torch model.
    """
    from qanchor_export.random_source import method_schema, random_source, shape_named

    if scenario.bundle:
        raise ConfigError(
            "bundle", scenario.bundle, "this suite needs the torch model itself", "set shape"
        )
    return random_source(shape_named(scenario.shape), method_schema(), scenario.seed)


def _export(scenario: BenchScenario, path: Path) -> None:
    from qanchor_export.bundle_writer import export_bundle
    from qanchor_export.weights import Numbers

    numbers = Numbers(precision=scenario.precision, kv_dtype=scenario.kv_dtype)
    export_bundle(source_of(scenario), path, numbers=numbers)


def _exporter_digest() -> str:
    """Changes with every file that decides what an export holds."""
    core = Path(qanchor.__file__).parent
    folders = (Path(qanchor_export.__file__).parent, core / "bundle", core / "encoder")
    files = [file for folder in folders for file in folder.glob("*.py")]
    digest = hashlib.sha256()
    for file in sorted([*files, core / "towers.py", core / "tokenization.py"]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:8]
