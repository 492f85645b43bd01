"""A scenario file: tuned or compiled scenarios and the checkpoint they belong to. Torch-free.

Written by `qanchor tune` and `qanchor compile`; an export takes its scenarios in place of the
checkpoint's, and a server that holds the bundle of the same checkpoint may take them as well: the
bundle's graphs stay as they are, since soft prompts are inputs of the suffix graph.
"""

from collections.abc import Iterable
from pathlib import Path

from qanchor import config
from qanchor.config import Config, Scenario
from qanchor.errors import ConfigError

FORMAT_VERSION = 1


class ScenarioFile(Config, frozen=True, kw_only=True):
    """Content of a scenario file (JSON)."""

    format_version: int = FORMAT_VERSION
    checkpoint_id: str
    """`qanchor.checkpoint.checkpoint_id` of the model whose soft prompts these are."""
    hidden_dim: int
    """Numbers per soft-prompt row."""
    dataset: str = ""
    """Name of the data set whose users they were learnt from, for people."""
    scenarios: tuple[Scenario, ...]
    """Unique names; each version is above that of the scenario it comes from."""


def read_scenario_file(path: Path) -> ScenarioFile:
    """Read and check a scenario file. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(
            "--scenarios", str(path), "no such file", "make one with `qanchor tune` or `compile`"
        )
    file = config.load(ScenarioFile, path)
    if file.format_version != FORMAT_VERSION:
        raise ConfigError(
            "format_version",
            file.format_version,
            f"this program reads {FORMAT_VERSION}",
            "tune again with this version",
        )
    names = [scenario.name for scenario in file.scenarios]
    if len(set(names)) != len(names):
        raise ConfigError("scenarios.name", names, "names must be unique", "drop one of them")
    return file


def check_fits(file: ScenarioFile, checkpoint_id: str, hidden_dim: int) -> None:
    """Raise ConfigError unless the file's soft prompts were learnt with this very model."""
    if file.checkpoint_id != checkpoint_id:
        raise ConfigError(
            "scenario_file.checkpoint_id",
            file.checkpoint_id,
            f"soft prompts fit one model only; this model is {checkpoint_id or 'unknown'}",
            "tune again with this checkpoint",
        )
    if file.hidden_dim != hidden_dim:
        raise ConfigError(
            "scenario_file.hidden_dim",
            file.hidden_dim,
            f"the model's hidden_dim is {hidden_dim}",
            "tune again with this checkpoint",
        )
    for scenario in file.scenarios:
        for row in scenario.soft_prompt:
            if len(row) != hidden_dim:
                raise ConfigError(
                    f"{scenario.name}.soft_prompt",
                    len(row),
                    f"numbers in a row; the model's hidden_dim is {hidden_dim}",
                    "tune this scenario again",
                )


def with_replaced(base: Iterable[Scenario], newer: Iterable[Scenario]) -> tuple[Scenario, ...]:
    """`base` with scenarios of `newer` in place of those of the same name; new names at the end."""
    by_name = {scenario.name: scenario for scenario in base}
    by_name.update({scenario.name: scenario for scenario in newer})
    return tuple(by_name.values())
