"""Q-Anchor: query-conditioned user embeddings (Query as Anchor, arXiv 2602.14492).

Importing this package imports nothing heavy; take what is needed from its submodules.
"""

__version__ = "0.1.0"
