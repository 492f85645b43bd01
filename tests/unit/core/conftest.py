"""A tiny model over a hand-made data set of twelve users."""

import numpy as np
import pytest

from qanchor.checkpoint import Checkpoint, CheckpointMeta, build_model
from qanchor.config import ModalitySpec, ProfileSchema, override
from qanchor.data.prefix import PrefixTokens
from qanchor.data.profile import DAY_SECONDS, Event, Profile
from qanchor.tokenization import (
    add_prefix_tokens,
    event_pad_id,
    train_decoder_tokenizer,
    train_event_tokenizer,
)
from qanchor.train.corpus import PrefixCorpus, RenderedCorpus, render_corpus
from qanchor.train.recipes import Recipe, mini
from qanchor.train.setup import tokenized

NUM_USERS = 12
AS_OF_S = 100 * DAY_SECONDS
QUERIES = (
    "Will the user buy again?",
    "How active is the user?",
    "What does the user like most of all?",
)


@pytest.fixture(scope="session")
def schema() -> ProfileSchema:
    return ProfileSchema(
        modalities=(
            ModalitySpec(name="shop", max_events=6, max_event_tokens=12),
            ModalitySpec(
                name="visit",
                max_events=4,
                max_event_tokens=9,
                group_by="day",
                template="{days_ago} days ago: {items}",
            ),
            ModalitySpec(name="tabular", kind="attributes", max_events=3, max_event_tokens=8),
        ),
        header="One user:",
    )


@pytest.fixture(scope="session")
def profiles() -> list[Profile]:
    """Users with 0 to 11 events; user 0 has none at all."""
    rng = np.random.default_rng(7)
    return [
        Profile(
            user_id=f"u{number}",
            as_of_s=AS_OF_S,
            events=tuple(
                Event(
                    time_s=AS_OF_S - int(rng.integers(0, 80)) * DAY_SECONDS,
                    modality=("shop", "visit")[int(rng.integers(2))],
                    event_type=("a", "b", "c")[int(rng.integers(3))],
                    text=f"bought item {rng.integers(5)}",
                    value=float(rng.integers(30)),
                )
                for _ in range(number)
            ),
            attributes={"city": f"city {number % 3}", "age": 20.0 + number} if number else {},
        )
        for number in range(NUM_USERS)
    ]


@pytest.fixture(scope="session")
def rendered(profiles: list[Profile], schema: ProfileSchema) -> RenderedCorpus:
    return render_corpus(profiles, schema, len(profiles))


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    return override(
        mini(),
        [
            "event_encoder.hidden_dim=16", "event_encoder.num_heads=2",
            "event_encoder.intermediate_dim=24", "decoder.hidden_dim=32", "decoder.num_layers=2",
            "decoder.intermediate_dim=48", "head.inner_dim=24", "head.embedding_dim=8",
        ],
    )  # fmt: skip


@pytest.fixture
def checkpoint(tiny_recipe: Recipe, schema: ProfileSchema, rendered: RenderedCorpus) -> Checkpoint:
    event_tokenizer = train_event_tokenizer(rendered.texts, 400)
    tokenizer = train_decoder_tokenizer([*QUERIES, "yes, often", "no, hardly"], 400)
    tokens: PrefixTokens = add_prefix_tokens(tokenizer, schema)
    meta = CheckpointMeta(
        recipe=tiny_recipe,
        profile_schema=schema,
        tokens=tokens,
        event_pad=event_pad_id(event_tokenizer),
        scenarios=(),
        step=0,
    )
    model = build_model(meta, tokenizer, event_tokenizer).eval()
    return Checkpoint(model, meta, tokenizer, event_tokenizer)


@pytest.fixture
def corpus(checkpoint: Checkpoint, rendered: RenderedCorpus) -> PrefixCorpus:
    return tokenized(checkpoint, rendered)
