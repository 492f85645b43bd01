"""The loss of cluster-based soft prompt tuning, Q-Anchor Eq. (7).

Legend: B users, K classes, Z embedding_dim.
"""

from torch import Tensor
from torch.nn import functional


def prototype_scores(anchor_BZ: Tensor, prototypes_KZ: Tensor, temperature: float) -> Tensor:
    """u_{i,q}^T p_k / tau [B, K] of unit vectors u; prototypes are normalised here."""
    return anchor_BZ @ functional.normalize(prototypes_KZ, dim=-1).T / temperature


def prompt_loss(
    anchor_BZ: Tensor, prototypes_KZ: Tensor, labels_B: Tensor, temperature: float
) -> Tensor:
    """L_pt of Eq. (7): mean_i -log softmax_k(u_{i,q}^T p_k / tau)[y_i]; labels are int64 in [0, K).

    Plain, as in the paper: a rare class counts by its users alone.
    """
    return functional.cross_entropy(
        prototype_scores(anchor_BZ, prototypes_KZ, temperature), labels_B
    )


def class_means(anchor_BZ: Tensor, labels_B: Tensor, num_classes: int) -> Tensor:
    """Unit vectors [K, Z] in the direction of each class's mean embedding; every class occurs."""
    member_KB = functional.one_hot(labels_B, num_classes).T.to(anchor_BZ.dtype)
    return functional.normalize(member_KB @ anchor_BZ, dim=-1)
