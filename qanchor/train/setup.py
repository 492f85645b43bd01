"""From a data set and a recipe to a step-0 checkpoint and tokenised training material."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from qanchor.checkpoint import Checkpoint, CheckpointMeta, build_model
from qanchor.data.dataset import Dataset
from qanchor.data.views import stream_views
from qanchor.errors import ConfigError, DataError
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
from qanchor.train.triples import (
    BatchOrder,
    TripleTexts,
    UserTriples,
    load_triples,
    read_triple_texts,
)

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
    texts = read_triple_texts(triples_path)
    rendered = render_views(dataset, texts)
    rng = np.random.default_rng(recipe.train.seed)
    event_tokenizer = _event_tokenizer(recipe, _sample(list(rendered.texts), rng))
    tokenizer = _decoder_tokenizer(recipe, _sample(sorted(set(texts.queries)) + texts.answers, rng))
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
    data = material(checkpoint, rendered, texts)
    if recipe.train.centre_users:
        centre_adapters(model, data.corpus, recipe.train.centre_users, recipe.train.seed)
    return checkpoint, data


def render_views(dataset: Dataset, texts: TripleTexts) -> RenderedCorpus:
    """Render the views that have triples, `user_ids` of the result being their names.

    Raises DataError when a triple is of a user outside the train split.
    """
    shifts = texts.shifts()
    for user_id in shifts:
        if dataset.split_of.get(user_id) != "train":
            raise DataError("triples: user_id", user_id, "is no train user", "make them again")
    with_future = any(any(of_user) for of_user in shifts.values())
    views = stream_views(dataset, shifts, with_future=with_future)
    profiles = (replace(profile, user_id=view.name) for view, profile, _ in views)
    return render_corpus(profiles, dataset.schema, sum(len(found) for found in shifts.values()))


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


def material(checkpoint: Checkpoint, rendered: RenderedCorpus, texts: TripleTexts) -> Material:
    """Tokenise prefixes and triples; the held-out users are drawn by the recipe's seed.

    A held-out user is held out with all views.
    """
    corpus = tokenized(checkpoint, rendered)
    if not checkpoint.meta.recipe.event_encoder.is_trained:
        corpus = with_event_vectors(corpus, checkpoint.model.event_encoder)
    triples = load_triples(texts, checkpoint, rendered.user_ids, "triples")
    train = checkpoint.meta.recipe.train
    people = sorted(set(triples.owners))
    order = np.random.default_rng([train.seed, 1]).permutation(len(people))
    num_heldout = min(train.heldout_users, len(order) // 10)
    heldout = {people[place] for place in order[:num_heldout]}
    is_heldout = np.array([owner in heldout for owner in triples.owners])
    return Material(
        corpus,
        _select(triples, np.flatnonzero(~is_heldout)),
        _select(triples, np.flatnonzero(is_heldout)),
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
        tuple(triples.owners[entry] for entry in kept),
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
