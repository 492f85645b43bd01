"""The tiny model of the core tests, behind cached prefixes."""

import pytest
import torch

from qanchor.checkpoint import Checkpoint
from qanchor.train.corpus import PrefixCorpus
from qanchor.tune.prefix_cache import PrefixCache, encode_prefixes
from qanchor.tune.suffix_pass import SuffixPass
from tests.unit.core.conftest import (  # noqa: F401
    NUM_USERS,
    checkpoint,
    corpus,
    profiles,
    rendered,
    schema,
    tiny_recipe,
)


@pytest.fixture
def cache(checkpoint: Checkpoint, corpus: PrefixCorpus) -> PrefixCache:  # noqa: F811
    return encode_prefixes(checkpoint.model, corpus, range(NUM_USERS), torch.float32)


@pytest.fixture
def passes(checkpoint: Checkpoint, cache: PrefixCache) -> SuffixPass:  # noqa: F811
    return SuffixPass(checkpoint.model, cache, checkpoint.meta.tokens.user_emb)
