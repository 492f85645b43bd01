"""From a data set and a recipe to a step-0 checkpoint and tokenised training material."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
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
from qanchor.train.recipes import Recipe, TrainConfig
from qanchor.train.source import InMemory
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
    checkpoint = fresh_checkpoint(recipe, dataset, rendered.texts, (texts.queries, texts.answers))
    data = material(checkpoint, rendered, texts)
    if recipe.train.centre_users:
        centre_adapters(checkpoint.model, data.corpus, recipe.train.centre_users, recipe.train.seed)
    return checkpoint, data


def fresh_checkpoint(
    recipe: Recipe,
    dataset: Dataset,
    event_texts: Sequence[str],
    triple_texts: tuple[list[str], list[str]],
) -> Checkpoint:
    """Tokenizers, where they are learnt from these texts (queries, answers), and a fresh model."""
    queries, answers = triple_texts
    rng = np.random.default_rng(recipe.train.seed)
    event_tokenizer = _event_tokenizer(recipe, _sample(list(event_texts), rng))
    tokenizer = _decoder_tokenizer(recipe, _sample(sorted(set(queries)) + answers, rng))
    meta = CheckpointMeta(
        recipe=recipe,
        profile_schema=dataset.schema,
        tokens=add_prefix_tokens(tokenizer, dataset.schema),
        event_pad=event_pad_id(event_tokenizer),
        scenarios=dataset.scenarios,
        step=0,
    )
    model = build_model(meta, tokenizer, event_tokenizer)
    return Checkpoint(model, meta, tokenizer, event_tokenizer)


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
    person_of = {view.name: view.user_id for view in texts.views}
    owners = [person_of[rendered.user_ids[row]] for row in triples.users]
    people = list(dict.fromkeys(owners))
    _, heldout = draw_heldout(len(people), train)
    kept_out = {people[place] for place in heldout}
    return Material(
        corpus,
        triples.part([entry for entry, owner in enumerate(owners) if owner not in kept_out]),
        triples.part([entry for entry, owner in enumerate(owners) if owner in kept_out]),
    )


def draw_heldout(
    num_users: int, train: TrainConfig
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Places of the users to train on and of those held out, both in random order."""
    order = np.random.default_rng([train.seed, 1]).permutation(num_users)
    num_heldout = min(train.heldout_users, num_users // 10)
    return order[num_heldout:], order[:num_heldout]


def batch_source(recipe: Recipe, corpus: PrefixCorpus, triples: UserTriples) -> InMemory:
    """The batches of `triples` in the deterministic order of a recipe."""
    counts = triples.topic_counts
    order = BatchOrder(
        triples=triples,
        topic_share=counts / counts.sum(),
        prefix_lens=np.array([corpus.prefix_len(user) for user in triples.users]),
        users_per_batch=recipe.train.users_per_batch,
        queries_per_user=recipe.train.queries_per_user,
        seed=recipe.train.seed,
    )
    return InMemory(order, corpus)


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
