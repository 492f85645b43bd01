"""The decoder's and the adapters' weights in the layout the graphs use.

Prefix and suffix graph hold the same tensors, so a bundle stores them once.

Legend: D decoder width, F inner width, H heads, G KV heads, K head_dim, J = (H + 2 G) K,
A adapters, E width of slot vectors, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qanchor.backbone_maths import check_decoder
from qanchor.bundle.manifest import KvDType, ModelDims, Precision
from qanchor.encoder.hierarchical import Adapter
from qanchor.towers import QAnchorModel
from qanchor_export.kv_store import TORCH_DTYPES, KvStore
from qanchor_export.projection import Projection, frozen
from qanchor_export.source import merged


def transposed(linear: nn.Linear) -> Tensor:
    """[in, out] weight of a Linear."""
    return linear.weight.detach().float().t()


def bias_of(linear: nn.Linear) -> Tensor:
    """[out] bias of a Linear, zeros where it has none."""
    if linear.bias is None:
        return torch.zeros(linear.weight.shape[0])
    return linear.bias.detach().float()


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """The types a decoder computes in and stores keys and values in."""

    precision: Precision = "float32"
    kv_dtype: KvDType | None = None
    """None: the type of the activations."""

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and of all weights but those of int8 matrices."""
        return torch.float32 if self.precision == "int8" else TORCH_DTYPES[self.precision]

    @property
    def stored(self) -> KvDType:
        """Type of keys and values in a slot."""
        activations: KvDType = "float32" if self.precision == "int8" else self.precision
        return self.kv_dtype or activations


class LayerWeights(nn.Module):
    """One decoder layer: queries, keys and values fused, queries already scaled by 1/sqrt(K)."""

    qkv: Projection
    kv: Projection | None
    """Keys and values alone, in the last layer: the prefix graph needs no queries there."""
    o: Projection
    gate: Projection
    up: Projection
    down: Projection
    store: KvStore

    def __init__(self, layer: Any, head_dim: int, dtype: torch.dtype, *, is_last: bool) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        scale = 1.0 / math.sqrt(head_dim)
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        weights = [transposed(part) for part in parts]
        biases = [bias_of(part) for part in parts]
        self.qkv = Projection(
            torch.cat([weights[0] * scale, *weights[1:]], dim=1).to(dtype),
            torch.cat([biases[0] * scale, *biases[1:]]).to(dtype),
        )
        kv_weight, kv_bias = torch.cat(weights[1:], dim=1), torch.cat(biases[1:])
        self.kv = Projection(kv_weight.to(dtype), kv_bias.to(dtype)) if is_last else None
        self.o = Projection(transposed(attention.o_proj).to(dtype))
        self.gate = Projection(transposed(mlp.gate_proj).to(dtype))
        self.up = Projection(transposed(mlp.up_proj).to(dtype))
        self.down = Projection(transposed(mlp.down_proj).to(dtype))
        self.attention_norm_D = frozen(layer.input_layernorm.weight, dtype)
        self.mlp_norm_D = frozen(layer.post_attention_layernorm.weight, dtype)
        self.store = KvStore(dtype)


class DecoderWeights(nn.Module):
    """A transformers Qwen2Model without its modules: tensors, and the few numbers of its maths.

    Tensors are of `dtype`; the final norm, whose rows the head reads, is float32.
    """

    inv_freq: Tensor
    swap_KK: Tensor | None
    """In half precision: states times this are (-second half, first half), as RoPE needs them."""
    final_norm_D: nn.Parameter

    def __init__(self, decoder: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        config = decoder.config
        check_decoder(config)
        self.num_heads = int(config.num_attention_heads)
        self.num_kv_heads = int(config.num_key_value_heads)
        self.head_dim = head_dim_of(config)
        self.norm_eps = float(config.rms_norm_eps)
        self.embed_VD = frozen(decoder.embed_tokens.weight, dtype)
        last = len(decoder.layers) - 1
        self.layers = nn.ModuleList(
            LayerWeights(layer, self.head_dim, dtype, is_last=index == last)
            for index, layer in enumerate(decoder.layers)
        )
        self.final_norm_D = frozen(decoder.norm.weight)
        theta = float(config.rope_parameters["rope_theta"])
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        self.register_buffer("inv_freq", 1.0 / theta**exponent)
        one, none = torch.eye(self.head_dim // 2), torch.zeros((self.head_dim // 2,) * 2)
        swap_KK = torch.cat([torch.cat([none, one], 1), torch.cat([-one, none], 1)]).to(dtype)
        self.register_buffer("swap_KK", None if dtype == torch.float32 else swap_KK)

    @property
    def stack(self) -> list[LayerWeights]:
        """The layers, first to last."""
        return [layer for layer in self.layers if isinstance(layer, LayerWeights)]

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads


class AdapterWeights(nn.Module):
    """All adapters side by side, so that one MLP of fixed shape serves every position.

    The norm's affine part is folded into the first matrix: (x g + b) W = x (diag(g) W) + b W.
    """

    def __init__(self, adapters: list[Adapter]) -> None:
        super().__init__()
        ups, up_biases = [], []
        for adapter in adapters:
            weight_EE = transposed(adapter.up).double()
            gain_E, shift_E = adapter.norm.weight.double(), adapter.norm.bias.double()
            ups.append(gain_E[:, None] * weight_EE)
            up_biases.append(shift_E @ weight_EE + bias_of(adapter.up).double())
        self.num_adapters = len(adapters)
        self.vector_dim = int(adapters[0].up.in_features)
        self.norm_eps = float(adapters[0].norm.eps)
        self.up_weight_EX = frozen(torch.cat(ups, dim=1))
        self.up_bias_X = frozen(torch.cat(up_biases))
        self.down_weight_XD = frozen(torch.cat([transposed(a.down) for a in adapters], dim=0))
        self.down_bias_AD = frozen(torch.stack([bias_of(a.down) for a in adapters]))


class HeadWeights(nn.Module):
    """The projection to the embedding."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.up_weight = frozen(transposed(head.up))
        self.up_bias = frozen(bias_of(head.up))
        self.down_weight = frozen(transposed(head.down))
        self.down_bias = frozen(bias_of(head.down))


def decoder_weights(model: QAnchorModel, numbers: Numbers | None = None) -> DecoderWeights:
    """The decoder of `model`, peft adapters merged, in its types; int8 parts are still float32.

    Raises ConfigError for unsupported maths.
    """
    language_model: Any = merged(model.language_model)
    numbers = numbers or Numbers()
    decoder = DecoderWeights(language_model.get_decoder(), numbers.dtype)
    if numbers.stored != "int8":  # whose scales take calibration
        for layer in decoder.stack:
            layer.store = KvStore(TORCH_DTYPES[numbers.stored])
    return decoder


def model_dims(model: QAnchorModel, kv_dtype: KvDType = "float32") -> ModelDims:
    """Sizes of a model as the manifest records them."""
    config: Any = model.language_model.config
    head: Any = model.head
    return ModelDims(
        num_layers=config.num_hidden_layers,
        hidden_dim=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim_of(config),
        intermediate_dim=config.intermediate_size,
        event_dim=model.event_encoder.event_dim,
        num_measures=model.encoder.vector_dim - model.event_encoder.event_dim,
        embedding_dim=head.down.out_features,
        kv_dtype=kv_dtype,
    )


def head_dim_of(config: Any) -> int:
    """Width of one attention head of a transformers configuration."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
