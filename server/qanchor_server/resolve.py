"""Queries as suffixes: scenarios resolved once, free text when it is first asked.

Must not know grpc or an engine's device. `Resolver` is used from the event loop thread only, but
for `resolve_all`.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qanchor.bundle.packing import SuffixQuery, scenario_suffix
from qanchor.bundle.reader import Bundle
from qanchor.config import Scenario, nearest
from qanchor.errors import BundleError, InvalidInput
from qanchor_server.failures import Overloaded
from qanchor_server.query_reader import QueryReader

MAX_CHARS_PER_TOKEN = 64


@dataclass(frozen=True, slots=True)
class ResolvedQuery:
    """A query ready for the engine; `scenario` is None for free text."""

    suffix: SuffixQuery
    scenario: Scenario | None = None


@dataclass(slots=True)
class _Reading:
    """A text being read for the first time, and how many wait for it."""

    task: asyncio.Task[ResolvedQuery]
    num_waiting: int = 0


class Resolver:
    """Turns scenario names and free text into suffix queries, within the manifest's limits."""

    def __init__(self, bundle: Bundle, *, max_cached_queries: int, max_unread: int = 1024) -> None:
        """Resolve every scenario. `max_unread`: texts that may wait for the query encoder.

        Raises BundleError for a scenario that breaks the manifest's limits.
        """
        self.reader = QueryReader(bundle)
        self._max_query_len = bundle.manifest.limits.max_query_len
        self._hidden_dim = bundle.manifest.dims.hidden_dim
        self._max_cached_queries = max_cached_queries
        self._max_unread = max_unread
        self._free_text: OrderedDict[str, ResolvedQuery] = OrderedDict()
        self._unread: dict[str, _Reading] = {}
        self._scenarios: Mapping[str, ResolvedQuery] = {}
        try:
            self.replace(self.resolve_all(bundle.scenarios))
        except InvalidInput as error:
            raise BundleError(f"{bundle.path}: {error}") from None

    def resolve_all(self, scenarios: Iterable[Scenario]) -> dict[str, ResolvedQuery]:
        """Scenarios by name, for `replace`. Raises InvalidInput. From any thread."""
        return {scenario.name: self._resolve_scenario(scenario) for scenario in scenarios}

    def replace(self, scenarios: Mapping[str, ResolvedQuery]) -> None:
        """Know these scenarios from now on."""
        self._scenarios = scenarios

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

    async def text(self, text: str, where: str) -> ResolvedQuery:
        """A free-text query; waits for nothing but a query encoder's first sight of the text.

        Raises InvalidInput at field path `where` when the text is empty or too long, Overloaded
        when too many texts wait to be read.
        """
        cached = self._free_text.get(text)
        if cached is not None:
            self._free_text.move_to_end(text)
            return cached
        if text not in self._unread:
            token_ids = self._checked(text, where)
            if self.reader.is_quick:
                return self._keep(text, self.reader.query_of(token_ids))
            if len(self._unread) >= self._max_unread:
                raise Overloaded(f"{where}: {len(self._unread)} new texts wait to be read")
            self._unread[text] = _Reading(asyncio.create_task(self._read(text, token_ids)))
        reading = self._unread[text]
        reading.num_waiting += 1
        try:
            # Shielded: others may wait for the same text when this caller goes away.
            return await asyncio.shield(reading.task)
        finally:
            reading.num_waiting -= 1
            if not reading.num_waiting:
                del self._unread[text]
                # Nobody is left to read it for; nothing happens where it is read already.
                reading.task.cancel()

    async def _read(self, text: str, token_ids: list[int]) -> ResolvedQuery:
        return self._keep(text, await self.reader.query_aside(token_ids))

    def _keep(self, text: str, suffix: SuffixQuery) -> ResolvedQuery:
        resolved = ResolvedQuery(suffix)
        self._free_text[text] = resolved
        if len(self._free_text) > self._max_cached_queries:
            self._free_text.popitem(last=False)
        return resolved

    def _checked(self, text: str, where: str) -> list[int]:
        """Token ids of a free text. Raises InvalidInput when it is empty or too long."""
        if not text.strip():
            raise InvalidInput(where, text, "must not be empty", "ask something")
        max_chars = self.reader.max_tokens * MAX_CHARS_PER_TOKEN
        # Megabytes of text are refused before the tokenizer holds up the event loop.
        if len(text) > max_chars:
            raise InvalidInput(where, text, f"at most {max_chars} characters", "shorten the query")
        return self._token_ids(text, where)

    def _token_ids(self, text: str, where: str) -> list[int]:
        token_ids, limit = self.reader.token_ids(text), self.reader.max_tokens
        if len(token_ids) > limit:
            raise InvalidInput(
                where,
                text,
                f"is read as {len(token_ids)} tokens, at most {limit} are taken",
                "shorten the query",
            )
        return token_ids

    def _resolve_scenario(self, scenario: Scenario) -> ResolvedQuery:
        known = self._scenarios.get(scenario.name)
        if known is not None and known.scenario == scenario:
            return known

        def query(text: str) -> SuffixQuery:
            return self.reader.query_of(self._token_ids(text, f"{scenario.name}.question"))

        suffix = scenario_suffix(scenario, query, self._hidden_dim)
        if suffix.suffix_len > self._max_query_len:
            raise InvalidInput(
                f"{scenario.name}.question",
                scenario.question,
                f"{suffix.suffix_len} suffix tokens with soft prompt and <USER_EMB>, limits allow "
                f"{self._max_query_len}",
                "shorten its question or compile it",
            )
        return ResolvedQuery(suffix, scenario)
