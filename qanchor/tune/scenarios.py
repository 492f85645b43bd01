"""Tuning or compiling several scenarios of a data set behind one prefix cache, and what is written.

`OUT` is the scenario file; `OUT` with the ending `.report.json` says how it went: settings,
environment, quality per scenario, positions computed and saved.
"""

import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from qanchor import config
from qanchor.bundle.scenario_file import (
    ScenarioFile,
    check_fits,
    read_scenario_file,
    with_replaced,
)
from qanchor.checkpoint import Checkpoint, checkpoint_id
from qanchor.config import Config, Scenario, nearest
from qanchor.data.dataset import LABELS_FILE, Dataset
from qanchor.environment import Environment, environment
from qanchor.errors import ConfigError, DataError
from qanchor.eval.results import SkippedScenario
from qanchor.tune.compiling import CompileReport, compile_scenario
from qanchor.tune.config import CompileConfig, TuneConfig
from qanchor.tune.suffix_pass import SuffixPass
from qanchor.tune.tuning import TuneReport, tune_scenario
from qanchor.tune.users import CachedUsers, LabelledRows, cache_users, labelled_rows

log = logging.getLogger(__name__)


class Reuse(Config, frozen=True, kw_only=True):
    """Token positions of all forward passes, and what keeping the prefixes saved."""

    prefix_positions: int
    """Encoded once."""
    suffix_positions: int
    positions_without_reuse: int
    """Had every pass run its users' prefixes again."""
    times_fewer: float
    cache_bytes: int
    cache_bytes_per_user: int


class _Summary(Config, frozen=True, kw_only=True):
    """What stands beside a scenario file."""

    scenario_file: str
    dataset: str
    checkpoint_id: str
    environment: Environment
    reuse: Reuse


class TuneSummary(_Summary, frozen=True, kw_only=True):
    """How `qanchor tune` went."""

    settings: TuneConfig
    scenarios: tuple[TuneReport, ...]
    skipped: tuple[SkippedScenario, ...] = ()
    """Those whose labels cannot be learnt from."""


class CompileSummary(_Summary, frozen=True, kw_only=True):
    """How `qanchor compile` went."""

    settings: CompileConfig
    scenarios: tuple[CompileReport, ...]


def tune(
    checkpoint: Checkpoint,
    dataset: Dataset,
    names: Sequence[str],
    out: Path,
    settings: TuneConfig,
) -> TuneSummary:
    """Tune scenarios of the data set, write scenario file and report, return the summary.

    No names: all scenarios but those whose labels cannot be learnt from. An existing file of the
    same checkpoint is extended. Raises ConfigError for an unknown name, a question too long or a
    file of another checkpoint, DataError where a named scenario or all cannot be learnt from.
    """
    earlier = _earlier(out, checkpoint)
    chosen = _chosen(dataset.scenarios, names)
    checkpoint.check_questions(chosen)
    users = cache_users(checkpoint, dataset, _labelled_users(dataset, chosen), settings)
    passes = _passes(checkpoint, users)
    temperature = settings.temperature or checkpoint.meta.recipe.loss.temperature
    learnable, skipped = _learnable(dataset, chosen, users, is_named=bool(names))
    made, reports = [], []
    for scenario, labelled in learnable:
        tuned, quality = tune_scenario(
            passes,
            _newest(scenario, earlier),
            checkpoint.query(scenario.question),
            labelled,
            settings,
            temperature,
        )
        made.append(tuned)
        reports.append(quality)
    summary = TuneSummary(
        **_written(out, checkpoint, dataset, with_replaced(earlier.values(), made), passes),
        settings=settings,
        scenarios=tuple(reports),
        skipped=skipped,
    )
    config.save(summary, report_path(out))
    return summary


def compile_all(
    checkpoint: Checkpoint,
    dataset: Dataset,
    names: Sequence[str],
    out: Path,
    settings: CompileConfig,
    *,
    scenarios: Sequence[Scenario] = (),
    wordings: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> CompileSummary:
    """Compile scenarios, write scenario file and report, return the summary.

    `scenarios` take the place of the data set's of the same name, so that tuned ones can be
    compiled. `wordings`, by scenario name: other questions that ask the same; the scenario is then
    compiled to the mean of all embeddings, its own included. Labels are only read for the probes of
    the report. Errors as for `tune`.
    """
    earlier = _earlier(out, checkpoint)
    chosen = _chosen(with_replaced(dataset.scenarios, scenarios), names)
    asked = {one.name: (one, *_reworded(one, wordings.get(one.name, ()))) for one in chosen}
    checkpoint.check_questions([*chain.from_iterable(asked.values())])
    everyone = {split: dataset.user_ids(split) for split in ("train", "valid")}
    users = cache_users(checkpoint, dataset, everyone, settings)
    passes = _passes(checkpoint, users)
    has_labels = (dataset.path / LABELS_FILE).is_file()
    known = {scenario.name for scenario in dataset.scenarios}
    made, reports = [], []
    for scenario in chosen:
        is_labelled = has_labels and scenario.name in known
        compiled, quality = compile_scenario(
            passes,
            _newest(scenario, earlier),
            [checkpoint.scenario(one) for one in asked[scenario.name]],
            users,
            _probe_labels(dataset, scenario.name, users) if is_labelled else None,
            settings,
        )
        made.append(compiled)
        reports.append(quality)
    summary = CompileSummary(
        **_written(out, checkpoint, dataset, with_replaced(earlier.values(), made), passes),
        settings=settings,
        scenarios=tuple(reports),
    )
    config.save(summary, report_path(out))
    return summary


def report_path(out: Path) -> Path:
    """Where the report of a scenario file lies."""
    return out.with_suffix(".report.json")


def _earlier(out: Path, checkpoint: Checkpoint) -> dict[str, Scenario]:
    """Scenarios of a file that is there already, by name. Checked before any work is done."""
    if not out.is_file():
        return {}
    file = read_scenario_file(out)
    check_fits(file, checkpoint_id(checkpoint), checkpoint.hidden_dim)
    return {scenario.name: scenario for scenario in file.scenarios}


def _chosen(known: Sequence[Scenario], names: Sequence[str]) -> list[Scenario]:
    """The scenarios of these names; all for no name."""
    by_name = {scenario.name: scenario for scenario in known}
    for name in names:
        if name not in by_name:
            raise ConfigError("--scenario", name, "no such scenario", nearest(name, list(by_name)))
    if not by_name:
        raise ConfigError("dataset", 0, "the data set has no scenarios", "add scenarios.json")
    return [by_name[name] for name in names or by_name]


def _reworded(scenario: Scenario, questions: Sequence[str]) -> list[Scenario]:
    """The scenario asked with other questions. Raises ConfigError where none would be read."""
    if questions and scenario.is_compiled:
        rule = "is compiled already: its text is not read"
        raise ConfigError("--wordings", scenario.name, rule, "compile the scenario as it was")
    return [msgspec.structs.replace(scenario, question=question) for question in questions]


def _newest(scenario: Scenario, earlier: Mapping[str, Scenario]) -> Scenario:
    """The scenario with the highest version known, so that the next one is above it."""
    known = earlier.get(scenario.name, scenario)
    return msgspec.structs.replace(scenario, version=max(scenario.version, known.version))


def _labelled_users(dataset: Dataset, scenarios: Sequence[Scenario]) -> dict[str, list[str]]:
    """Train and valid users that have a label for any of the scenarios."""
    labelled = {user for scenario in scenarios for user in dataset.labels(scenario.name)[0]}
    return {
        split: [user for user in dataset.user_ids(split) if user in labelled]
        for split in ("train", "valid")
    }


def _learnable(
    dataset: Dataset, scenarios: Sequence[Scenario], users: CachedUsers, *, is_named: bool
) -> tuple[list[tuple[Scenario, dict[str, LabelledRows]]], tuple[SkippedScenario, ...]]:
    """Scenarios with their labels, and those left out as their labels cannot be learnt from.

    Raises DataError for such a one where `is_named`, and where none is left.
    """
    found: list[tuple[Scenario, dict[str, LabelledRows]]] = []
    skipped: list[SkippedScenario] = []
    for scenario in scenarios:
        try:
            found.append((scenario, labelled_rows(dataset, scenario.name, users)))
        except DataError as error:
            is_last = not found and len(skipped) + 1 == len(scenarios)
            if is_named or is_last:
                raise
            log.warning("scenario %s is not tuned: %s", scenario.name, error)
            skipped.append(SkippedScenario(scenario=scenario.name, reason=str(error)))
    return found, tuple(skipped)


def _probe_labels(
    dataset: Dataset, scenario: str, users: CachedUsers
) -> dict[str, LabelledRows] | None:
    """Labels for the probes of a report; None, with a warning, where they tell nothing."""
    try:
        return labelled_rows(dataset, scenario, users)
    except DataError as error:
        log.warning("scenario %s is compiled without probes: %s", scenario, error)
        return None


def _passes(checkpoint: Checkpoint, users: CachedUsers) -> SuffixPass:
    return SuffixPass(checkpoint.model, users.cache, checkpoint.meta.tokens.user_emb)


def _written(
    out: Path,
    checkpoint: Checkpoint,
    dataset: Dataset,
    scenarios: tuple[Scenario, ...],
    passes: SuffixPass,
) -> dict[str, Any]:
    """Write the scenario file; what every summary says of it."""
    content_id = checkpoint_id(checkpoint)
    file = ScenarioFile(
        checkpoint_id=content_id,
        hidden_dim=checkpoint.hidden_dim,
        dataset=dataset.name,
        scenarios=scenarios,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    # A server may be reading: the file changes in one step.
    staging = out.with_name(out.name + ".partial")
    config.save(file, staging)
    staging.replace(out)
    return {
        "scenario_file": str(out),
        "dataset": dataset.name,
        "checkpoint_id": content_id,
        "environment": environment(),
        "reuse": _reuse(passes),
    }


def _reuse(passes: SuffixPass) -> Reuse:
    positions, cache = passes.positions, passes.cache
    return Reuse(
        prefix_positions=positions.num_prefix,
        suffix_positions=positions.num_suffix,
        positions_without_reuse=positions.num_reused + positions.num_suffix,
        times_fewer=round(positions.times_fewer, 2),
        cache_bytes=cache.num_bytes,
        cache_bytes_per_user=cache.num_bytes // len(cache.kv),
    )
