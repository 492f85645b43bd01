"""`qanchor userqa` as a process: killed and started again, exit codes, the last line."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qanchor.data.dataset import Dataset
from qanchor.userqa.cli import STOPPED
from qanchor.userqa.store import ReplyStore
from tests.unit.userqa.conftest import KEY
from tests.unit.userqa.fake_endpoint import FakeEndpoint, Said

CONCURRENCY = 3
ROOT = Path(__file__).resolve().parents[3]


def command(dataset: Dataset, output: Path, *arguments: str) -> list[str]:
    # With -v, so that what debug logging would let slip shows.
    program = [sys.executable, "-m", "qanchor.cli", "-v", "userqa", str(dataset.path), str(output)]
    return [*program, "--set", f"endpoint.concurrency={CONCURRENCY}", *arguments]


def environment(**variables: str) -> dict[str, str]:
    inherited = {name: text for name, text in os.environ.items() if not name.startswith("OPENAI_")}
    path = os.pathsep.join([str(ROOT), inherited.get("PYTHONPATH", "")])
    return {**inherited, "PYTHONPATH": path, **variables}


def finished(
    dataset: Dataset, output: Path, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(dataset, output, *arguments),
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def stored_texts(output: Path) -> set[str]:
    db = sqlite3.connect(output / "replies.sqlite")
    texts = {row[0] for row in db.execute("SELECT text FROM replies")}
    db.close()
    return texts


def hold_from(endpoint: FakeEndpoint, number: int) -> None:
    """No reply from this request on: the process cannot end before it is stopped."""
    endpoint.misbehave = lambda asked: Said(delay_s=600) if asked.number >= number else None


def test_killed_and_started_again_it_asks_nothing_twice(
    wallet: Dataset, endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    """Each reply of the fake model is its own, so a stored text names the request it answers."""
    variables = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": endpoint.url, "OPENAI_MODEL": "m"}
    endpoint.delay_s = 0.05
    hold_from(endpoint, 16)
    process = subprocess.Popen(
        command(wallet, tmp_path / "killed"),
        env=environment(**variables),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while endpoint.num_replied < 14:
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline, "it does not ask"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    endpoint.misbehave = lambda asked: None
    assert not (tmp_path / "killed/triples.parquet").exists()
    asked_before = [asked.body for asked in endpoint.asked]
    texts = stored_texts(tmp_path / "killed")
    stored = {body for body, text in endpoint.content_of.items() if text in texts}
    assert len(stored) >= 14 - CONCURRENCY

    endpoint.asked.clear()
    done = finished(wallet, tmp_path / "killed", **variables)
    assert done.returncode == 0, done.stderr
    asked_after = [asked.body for asked in endpoint.asked]
    assert not stored & set(asked_after)
    assert len(set(asked_after)) == len(asked_after)
    # What was on the way when the process died may be asked again, nothing else.
    assert len(set(asked_before) & set(asked_after)) <= CONCURRENCY
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["num_requests"] == len(asked_after)
    assert report["num_replies_from_store"] == len(stored)
    assert report["num_requests"] + len(stored) == 3 * len(wallet.user_ids("train"))

    assert finished(wallet, tmp_path / "whole", **variables).returncode == 0
    killed, whole = (tmp_path / name / "triples.parquet" for name in ("killed", "whole"))
    assert killed.read_bytes() == whole.read_bytes()


def test_the_last_line_is_the_report_and_flags_win(
    wallet: Dataset, endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text("num_topics = 4\nmax_users = 5\n")
    flags = ["--config", str(tmp_path / "config.toml"), "--max-users", "2", "--future", "1"]
    flags += ["--model", "m", "--base-url", endpoint.url, "--set", "endpoint.temperature=null"]
    done = finished(wallet, tmp_path / "out", *flags, OPENAI_API_KEY=KEY)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [report[f"num_{name}"] for name in ("users", "topics_picked", "future")] == [2, 8, 2]
    assert report == {"output": str(tmp_path / "out"), **saved(tmp_path / "out/report.json")}
    assert saved(tmp_path / "out/config.json")["endpoint"]["base_url"] == endpoint.url
    assert all("temperature" not in asked.data for asked in endpoint.asked)
    for private in (KEY, "END OF PROFILE"):
        assert private not in done.stdout + done.stderr
    assert "2/2" in done.stderr


def saved(path: Path) -> dict[str, dict[str, object]]:
    data: dict[str, dict[str, object]] = json.loads(path.read_text())
    return data


def test_two_runs_do_not_work_in_one_directory(
    wallet: Dataset, endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    store = ReplyStore(tmp_path / "replies.sqlite")
    flags = ["--model", "m", "--base-url", endpoint.url]
    done = finished(wallet, tmp_path, *flags, OPENAI_API_KEY=KEY)
    store.close()
    assert done.returncode == 2
    assert "other run" in done.stderr
    assert not endpoint.asked
    assert [path.name for path in tmp_path.iterdir()] == ["replies.sqlite"]


def test_without_an_endpoint_the_rules_answer(wallet: Dataset, tmp_path: Path) -> None:
    done = finished(wallet, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["author"] == "builtin"


def test_builtin_passes_over_the_environment(
    wallet: Dataset, endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    variables = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": endpoint.url, "OPENAI_MODEL": "m"}
    assert finished(wallet, tmp_path / "out", "--builtin", **variables).returncode == 0
    assert not endpoint.asked


@pytest.mark.parametrize(
    ("flags", "status", "code", "said"),
    [
        ([], 401, 2, "OPENAI_API_KEY"),
        (["--set", "budget.max_tokens=4000"], 200, STOPPED, "max_tokens"),
        (["--set", "endpoint.max_retries=0"], 500, STOPPED, "run again"),
        (["--set", "endpoint.modle=m"], 200, 2, "did you mean 'model'"),
    ],
)
def test_the_exit_code_tells_how_it_ended(
    wallet: Dataset,
    endpoint: FakeEndpoint,
    tmp_path: Path,
    flags: list[str],
    status: int,
    code: int,
    said: str,
) -> None:
    endpoint.misbehave = lambda asked: None if status == 200 else Said(status=status)
    done = finished(
        wallet, tmp_path, "--model", "m", "--base-url", endpoint.url, *flags, OPENAI_API_KEY=KEY
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_interrupted_it_says_how_to_go_on(
    wallet: Dataset, endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    hold_from(endpoint, 2)
    process = subprocess.Popen(
        command(wallet, tmp_path, "--model", "m", "--base-url", endpoint.url),
        env=environment(OPENAI_API_KEY=KEY),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Tests started in the background of a shell ignore SIGINT, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while endpoint.num_replied < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "run the same command again" in errors
    assert "Traceback" not in errors


def test_a_missing_package_is_an_error_that_says_what_to_install(
    wallet: Dataset, tmp_path: Path
) -> None:
    (tmp_path / "openai.py").write_text("raise ModuleNotFoundError('no', name='openai')\n")
    variables = environment(OPENAI_API_KEY=KEY)
    variables["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{variables['PYTHONPATH']}"
    done = subprocess.run(
        command(wallet, tmp_path / "out", "--model", "m"),
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install 'qanchor[userqa]'" in done.stderr
