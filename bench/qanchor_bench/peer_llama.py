"""llama.cpp as a peer, where its `llama-bench` program and the `gguf` package are installed.

The same random weights go to it as a GGUF file. `llama-bench -d P -p S` times S tokens after P
that are in its cache: S = one query's tokens is one query of a cached user, S = all queries'
tokens is all of them sharing the prefix. There the queries also see each other, a little more
attention than ours; the vectors themselves are not read, so its answers are not compared.
"""

import json
import logging
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qanchor_bench.floors import StepSize
from qanchor_bench.result import Point
from qanchor_bench.spread import median
from qanchor_export.source import ExportSource

logger = logging.getLogger(__name__)

_TYPES = ("F32", "BF16", "Q8_0")
_TENSORS = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_OUTER = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}


@dataclass(frozen=True, slots=True)
class Llama:
    """Where llama-bench is; empty, with the reason, where it cannot run."""

    program: str
    why_not: str = ""


def find_llama() -> Llama:
    """llama-bench on PATH, if the package that writes its files is installed too."""
    program = shutil.which("llama-bench")
    if program is None:
        return Llama("", "no llama-bench on PATH")
    if find_spec("gguf") is None:
        return Llama("", "the package gguf is not installed")
    return Llama(program)


def llama_points(
    llama: Llama, source: ExportSource, size: StepSize, repeats: int, threads: int, scratch: Path
) -> tuple[list[Point], str]:
    """One query and all queries in llama.cpp's best type each, and a note of what ran.

    Best: the smallest median over F32, BF16 and Q8_0.
    """
    if not llama.program:
        return [], f"llama.cpp did not run: {llama.why_not}"
    lens = {"llama_one": size.query_len, "llama_all": size.num_queries * size.query_len}
    best: dict[str, tuple[list[float], str]] = {}
    for kind in _TYPES:
        file = scratch / f"model-{kind}.gguf"
        _write_gguf(source, file, kind)
        for road, num_tokens in lens.items():
            seconds = _time(llama, file, size.prefix_len, num_tokens, repeats, threads)
            logger.info("%s %s: %.1f ms", road, kind, 1e3 * median(seconds))
            if road not in best or median(seconds) < median(best[road][0]):
                best[road] = (seconds, kind)
        file.unlink()
    groups = {"llama_one": "one query", "llama_all": "all queries"}
    points = [
        Point(
            name=f"llama.cpp, prefix cached, {groups[road]}",
            group=groups[road],
            labels={"road": road, "type": kind},
            unit="s",
            values=tuple(seconds),
        )
        for road, (seconds, kind) in best.items()
    ]
    return points, "llama.cpp ran after the other roads; its vectors are not compared"


def _time(
    llama: Llama, file: Path, depth: int, num_tokens: int, repeats: int, threads: int
) -> list[float]:
    command = [
        llama.program, "-m", str(file), "-p", str(num_tokens), "-n", "0", "-d", str(depth),
        "-r", str(repeats), "-t", str(threads), "-b", "2048", "-ub", "2048", "-o", "json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (measured,) = json.loads(done.stdout)
    return [nanoseconds / 1e9 for nanoseconds in measured["samples_ns"]]


def _write_gguf(source: ExportSource, file: Path, kind: str) -> None:
    import gguf
    import torch

    decoder: Any = source.model.decoder
    config = decoder.config
    writer = gguf.GGUFWriter(str(file), "qwen2")
    writer.add_context_length(4096)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    # Token ids go in, so that no vocabulary is needed.
    writer.add_tokenizer_model("no_vocab")
    quantisation = gguf.GGMLQuantizationType[kind]
    for name, tensor in decoder.state_dict().items():
        array = tensor.detach().to(torch.float32).numpy()
        # Biases and norms stay float32, as llama.cpp's own converter leaves them.
        wanted = quantisation if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(array, wanted)
        writer.add_tensor(_gguf_name(name), data, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{_TENSORS[rest]}"
