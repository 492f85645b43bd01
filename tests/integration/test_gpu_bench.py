"""The GPU bench runs end to end on host memory: its checks, table and figures are real."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu.py"


def test_the_gpu_bench_proves_itself_on_the_host(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("gpu_bench", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    arguments = "--engine host --shape tiny --precision float32 --prefix-lens 30 12 --queries 3"
    arguments += " --query-len 6 --users 2 --repeats 5 --peers --max-users 4"
    assert bench.main([*arguments.split(), "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    last = json.loads(lines[-1])
    assert last["ok"]
    # Four that were filled, and the two of the steps with prefix 30 and the one with 12.
    assert last["users_held"] == 4 + 2 + 1
    result = json.loads((tmp_path / last["result"]).read_text())
    assert {"engine = torch at export", "packed = alone", "kept = encoded anew"} < set(
        result["checks"]
    )
    assert len(result["seconds"]["prefill of 12"]) == 5
    assert any(line.startswith("| 2 users x 3 queries x 6 tokens, prefix 30 |") for line in lines)
