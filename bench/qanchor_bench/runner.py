"""Runs scenarios, each in a process of its own, and writes their result files.

python -m qanchor_bench.runner SCENARIO.toml RESULT_DIR [--prepare] [--set a=b]
"""

import argparse
import datetime
import importlib
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from qanchor import config
from qanchor.bundle.reader import Bundle, open_bundle
from qanchor.environment import environment
from qanchor.errors import QAnchorError
from qanchor_bench.scenario import BenchScenario, load_scenario

logger = logging.getLogger(__name__)

SUITES = {
    "static": "qanchor_bench.suites.static",
    "engine": "qanchor_bench.suites.engine",
    "serve": "qanchor_bench.suites.serve",
    "cache": "qanchor_bench.suites.cache",
    "peers": "qanchor_bench.suites.peers",
    "accuracy": "qanchor_bench.suites.accuracy",
    "training": "qanchor_bench.suites.training",
}
"""Module by suite; each has `run(bench: Bench) -> Findings`."""


def run_scenario(file: Path, results: Path, assignments: Sequence[str] = ()) -> Path | None:
    """Measure a scenario in a fresh process; the result file, or None when the process failed.

    Bundle and plan files are made by another process before: its memory and threads do not disturb.
    """
    command = [sys.executable, "-m", "qanchor_bench.runner", str(file), str(results)]
    for assignment in assignments:
        command += ["--set", assignment]
    # Waiting threads that spin would take cores from whoever works.
    env = {"OMP_WAIT_POLICY": "passive", **os.environ}
    if subprocess.run([*command, "--prepare"], env=env, check=False).returncode:
        return None
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    return None if done.returncode else Path(done.stdout.splitlines()[-1])


def measure(scenario: BenchScenario, results: Path) -> Path:
    """Measure in this process; returns the file written. Raises whatever the suite raises."""
    import torch

    from qanchor_bench.bench import Bench, num_threads
    from qanchor_bench.machine import (
        Busy,
        decisive_flags,
        governor,
        gpu_state,
        hardware_slug,
        memory_gib,
    )
    from qanchor_bench.result import MachineState, Result, save_result

    suite = importlib.import_module(SUITES[scenario.suite])
    threads = num_threads(scenario)
    torch.set_num_threads(threads)
    bundle = prepare(scenario)
    gpu = gpu_state() if scenario.is_on_gpu else ""
    before, load_before = Busy.now(), os.getloadavg()[0]
    started, start = datetime.datetime.now(datetime.UTC), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qanchor-bench-") as scratch:
        findings = suite.run(Bench(scenario, bundle, threads, Path(scratch)))
    machine = MachineState(
        threads=threads,
        cpu_flags=decisive_flags(),
        governor=governor(),
        memory_gib=memory_gib(),
        gpu=gpu,
        load_average_before=load_before,
        load_average_after=os.getloadavg()[0],
        cpu_share_of_others=Busy.now().others_since(before),
        started_at=started.isoformat(timespec="seconds"),
        wall_seconds=time.monotonic() - start,
    )
    result = Result(
        scenario=scenario.for_result(),
        environment=environment(),
        machine=machine,
        model_id=bundle.manifest.model_id if bundle else "",
        findings=findings,
    )
    return save_result(result, results, hardware_slug(gpu))


def prepare(scenario: BenchScenario) -> Bundle | None:
    """The scenario's bundle and plan files, made where they are missing; None: it runs none."""
    if scenario.suite == "training":
        return None
    from qanchor_bench.bundles import bundle_of
    from qanchor_bench.engines import build_plans

    bundle = open_bundle(bundle_of(scenario))
    if scenario.engine == "tensorrt":
        build_plans(scenario, bundle)
    return bundle


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare or measure one scenario; the last line of stdout is the result's path."""
    parser = argparse.ArgumentParser(prog="qanchor_bench.runner", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--prepare", action="store_true", help="only make bundle and plan files")
    config.add_set_argument(parser, "--set repeats=9")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    # The exporter tells of every graph it traces.
    logging.getLogger("onnxscript").setLevel(logging.WARNING)
    logging.getLogger("onnx_ir").setLevel(logging.WARNING)
    try:
        scenario = config.override(load_scenario(args.file), args.assignments)
        if args.prepare:
            prepare(scenario)
        else:
            print(measure(scenario, args.results))
    except QAnchorError as error:
        print(f"qanchor-bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
