"""The verbs `export` and `verify`."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

from qanchor.bundle.reader import open_bundle
from qanchor.bundle.tolerance import EXACT
from qanchor.config import Scenario
from qanchor.errors import ConfigError, QAnchorError
from qanchor_export.bundle_writer import export_bundle
from qanchor_export.cli import add_parser
from qanchor_export.random_source import TINY, method_schema, random_source
from qanchor_export.verify import Check


def run_verb(*words: str) -> int:
    """Parse and run one command line; errors of use come up as they are."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(words)
    code: int = args.run(args)
    return code


@pytest.fixture(scope="module")
def random_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`qanchor export --random --shape tiny`, as a user runs it."""
    path = tmp_path_factory.mktemp("bundles") / "random"
    assert run_verb("export", "--random", "--shape", "tiny", str(path)) == 0
    return path


def test_a_random_bundle_says_so_and_verifies(
    random_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = open_bundle(random_bundle).manifest
    assert manifest.recipe == "random-tiny"
    assert [spec.max_events for spec in manifest.profile_schema.modalities] == [
        250, 150, 150, 100, 10, 50,
    ]  # fmt: skip
    capsys.readouterr()
    assert run_verb("verify", str(random_bundle), "--users", "1", "--threads", "1") == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["ok"] is True
    assert last["model_id"] == manifest.model_id
    assert last["max_abs"] <= 1e-4


def test_verify_fails_where_torch_said_something_else(
    random_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [Check("torch at export = ONNX Runtime", 3, 2e-4, 1e-5, 1.0, EXACT)]
    monkeypatch.setattr("qanchor_export.verify.verify", lambda *_, **__: wrong)
    assert run_verb("verify", str(random_bundle)) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert json.loads(out.splitlines()[-1])["ok"] is False


def test_a_question_the_server_would_refuse_is_not_exported(tmp_path: Path) -> None:
    source = random_source(TINY, method_schema())
    question = "Will the user cancel the subscription within 30 days?"
    num_tokens = len(source.encode_query(question))
    rows = ((0.5,) * TINY.hidden_dim,) * 2
    scenarios = (
        Scenario(name="churn", question=question),
        Scenario(name="tuned", question="Soon?", soft_prompt=rows),
    )
    # One token of the suffix is <USER_EMB>, two belong to the soft prompt.
    short = replace(source, scenarios=scenarios, max_query_len=num_tokens + 2)
    with pytest.raises(
        ConfigError, match=f"churn.* {num_tokens} tokens, .* takes {num_tokens - 1}"
    ):
        export_bundle(short, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())
    assert replace(short, max_query_len=num_tokens + 3).max_text_len == num_tokens


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("export", "--random", "--shape", "tiny", "a", "b"), "drop CHECKPOINT"),
        (("export", "--random", "--shape", "tny", "a"), "did you mean 'tiny'"),
        (("export", "a"), "give CHECKPOINT and BUNDLE"),
        (("export", "no-checkpoint", "b"), "no-checkpoint"),
        (("verify", "no-bundle"), "make a bundle with `qanchor export`"),
        (("verify", "no-bundle", "--users", "0"), "at least one user"),
    ],
)
def test_wrong_usage_is_told(words: tuple[str, ...], told: str) -> None:
    with pytest.raises(QAnchorError, match=told):
        run_verb(*words)
