"""From a data set and a recipe to a step-0 checkpoint and tokenised training material."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from qanchor.checkpoint import Checkpoint, CheckpointMeta, build_model
from qanchor.data.dataset import Dataset
from qanchor.errors import ConfigError
from qanchor.tokenization import (
    add_prefix_tokens,
    event_pad_id,
    load_tokenizer,
    train_decoder_tokenizer,
    train_event_tokenizer,
)
from qanchor.train.centre import centre_adapters
from qanchor.train.corpus import PrefixCorpus, RenderedCorpus, render_corpus, tokenize_corpus
from qanchor.train.event_vectors import with_event_vectors
from qanchor.train.recipes import Recipe
from qanchor.train.triples import BatchOrder, UserTriples, load_triples, read_triple_texts

TOKENIZER_SAMPLE = 200_000


@dataclass(frozen=True, slots=True)
class Material:
    """What training reads: the train users' prefixes, and their triples split in two."""

    corpus: PrefixCorpus
    training: UserTriples
    heldout: UserTriples


def prepare(recipe: Recipe, dataset: Dataset, triples_path: Path) -> tuple[Checkpoint, Material]:
    """Tokenizers, an untrained model and the material of the data set's train users.

    Labels are not read. Raises DataError when the triples name a user outside the train split.
    """
    rendered = render_users(dataset, dataset.user_ids("train"))
    _, _, queries, answers = read_triple_texts(triples_path)
    rng = np.random.default_rng(recipe.train.seed)
    event_tokenizer = _event_tokenizer(recipe, _sample(list(rendered.texts), rng))
    tokenizer = _decoder_tokenizer(recipe, _sample(sorted(set(queries)) + answers, rng))
    tokens = add_prefix_tokens(tokenizer, dataset.schema)
    meta = CheckpointMeta(
        recipe=recipe,
        profile_schema=dataset.schema,
        tokens=tokens,
        event_pad=event_pad_id(event_tokenizer),
        scenarios=dataset.scenarios,
        step=0,
    )
    model = build_model(meta, tokenizer, event_tokenizer)
    checkpoint = Checkpoint(model, meta, tokenizer, event_tokenizer)
    data = material(checkpoint, rendered, triples_path)
    if recipe.train.centre_users:
        centre_adapters(model, data.corpus, recipe.train.centre_users, recipe.train.seed)
    return checkpoint, data


def render_users(dataset: Dataset, user_ids: list[str]) -> RenderedCorpus:
    """Render the given users of a data set; `user_ids` of the result tell their order."""
    return render_corpus(dataset.profiles(user_ids=user_ids), dataset.schema, len(user_ids))


def check_renders_alike(checkpoint: Checkpoint, dataset: Dataset) -> None:
    """Raise ConfigError unless checkpoint and data set put profiles into the same words.

    What the schema says of the prefix's layout and of the query may differ: the checkpoint's own
    holds, wherever the two meet.
    """
    mine, theirs = checkpoint.meta.profile_schema, dataset.schema
    if (mine.modalities, mine.window_days) != (theirs.modalities, theirs.window_days):
        raise ConfigError(
            "dataset",
            dataset.name,
            "the checkpoint was trained with another profile schema",
            "use the data set it was trained with",
        )


def tokenized(checkpoint: Checkpoint, rendered: RenderedCorpus) -> PrefixCorpus:
    """The rendered users with a checkpoint's tokenizers."""
    meta = checkpoint.meta
    return tokenize_corpus(rendered, checkpoint.event_tokenizer, meta.event_pad, meta.tokens)


def material(checkpoint: Checkpoint, rendered: RenderedCorpus, triples_path: Path) -> Material:
    """Tokenise prefixes and triples; the held-out users are drawn by the recipe's seed."""
    corpus = tokenized(checkpoint, rendered)
    if not checkpoint.meta.recipe.event_encoder.is_trained:
        corpus = with_event_vectors(corpus, checkpoint.model.event_encoder)
    triples = load_triples(triples_path, checkpoint, rendered.user_ids)
    train = checkpoint.meta.recipe.train
    order = np.random.default_rng([train.seed, 1]).permutation(len(triples.users))
    num_heldout = min(train.heldout_users, len(order) // 10)
    return Material(
        corpus, _select(triples, order[num_heldout:]), _select(triples, order[:num_heldout])
    )


def batch_order(recipe: Recipe, corpus: PrefixCorpus, triples: UserTriples) -> BatchOrder:
    """The deterministic visiting order of `triples` under a recipe."""
    counts = triples.topic_counts
    return BatchOrder(
        triples=triples,
        topic_share=counts / counts.sum(),
        prefix_lens=np.array([corpus.prefix_len(user) for user in triples.users]),
        users_per_batch=recipe.train.users_per_batch,
        queries_per_user=recipe.train.queries_per_user,
        seed=recipe.train.seed,
    )


def _select(triples: UserTriples, entries: np.ndarray) -> UserTriples:
    kept = np.sort(entries)
    return UserTriples(
        tuple(triples.users[entry] for entry in kept),
        tuple(triples.segments[entry] for entry in kept),
        tuple(triples.topics[entry] for entry in kept),
    )


def _sample(texts: list[str], rng: np.random.Generator) -> list[str]:
    if len(texts) <= TOKENIZER_SAMPLE:
        return texts
    return [texts[row] for row in np.sort(rng.choice(len(texts), TOKENIZER_SAMPLE, replace=False))]


def _event_tokenizer(recipe: Recipe, texts: list[str]) -> Tokenizer:
    if recipe.event_encoder.path:
        return load_tokenizer(Path(recipe.event_encoder.path), "event_encoder.path")
    return train_event_tokenizer(texts, recipe.event_vocab_size)


def _decoder_tokenizer(recipe: Recipe, texts: list[str]) -> Tokenizer:
    if recipe.decoder.path:
        return load_tokenizer(Path(recipe.decoder.path), "decoder.path")
    return train_decoder_tokenizer(texts, recipe.decoder.vocab_size)
