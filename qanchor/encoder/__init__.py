"""The hierarchical coarse-to-fine user encoder, Q-Anchor Eq. (1)-(2)."""
