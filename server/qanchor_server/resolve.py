"""Queries as suffix tokens: scenarios resolved once, free text per request.

Must not know grpc or an engine's device. `Resolver` is used from the event loop thread only, but
for `check`.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from qanchor.bundle.packing import SuffixQuery, scenario_suffix
from qanchor.bundle.reader import Bundle
from qanchor.config import Scenario, nearest
from qanchor.errors import BundleError, InvalidInput

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
        try:
            self.replace(bundle.scenarios)
        except InvalidInput as error:
            raise BundleError(f"{bundle.path}: {error}") from None

    def replace(self, scenarios: Iterable[Scenario]) -> None:
        """Know these scenarios from now on. Raises InvalidInput; then nothing has changed."""
        self._scenarios = self._resolve_all(scenarios)

    def check(self, scenarios: Iterable[Scenario]) -> None:
        """Raise InvalidInput for scenarios that `replace` would refuse. From any thread."""
        self._resolve_all(scenarios)

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

    def _resolve_all(self, scenarios: Iterable[Scenario]) -> dict[str, ResolvedQuery]:
        return {scenario.name: self._resolve_scenario(scenario) for scenario in scenarios}

    def _resolve_scenario(self, scenario: Scenario) -> ResolvedQuery:
        manifest = self._bundle.manifest
        suffix = scenario_suffix(scenario, self._bundle.encode_query, manifest.dims.hidden_dim)
        limit = manifest.limits.max_query_len
        if suffix.suffix_len > limit:
            raise InvalidInput(
                f"{scenario.name}.question",
                scenario.question,
                f"{suffix.suffix_len} suffix tokens with soft prompt and <USER_EMB>, limits allow "
                f"{limit}",
                "shorten its question or compile it",
            )
        return ResolvedQuery(suffix, scenario)
