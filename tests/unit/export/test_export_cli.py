"""The verbs `export` and `verify`, and the bench that stands on the same bundle."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from bench import suffix_step
from bench.machine import Rates
from bench.suffix_step import Workload, agreement, step_floor
from qanchor.bundle.manifest import ModelDims
from qanchor.bundle.reader import open_bundle
from qanchor.bundle.tolerance import EXACT
from qanchor.errors import QAnchorError
from qanchor_export.cli import add_parser
from qanchor_export.verify import Check


def run_verb(*words: str) -> int:
    """Parse and run one command line; errors of use come up as they are."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(words)
    code: int = args.run(args)
    return code


@pytest.fixture(scope="module")
def random_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`qanchor export --random --shape tiny`, as a user runs it."""
    path = tmp_path_factory.mktemp("bundles") / "random"
    assert run_verb("export", "--random", "--shape", "tiny", str(path)) == 0
    return path


def test_a_random_bundle_says_so_and_verifies(
    random_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = open_bundle(random_bundle).manifest
    assert manifest.recipe == "random-tiny"
    assert [spec.max_events for spec in manifest.profile_schema.modalities] == [
        250, 150, 150, 100, 10, 50,
    ]  # fmt: skip
    capsys.readouterr()
    assert run_verb("verify", str(random_bundle), "--users", "1", "--threads", "1") == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["ok"] is True
    assert last["model_id"] == manifest.model_id
    assert last["max_abs"] <= 1e-4


def test_verify_fails_where_torch_said_something_else(
    random_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [Check("torch at export = ONNX Runtime", 3, 2e-4, 1e-5, 1.0, EXACT)]
    monkeypatch.setattr("qanchor_export.verify.verify", lambda *_, **__: wrong)
    assert run_verb("verify", str(random_bundle)) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert json.loads(out.splitlines()[-1])["ok"] is False


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("export", "--random", "--shape", "tiny", "a", "b"), "drop CHECKPOINT"),
        (("export", "--random", "--shape", "tny", "a"), "did you mean 'tiny'"),
        (("export", "a"), "give CHECKPOINT and BUNDLE"),
        (("export", "no-checkpoint", "b"), "no-checkpoint"),
        (("verify", "no-bundle"), "make a bundle with `qanchor export`"),
        (("verify", "no-bundle", "--users", "0"), "at least one user"),
    ],
)
def test_wrong_usage_is_told(words: tuple[str, ...], told: str) -> None:
    with pytest.raises(QAnchorError, match=told):
        run_verb(*words)


def test_the_suffix_bench_runs_and_checks_its_answers(
    random_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--shape", "tiny", "--bundle", str(random_bundle), "--results", str(tmp_path)]
    arguments += ["--prefix-len", "50", "--repeats", "5", "--threads", "1"]
    assert suffix_step.main(arguments) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    result = json.loads((tmp_path / last["result"]).read_text())
    assert result["correctness"]["is_ok"]
    assert set(result["median_ms"]) >= set(suffix_step.TITLES)
    assert result["correctness"]["roads"]["int8"]["mean_cosine"] >= 0.995
    assert result["ratios"]["int8_prefix_1024_over_128"] > 0
    assert len(result["seconds"]["packed"]) == 5
    assert result["environment"]["threads"] == 1


def test_the_floor_counts_products_by_hand() -> None:
    """One layer, D 4, one head of width 4, one KV head, F 2; prefix 3, one query of one token.

    QKV 4 x 12 = 48, after attention 4 x (4 + 6) = 40, attention 2 x 4 x (3 + 1) = 32: 240 FLOPs.
    """
    dims = ModelDims(
        num_layers=1, hidden_dim=4, num_heads=1, num_kv_heads=1, head_dim=4, intermediate_dim=2,
        event_dim=4, embedding_dim=2,
    )  # fmt: skip
    floor = step_floor(dims, Workload(3, 1, 1), Rates(240.0, 1, 1, 1e9))
    assert floor.flops == 240
    assert floor.num_bytes == 4 * 88 + 3 * 2 * 4 * 4
    assert floor.seconds == 1


def test_the_int8_floor_has_two_rates_and_one_byte_per_weight() -> None:
    """As above: 176 FLOPs of weights at 352 a second and 64 of attention at 640."""
    dims = ModelDims(
        num_layers=1, hidden_dim=4, num_heads=1, num_kv_heads=1, head_dim=4, intermediate_dim=2,
        event_dim=4, embedding_dim=2,
    )  # fmt: skip
    floor = step_floor(dims, Workload(3, 1, 1), Rates(640.0, 1, 1, 1e9, 352.0), "int8")
    assert floor.flops == 240
    assert floor.num_bytes == 88 + 3 * 2 * 4 * 4
    assert floor.seconds == pytest.approx(0.5 + 0.1)


def test_disagreeing_roads_are_not_ok() -> None:
    ours = np.eye(3, dtype=np.float32)
    assert agreement({"packed": ours, "other": ours[:1]})["is_ok"]
    assert not agreement({"packed": ours, "other": ours[::-1]})["is_ok"]
