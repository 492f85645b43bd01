"""Recipes: complete, named settings of a pre-training run, as functions that return a config."""

from collections.abc import Callable
from typing import Literal

from qanchor.config import Config, nearest
from qanchor.data.useru import TripleOptions
from qanchor.decoder import DecoderConfig, LoraConfig
from qanchor.encoder.event_encoder import EventEncoderConfig
from qanchor.encoder.query_encoder import QueryEncoderConfig
from qanchor.errors import ConfigError
from qanchor.losses import LossConfig


class HeadConfig(Config, frozen=True, kw_only=True):
    """The projection from decoder width to the embedding."""

    inner_dim: int = 512
    embedding_dim: int = 128


class TrainConfig(Config, frozen=True, kw_only=True):
    """Optimisation, schedule and bookkeeping."""

    steps: int = 1000
    users_per_batch: int = 32
    """Users of a step, all processes together: whose answers are each other's negatives."""
    users_per_piece: int = 0
    """Users whose activations a process holds at once; 0: its whole share of the batch. Smaller
    pieces cost one more forward pass; losses and gradients stay those of the whole batch."""
    queries_per_user: int = 4
    """Triples per user and step; they share the user's prefix (pairs per step = product)."""
    yes_no_per_user: int = 0
    """Further triples per user and step whose answers say yes or no, for the yes/no loss alone; no
    effect where its weight is 0. Which way a question is put is learnt from many questions; those
    that a query encoder reads cost little."""
    learning_rate: float = 2e-4
    """Peak, of what AdamW moves."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` moves the matrices of projections, adapters and head by orthogonalised momentum: a
    third of the steps for models trained from scratch; leave what is pre-trained to `adamw`."""
    matrix_learning_rate: float = 2e-3
    """Peak, of what Muon moves."""
    weight_decay: float = 0.01
    warmup_steps: int = 100
    max_grad_norm: float = 1.0
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """`bfloat16` runs the towers under autocast; weights, head and losses stay float32. `auto`:
    bfloat16 where the device multiplies in it, else float32; a run keeps what it begins with."""
    event_dropout: float = 0.0
    """Share of a user's events a step leaves out, on average; each user lacks between none and
    twice as many, others every time. Keeps a small model from learning users by heart."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input and compute the rest again in the backward pass: a third more
    time for a fraction of the activations."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: `ddp` a whole copy of the model on each process, `fsdp` a slice of it."""
    tensorboard: bool = False
    """Write RUN/tensorboard beside metrics.jsonl, which holds the same numbers and is what
    everything else reads; hence off unless someone watches. Needs tensorboardX."""
    max_query_len: int = 48
    """Query tokens kept, template included, <USER_EMB> not counted; where a query encoder reads the
    questions, its tokens."""
    max_answer_len: int = 96
    """Answer tokens kept, eos not counted."""
    centre_users: int = 256
    """Train users from whose events the adapters' LayerNorms are set before the first step, so
    that users differ from the start; 0 leaves their usual start. Not in the paper."""
    heldout_users: int = 256
    """Train users kept out of training to watch the loss and retrieval during it."""
    shard_users: int = 0
    """Users per shard of RUN/shards, of which a process holds two at a time; 0 holds all users in
    memory. Batches are then drawn within a shard: take many times users_per_batch."""
    evaluate_every: int = 250
    checkpoint_every: int = 250
    num_threads: int = 0
    """Torch CPU threads; 0 takes all cores."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("users_per_piece", "shard_users", "yes_no_per_user"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"train.{name}", getattr(self, name), "must not be negative", "0 is off"
                )
        if not 0 <= self.event_dropout < 0.5:
            raise ConfigError(
                "train.event_dropout",
                self.event_dropout,
                "must be at least 0 and below 0.5",
                "e.g. 0.2; some users lack twice as many",
            )
        if self.users_per_batch < 1:
            raise ConfigError(
                "train.users_per_batch", self.users_per_batch, "must be at least 1", "e.g. 32"
            )
        if 0 < self.shard_users < self.users_per_batch:
            raise ConfigError(
                "train.shard_users",
                self.shard_users,
                f"must be 0 or at least users_per_batch={self.users_per_batch}",
                "a batch lies within one shard",
            )


class Recipe(Config, frozen=True, kw_only=True):
    """Everything that decides a pre-training run, apart from the data."""

    name: str
    event_encoder: EventEncoderConfig = EventEncoderConfig()
    event_vocab_size: int = 4096
    """Size of the event tokenizer trained when event_encoder.path is empty."""
    decoder: DecoderConfig = DecoderConfig()
    query_encoder: QueryEncoderConfig = QueryEncoderConfig()
    head: HeadConfig = HeadConfig()
    lora: LoraConfig | None = None
    loss: LossConfig = LossConfig()
    triples: TripleOptions = TripleOptions()
    """Read where `qanchor pretrain` makes the triples itself."""
    train: TrainConfig = TrainConfig()

    @property
    def max_query_positions(self) -> int:
        """Suffix positions kept for a question: its text's, or where that is read apart as many.

        Rows stand for a text then, but soft prompts made later need room, too.
        """
        rows = self.query_encoder.num_rows if self.query_encoder.path else 0
        return max(self.train.max_query_len, rows)


def mini() -> Recipe:
    """Trains from scratch on 2 CPU cores; on OULAD within three core-hours."""
    return Recipe(
        name="mini",
        event_encoder=EventEncoderConfig(is_trained=False),
        decoder=DecoderConfig(
            vocab_size=2048,
            num_layers=2,
            intermediate_dim=256,
            # With masks and these sizes quicker on CPUs than the flash kernel.
            attention="eager",
        ),
        # From scratch the answers' words teach users first; the contrastive term, at full weight,
        # first takes away whatever tells users apart. All users of a step are asked the same few
        # questions: the margin mask would drop just those who differ by behaviour alone.
        loss=LossConfig(
            contrastive_weight=0.1,
            margin=None,
            drop_equal_answers=True,
            next_token_context="embedding",
            statistics_weight=8.0,
            statistics_future_share=0.5,
            statistics_whitening=0.25,
            yes_no_weight=0.5,
        ),
        # Three as-of days per train user: the same people, three times as much to predict.
        triples=TripleOptions(views_per_user=2, per_user_future=24, per_user_uqa=6),
        train=TrainConfig(
            optimizer="muon",
            learning_rate=1e-3,
            steps=2400,
            # Long runs without it learn train users' futures by heart.
            event_dropout=0.2,
            # Statistics differ between users, not between questions: many users, few questions.
            users_per_batch=64,
            queries_per_user=3,
            warmup_steps=100,
            dtype="auto",
            evaluate_every=500,
            checkpoint_every=500,
        ),
    )


def qwen2_5_0_5b() -> Recipe:
    """The method's: Qwen2.5-0.5B-Instruct and gte-base with LoRA, 64 GPUs x 32 users.

    Give `--set decoder.path=DIR --set event_encoder.path=DIR`.
    """
    return Recipe(
        name="qwen2.5-0.5b",
        event_encoder=EventEncoderConfig(path="gte-base"),
        decoder=DecoderConfig(path="Qwen2.5-0.5B-Instruct"),
        lora=LoraConfig(),
        loss=LossConfig(mask_from_step=1000),
        train=TrainConfig(
            steps=50_000,
            users_per_batch=2048,
            queries_per_user=1,
            learning_rate=2e-4,
            warmup_steps=1000,
            dtype="bfloat16",
            max_query_len=64,
            max_answer_len=200,
        ),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"mini": mini, "qwen2.5-0.5b": qwen2_5_0_5b}


def recipe_named(name: str) -> Recipe:
    """The recipe of that name. Raises ConfigError for an unknown one."""
    if name not in RECIPES:
        raise ConfigError("--recipe", name, "no such recipe", nearest(name, list(RECIPES)))
    return RECIPES[name]()
