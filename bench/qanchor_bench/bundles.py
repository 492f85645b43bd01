"""The bundle that a scenario measures: exported once per model, types and exporter, then kept."""

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

import qanchor
import qanchor_export
from qanchor.config import ProfileSchema
from qanchor.errors import ConfigError
from qanchor_bench.scenario import BenchScenario

if TYPE_CHECKING:
    from qanchor_export.source import ExportSource

logger = logging.getLogger(__name__)

CACHE_DIR = Path(__file__).resolve().parents[2] / "build" / "bench_bundles"


def bundle_of(scenario: BenchScenario, cache: Path = CACHE_DIR) -> Path:
    """The scenario's bundle, exported into `cache` where it is not there yet.

    Raises ConfigError for suite accuracy without checkpoint and data set.
    """
    if scenario.suite == "accuracy" and not (scenario.checkpoint and scenario.dataset):
        raise ConfigError(
            "checkpoint, dataset",
            (scenario.checkpoint, scenario.dataset),
            "accuracy needs a trained model and its labelled users",
            "--set checkpoint=RUN/checkpoint --set dataset=DIR",
        )
    if scenario.bundle:
        return Path(scenario.bundle)
    path = cache / f"{_name(scenario)}-{_exporter_digest()}"
    if not path.exists():
        logger.info("exporting %s, once", path.name)
        _export(scenario, path)
    return path


def source_of(scenario: BenchScenario) -> "ExportSource":
    """The scenario's torch model: of its checkpoint, or random of its shape.

    Raises ConfigError where the scenario names a bundle, which holds no torch model.
    """
    if scenario.bundle:
        raise ConfigError(
            "bundle", scenario.bundle, "this suite needs the torch model itself", "set shape"
        )
    if scenario.checkpoint:
        from qanchor.checkpoint import load_checkpoint
        from qanchor_export import source

        return source.source_of(load_checkpoint(Path(scenario.checkpoint)))
    from qanchor_export.random_source import method_schema, random_source, shape_named

    schema = _with_room(scenario, method_schema())
    return random_source(shape_named(scenario.shape), schema, scenario.seed)


def _export(scenario: BenchScenario, path: Path) -> None:
    from qanchor_export.bundle_writer import export_bundle
    from qanchor_export.calibration import calibration_users
    from qanchor_export.quantize import Calibration
    from qanchor_export.weights import Numbers

    source = source_of(scenario)
    numbers = Numbers(precision=scenario.precision, kv_dtype=scenario.kv_dtype)
    calibration = None
    if scenario.dataset:
        users = calibration_users(source, Path(scenario.dataset), scenario.calibrate_users)
        calibration = Calibration(users)
    export_bundle(source, path, numbers=numbers, calibration=calibration)


def _name(scenario: BenchScenario) -> str:
    """Names model, types, and what else decides an export: seed and room, or files read."""
    kind = f"{scenario.precision}-{scenario.kv_dtype}" if scenario.kv_dtype else scenario.precision
    if scenario.dataset and "int8" in (scenario.precision, scenario.kv_dtype):
        kind += f"-{_files_digest(Path(scenario.dataset))}x{scenario.calibrate_users}"
    if scenario.checkpoint:
        return f"checkpoint-{_files_digest(Path(scenario.checkpoint))}-{kind}"
    room = f"-{max(scenario.prefix_lens)}" if _has_buckets(scenario) else ""
    return f"{scenario.shape}-{kind}-{scenario.seed}{room}"


def _has_buckets(scenario: BenchScenario) -> bool:
    return scenario.engine != "cpu"


def _with_room(scenario: BenchScenario, schema: ProfileSchema) -> ProfileSchema:
    """A schema whose longest prefix, and so the largest bucket, holds every prefix measured."""
    if not _has_buckets(scenario):
        return schema
    first, *rest = schema.modalities
    most = max(first.max_events, *scenario.prefix_lens)
    roomy = msgspec.structs.replace(first, max_events=most)
    return msgspec.structs.replace(schema, modalities=(roomy, *rest))


def _files_digest(directory: Path) -> str:
    """Changes when a file of the directory does. Raises ConfigError where there is none."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    if not files:
        raise ConfigError("path", str(directory), "no files there", "check --set")
    digest = hashlib.sha256()
    for file in files:
        state = file.stat()
        digest.update(f"{file.relative_to(directory)} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()[:8]


def _exporter_digest() -> str:
    """Changes with every file that decides what an export holds."""
    core = Path(qanchor.__file__).parent
    folders = (Path(qanchor_export.__file__).parent, core / "bundle", core / "encoder")
    files = [file for folder in folders for file in folder.glob("*.py")]
    digest = hashlib.sha256()
    for file in sorted([*files, core / "towers.py", core / "tokenization.py"]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:8]
