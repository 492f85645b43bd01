"""Weights in the graphs' layout."""

import pytest
import torch

from qanchor.encoder.hierarchical import Adapter
from qanchor.errors import ConfigError
from qanchor_export.random_source import shape_named
from qanchor_export.weights import AdapterWeights


def test_folded_adapters_compute_each_adapter() -> None:
    """The block of adapter a: gelu(norm(x) U_a + u_a) D_a + d_a with the norm's affine in U_a."""
    torch.manual_seed(0)
    adapters = [Adapter(5, 7) for _ in range(3)]
    with torch.no_grad():
        for adapter in adapters:
            adapter.norm.weight.normal_()
            adapter.norm.bias.normal_()
        folded = AdapterWeights(adapters)
        vectors = torch.randn(4, 5)
        normed = torch.nn.functional.layer_norm(vectors, (5,), eps=folded.norm_eps)
        inner = torch.nn.functional.gelu(normed @ folded.up_weight_EX + folded.up_bias_X)
        for index, adapter in enumerate(adapters):
            block = slice(5 * index, 5 * index + 5)
            found = inner[:, block] @ folded.down_weight_XD[block] + folded.down_bias_AD[index]
            torch.testing.assert_close(found, adapter(vectors), rtol=0, atol=1e-6)


def test_an_unknown_shape_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'qwen2\.5-0\.5b'"):
        shape_named("qwen2.5-0.5")
