"""The verb `data`: exit codes, and a last line of JSON."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from qanchor.data.cli import add_parser


def _run(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="qanchor")
    add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["data", *arguments])
    code: int = args.run(args)
    return code


def _last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_a_wallet_is_made_checked_and_turned_into_triples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "wallet")
    assert _run("wallet", target, "--users", "20", "--seed", "3") == 0
    assert _last_line(capsys)["num_users"] == 20
    assert _run("validate", target) == 0
    assert _last_line(capsys)["is_valid"] is True
    output = str(tmp_path / "triples.parquet")
    assert _run("triples", target, output, "--future", "1", "--uqa", "1") == 0
    assert _last_line(capsys)["num_future"] > 5
    assert Path(output).is_file()


def test_show_prints_the_profile_as_the_model_sees_it(
    wallet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("show", str(wallet), "7") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Behaviour of a wallet user:"
    counts = json.loads(lines[-1])["num_positions"]
    assert sum(line.startswith("  ") for line in lines) == sum(counts.values())
    assert counts["tabular"] == 7


def test_problems_are_listed_and_exit_with_1(
    write_tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_tiny(labels={"label": [2, 3, 4]})
    assert _run("validate", str(path), "--max-problems", "1") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("labels.parquet, row 0, column label: 2:")
    assert lines[1] == "... and 2 more"
    assert json.loads(lines[2])["num_problems"] == 3


def test_wrong_input_exits_with_2_and_names_the_remedy(
    wallet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("show", str(wallet), "nobody") == 2
    assert "unknown user" in capsys.readouterr().err
    assert _run("show", str(tmp_path), "1") == 2
    assert "qanchor data import" in capsys.readouterr().err
    assert _run("import", "oulad", str(tmp_path), str(tmp_path / "out")) == 2
    assert "studentVle.csv" in capsys.readouterr().err


def test_a_tiny_parquet_set_is_no_oulad(write_tiny: Any, tmp_path: Path) -> None:
    assert _run("import", "oulad", str(write_tiny()), str(tmp_path / "out")) == 2


def test_no_verb_is_wrong_usage() -> None:
    with pytest.raises(SystemExit) as stop:
        _run()
    assert stop.value.code == 2
