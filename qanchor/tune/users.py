"""Whose prefixes are cached and what their labels are: train and valid users, never test.

Legend: U users.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qanchor.checkpoint import Checkpoint
from qanchor.data.dataset import Dataset
from qanchor.errors import ConfigError, DataError
from qanchor.train.corpus import IntArray, PrefixCorpus
from qanchor.train.event_vectors import with_event_vectors
from qanchor.train.setup import check_renders_alike, render_users, tokenized
from qanchor.tune.config import SuffixTraining
from qanchor.tune.prefix_cache import (
    DTYPES,
    PrefixCache,
    encode_prefixes,
    kv_bytes_per_position,
)

log = logging.getLogger(__name__)

GIB = 2**30


@dataclass(frozen=True, slots=True)
class CachedUsers:
    """Encoded users; `train` and `valid` are cache rows."""

    cache: PrefixCache
    train: IntArray
    valid: IntArray


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """Cache rows [U] that have a label and the labels [U], 0 to K - 1."""

    rows: IntArray
    labels: IntArray


def cache_users(
    checkpoint: Checkpoint,
    dataset: Dataset,
    candidates: Mapping[str, Sequence[str]],
    config: SuffixTraining,
) -> CachedUsers:
    """Draw train and valid users from `candidates` (by split) and encode their prefixes once.

    Raises ConfigError for a data set of another schema, DataError when a split has no user.
    """
    check_renders_alike(checkpoint, dataset)
    limits = {"train": config.max_train_users, "valid": config.max_valid_users}
    drawn: dict[str, list[str]] = {}
    for index, (split, limit) in enumerate(limits.items()):
        if not candidates[split]:
            raise DataError("users", split, "no user of this split to learn from", "add some")
        rng = np.random.default_rng([config.seed, 4, index])
        order = rng.permutation(len(candidates[split])).tolist()
        drawn[split] = [candidates[split][place] for place in order[: limit or None]]
    rendered = render_users(dataset, [*drawn["train"], *drawn["valid"]])
    corpus = tokenized(checkpoint, rendered)
    row_of = {user: row for row, user in enumerate(rendered.user_ids)}
    by_split = {split: [row_of[user] for user in users] for split, users in drawn.items()}
    by_split = _within_budget(checkpoint, corpus, by_split, config)
    corpus = with_event_vectors(corpus, checkpoint.model.event_encoder)
    dtype = DTYPES[config.cache_dtype]
    chosen = [*by_split["train"], *by_split["valid"]]
    cache = encode_prefixes(checkpoint.model, corpus, chosen, dtype)
    log.info(
        "prefix cache: %d users, %.2f GiB, %d bytes per position, %d per user on average",
        len(chosen),
        cache.num_bytes / GIB,
        kv_bytes_per_position(checkpoint.model, dtype),
        cache.num_bytes // len(chosen),
    )
    num_train = len(by_split["train"])
    return CachedUsers(cache, np.arange(num_train), np.arange(num_train, len(chosen)))


def labelled_rows(dataset: Dataset, scenario: str, users: CachedUsers) -> dict[str, LabelledRows]:
    """Labels of a scenario for the cached users, by split `train` and `valid`.

    Raises DataError unless the labels are 0 to K - 1, K at least 2, and each occurs in train.
    """
    ids, labels = dataset.labels(scenario)
    label_of = dict(zip(ids, labels.tolist(), strict=True))
    found = {
        split: _labelled(users.cache, rows, label_of)
        for split, rows in (("train", users.train), ("valid", users.valid))
    }
    classes = np.unique(found["train"].labels)
    if len(classes) < 2 or not np.array_equal(classes, np.arange(len(classes))):
        raise DataError(
            f"labels.{scenario}",
            classes.tolist(),
            "train users must show every label from 0 to K - 1, K at least 2",
            "draw more users (max_train_users), or leave the scenario out",
        )
    if not np.array_equal(np.unique(found["valid"].labels), classes):
        raise DataError(
            f"labels.{scenario}",
            np.unique(found["valid"].labels).tolist(),
            f"valid users must show the same labels as train users: {classes.tolist()}",
            "draw more users (max_valid_users), or leave the scenario out",
        )
    return found


def _labelled(cache: PrefixCache, rows: IntArray, label_of: Mapping[str, int]) -> LabelledRows:
    kept = [row for row in rows.tolist() if cache.user_ids[row] in label_of]
    labels = [label_of[cache.user_ids[row]] for row in kept]
    return LabelledRows(np.array(kept, dtype=np.int64), np.array(labels, dtype=np.int64))


def _within_budget(
    checkpoint: Checkpoint,
    corpus: PrefixCorpus,
    by_split: dict[str, list[int]],
    config: SuffixTraining,
) -> dict[str, list[int]]:
    """As many users of each split as the cache may hold, in the order drawn."""
    per_position = kv_bytes_per_position(checkpoint.model, DTYPES[config.cache_dtype])
    total = per_position * sum(corpus.prefix_len(row) for rows in by_split.values() for row in rows)
    budget = config.max_cache_gib * GIB
    if total <= budget:
        return by_split
    kept = {}
    for split, rows in by_split.items():
        used = np.cumsum([per_position * corpus.prefix_len(row) for row in rows])
        # Each split gives up the same share.
        kept[split] = rows[: int((used <= used[-1] * budget / total).sum())]
        if not kept[split]:
            raise ConfigError(
                "max_cache_gib", config.max_cache_gib, f"holds no {split} user", "raise it"
            )
    log.warning(
        "%.1f GiB of keys and values, max_cache_gib=%g: only %d train and %d valid users are used",
        total / GIB,
        config.max_cache_gib,
        len(kept["train"]),
        len(kept["valid"]),
    )
    return kept
