"""Proof that a bundle computes what torch computed, and the same whichever way it is run.

Without a model the proof rests on the embeddings torch gave at export; with one, made-up users
are also compared with the model itself and with one plain causal pass of transformers per query.

Legend: Q queries, Z embedding_dim, D decoder width.
"""

import logging
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qanchor.bundle.packing import SuffixQuery
from qanchor.bundle.tolerance import EXACT, Tolerance, Tolerances, tolerances
from qanchor.data.render import RenderedProfile
from qanchor_export.runner import BundleRunner, EncodedPrefix
from qanchor_export.sample_users import SAMPLE_QUERIES, sample_users
from qanchor_export.source import ExportSource

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]

_SPARE_COLUMNS = 37
_NUM_PROMPT_ROWS = 6
_NUM_FULL_PASSES = 3


@dataclass(frozen=True, slots=True)
class Check:
    """One equality and how far apart its two sides are."""

    name: str
    num_vectors: int
    max_abs: float
    mean_abs: float
    mean_cosine: float
    allowed: Tolerance

    @property
    def is_ok(self) -> bool:
        """Whether largest difference and mean cosine are within tolerance; NaN is not."""
        is_near = self.max_abs <= self.allowed.max_abs
        return is_near and self.mean_cosine >= self.allowed.mean_cosine


def compare(name: str, found: FloatArray, wanted: FloatArray, allowed: Tolerance = EXACT) -> Check:
    """The differences of two arrays of vectors [Q, Z], and the mean cosine of their rows."""
    assert found.shape == wanted.shape, f"This is a bug: {found.shape} against {wanted.shape}"
    apart = np.abs(found.astype(np.float64) - wanted)
    norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(wanted, axis=-1)
    cosine = float(((found.astype(np.float64) * wanted).sum(-1) / norms).mean())
    check = Check(name, len(found), float(apart.max()), float(apart.mean()), cosine, allowed)
    logger.info("%s: max %.2e, mean %.2e", check.name, check.max_abs, check.mean_abs)
    return check


def verify(
    runner: BundleRunner, source: ExportSource | None = None, num_users: int = 4, seed: int = 7
) -> list[Check]:
    """Run every check; `source` is the model the bundle came from, `num_users` are made up."""
    trial = _Trial(runner, num_users, seed)
    checks = [trial.stored(), *trial.chunks(), trial.spare(), trial.alone(), trial.batched()]
    checks.append(trial.prompts_alone())
    if source is not None:
        checks += [trial.anchor(source), trial.full_pass(source), trial.prompts(source)]
        if any(scenario.soft_prompt for scenario in runner.bundle.scenarios):
            checks.append(trial.scenarios(source))
    return checks


@dataclass(slots=True)
class _Trial:
    """Made-up users, their prefixes in one piece and their packed embeddings: the common side."""

    runner: BundleRunner
    num_users: int
    seed: int
    users: list[RenderedProfile] = field(init=False)
    allowed: Tolerances = field(init=False)
    queries: list[SuffixQuery] = field(init=False)
    prefixes: list[EncodedPrefix] = field(init=False)
    packed: list[FloatArray] = field(init=False)

    def __post_init__(self) -> None:
        self.allowed = tolerances(self.runner.bundle.manifest)
        schema = self.runner.bundle.manifest.profile_schema
        self.users = sample_users(schema, self.num_users, self.seed)
        self.queries = [self.runner.query(text) for text in SAMPLE_QUERIES]
        self.prefixes = [self.runner.encode_prefix(user) for user in self.users]
        self.packed = [self.runner.suffix([(prefix, self.queries)]) for prefix in self.prefixes]

    def stored(self) -> Check:
        """Cases of the bundle: torch at export = ONNX Runtime now."""
        found, wanted = [], []
        for case in self.runner.bundle.parity:
            prefix = self.runner.encode_prefix(case.rendered)
            found.append(
                self.runner.suffix([(prefix, [self.runner.query(q) for q in case.queries])])
            )
            wanted.append(np.array(case.embeddings, dtype=np.float32))
        return self._torch("torch at export = ONNX Runtime", _rows(found), _rows(wanted))

    def chunks(self) -> list[Check]:
        """A prefix in one piece = in chunks."""
        shortest = min(range(len(self.users)), key=lambda user: self.prefixes[user].length)
        everyone = range(len(self.users))
        # Single tokens on the shortest prefix only: a step each.
        rounds: list[tuple[int, list[int]]] = [(1, [shortest]), (7, [shortest])]
        rounds.append((64, list(everyone)))
        checks = []
        for chunk_len, chosen in rounds:
            found = [
                self.runner.suffix(
                    [(self.runner.encode_prefix(self.users[user], chunk_len), self.queries)]
                )
                for user in chosen
            ]
            wanted = [self.packed[user] for user in chosen]
            name = f"prefix in one piece = in chunks of {chunk_len}"
            checks.append(self._ways(name, _rows(found), _rows(wanted)))
        return checks

    def spare(self) -> Check:
        """Columns behind the prefix hold noise in prefill and suffix step."""
        found = [
            self.runner.suffix(
                [(self.runner.encode_prefix(user, 64, _SPARE_COLUMNS), self.queries)]
            )
            for user in self.users
        ]
        return self._ways("noise in unused prefix columns", _rows(found), _rows(self.packed))

    def alone(self) -> Check:
        """Each query alone = packed with nine others."""
        found = [
            self.runner.suffix([(prefix, [query])])
            for prefix in self.prefixes
            for query in self.queries
        ]
        return self._ways("query alone = packed", _rows(found), _rows(self.packed))

    def batched(self) -> Check:
        """All users in one step, prefixes of different length, one query fewer for each."""
        count = len(self.queries)
        taken = [self.queries[: max(1, count - user)] for user in range(len(self.users))]
        found = self.runner.suffix(list(zip(self.prefixes, taken, strict=True)))
        wanted = [rows[: len(few)] for rows, few in zip(self.packed, taken, strict=True)]
        return self._ways("users apart = batched", found, _rows(wanted))

    def prompts_alone(self) -> Check:
        """Queries with soft prompts of different length: alone = packed among plain ones."""
        mixed = [
            query for pair in zip(self.queries, self.prompted(), strict=True) for query in pair
        ]
        found = self.runner.suffix([(self.prefixes[0], mixed)])[1::2]
        wanted = [self.runner.suffix([(self.prefixes[0], [query])]) for query in self.prompted()]
        return self._ways("soft prompts alone = packed", found, _rows(wanted))

    def anchor(self, source: ExportSource) -> Check:
        """The model's own anchor tower."""
        from qanchor_export.reference import anchor_embeddings, make_query

        queries = [make_query(source, text) for text in SAMPLE_QUERIES]
        wanted = [anchor_embeddings(source, user, queries) for user in self.users]
        return self._torch("anchor tower = ONNX Runtime", _rows(self.packed), _rows(wanted))

    def full_pass(self, source: ExportSource) -> Check:
        """Prefix step and suffix step = one causal pass of transformers over [prefix | query]."""
        few = self.queries[:_NUM_FULL_PASSES]
        return self._against_full_pass(source, "one full pass = prefix + suffix", few)

    def prompts(self, source: ExportSource) -> Check:
        """The same with soft-prompt rows."""
        few = self.prompted()[:_NUM_FULL_PASSES]
        return self._against_full_pass(source, "one full pass, soft prompts", few)

    def scenarios(self, source: ExportSource) -> Check:
        """The bundle's tuned and compiled scenarios, on one user."""
        from qanchor_export.reference import full_pass_embeddings, scenario_query

        chosen = [one for one in self.runner.bundle.scenarios if one.soft_prompt]
        queries = [self.runner.scenario(scenario) for scenario in chosen]
        wanted = full_pass_embeddings(
            source, self.users[0], [scenario_query(source, scenario) for scenario in chosen]
        )
        found = self.runner.suffix([(self.prefixes[0], queries)])
        return self._torch("one full pass, the bundle's scenarios", found, wanted)

    def prompted(self) -> list[SuffixQuery]:
        """The queries with soft prompts of 1 to 6 random rows."""
        rng = np.random.default_rng(self.seed)
        hidden_dim = self.runner.bundle.manifest.dims.hidden_dim
        return [
            self.runner.query(
                text,
                rng.standard_normal((1 + i % _NUM_PROMPT_ROWS, hidden_dim), dtype=np.float32),
            )
            for i, text in enumerate(SAMPLE_QUERIES)
        ]

    def _ways(self, name: str, found: FloatArray, wanted: FloatArray) -> Check:
        return compare(name, found, wanted, self.allowed.ways)

    def _torch(self, name: str, found: FloatArray, wanted: FloatArray) -> Check:
        return compare(name, found, wanted, self.allowed.torch)

    def _against_full_pass(
        self, source: ExportSource, name: str, queries: list[SuffixQuery]
    ) -> Check:
        from qanchor_export.reference import full_pass_embeddings

        found = [self.runner.suffix([(prefix, queries)]) for prefix in self.prefixes]
        wanted = [full_pass_embeddings(source, user, queries) for user in self.users]
        return self._torch(name, _rows(found), _rows(wanted))


def _rows(parts: list[FloatArray]) -> FloatArray:
    return np.concatenate(parts)
