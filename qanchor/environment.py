"""What a reader needs to judge or repeat a measurement: machine, packages, commit. Torch-free."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qanchor.config import Config

PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "numpy", "scikit-learn", "tokenizers")


class Environment(Config, frozen=True, kw_only=True):
    """Machine and software of a run; stands in every result file."""

    cpu: str
    cores: int
    python: str
    packages: dict[str, str]
    """Version by package; `absent` where it is not installed."""
    commit: str
    """Short hash of the project's checkout; `uncommitted` outside of one."""
    is_dirty: bool
    """The checkout had changes that no commit holds, other than results of earlier measurements."""


def environment() -> Environment:
    """The present machine and software."""
    inside = _is_own_checkout()
    return Environment(
        cpu=cpu_model(),
        cores=os.cpu_count() or 1,
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        commit=_git("rev-parse", "--short=12", "HEAD") if inside else "uncommitted",
        is_dirty=inside
        and bool(_git("status", "--porcelain", "--", ":/", ":(top,exclude)bench/results")),
    )


def cpu_model() -> str:
    """The processor's name as the kernel gives it."""
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Instruction sets and features as the kernel names them; empty where it does not tell."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


def _is_own_checkout() -> bool:
    # An environment inside somebody else's repository must not lend us its commit.
    top = _git("rev-parse", "--show-toplevel")
    return bool(top) and Path(top).resolve() == Path(__file__).resolve().parent.parent


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
