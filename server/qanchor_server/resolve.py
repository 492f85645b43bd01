"""Queries as suffix tokens: scenarios resolved once, free text per request.

Must not know grpc or an engine's device. `Resolver` is used from the event loop thread only.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from qanchor.bundle.packing import SuffixQuery, scenario_suffix
from qanchor.bundle.reader import Bundle
from qanchor.config import Scenario, nearest
from qanchor.errors import BundleError, ConfigError, InvalidInput

MAX_CHARS_PER_TOKEN = 64


@dataclass(frozen=True, slots=True)
class ResolvedQuery:
    """A query ready for the engine; `scenario` is None for free text."""

    suffix: SuffixQuery
    scenario: Scenario | None = None


class Resolver:
    """Turns scenario names and free text into suffix queries, within the manifest's limits."""

    def __init__(self, bundle: Bundle, *, max_cached_queries: int) -> None:
        """Resolve every scenario. Raises BundleError for one that breaks the manifest's limits."""
        self._bundle = bundle
        self._max_cached_queries = max_cached_queries
        self._free_text: OrderedDict[str, ResolvedQuery] = OrderedDict()
        self._scenarios = {
            scenario.name: self._resolve_scenario(scenario) for scenario in bundle.scenarios
        }

    def scenarios(self) -> Iterable[tuple[Scenario, SuffixQuery]]:
        """All scenarios, by name."""
        for name in sorted(self._scenarios):
            resolved = self._scenarios[name]
            assert resolved.scenario is not None
            yield resolved.scenario, resolved.suffix

    def scenario(self, name: str, where: str) -> ResolvedQuery:
        """The scenario of that name. Raises InvalidInput at field path `where`."""
        resolved = self._scenarios.get(name)
        if resolved is None:
            raise InvalidInput(
                where, name, "no such scenario", nearest(name, list(self._scenarios))
            )
        return resolved

    def text(self, text: str, where: str) -> ResolvedQuery:
        """A free-text query. Raises InvalidInput at field path `where` when empty or too long."""
        cached = self._free_text.get(text)
        if cached is not None:
            self._free_text.move_to_end(text)
            return cached
        if not text.strip():
            raise InvalidInput(where, text, "must not be empty", "ask something")
        limit = self._bundle.manifest.limits.max_query_len
        # Megabytes of text are refused before the tokenizer holds up the event loop.
        if len(text) > limit * MAX_CHARS_PER_TOKEN:
            raise InvalidInput(
                where,
                text,
                f"at most {limit * MAX_CHARS_PER_TOKEN} characters",
                "shorten the query",
            )
        suffix = SuffixQuery(tuple(self._bundle.encode_query(text)))
        if suffix.suffix_len > limit:
            raise InvalidInput(
                where,
                text,
                f"{suffix.suffix_len} tokens with template and <USER_EMB>, at most {limit}",
                "shorten the query",
            )
        resolved = ResolvedQuery(suffix)
        self._free_text[text] = resolved
        if len(self._free_text) > self._max_cached_queries:
            self._free_text.popitem(last=False)
        return resolved

    def _resolve_scenario(self, scenario: Scenario) -> ResolvedQuery:
        manifest = self._bundle.manifest
        try:
            suffix = scenario_suffix(scenario, self._bundle.encode_query, manifest.dims.hidden_dim)
        except ConfigError as error:
            raise BundleError(f"scenario {scenario.name!r}: {error}") from None
        if suffix.suffix_len > manifest.limits.max_query_len:
            raise BundleError(
                f"scenario {scenario.name!r}: {suffix.suffix_len} suffix tokens, limits allow "
                f"{manifest.limits.max_query_len}; shorten its question"
            )
        return ResolvedQuery(suffix, scenario)
