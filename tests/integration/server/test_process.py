"""A server process: killed, signalled, started again; and the blocking client against it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qanchor.client import CacheState, Client, ClientError, EmbedRequestItem
from qanchor.data.profile import Event, Profile

PROGRAM = Path(__file__).parent / "fake_server.py"
NOW_S = int(time.time())

Start = Callable[..., tuple["subprocess.Popen[str]", str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts server processes on one data directory; ends those still running."""
    processes: list[subprocess.Popen[str]] = []

    def begin(*settings: str) -> tuple["subprocess.Popen[str]", str]:
        port_file = tmp_path / f"port-{len(processes)}"
        process = subprocess.Popen(
            [sys.executable, PROGRAM, tmp_path / "data", port_file, *settings],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        processes.append(process)
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("qanchor: serving fake fake-export on 127.0.0.1:"), line
        return process, f"127.0.0.1:{int(port_file.read_text())}"

    yield begin
    for process in processes:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def profile(user_id: str) -> Profile:
    event = Event(time_s=NOW_S, modality="buy", event_type="", text="coffee")
    return Profile(user_id=user_id, as_of_s=NOW_S, events=(event,))


def test_what_was_acknowledged_survives_a_kill(start: Start) -> None:
    process, address = start()
    acknowledged = {}
    with Client(address) as client:
        for number in range(5):
            acknowledged[f"user-{number}"] = client.put_profile(profile(f"user-{number}"))
        tea = Event(time_s=NOW_S, modality="buy", event_type="", text="tea")
        acknowledged["user-0"] = client.append_events("user-0", [tea], append_id="once")
        client.delete_profile("user-4")
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=10) == -signal.SIGKILL
    _, address = start()
    with Client(address) as client:
        for user_id in ("user-0", "user-1", "user-2", "user-3"):
            state = client.profile_state(user_id)
            assert state.digest == acknowledged[user_id].digest
            assert state.prefix_version == acknowledged[user_id].prefix_version
        with pytest.raises(ClientError, match="NOT_FOUND"):
            client.profile_state("user-4")
        assert client.append_events("user-0", [tea], append_id="once").is_duplicate
        again = client.put_profile(profile("user-4"))
        assert again.prefix_version > max(p.prefix_version for p in acknowledged.values())
        vectors = client.embed("user-1", scenarios=["coffee_fan"]).vectors
        assert vectors.tolist() == [[540, 13, 4, 0]]


def test_a_kill_leaves_keys_and_values_that_are_right_or_none(start: Start) -> None:
    tiers = ("kv_pool_bytes=112", "slab_ladder=[]", "kv_host_bytes=256", "kv_disk_bytes=1000000")
    process, address = start(*tiers)
    with Client(address) as client:
        for number in range(12):
            client.put_profile(profile(f"user-{number}"))
            client.warm_profile(f"user-{number}")
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    _, address = start(*tiers)
    found = []
    with Client(address) as client:
        for number in range(12):
            result = client.embed(f"user-{number}", scenarios=["coffee_fan"])
            assert result.vectors.tolist() == [[540, 13, 4, 0]]
            found.append(result.provenance.cache_state)
    # The last one was on the device alone.
    assert found[-1] is CacheState.ENCODED_NOW
    assert CacheState.DISK in found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_with_0(start: Start, number: signal.Signals) -> None:
    process, address = start("step_seconds=0.2")
    with Client(address) as client, ThreadPoolExecutor() as threads:
        client.put_profile(profile("ada"))
        embedding = threads.submit(client.embed, "ada", queries=["tea"])
        # Prefill and suffix take 0.4 s; the signal comes in between.
        time.sleep(0.15)
        process.send_signal(number)
        assert embedding.result().vectors.tolist() == [[540, 14, 4, 0]]
    assert process.wait(timeout=10) == 0


def test_the_blocking_client_speaks_every_call(start: Start) -> None:
    _, address = start()
    with Client(address, timeout_s=5) as client:
        client.put_profile(profile("ada"))
        assert client.warm_profile("ada").num_prefix_tokens == 9
        result = client.embed("ada", scenarios=["coffee_fan"], queries=["tea"], dtype="float16")
        assert result.vectors.tolist() == [[540, 13, 4, 0], [540, 14, 4, 0]]
        items = [
            EmbedRequestItem(request_id=str(n), user_id="ada", scenarios=("tea_fan",))
            for n in range(3)
        ]
        assert {reply.request_id for reply in client.stream_embed(items)} == {"0", "1", "2"}
        assert len(client.list_scenarios()) == 3
        assert client.server_info().counters["num_answered"] == 5
        assert client.profile_state("ada").num_prefix_events == 1
        assert client.delete_profile("ada")
        with pytest.raises(ClientError) as caught:
            client.embed("ada", scenarios=["nobody"])
        assert caught.value.field_violations[0].field == "queries[0].scenario"


def test_a_call_without_a_server_fails_in_time() -> None:
    with Client("127.0.0.1:1", timeout_s=0.5) as client, pytest.raises(ClientError) as caught:
        client.server_info()
    assert caught.value.code in {"UNAVAILABLE", "DEADLINE_EXCEEDED"}
