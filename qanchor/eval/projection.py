"""Embeddings in the plane: PCA and t-SNE of the same users, base and tuned.

Legend: U users, Z embedding_dim.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Projection:
    """One scenario's users in the plane [U, 2] under both methods, with their labels [U]."""

    scenario: str
    is_tuned: bool
    pca: Floats
    tsne: Floats
    labels: npt.NDArray[np.int64]


def project(
    scenario: str, embeddings_UZ: Floats, labels_U: npt.NDArray[np.int64], *, is_tuned: bool
) -> Projection:
    """PCA and t-SNE of some users; both repeat to the bit for equal input on one machine."""
    perplexity = min(30.0, (len(embeddings_UZ) - 1) / 3)
    tsne = TSNE(
        n_components=2, perplexity=perplexity, init="pca", random_state=0, max_iter=500, n_jobs=1
    )
    return Projection(
        scenario=scenario,
        is_tuned=is_tuned,
        pca=PCA(n_components=2, random_state=0).fit_transform(embeddings_UZ).astype(np.float32),
        tsne=tsne.fit_transform(embeddings_UZ).astype(np.float32),
        labels=labels_U,
    )
