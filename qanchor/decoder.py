"""The decoder shared by both towers: a Qwen2 causal LM of transformers, built or loaded."""

from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AutoConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from qanchor.backbone_maths import check_decoder
from qanchor.config import Config, nearest
from qanchor.errors import ConfigError


class DecoderConfig(Config, frozen=True, kw_only=True):
    """The decoder: a Hugging Face directory, or a Qwen2 of these sizes trained from scratch."""

    path: str = ""
    """Hugging Face directory such as Qwen2.5-0.5B-Instruct; empty builds the sizes below."""
    vocab_size: int = 4096
    """Size of the tokenizer trained for a decoder built from scratch."""
    hidden_dim: int = 128
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_dim: int = 384
    max_positions: int = 2048
    rope_theta: float = 10_000.0
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Which of transformers' attention implementations trains; the result is the same."""

    def __post_init__(self) -> None:
        if self.path:
            return
        for name, value, divisor in (
            ("decoder.hidden_dim", self.hidden_dim, self.num_heads),
            ("decoder.num_heads", self.num_heads, self.num_kv_heads),
        ):
            if divisor < 1 or value % divisor:
                raise ConfigError(name, value, f"must be a multiple of {divisor}", "adapt one")


class LoraConfig(Config, frozen=True, kw_only=True):
    """Low-rank adapters on the projections of decoder and text encoder; the rest is frozen."""

    rank: int = 64
    alpha: int = 32
    dropout: float = 0.1
    decoder_targets: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    encoder_targets: tuple[str, ...] = ("query", "key", "value", "dense")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError("lora.rank", self.rank, "must be at least 1", "the method's is 64")
        if not 0 <= self.dropout < 1:
            raise ConfigError("lora.dropout", self.dropout, "must be in [0, 1)", "e.g. 0.1")


def build_language_model(config: DecoderConfig, num_tokens: int) -> PreTrainedModel:
    """A Qwen2ForCausalLM in float32 whose embedding has at least `num_tokens` rows.

    Raises ConfigError when `config.path` holds no plain Qwen2 model.
    """
    if config.path:
        return _load(config, num_tokens)
    qwen2 = Qwen2Config(
        vocab_size=num_tokens,
        hidden_size=config.hidden_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        intermediate_size=config.intermediate_dim,
        max_position_embeddings=config.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=True,
        # The usual 0.02 suits width 896; at small widths users would hardly differ at <USER_EMB>.
        initializer_range=config.hidden_dim**-0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: PreTrainedModel = Qwen2ForCausalLM._from_config(
        qwen2, attn_implementation=config.attention
    )
    return model


def _load(config: DecoderConfig, num_tokens: int) -> PreTrainedModel:
    field, path = "decoder.path", Path(config.path)
    if not (path / "config.json").is_file():
        raise ConfigError(field, str(path), "no config.json there", "give a Hugging Face directory")
    found = AutoConfig.from_pretrained(path, local_files_only=True)
    check_decoder(found)
    model = Qwen2ForCausalLM.from_pretrained(
        path, local_files_only=True, dtype=torch.float32, attn_implementation=config.attention
    )
    if model.config.vocab_size < num_tokens:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    return model


def add_lora(
    model: PreTrainedModel, config: LoraConfig, targets: tuple[str, ...], new_tokens: list[int]
) -> PreTrainedModel:
    """Freeze `model` and give it LoRA adapters; embedding rows `new_tokens` stay trainable.

    Raises ConfigError for a target the model has no module of; peft would pass over it.
    """
    import peft

    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for target in targets:
        if target not in names:
            kind = model.config.model_type
            rule = f"the {kind} model has no module of this name"
            raise ConfigError("lora targets", target, rule, nearest(target, sorted(names - {""})))
    # A peft model stands in for the model it wraps; its type does not say so.
    adapted: Any = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(targets),
            trainable_token_indices={"embed_tokens": new_tokens} if new_tokens else None,
        ),
    )
    return cast(PreTrainedModel, adapted)
