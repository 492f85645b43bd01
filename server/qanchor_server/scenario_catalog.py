"""Which scenarios the server knows: the bundle's, and those of scenario files beside it.

Files are read at start and again on request. New scenarios are checked as a whole and then take
the place of the old ones at once: a request is resolved under one state, and what is wrong changes
nothing. The bundle's graphs stay as they are, since soft prompts are inputs. Must not know grpc.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qanchor.bundle.reader import Bundle
from qanchor.bundle.scenario_file import check_fits, read_scenario_file, with_replaced
from qanchor.config import Scenario
from qanchor.errors import InvalidInput
from qanchor_server.resolve import ResolvedQuery, Resolver


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload changed, by name."""

    changed: tuple[str, ...]
    """New, or of a newer version."""
    removed: tuple[str, ...]
    """Known before, in no file any more."""


class ScenarioCatalog:
    """Reads scenario files and gives them to a resolver. Coroutines run on the event loop."""

    def __init__(self, bundle: Bundle, path: Path | None, resolver: Resolver) -> None:
        """`path`: a scenario file, or a directory whose *.json are; None: the bundle's alone.

        Reads it. Raises InvalidInput for a wrong file.
        """
        self._bundle = bundle
        self._path = path
        self._resolver = resolver
        self._lock = asyncio.Lock()
        if path is not None:
            self._take(self._read(path))

    async def reload(self) -> Reloaded:
        """Read the files again. Raises InvalidInput for a wrong one; then nothing has changed."""
        path = self._path
        if path is None:
            raise InvalidInput(
                "scenarios", "", "the server has no scenario files", "start it with --scenarios"
            )
        async with self._lock:
            # Reading files and questions may take a while; requests go on meanwhile.
            return self._take(await asyncio.to_thread(self._read, path))

    def _read(self, path: Path) -> dict[str, ResolvedQuery]:
        """The bundle's scenarios with those of all files in place of their older versions, ready
        for the resolver.
        """
        newer: dict[str, tuple[Scenario, str]] = {}
        for file in self._files(path):
            for scenario in self._read_file(file):
                if scenario.name in newer:
                    raise InvalidInput(
                        f"{file.name}: {scenario.name}.name",
                        scenario.name,
                        f"{newer[scenario.name][1]} has a scenario of this name too",
                        "keep it in one file",
                    )
                newer[scenario.name] = scenario, file.name
        base = {scenario.name: scenario for scenario in self._bundle.scenarios}
        for scenario, name in newer.values():
            _check_version(scenario, base.get(scenario.name), name, "the bundle")
        current = {scenario.name: scenario for scenario, _ in self._resolver.scenarios()}
        merged = with_replaced(base.values(), (scenario for scenario, _ in newer.values()))
        for scenario in merged:
            name = newer[scenario.name][1] if scenario.name in newer else self._bundle.path.name
            _check_version(scenario, current.get(scenario.name), name, "the server")
        return self._resolver.resolve_all(merged)

    def _files(self, path: Path) -> Iterable[Path]:
        if path.is_dir():
            return sorted(path.glob("*.json"))
        return [path]

    def _read_file(self, path: Path) -> tuple[Scenario, ...]:
        manifest = self._bundle.manifest
        try:
            file = read_scenario_file(path)
            check_fits(file, manifest.checkpoint_id, manifest.dims.hidden_dim)
        except InvalidInput as error:
            where = error.field if path.name in error.field else f"{path.name}: {error.field}"
            raise InvalidInput(where, error.value, error.rule, error.remedy) from None
        except OSError as error:
            raise InvalidInput(path.name, str(path), f"cannot be read: {error}") from None
        return file.scenarios

    def _take(self, resolved: dict[str, ResolvedQuery]) -> Reloaded:
        before = {scenario.name: scenario for scenario, _ in self._resolver.scenarios()}
        self._resolver.replace(resolved)
        after = {scenario.name: scenario for scenario, _ in self._resolver.scenarios()}
        return Reloaded(
            changed=tuple(name for name in after if before.get(name) != after[name]),
            removed=tuple(name for name in before if name not in after),
        )


def _check_version(new: Scenario, old: Scenario | None, file: str, holder: str) -> None:
    """Raise InvalidInput unless `new` is newer than `old` or the same."""
    if old is None or new == old or new.version > old.version:
        return
    rule = (
        f"{holder} has version {old.version} with another content"
        if new.version == old.version
        else f"{holder} has the newer version {old.version}"
    )
    raise InvalidInput(
        f"{file}: {new.name}.version",
        new.version,
        rule,
        f"give it version {old.version + 1}, also to go back to an older content",
    )
