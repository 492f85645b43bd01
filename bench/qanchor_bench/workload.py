"""Users and queries of exact lengths for engine measurements: random tokens, real prefills.

Legend: P prefix length, N queries, S query length with <USER_EMB>, Z embedding_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qanchor.bundle.manifest import Manifest
from qanchor.bundle.packing import SuffixQuery, UserSuffix
from qanchor.bundle.tolerance import Tolerance
from qanchor.data.prefix import ADAPTER_TOKEN
from qanchor_bench.result import Check
from qanchor_server.config import ServerConfig
from qanchor_server.engine import Engine, PrefixChunk
from qanchor_server.suffix_runner import SuffixRunner

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

CHUNK_LEN = ServerConfig().chunk_len
"""Prefix positions per prefill step."""


@dataclass(frozen=True, slots=True)
class EncodedUser:
    """A user's slot and how much of it is filled."""

    slot: Any
    prefix_len: int


def random_tokens(rng: np.random.Generator, highest: int, shape: tuple[int, ...]) -> IntArray:
    """Token ids below `highest`; what a step costs does not depend on which."""
    return rng.integers(0, highest, shape)


def queries_of(token_ids_NS: IntArray) -> tuple[SuffixQuery, ...]:
    """Queries from rows of S tokens; the last stands for <USER_EMB>, which packing adds."""
    return tuple(SuffixQuery(tuple(row[:-1])) for row in token_ids_NS.tolist())


def encode_tokens(engine: Engine[Any], manifest: Manifest, tokens_P: IntArray) -> EncodedUser:
    """Prefill text tokens into a new slot, chunk by chunk."""
    user = EncodedUser(engine.allocate_slot(len(tokens_P)), len(tokens_P))
    prefill(engine, manifest, user, tokens_P)
    return user


def prefill(engine: Engine[Any], manifest: Manifest, user: EncodedUser, tokens_P: IntArray) -> None:
    """Fill a user's slot."""
    for start in range(0, len(tokens_P), CHUNK_LEN):
        chunk_P = tokens_P[start : start + CHUNK_LEN]
        engine.prefill(
            user.slot,
            PrefixChunk(
                token_ids_C=chunk_P,
                adapter_C=np.full(len(chunk_P), ADAPTER_TOKEN, dtype=np.int64),
                vectors_CE=np.zeros(
                    (len(chunk_P), manifest.dims.slot_vector_dim), dtype=np.float32
                ),
                start=start,
            ),
        )


def suffix_step(
    engine: Engine[Any],
    manifest: Manifest,
    users: Sequence[tuple[EncodedUser, tuple[SuffixQuery, ...]]],
) -> FloatArray:
    """Embeddings of all queries of all users from one step, packing anew included."""
    runner = SuffixRunner(
        engine, user_emb=manifest.tokens.user_emb, hidden_dim=manifest.dims.hidden_dim
    )
    asked = [UserSuffix(user.prefix_len, queries) for user, queries in users]
    return runner.embed(asked, [user.slot for user, _ in users])


def agreement(name: str, found: FloatArray, wanted: FloatArray, allowed: Tolerance) -> Check:
    """Whether unit vectors are the same, as far as the bundle's types let them be."""
    if found.shape != wanted.shape:
        return Check(name=name, is_ok=False, detail=f"shape {found.shape}, not {wanted.shape}")
    cosine = float((found * wanted).sum(-1).mean())
    difference = float(np.abs(found - wanted).max())
    # `<=` and `>=`, so that a NaN fails.
    is_ok = difference <= allowed.max_abs and cosine >= allowed.mean_cosine
    detail = f"{len(found)} vectors, max abs difference {difference:.1e}, mean cosine {cosine:.6f}"
    return Check(name=name, is_ok=is_ok, detail=detail)


def distinctness(name: str, vectors: FloatArray) -> Check:
    """Whether different questions have different answers; else agreement proves nothing."""
    if len(vectors) < 2:
        return Check(name=name, is_ok=True, detail="one vector")
    between = float((vectors @ vectors.T)[~np.eye(len(vectors), dtype=bool)].max())
    return Check(name=name, is_ok=between < 0.9999, detail=f"largest cosine {between:.6f}")
