"""Whole profiles through the server's engine in this process: the right answers.

Legend: Q queries, Z embedding_dim.
"""

from collections.abc import Sequence
from typing import Any

from qanchor.bundle.packing import UserSuffix
from qanchor.data.profile import Profile
from qanchor_bench.bench import Bench
from qanchor_bench.workload import EncodedUser, FloatArray
from qanchor_export.sample_users import SAMPLE_QUERIES
from qanchor_server.config import ServerConfig
from qanchor_server.engine import Engine
from qanchor_server.prefix_encoder import PrefixEncoder
from qanchor_server.prefix_source import prepare
from qanchor_server.query_reader import QueryReader
from qanchor_server.suffix_runner import SuffixRunner


class ProfileEngine:
    """One engine, and the queries that every profile is asked."""

    def __init__(self, bench: Bench, *, max_cached_texts: int) -> None:
        self.bench = bench
        self.engine: Engine[Any] = bench.engine()
        self.encoder = prefix_encoder(bench, self.engine, max_cached_texts=max_cached_texts)
        manifest = bench.bundle.manifest
        self._suffix = SuffixRunner(
            self.engine, user_emb=manifest.tokens.user_emb, hidden_dim=manifest.dims.hidden_dim
        )
        self.queries = query_texts(bench.scenario.queries[0])
        reader = QueryReader(bench.bundle)
        self.suffixes = tuple(reader.query(text) for text in self.queries)

    def encode(self, profile: Profile) -> EncodedUser:
        """A fresh encoding of a profile."""
        prepared = prepare(profile, 1, self.bench.bundle.manifest)
        slot = self.engine.allocate_slot(len(prepared.layout))
        self.encoder.encode(prepared, slot)
        return EncodedUser(slot, len(prepared.layout))

    def step(self, users: Sequence[EncodedUser]) -> FloatArray:
        """Vectors of all queries of encoded users from one suffix step, packed as by the server."""
        asked = [UserSuffix(user.prefix_len, self.suffixes) for user in users]
        return self._suffix.embed(asked, [user.slot for user in users])

    def answer(self, profile: Profile) -> FloatArray:
        """Vectors [Q, Z] of all queries over a fresh encoding."""
        user = self.encode(profile)
        found_QZ = self.step([user])
        self.engine.free_slot(user.slot)
        return found_QZ


def prefix_encoder(
    bench: Bench, engine: Engine[Any], *, max_cached_texts: int = ServerConfig().event_vector_cache
) -> PrefixEncoder[Any]:
    """The server's encoder with its default step sizes."""
    defaults = ServerConfig()
    return PrefixEncoder(
        engine,
        bench.bundle,
        chunk_len=defaults.chunk_len,
        max_event_tokens_per_step=defaults.max_event_tokens_per_step,
        max_cached_texts=max_cached_texts,
    )


def query_texts(num_queries: int) -> tuple[str, ...]:
    """So many different questions."""
    texts = [*SAMPLE_QUERIES]
    rounds = num_queries // len(texts)
    texts += [f"{text} Asked {number}." for number in range(rounds) for text in SAMPLE_QUERIES]
    return tuple(texts[:num_queries])
