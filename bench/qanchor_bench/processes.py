"""Child processes of the serve suite: server, echo, clients; all ended and waited for."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from qanchor import config
from qanchor_bench.load_client import ClientPlan, Records

START_SECONDS = 300.0
_STOP_SECONDS = 60.0
_POLL_SECONDS = 0.02
_HEAD_START_SECONDS = 0.1


@contextmanager
def listening(module: str, arguments: Sequence[str], port_file: Path, log: Path) -> Iterator[str]:
    """A Python module as a server; yields its address once `port_file` holds the port.

    Raises RuntimeError with the end of its log when it does not come up.
    """
    with log.open("wb") as stream:
        command = [sys.executable, "-m", module, *arguments]
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        try:
            yield f"127.0.0.1:{_port(process, port_file, log)}"
        finally:
            process.terminate()
            process.wait(timeout=_STOP_SECONDS)


@contextmanager
def qanchor_server(
    bundle: Path, scratch: Path, settings: Mapping[str, int | float | bool | str]
) -> Iterator[str]:
    """`qanchor serve` on a free port."""
    port_file = scratch / "server.port"
    arguments = ["serve", str(bundle), "--address", "127.0.0.1:0", "--port-file", str(port_file)]
    arguments += ["--data-dir", str(scratch / "profiles")]
    for name, value in settings.items():
        arguments += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    with listening("qanchor.cli", arguments, port_file, scratch / "server.log") as address:
        yield address


@contextmanager
def echo_server(scratch: Path) -> Iterator[str]:
    """The bench's own echo on a free port."""
    port_file = scratch / "echo.port"
    log = scratch / "echo.log"
    with listening("qanchor_bench.echo", [str(port_file)], port_file, log) as address:
        yield address


class Clients:
    """Client processes that run phases together; see load_client for what they say."""

    def __init__(self, num_clients: int, scratch: Path) -> None:
        self._scratch = scratch
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "qanchor_bench.load_client"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(num_clients)
        ]

    def run(self, plans: Sequence[ClientPlan]) -> tuple[list[Records], float]:
        """One plan per process, all from one moment on, which is returned too.

        Raises RuntimeError when a client fails; its reason is on stderr.
        """
        outputs = []
        for number, (process, plan) in enumerate(zip(self._processes, plans, strict=True)):
            plan_path = self._scratch / f"plan-{number}.json"
            outputs.append(self._scratch / f"records-{number}.json")
            config.save(plan, plan_path)
            _say(process, f"{plan_path}\n{outputs[-1]}")
        self._await("ready")
        start_s = time.monotonic() + _HEAD_START_SECONDS
        for process in self._processes:
            _say(process, repr(start_s))
        self._await("done")
        return [config.load(Records, output) for output in outputs], start_s

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.communicate(timeout=_STOP_SECONDS)

    def _await(self, word: str) -> None:
        for process in self._processes:
            assert process.stdout is not None
            if process.stdout.readline().strip() != word:
                raise RuntimeError("a client process failed; its reason is above")


def _say(process: "subprocess.Popen[str]", text: str) -> None:
    assert process.stdin is not None
    process.stdin.write(text + "\n")
    process.stdin.flush()


def _port(process: "subprocess.Popen[bytes]", port_file: Path, log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while not port_file.is_file() or not port_file.read_text(encoding="utf-8").strip():
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"the server did not start:\n{said[-2000:]}")
        time.sleep(_POLL_SECONDS)
    return port_file.read_text(encoding="utf-8").strip()
