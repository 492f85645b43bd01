"""Settings of prompt tuning and of compiling. Torch-free."""

from typing import Literal

from qanchor.config import Config


class SuffixTraining(Config, frozen=True, kw_only=True):
    """What tuning and compiling share: which users, which steps."""

    steps: int = 500
    """Optimizer steps at most; early stopping may end sooner. 500 in the paper."""
    batch_users: int = 256
    learning_rate: float = 0.01
    """Peak, of AdamW without weight decay."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """`cosine` falls to a tenth of the peak at the last step."""
    evaluate_every: int = 25
    """Steps between looks at valid."""
    patience: int = 6
    """Looks without a better one after which training stops; 0 never stops it."""
    max_train_users: int = 4000
    """Train users drawn (by the seed) and cached; 0 takes all."""
    max_valid_users: int = 2000
    """Valid users drawn and cached; 0 takes all."""
    max_cache_gib: float = 8.0
    """RAM for the prefixes' keys and values; fewer users are drawn when more would not fit. A
    scenario being tuned adds those of its text."""
    cache_dtype: Literal["float32", "bfloat16"] = "float32"
    """How keys and values are kept; `bfloat16` halves the RAM, embeddings then differ by some
    1e-3 from a full pass."""
    seed: int = 0


class TuneConfig(SuffixTraining, frozen=True, kw_only=True):
    """Cluster-based soft prompt tuning, Q-Anchor Eq. (7)."""

    num_prompt_rows: int = 6
    """Learnt vectors between query and <USER_EMB>. 6 in the paper."""
    temperature: float | None = None
    """tau of Eq. (7); null takes the recipe's loss.temperature."""


class CompileConfig(SuffixTraining, frozen=True, kw_only=True):
    """Distilling a scenario's text into a few vectors."""

    num_prompt_rows: int = 8
    """Vectors that stand for the text."""
