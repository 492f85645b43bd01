"""Which backbones the exported graphs compute: checked before training, and again at export.

`config`: a transformers configuration. Of maths that is not named here the graphs would compute
something else without a word.
"""

from typing import Any

from qanchor.errors import ConfigError


def check_decoder(config: Any) -> None:
    """Raise ConfigError at `decoder` unless it is a plain Qwen2."""
    rope = getattr(config, "rope_parameters", None) or {}
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    has_window = getattr(config, "use_sliding_window", False) or layer_types != {"full_attention"}
    _check(
        "decoder",
        [
            ("model_type", config.model_type, "qwen2"),
            ("hidden_act", getattr(config, "hidden_act", None), "silu"),
            ("rope_type", rope.get("rope_type", "default"), "default"),
            ("partial_rotary_factor", rope.get("partial_rotary_factor") or 1.0, 1.0),
            ("use_sliding_window", has_window, False),
        ],
        "take a plain Qwen2 decoder, e.g. Qwen2.5-0.5B-Instruct",
    )


def check_text_encoder(config: Any, field: str, kinds: tuple[str, ...] = ("bert",)) -> None:
    """Raise ConfigError at `field` unless it is a plain BERT, or of another of `kinds`."""
    position = getattr(config, "position_embedding_type", None) or "absolute"
    _check(
        field,
        [
            ("model_type", config.model_type, kinds),
            ("hidden_act", getattr(config, "hidden_act", None), "gelu"),
            ("position_embedding_type", position, "absolute"),
        ],
        "take a plain BERT encoder (gte-base, bge, e5, MiniLM ...)",
    )


QUERY_ENCODERS = ("bert", "mpnet")
"""Kinds of encoder that may read questions."""


def num_text_positions(config: Any) -> int:
    """Most tokens of a text. MPNet numbers them from 2 on, whatever its configuration says."""
    return int(config.max_position_embeddings) - (2 if config.model_type == "mpnet" else 0)


def _check(field: str, rules: list[tuple[str, object, object]], remedy: str) -> None:
    """`rules`: name, value found, value supported, or a tuple of several."""
    for name, value, supported in rules:
        allowed = supported if isinstance(supported, tuple) else (supported,)
        if value not in allowed:
            words = " or ".join(str(one) for one in allowed)
            rule = f"must be {words}: the exported graphs compute nothing else"
            raise ConfigError(f"{field}.{name}", value, rule, remedy)
