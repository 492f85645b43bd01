"""`qanchor tune`, `compile` and `eval --scenarios` on a small wallet, as a user runs them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from qanchor import config
from qanchor.bundle.scenario_file import read_scenario_file
from qanchor.checkpoint import load_checkpoint, save_checkpoint
from qanchor.cli import main
from qanchor.config import override
from qanchor.data.dataset import SCENARIOS_FILE, load_scenarios, open_dataset
from qanchor.data.useru import write_triples
from qanchor.data.wallet import generate_wallet
from qanchor.eval.config import EvalConfig
from qanchor.eval.evaluate import evaluate
from qanchor.eval.methods import Subject
from qanchor.train.recipes import mini
from qanchor.train.setup import prepare
from tests.unit.eval.conftest import relabelled

QUICK = ["steps=4", "batch_users=16", "evaluate_every=2", "max_valid_users=60"]
SET = [word for assignment in QUICK for word in ("--set", assignment)]
NAMES = ["--scenario", "active_30d", "--scenario", "login_7d"]


@pytest.fixture(scope="module")
def wallet(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An untrained tiny checkpoint and the data set it belongs to."""
    place = tmp_path_factory.mktemp("wallet")
    dataset = open_dataset(generate_wallet(place / "data", 160, seed=1))
    write_triples(dataset, place / "triples.parquet")
    recipe = override(
        mini(),
        [
            "event_encoder.hidden_dim=16", "event_encoder.num_heads=2",
            "event_encoder.intermediate_dim=24", "decoder.hidden_dim=32", "decoder.num_layers=2",
            "decoder.intermediate_dim=48", "head.inner_dim=24", "head.embedding_dim=8",
            "event_vocab_size=400", "decoder.vocab_size=400", "train.centre_users=8",
        ],
    )  # fmt: skip
    checkpoint, _ = prepare(recipe, dataset, place / "triples.parquet")
    save_checkpoint(checkpoint, place / "checkpoint")
    return str(place / "checkpoint"), str(place / "data")


def test_tune_writes_a_file_and_says_what_the_cache_saved(
    wallet: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned.json"
    assert main(["tune", *wallet, str(out), *NAMES, *SET]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [report["scenario"] for report in last["scenarios"]] == ["active_30d", "login_7d"]
    assert all(report["tuned"] >= report["start"] for report in last["scenarios"])
    reuse = last["reuse"]
    assert reuse["positions_without_reuse"] > reuse["prefix_positions"] + reuse["suffix_positions"]
    assert reuse["cache_bytes_per_user"] > 0
    assert last["settings"]["steps"] == 4
    assert json.loads(out.with_suffix(".report.json").read_text()) == last
    file = read_scenario_file(out)
    assert file.checkpoint_id == last["checkpoint_id"]
    assert {s.name: (s.version, len(s.soft_prompt), len(s.prototypes)) for s in file.scenarios} == {
        "active_30d": (2, 6, 2),
        "login_7d": (2, 6, 2),
    }
    again = ["tune", *wallet, str(out), "--scenario", "login_7d", *SET]
    assert main([*again, "--set", "num_prompt_rows=2"]) == 0
    file = read_scenario_file(out)
    assert [(s.name, s.version, len(s.soft_prompt)) for s in file.scenarios] == [
        ("active_30d", 2, 6),
        ("login_7d", 3, 2),
    ]


def test_compile_takes_tuned_scenarios_and_eval_judges_the_result(
    wallet: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned, compiled = tmp_path / "tuned.json", tmp_path / "compiled.json"
    assert main(["tune", *wallet, str(tuned), "--scenario", "active_30d", *SET]) == 0
    words = ["compile", *wallet, str(compiled), *NAMES, "--scenarios", str(tuned), *SET]
    assert main([*words, "--set", "num_prompt_rows=4"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    reports = {report["scenario"]: report for report in last["scenarios"]}
    for report in reports.values():
        assert report["min_cosine"] <= report["mean_cosine"] <= 1 + 1e-6
        assert report["suffix_tokens_compiled"] == 5
        assert 0 <= report["probe_auc_compiled"] <= 1
    file = read_scenario_file(compiled)
    assert [(s.version, s.is_compiled, len(s.prototypes)) for s in file.scenarios] == [
        (3, True, 2),
        (2, True, 0),
    ]
    checkpoint, dataset = load_checkpoint(Path(wallet[0])), open_dataset(wallet[1])
    subject = Subject(checkpoint, tuned=file.scenarios)
    settings = EvalConfig(parts=("zero-shot",), num_draws=10)
    evaluation = evaluate(subject, dataset, settings).evaluation
    methods = evaluation.methods
    assert evaluation.zero_shot
    told = {one.scenario: one for one in evaluation.zero_shot.scenarios}
    assert {name for name, one in told.items() if one.soft_auc is not None} == {
        "active_30d", "login_7d",
    }  # fmt: skip
    assert told["fraud_30d"].soft_auc is None
    assert [method.method for method in methods] == ["Q-Anchor", "compiled"]
    plain, soft = ({s.scenario: s for s in method.scenarios} for method in methods)
    assert set(plain) == set(soft) == {scenario.name for scenario in dataset.scenarios}
    assert soft["fraud_30d"].auc == plain["fraud_30d"].auc


def test_compile_takes_other_wordings_of_a_scenario(
    wallet: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled, wordings = tmp_path / "compiled.json", tmp_path / "wordings.json"
    wordings.write_text('{"login_7d": ["Back within a week?", "Seen again in seven days?"]}')
    words = [*wallet, str(compiled), *NAMES, "--wordings", str(wordings)]
    assert main(["compile", *words, *SET]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    counts = {report["scenario"]: report["num_wordings"] for report in last["scenarios"]}
    assert counts == {"active_30d": 1, "login_7d": 3}
    # What is compiled sends no text any more: no other words can be asked.
    assert main(["compile", *words, "--scenarios", str(compiled), *SET]) == 2
    assert "its text is not read" in capsys.readouterr().err
    wordings.write_text('{"login_8d": ["Back within a week?"]}')
    assert main(["compile", *words, *SET]) == 2
    assert "did you mean 'login_7d'" in capsys.readouterr().err


def test_wrong_use_is_told_before_any_work(
    wallet: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.json"
    assert main(["tune", *wallet, str(out), "--scenario", "login_8d"]) == 2
    assert "did you mean 'login_7d'" in capsys.readouterr().err
    assert main(["tune", *wallet, str(out), "--all", "--set", "step=3"]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err
    out.write_text('{"checkpoint_id": "1", "hidden_dim": 32, "scenarios": []}')
    for verb in ("tune", "compile"):
        assert main([verb, *wallet, str(out), "--all"]) == 2
        assert "soft prompts fit one model only" in capsys.readouterr().err
    for words in (
        ["eval", *wallet, "--scenarios", str(out)],
        ["export", wallet[0], str(tmp_path / "bundle"), "--scenarios", str(out)],
    ):
        assert main(words) == 2
        assert "soft prompts fit one model only" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()
    assert main(["export", "--random", "--scenarios", str(out), str(tmp_path / "bundle")]) == 2
    assert "--random" in capsys.readouterr().err


def test_all_scenarios_but_those_that_tell_no_classes_apart_are_tuned(
    wallet: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def label_of(scenario: str, split: str, label: int) -> int | None:
        if (scenario, split) == ("login_7d", "valid"):
            return 0
        return label if scenario in ("active_30d", "login_7d") else None

    relabelled(Path(wallet[1]), tmp_path / "data", label_of)
    place, out = tmp_path / "data", str(tmp_path / "x.json")
    scenarios = load_scenarios(place / SCENARIOS_FILE)
    kept = [scenario for scenario in scenarios if scenario.name in ("active_30d", "login_7d")]
    config.save(kept, place / SCENARIOS_FILE)
    given = [wallet[0], str(place), out]
    assert main(["tune", *given, "--all", *SET]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [one["scenario"] for one in last["scenarios"]] == ["active_30d"]
    assert [one["scenario"] for one in last["skipped"]] == ["login_7d"]
    assert "valid users must show the same labels" in last["skipped"][0]["reason"]
    assert [one.name for one in read_scenario_file(Path(out)).scenarios] == ["active_30d"]
    # Who is asked for by name is not left out in silence.
    assert main(["tune", *given, "--scenario", "login_7d", *SET]) == 2
    assert "valid users must show the same labels" in capsys.readouterr().err
    # Compiling learns nothing from labels: only the probes of its report are missing.
    assert main(["compile", *given, "--scenario", "login_7d", *SET]) == 0
    (report,) = json.loads(capsys.readouterr().out.splitlines()[-1])["scenarios"]
    assert report["probe_auc_text"] is None


def test_a_question_longer_than_the_model_takes_is_told_before_any_work(
    wallet: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, place = load_checkpoint(Path(wallet[0])), tmp_path / "short"
    recipe = override(checkpoint.meta.recipe, ["train.max_query_len=4"])
    meta = msgspec.structs.replace(checkpoint.meta, recipe=recipe)
    save_checkpoint(replace(checkpoint, meta=meta), place)
    for words in (
        ["tune", str(place), wallet[1], str(tmp_path / "x.json"), *NAMES],
        ["compile", str(place), wallet[1], str(tmp_path / "x.json"), *NAMES],
        ["export", str(place), str(tmp_path / "bundle")],
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert re.search(r"_\d+d\.question=.* tokens, .* takes 4; shorten it, or train", said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short"]


def test_a_model_that_hears_no_query_is_not_tuned(
    wallet: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = load_checkpoint(Path(wallet[0]))
    schema = msgspec.structs.replace(checkpoint.meta.profile_schema, query_template="")
    meta = msgspec.structs.replace(checkpoint.meta, profile_schema=schema)
    silent = replace(checkpoint, meta=meta)
    save_checkpoint(silent, tmp_path / "silent")
    words = ["tune", str(tmp_path / "silent"), wallet[1], str(tmp_path / "x.json")]
    assert main([*words, "--scenario", "active_30d", *SET]) == 2
    assert "hears no question" in capsys.readouterr().err


def test_fewer_users_are_used_when_the_cache_would_not_hold_them(
    wallet: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tune", *wallet, str(tmp_path / "x.json"), "--scenario", "active_30d", *SET]
    assert main(words) == 0
    whole = json.loads(capsys.readouterr().out.splitlines()[-1])
    gib = whole["reuse"]["cache_bytes"] * 0.7 / 2**30
    assert main([*words, "--set", f"max_cache_gib={gib}"]) == 0
    less = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert less["reuse"]["cache_bytes"] <= whole["reuse"]["cache_bytes"] * 0.7
    for split in ("num_train", "num_valid"):
        assert 0 < less["scenarios"][0][split] < whole["scenarios"][0][split]
