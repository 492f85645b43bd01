"""Floors against sums done by hand; what the machine is called."""

from pathlib import Path

import pytest

from qanchor.bundle.manifest import ModelDims
from qanchor_bench.floors import StepSize, prefill_floor, suffix_floor
from qanchor_bench.machine import Busy, Rates, decisive_flags, gpu_state, hardware_slug

DIMS = ModelDims(
    num_layers=1, hidden_dim=4, num_heads=1, num_kv_heads=1, head_dim=4, intermediate_dim=2,
    event_dim=4, embedding_dim=2,
)  # fmt: skip
RATES = Rates(
    gemm_flops=240.0, ort_gemm_flops=1, torch_gemm_flops=1, int8_gemm_flops=960.0, read_bytes=1e9
)


def test_the_suffix_floor_counts_products_by_hand() -> None:
    """One layer, D 4, one head of width 4, one KV head, F 2; prefix 3, one query of one token.

    QKV 4 x 12 = 48, after attention 4 x (4 + 6) = 40, attention 2 x 4 x (3 + 1) = 32: 240 FLOPs.
    """
    size = StepSize(prefix_len=3, num_queries=1, query_len=1)
    floor = suffix_floor(DIMS, size, RATES)
    assert (floor.dense_flops, floor.attention_flops, floor.flops) == (176, 64, 240)
    assert floor.num_bytes == 4 * 88 + 3 * 2 * 4 * 4
    assert floor.seconds == 1
    quick = suffix_floor(DIMS, size, RATES, "int8")
    assert quick.seconds == pytest.approx(176 / 960 + 64 / 240)
    assert quick.num_bytes == 88 + 3 * 2 * 4 * 4


def test_users_multiply_tokens_and_keys_but_not_weights() -> None:
    one = suffix_floor(DIMS, StepSize(prefix_len=3, num_queries=2, query_len=1), RATES)
    three = suffix_floor(
        DIMS, StepSize(prefix_len=3, num_queries=2, query_len=1, num_users=3), RATES
    )
    assert three.flops == 3 * one.flops
    assert three.num_bytes - one.num_bytes == 2 * 3 * DIMS.kv_bytes_per_token


def test_the_prefill_floor_of_one_layer_is_its_keys_and_values() -> None:
    """The only layer is the last: 2 x 4 x 4 = 32 products per position."""
    floor = prefill_floor(DIMS, 5, RATES)
    assert (floor.dense_flops, floor.attention_flops) == (2 * 5 * 32, 0)


def test_others_do_not_include_this_process_and_its_children() -> None:
    before = Busy(wall_seconds=0.0, all_seconds=10.0, own_seconds=4.0)
    after = Busy(wall_seconds=10.0, all_seconds=16.0, own_seconds=10.0)
    assert after.others_since(before) == 0.0


def test_the_machine_has_a_name_and_flags_we_know() -> None:
    assert hardware_slug().endswith("c")
    assert set(decisive_flags()) <= {
        "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile",
        "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve", "bf16",
    }  # fmt: skip


def test_a_result_of_a_gpu_is_named_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_state() == ""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA X9 80GB, 123.4, 81559 MiB'\n")
    program.chmod(0o755)
    state = gpu_state()
    assert state.startswith("NVIDIA X9 80GB, 123.4, 81559 MiB")
    assert hardware_slug(state) == "nvidia-x9-80gb"
