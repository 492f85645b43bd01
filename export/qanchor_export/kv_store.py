"""How keys and values are stored in a slot, and how attention reads them back.

Floats are cast. int8 has one scale per KV head and channel, a constant of the graphs: a key's scale
is multiplied into the query and a value's into the result, so neither is ever dequantised.

Legend: B users, G KV heads, T tokens, C prefix_capacity, M attention rows, K head_dim.
"""

import torch
from torch import Tensor, nn

INT8_PEAK = 127
TORCH_DTYPES: dict[str, torch.dtype] = {
    "int64": torch.int64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}


class KvStore(nn.Module):
    """One layer's way of storing keys and values; `scales` [2, G, 1, K] for int8, else None."""

    scales: Tensor | None

    def __init__(self, dtype: torch.dtype, scales_2G1K: Tensor | None = None) -> None:
        super().__init__()
        assert (dtype == torch.int8) == (scales_2G1K is not None), "This is a bug: int8 has scales."
        self.dtype = dtype
        self.register_buffer("scales", scales_2G1K)

    def store(self, part: int, states_GTK: Tensor) -> Tensor:
        """Keys (part 0) or values (part 1) as they lie in a slot."""
        if self.scales is None:
            return states_GTK.to(self.dtype)
        levels = torch.round(states_GTK / self.scales[part])
        return levels.clamp(-INT8_PEAK, INT8_PEAK).to(self.dtype)

    def scaled(self, part: int, states_GMK: Tensor) -> Tensor:
        """Queries made to fit stored keys (part 0), a sum of stored values made true (part 1)."""
        if self.scales is None:
            return states_GMK
        return states_GMK * self.scales[part].to(states_GMK.dtype)

    def stored_and_read(self, part: int, states_GTK: Tensor) -> tuple[Tensor, Tensor]:
        """What `store` gives, and what it is worth when read back, in the type of the states."""
        stored = self.store(part, states_GTK)
        return stored, self.scaled(part, stored.to(states_GTK.dtype))
