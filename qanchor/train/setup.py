"""From a data set and a recipe to a step-0 checkpoint and tokenised training material."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from qanchor.checkpoint import Checkpoint, CheckpointMeta, build_model
from qanchor.data.dataset import Dataset
from qanchor.data.profile import Profile
from qanchor.data.statistics import StatisticSpace, log_statistics, training_space
from qanchor.data.views import View, stream_views
from qanchor.encoder.query_encoder import QueryEncoder, load_query_encoder
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
    TripleQueries,
    TripleTexts,
    UserTriples,
    load_triples,
    read_triple_texts,
)
from qanchor.train.yes_no import YesNo

log = logging.getLogger(__name__)

TOKENIZER_SAMPLE = 200_000
SCALE_SAMPLE = 2_000
"""Questions whose states say where the query map's 0 is, and how far 1."""


@dataclass(frozen=True, slots=True)
class Material:
    """What training reads: the train users' prefixes, and their triples split in two."""

    corpus: PrefixCorpus
    training: UserTriples
    heldout: UserTriples


def prepare(
    recipe: Recipe, dataset: Dataset, triples_path: Path, kept_in: Path | None = None
) -> tuple[Checkpoint, Material]:
    """Tokenizers, an untrained model and the material of the data set's train users.

    Labels are not read. Raises DataError when the triples name a user outside the train split.
    """
    texts = read_triple_texts(triples_path)
    space = statistic_space(recipe, dataset)
    rendered = render_views(dataset, texts, space)
    triple_texts = (texts.queries, texts.answers)
    checkpoint = fresh_checkpoint(recipe, dataset, rendered.texts, triple_texts, space)
    data = material(checkpoint, rendered, texts, kept_in)
    fit_to_users(checkpoint, data.corpus)
    return checkpoint, data


def fit_to_users(checkpoint: Checkpoint, corpus: PrefixCorpus) -> None:
    """Set what a fresh model takes from train users: adapters' norms, scales of statistics."""
    model, recipe = checkpoint.model, checkpoint.meta.recipe
    if recipe.train.centre_users:
        centre_adapters(model, corpus, recipe.train.centre_users, recipe.train.seed)
    if model.statistics_head is not None and corpus.rendered.statistics is not None:
        model.statistics_head.set_scale(
            corpus.rendered.statistics, recipe.loss.statistics_whitening
        )


def statistic_space(recipe: Recipe, dataset: Dataset) -> StatisticSpace | None:
    """Columns of the statistics loss; None where the recipe does without.

    Raises ConfigError where it wants futures and the data set has none.
    """
    if not recipe.loss.statistics_weight:
        return None
    return training_space(dataset, with_future=recipe.loss.statistics_future_share > 0)


def fresh_checkpoint(
    recipe: Recipe,
    dataset: Dataset,
    event_texts: Sequence[str],
    triple_texts: tuple[list[str], list[str]],
    space: StatisticSpace | None,
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
        statistics=space,
    )
    query_encoder = _query_encoder(recipe, dataset)
    model = build_model(meta, tokenizer, event_tokenizer, query_encoder)
    checkpoint = Checkpoint(model, meta, tokenizer, event_tokenizer, query_encoder)
    if query_encoder is not None and model.query_map is not None:
        chosen = _sample(sorted(set(queries)), rng, SCALE_SAMPLE)
        model.query_map.set_scale(TripleQueries(checkpoint).states(chosen))
    try:
        checkpoint.check_questions(dataset.scenarios)
    except ConfigError as error:
        # Training asks none of them, but the model could not be judged, tuned or exported.
        log.warning("%s", error)
    return checkpoint


def render_views(
    dataset: Dataset, texts: TripleTexts, space: StatisticSpace | None
) -> RenderedCorpus:
    """Render the views that have triples, `user_ids` of the result being their names.

    With a `space` their behaviour statistics stand beside them. Raises DataError when a triple is
    of a user outside the train split.
    """
    shifts = texts.shifts()
    for user_id in shifts:
        if dataset.split_of.get(user_id) != "train":
            raise DataError("triples: user_id", user_id, "is no train user", "make them again")
    views = training_views(dataset, shifts, space)
    statistics: list[npt.NDArray[np.float16]] = []

    def profiles() -> Iterator[Profile]:
        for view, profile, numbers in views:
            if numbers is not None:
                statistics.append(numbers)
            yield replace(profile, user_id=view.name)

    num_views = sum(len(found) for found in shifts.values())
    rendered = render_corpus(profiles(), dataset.schema, num_views)
    return replace(rendered, statistics=np.stack(statistics)) if statistics else rendered


def training_views(
    dataset: Dataset, shifts: Mapping[str, Sequence[int]], space: StatisticSpace | None
) -> Iterator[tuple[View, Profile, npt.NDArray[np.float16] | None]]:
    """Yield (view, its profile, its behaviour statistics where there is a `space` for them)."""
    with_future = any(any(of_user) for of_user in shifts.values())
    if space is not None and space.future_days:
        with_future = True
    for view, profile, after in stream_views(dataset, shifts, with_future=with_future):
        if space is None:
            yield view, profile, None
        else:
            known_days = space.future_days - max(view.shift, 0)
            yield view, profile, log_statistics(profile, after, known_days, space)


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


def material(
    checkpoint: Checkpoint,
    rendered: RenderedCorpus,
    texts: TripleTexts,
    kept_in: Path | None = None,
) -> Material:
    """Tokenise prefixes and triples; the held-out users are drawn by the recipe's seed.

    A held-out user is held out with all views. What a query encoder reads is kept in `kept_in`, if
    given, else in memory.
    """
    corpus = tokenized(checkpoint, rendered)
    if not checkpoint.meta.recipe.event_encoder.is_trained:
        corpus = with_event_vectors(corpus, checkpoint.model.event_encoder)
    triples = load_triples(texts, checkpoint, rendered.user_ids, "triples", kept_in)
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


def batch_source(
    recipe: Recipe, corpus: PrefixCorpus, triples: UserTriples, yes_no: YesNo | None = None
) -> InMemory:
    """The batches of `triples` in the deterministic order of a recipe.

    Without `yes_no` without triples for the yes/no loss alone.
    """
    counts = triples.topic_counts
    order = BatchOrder(
        triples=triples,
        topic_share=counts / counts.sum(),
        prefix_lens=np.array([corpus.prefix_len(user) for user in triples.users]),
        users_per_batch=recipe.train.users_per_batch,
        queries_per_user=recipe.train.queries_per_user,
        seed=recipe.train.seed,
        yes_no_per_user=recipe.train.yes_no_per_user,
        yes_no=yes_no,
    )
    return InMemory(order, corpus)


def _sample(texts: list[str], rng: np.random.Generator, size: int = TOKENIZER_SAMPLE) -> list[str]:
    if len(texts) <= size:
        return texts
    return [texts[row] for row in np.sort(rng.choice(len(texts), size, replace=False))]


def _query_encoder(recipe: Recipe, dataset: Dataset) -> QueryEncoder | None:
    if not recipe.query_encoder.path:
        return None
    if not dataset.schema.query_template:
        raise ConfigError(
            "query_encoder.path",
            recipe.query_encoder.path,
            "the schema's query_template is empty: the model is to hear no question",
            "leave one of them out",
        )
    return load_query_encoder(Path(recipe.query_encoder.path))


def _event_tokenizer(recipe: Recipe, texts: list[str]) -> Tokenizer:
    if recipe.event_encoder.path:
        return load_tokenizer(Path(recipe.event_encoder.path), "event_encoder.path")
    return train_event_tokenizer(texts, recipe.event_vocab_size)


def _decoder_tokenizer(recipe: Recipe, texts: list[str]) -> Tokenizer:
    if recipe.decoder.path:
        return load_tokenizer(Path(recipe.decoder.path), "decoder.path")
    return train_decoder_tokenizer(texts, recipe.decoder.vocab_size)
