"""Plan files of a bundle: what they were built for, and finding those that fit. Torch-free.

A plan file runs only on the GPU model and with the TensorRT version it was built by, and only for
the graphs it was built from. One directory may hold sets for several; each has a directory of its
own, named by its key. Written by the exporter, read by the TensorRT engine; must not know TensorRT.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from qanchor import config
from qanchor.bundle.buckets import Ladders, Range
from qanchor.bundle.manifest import DEVICE_GRAPHS, WEIGHTS_FILE, Manifest
from qanchor.bundle.reader import file_sha256
from qanchor.config import Config
from qanchor.errors import BundleError, ConfigError

FORMAT_VERSION = 1
PLANS_FILE = "plans.json"
_HASH_CHARS = 12


class GraphPlan(Config, frozen=True, kw_only=True):
    """One plan file."""

    file: str
    sha256: str
    """Of the plan file."""
    profiles: tuple[dict[str, Range], ...]
    """Its optimization profiles in order: least, usual and greatest size by dimension name."""


class PlanSet(Config, frozen=True, kw_only=True):
    """All plan files of a bundle for one GPU model and one TensorRT version."""

    format_version: int = FORMAT_VERSION
    gpu: str
    compute_capability: str
    tensorrt_version: str
    export_id: str
    """Of the bundle."""
    graphs_hash: str
    """`graphs_hash` of the bundle: equal hashes, equal computation."""
    ladders: Ladders
    """The buckets the profiles were made for; the engine takes no others."""
    graphs: dict[str, GraphPlan]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The machine plan files run on."""

    gpu: str
    compute_capability: str
    tensorrt_version: str


def graphs_hash(manifest: Manifest) -> str:
    """Hash of the graphs and weights a bundle's plan files are built from."""
    names = sorted([manifest.graphs[name].file for name in DEVICE_GRAPHS] + [WEIGHTS_FILE])
    text = "\n".join(f"{name} {manifest.files[name].sha256}" for name in names)
    return hashlib.sha256(text.encode()).hexdigest()


def machine_name(target: Target) -> str:
    """File name part of a machine: plan files and timings are good for no other."""
    gpu = re.sub(r"[^a-z0-9]+", "-", target.gpu.lower()).strip("-")
    capability = target.compute_capability.replace(".", "")
    return f"{gpu}-sm{capability}-trt{target.tensorrt_version}"


def set_name(target: Target, manifest: Manifest, ladders: Ladders) -> str:
    """Directory name of a plan set, its key: GPU, TensorRT version, graphs and buckets."""
    digest = hashlib.sha256(graphs_hash(manifest).encode() + config.to_json(ladders)).hexdigest()
    return f"{machine_name(target)}-{digest[:_HASH_CHARS]}"


def check_ladders(built: Ladders, wanted: Ladders) -> None:
    """Raise ConfigError where plan files hold less than a server's settings ask for."""
    for field, there, asked in (
        ("max_step_users", built.users[-1], wanted.users[-1]),
        ("max_step_tokens", built.tokens[-1], wanted.tokens[-1]),
        ("chunk_len", built.chunk_lens[-1], wanted.chunk_lens[-1]),
    ):
        if there < asked:
            raise ConfigError(
                field, asked, f"the plan files were built for {there}", "lower it or build again"
            )


def find_plans(plans_dir: Path, manifest: Manifest, target: Target) -> tuple[Path, PlanSet]:
    """The plan set that fits bundle and machine, newest first; its files' hashes are checked.

    Raises BundleError that names what each set found was built for.
    """
    misfits = []
    found = sorted(
        plans_dir.glob(f"*/{PLANS_FILE}"), key=lambda file: file.stat().st_mtime, reverse=True
    )
    for file in found:
        try:
            plans = config.load(PlanSet, file)
        except ConfigError as error:
            misfits.append(f"{file.parent.name} is of another version ({error.field})")
            continue
        misfit = _misfit(plans, manifest, target)
        if misfit:
            misfits.append(f"{file.parent.name} {misfit}")
            continue
        for plan in plans.graphs.values():
            if file_sha256(file.parent / plan.file) != plan.sha256:
                raise BundleError(f"{file.parent / plan.file}: altered since it was built")
        return file.parent, plans
    raise BundleError(
        f"{plans_dir}: no plan files for {target.gpu} (compute capability "
        f"{target.compute_capability}), TensorRT {target.tensorrt_version} and bundle "
        f"{manifest.export_id}: {'; '.join(misfits) or 'the directory has none'}; build them here "
        "with `qanchor export BUNDLE PLANS --target tensorrt`"
    )


def _misfit(plans: PlanSet, manifest: Manifest, target: Target) -> str:
    for what, built_for, here in (
        ("format", plans.format_version, FORMAT_VERSION),
        ("GPU", plans.gpu, target.gpu),
        ("compute capability", plans.compute_capability, target.compute_capability),
        ("TensorRT", plans.tensorrt_version, target.tensorrt_version),
        ("graphs", plans.graphs_hash, graphs_hash(manifest)),
    ):
        if built_for != here:
            return f"is for {what} {built_for}"
    return ""
