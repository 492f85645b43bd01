"""The commands and the quick start of README.md, run as they stand but for their size."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
START_SECONDS = 120
SMALLER = (
    ("--users 3000", "--users 150"),
    (
        "--set train.steps=300",
        "--set train.steps=3 --set train.users_per_batch=4 --set train.num_threads=1",
    ),
)


def blocks(language: str) -> list[str]:
    """Code blocks of the README in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def in_shell(block: str, directory: Path) -> str:
    """Run a bash block in `directory`, stopping at the first failure; returns its stdout."""
    for written, run in SMALLER:
        block = block.replace(written, run)
    block = block.replace("source .venv/bin/activate\n", "")
    bin_dir = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=directory,
        env={**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the first block (data, training, export, proof) has run."""
    directory = tmp_path_factory.mktemp("readme")
    in_shell(blocks("bash")[0], directory)
    return directory


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[None]:
    """The server of the second block, ready."""
    command = [*blocks("bash")[1].split(), "--port-file", "port"]
    process = subprocess.Popen([sys.executable, "-m", "qanchor.cli", *command[1:]], cwd=workplace)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (workplace / "port").exists():
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not get ready"
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0


def test_every_bash_block_is_accounted_for() -> None:
    assert len(blocks("bash")) == 3


def test_the_commands_up_to_the_proof_run(workplace: Path) -> None:
    assert (workplace / "runs/wallet/eval.json").is_file()
    assert (workplace / "bundles/wallet/manifest.json").is_file()


@pytest.mark.usefixtures("server")
def test_the_shell_can_ask(workplace: Path) -> None:
    said = in_shell(blocks("bash")[2], workplace)
    assert "takeout_30d" in said


@pytest.mark.usefixtures("server")
def test_the_ten_lines_run(workplace: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", blocks("python")[0]],
        cwd=workplace,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "(2, 128) CacheState.ENCODED_NOW" in done.stdout
