"""The client's verbs against a running server, and the flags of `serve`."""

import argparse
import asyncio
import io
import json

import pytest

from qanchor.client import cli as client_cli
from qanchor.errors import ConfigError, InvalidInput
from qanchor_server import cli as server_cli

NOW_S = 1_000 * 86_400
PROFILE = {
    "user_id": "ada",
    "as_of_s": NOW_S,
    "events": [{"time_s": NOW_S, "modality": "buy", "text": "coffee"}],
    "attributes": {"tea": True},
}


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers(dest="verb", required=True)
    client_cli.add_parser(subparsers)
    server_cli.add_parser(subparsers)
    return parser.parse_args(words)


@pytest.fixture
def call(running, capsys):
    """Runs a verb against the server; gives exit code and the JSON of stdout's last line."""

    async def run(*words: str):
        args = parse(*words, "--address", running.address)
        code = await asyncio.to_thread(args.run, args)
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        return code, json.loads(lines[-1]) if lines else captured.err

    return run


async def test_a_profile_is_put_extended_and_asked(call, tmp_path, monkeypatch):
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(PROFILE))
    code, put = await call("profile", "put", str(file))
    assert (code, put["num_prefix_tokens"]) == (0, 10)
    _, embedded = await call("embed", "--user", "ada", "--scenario", "tea_fan")
    (result,) = embedded["results"]
    assert result["scenario"] == "tea_fan"
    # "tea: yes" is 3 + 6 + 1 = 10; structure 510, means 12 and 10, user 11, events 12 and 10.
    assert result["vector"] == [510 + 12 + 10 + 11 + 12 + 10, 17, 5, 0]
    assert embedded["provenance"]["cache_state"] == "ENCODED_NOW"
    more = {"user_id": "ada", "events": PROFILE["events"], "append_id": "k"}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(more)))
    _, appended = await call("profile", "append")
    assert (appended["num_prefix_tokens"], appended["is_duplicate"]) == (11, False)
    assert (await call("profile", "state", "--user", "ada"))[1]["cache_state"] == "ABSENT"
    assert (await call("profile", "warm", "--user", "ada"))[1]["cache_state"] == "ENCODED_NOW"
    _, answer = await call("ask", "--user", "ada", "tea", "shoes")
    assert [found["query"] for found in answer["results"]] == ["tea", "shoes"]
    assert await call("profile", "delete", "--user", "ada") == (0, {"was_stored": True})


async def test_a_failed_call_ends_with_1_and_says_why(call):
    code, message = await call("embed", "--user", "ada", "--scenario", "tea_fan")
    assert code == 1
    assert "NOT_FOUND" in message


async def test_scenarios_are_listed(call):
    code, scenarios = await call("scenarios")
    assert code == 0
    assert [scenario["name"] for scenario in scenarios] == ["coffee_fan", "tea_fan", "tuned"]


def test_wrong_json_names_the_field(monkeypatch):
    args = parse("profile", "put")
    monkeypatch.setattr("sys.stdin", io.StringIO('{"user_id": "a", "evnts": []}'))
    with pytest.raises(ConfigError, match="events"):
        args.run(args)
    monkeypatch.setattr("sys.stdin", io.StringIO("no json"))
    with pytest.raises(InvalidInput, match="no JSON"):
        args.run(args)


def test_serve_takes_a_file_then_flags_then_set(tmp_path):
    file = tmp_path / "server.toml"
    file.write_text('address = "127.0.0.1:1"\nmax_queue = 5\ndata_dir = "kept"\n')
    args = parse(
        "serve", "bundle", "--config", str(file), "--address", "127.0.0.1:2",
        "--kv-pool-bytes", "1000", "--set", "max_queue=6", "--set", "slab_ladder=[10,20]",
    )  # fmt: skip
    settings = server_cli.settings_of(args)
    assert (settings.address, settings.data_dir) == ("127.0.0.1:2", "kept")
    assert (settings.kv_pool_bytes, settings.max_queue) == (1000, 6)
    assert settings.slab_ladder == (10, 20)
    args = parse("serve", "bundle", "--set", "max_queu=6")
    with pytest.raises(ConfigError, match="did you mean 'max_queue'"):
        server_cli.settings_of(args)
