"""Scenario files that a running server picks up: all or nothing, one state per request."""

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from qanchor import config
from qanchor.bundle.scenario_file import ScenarioFile
from qanchor.client import ClientError
from qanchor.config import Scenario
from qanchor.errors import InvalidInput
from qanchor_server.scenario_catalog import Reloaded

ROWS = ((1.0, 0.0, 0.0), (0.0, 2.0, 4.0))


def write(path: Path, *scenarios: Scenario, checkpoint_id: str = "fake-checkpoint") -> None:
    """A scenario file as `qanchor tune` writes it."""
    file = ScenarioFile(checkpoint_id=checkpoint_id, hidden_dim=3, scenarios=scenarios)
    config.save(file, path)


def tea(version: int = 2, question: str = "tea", **fields: object) -> Scenario:
    return Scenario(name="tea_fan", question=question, version=version, **fields)  # type: ignore[arg-type]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "scenarios"
    made.mkdir()
    return made


@pytest.fixture
async def serving(start_server, profile, directory):
    """A server with a scenario directory that knows ada."""
    running = await start_server(scenarios=str(directory))
    await running.client.put_profile(profile())
    return running


async def test_a_server_starts_with_the_scenarios_of_a_file(start_server, profile, directory):
    write(directory / "tuned.json", tea(soft_prompt=ROWS, is_compiled=True))
    running = await start_server(scenarios=str(directory / "tuned.json"))
    await running.client.put_profile(profile())
    result = await running.client.embed("ada", scenarios=["tea_fan", "coffee_fan"])
    # Compiled: no text tokens, two rows and <USER_EMB>.
    assert result.vectors.tolist() == [[540, 0, 3, 7], [540, 13, 4, 0]]
    assert result.provenance.scenario_versions == (2, 3)


async def test_a_reload_takes_new_and_newer_scenarios_without_an_encoding(serving, directory):
    client = serving.client
    before = await client.embed("ada", scenarios=["tea_fan"])
    assert before.vectors.tolist() == [[540, 17, 5, 0]]
    write(directory / "a.json", tea(soft_prompt=ROWS), Scenario(name="shoe_fan", question="shoes"))
    write(directory / "b.json", Scenario(name="tuned", question="tea", version=2))
    reloaded = await client.reload_scenarios()
    assert reloaded.changed == ("shoe_fan", "tea_fan", "tuned")
    assert reloaded.removed == ()
    assert [s.name for s in reloaded.scenarios] == ["coffee_fan", "shoe_fan", "tea_fan", "tuned"]
    assert await client.list_scenarios() == list(reloaded.scenarios)
    prefills = serving.engine.num_prefill_calls
    result = await client.embed("ada", scenarios=["tea_fan", "shoe_fan", "tuned"])
    assert result.vectors.tolist() == [[540, 14, 6, 7], [540, 15, 4, 0], [540, 14, 4, 0]]
    assert result.provenance.scenario_versions == (2, 1, 2)
    assert serving.engine.num_prefill_calls == prefills
    assert (await client.reload_scenarios()).changed == ()
    (directory / "a.json").unlink()
    write(directory / "b.json", Scenario(name="tuned", question="tea", version=2), tea(version=3))
    assert (await client.reload_scenarios()).removed == ("shoe_fan",)
    with pytest.raises(ClientError, match="no such scenario"):
        await client.embed("ada", scenarios=["shoe_fan"])


WRONG = {
    "another checkpoint": (lambda d: write(d / "x.json", tea(), checkpoint_id="other"),
                           "x.json: scenario_file.checkpoint_id", "fit one model only"),
    "changed without a version": (lambda d: write(d / "x.json", tea(version=1)),
                                  "x.json: tea_fan.version", "give it version 2"),
    "older": (lambda d: write(d / "x.json", Scenario(name="coffee_fan", question="coffee tea")),
              "x.json: coffee_fan.version", "give it version 4"),
    "rows too wide": (lambda d: write(d / "x.json", tea(soft_prompt=((1.0,) * 4,))),
                      "x.json: tea_fan.soft_prompt", "hidden_dim is 3"),
    "too long": (lambda d: write(d / "x.json", tea(question="tea " * 12)),
                 "tea_fan.question", "at most 11 are taken"),
    "no JSON": (lambda d: (d / "x.json").write_text("{"), "x.json", "not readable"),
    "unknown key": (lambda d: (d / "x.json").write_text('{"scenarois": []}'), "x.json",
                    "scenarois"),
    "twice": (lambda d: (write(d / "x.json", tea()), write(d / "y.json", tea())),
              "y.json: tea_fan.name", "x.json has a scenario of this name"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
async def test_a_wrong_file_changes_nothing_and_names_the_field(serving, directory, name):
    make, field, rule = WRONG[name]
    before = await serving.client.list_scenarios()
    write(directory / "good.json", Scenario(name="new", question="tea"))
    make(directory)
    with pytest.raises(ClientError) as caught:
        await serving.client.reload_scenarios()
    assert caught.value.code == "INVALID_ARGUMENT"
    (violation,) = caught.value.field_violations
    assert field in violation.field
    assert rule in violation.description
    assert await serving.client.list_scenarios() == before


async def test_a_version_never_goes_back_by_a_deleted_file(serving, directory):
    write(directory / "a.json", tea(version=5))
    await serving.client.reload_scenarios()
    (directory / "a.json").unlink()
    with pytest.raises(ClientError, match="newer version 5"):
        await serving.client.reload_scenarios()
    result = await serving.client.embed("ada", scenarios=["tea_fan"])
    assert result.provenance.scenario_versions == (5,)


async def test_a_server_without_scenario_files_says_so(running):
    with pytest.raises(ClientError, match="start it with --scenarios") as caught:
        await running.client.reload_scenarios()
    assert caught.value.code == "INVALID_ARGUMENT"


async def test_a_wrong_file_at_start_is_refused(start_server, tmp_path):
    with pytest.raises(InvalidInput, match="no such file"):
        await start_server(scenarios=str(tmp_path / "none.json"))


async def test_requests_see_one_state_while_files_change(serving, directory):
    """Version v adds v to the last number: rows and version of a reply always belong together."""

    def put(version: int) -> None:
        rows = ((float(version), 0.0, 0.0),)
        both = [
            Scenario(name=name, question="tea", version=version, soft_prompt=rows)
            for name in ("left", "right")
        ]
        # A new name, then its place: the server never reads half a file.
        write(directory / "next.tmp", *both)
        (directory / "next.tmp").rename(directory / "both.json")

    put(1)
    await serving.client.reload_scenarios()
    done = asyncio.Event()
    seen = set()

    async def ask() -> None:
        while not done.is_set():
            result = await serving.client.embed("ada", scenarios=["left", "right"])
            left, right = result.provenance.scenario_versions
            assert left == right
            assert np.array_equal(result.vectors[:, 3], [left, left])
            seen.add(left)

    asking = [asyncio.create_task(ask()) for _ in range(4)]
    for version in range(2, 12):
        put(version)
        await serving.client.reload_scenarios()
        await asyncio.sleep(0.01)
    done.set()
    await asyncio.gather(*asking)
    assert len(seen) > 3


async def test_a_hangup_reads_the_files_again(serving, directory):
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, serving.server.request_reload)
    try:
        write(directory / "a.json", tea())
        os.kill(os.getpid(), signal.SIGHUP)
        async with asyncio.timeout(5):
            while {s.name: s.version for s in await serving.client.list_scenarios()} != {
                "coffee_fan": 3,
                "tea_fan": 2,
                "tuned": 1,
            }:
                await asyncio.sleep(0.01)
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
    assert await serving.server.core.reload_scenarios() == Reloaded((), ())
