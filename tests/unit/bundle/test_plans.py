"""A plan set is found by GPU, TensorRT version and graphs, and refused with the reason."""

import os
from pathlib import Path

import pytest

from qanchor import config
from qanchor.bundle.buckets import BucketLimits, Ladders, make_ladders
from qanchor.bundle.manifest import Manifest
from qanchor.bundle.plans import (
    PLANS_FILE,
    GraphPlan,
    PlanSet,
    Target,
    check_ladders,
    find_plans,
    graphs_hash,
    set_name,
)
from qanchor.bundle.reader import file_sha256, open_bundle
from qanchor.errors import BundleError, ConfigError

TARGET = Target(gpu="NVIDIA L20", compute_capability="8.9", tensorrt_version="11.4.0.106")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    pytest.importorskip("torch")
    from qanchor_export.bundle_writer import export_bundle
    from qanchor_export.random_source import method_schema, random_source, shape_named

    path = tmp_path_factory.mktemp("plans") / "bundle"
    export_bundle(random_source(shape_named("tiny"), method_schema()), path)
    return open_bundle(path).manifest


def ladders_of(manifest: Manifest, **limits: object) -> Ladders:
    found = BucketLimits(**limits)  # type: ignore[arg-type] - any limit by keyword
    return make_ladders(found, manifest.limits, manifest.profile_schema)


def write_set(directory: Path, manifest: Manifest, **changes: object) -> Path:
    """A set whose plan file holds a few bytes; `changes` are fields of the PlanSet."""
    ladders = ladders_of(manifest)
    values = {
        "gpu": TARGET.gpu,
        "compute_capability": TARGET.compute_capability,
        "tensorrt_version": TARGET.tensorrt_version,
        "export_id": manifest.export_id,
        "graphs_hash": graphs_hash(manifest),
        "ladders": ladders,
        **changes,
    }
    path = directory / f"set-{len(list(directory.iterdir()))}"
    path.mkdir()
    (path / "suffix.plan").write_bytes(b"plan")
    plan = GraphPlan(
        file="suffix.plan",
        sha256=file_sha256(path / "suffix.plan"),
        profiles=ladders.profiles()["suffix"],
    )
    plans = PlanSet(graphs={"suffix": plan}, **values)  # type: ignore[arg-type]
    config.save(plans, path / PLANS_FILE)
    return path


def test_the_newest_set_that_fits_is_taken(manifest, tmp_path):
    write_set(tmp_path, manifest, gpu="NVIDIA H100")
    old, new = write_set(tmp_path, manifest), write_set(tmp_path, manifest)
    os.utime(old / PLANS_FILE, (1, 1))
    path, plans = find_plans(tmp_path, manifest, TARGET)
    assert path == new
    assert plans.ladders == ladders_of(manifest)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("gpu", "NVIDIA H100", "GPU NVIDIA H100"),
        ("compute_capability", "9.0", "compute capability 9.0"),
        ("tensorrt_version", "10.15.1.29", "TensorRT 10.15.1.29"),
        ("graphs_hash", "0" * 64, "graphs 000"),
    ],
)
def test_a_set_of_another_machine_or_bundle_is_named(manifest, tmp_path, field, value, named):
    write_set(tmp_path, manifest, **{field: value})
    with pytest.raises(BundleError, match=named):
        find_plans(tmp_path, manifest, TARGET)


def test_an_empty_directory_says_how_to_build(manifest, tmp_path):
    with pytest.raises(BundleError, match="the directory has none; build them here"):
        find_plans(tmp_path, manifest, TARGET)


def test_an_altered_plan_file_is_refused(manifest, tmp_path):
    (write_set(tmp_path, manifest) / "suffix.plan").write_bytes(b"other")
    with pytest.raises(BundleError, match="altered since it was built"):
        find_plans(tmp_path, manifest, TARGET)


def test_the_name_of_a_set_says_machine_graphs_and_buckets(manifest):
    ladders = ladders_of(manifest)
    name = set_name(TARGET, manifest, ladders)
    assert name.startswith("nvidia-l20-sm89-trt11.4.0.106-")
    assert name != set_name(TARGET, manifest, ladders_of(manifest, max_step_users=2))


def test_plans_that_hold_less_than_the_settings_ask_are_refused(manifest):
    built = ladders_of(manifest)
    check_ladders(built, ladders_of(manifest, max_step_tokens=64))
    with pytest.raises(ConfigError, match="max_step_tokens=1024: the plan files were built"):
        check_ladders(built, ladders_of(manifest, max_step_tokens=1024))
