"""Hierarchical coarse-to-fine user encoder, Q-Anchor Eq. (1)-(2).

One adapter class and a table of modalities: the user token, the modality tokens and the events of
each modality pass LayerNorm -> Linear -> GELU -> Linear from encoder space into the decoder's.

Legend: B users, P prefix length, N event texts, E width of the event vectors (measures included,
where the schema has them), D decoder width, M modalities.
"""

import torch
from torch import Tensor, nn

from qanchor.data.prefix import ADAPTER_FIRST_EVENT, ADAPTER_MODALITY, ADAPTER_USER

LAYER_NORM_EPS = 1e-6


class Adapter(nn.Module):
    """MLP(LayerNorm(h)): one encoder-space vector to one decoder input embedding."""

    def __init__(self, vector_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(vector_dim, eps=LAYER_NORM_EPS)
        self.up = nn.Linear(vector_dim, vector_dim)
        self.down = nn.Linear(vector_dim, hidden_dim)

    def forward(self, vectors_E: Tensor) -> Tensor:
        """[..., E] to [..., D]."""
        projected: Tensor = self.down(nn.functional.gelu(self.up(self.norm(vectors_E))))
        return projected


class HierarchicalEncoder(nn.Module):
    """Event vectors of a batch of users to the non-text input embeddings of their prefixes."""

    def __init__(self, num_modalities: int, vector_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.user_adapter = Adapter(vector_dim, hidden_dim)
        self.modality_adapter = Adapter(vector_dim, hidden_dim)
        self.event_adapters = nn.ModuleList(
            Adapter(vector_dim, hidden_dim) for _ in range(num_modalities)
        )

    @property
    def vector_dim(self) -> int:
        """Width E of the vectors the adapters read."""
        return self.user_adapter.up.in_features

    @property
    def adapters(self) -> list[Adapter]:
        """Adapters by id: index a - 1 serves adapter id a of `PrefixLayout.adapter_P`."""
        return [self.user_adapter, self.modality_adapter, *self.event_adapters]

    def forward(
        self, embeddings_BPD: Tensor, adapter_BP: Tensor, event_vectors_BPE: Tensor
    ) -> Tensor:
        """Fill the non-text positions of `embeddings_BPD`.

        `embeddings_BPD`: token embeddings (any value where the position is no token).
        `adapter_BP`: int64 adapter ids of PrefixLayout, 0 for tokens and padding.
        `event_vectors_BPE`: h_{m,t} at event positions, ignored elsewhere.
        """
        vectors_BPE = self.pool(adapter_BP, event_vectors_BPE)
        filled_BPD = embeddings_BPD
        for index, adapter in enumerate(self.adapters):
            is_here_BP = adapter_BP == index + 1
            if is_here_BP.any():
                filled_BPD = filled_BPD.masked_scatter(
                    is_here_BP.unsqueeze(-1),
                    adapter(vectors_BPE[is_here_BP]).to(embeddings_BPD.dtype),
                )
        return filled_BPD

    def pool(self, adapter_BP: Tensor, event_vectors_BPE: Tensor) -> Tensor:
        """Event vectors with modality means and user mean put at their positions, [B, P, E].

        The torch twin of `qanchor.data.prefix.slot_vectors`; pooled vectors are pre-adapter means
        over real events, an empty modality is zeros (as in the authors' code).
        """
        num_modalities = len(self.event_adapters)
        modality_M = torch.arange(num_modalities, device=adapter_BP.device)
        weights_BMP = (adapter_BP.unsqueeze(1) == modality_M[:, None] + ADAPTER_FIRST_EVENT).to(
            event_vectors_BPE.dtype
        )
        counts_BM1 = weights_BMP.sum(-1, keepdim=True).clamp(min=1)
        means_BME = (weights_BMP @ event_vectors_BPE) / counts_BM1
        pooled_BPE = torch.where(
            (adapter_BP >= ADAPTER_FIRST_EVENT).unsqueeze(-1),
            event_vectors_BPE,
            torch.zeros_like(event_vectors_BPE),
        )
        pooled_BPE = pooled_BPE.masked_scatter(
            (adapter_BP == ADAPTER_MODALITY).unsqueeze(-1), means_BME
        )
        return pooled_BPE.masked_scatter(
            (adapter_BP == ADAPTER_USER).unsqueeze(-1), means_BME.mean(dim=1)
        )
