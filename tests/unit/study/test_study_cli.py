"""`qanchor study` on a small wallet: killed, gone on with, finished; side by side as in turn."""

import json
from pathlib import Path
from typing import Any

import pytest

from qanchor import config
from qanchor.checkpoint import load_checkpoint
from qanchor.cli import main
from qanchor.config import override
from qanchor.data.dataset import Dataset
from qanchor.report.document import write_html
from qanchor.study import runs
from qanchor.study.plan import Study, Variant
from qanchor.study.report import document
from qanchor.study.results import StudyResult
from qanchor.study.runner import StudyInput, run_study
from qanchor.study.work import StudyConfig
from qanchor.train import pretrain as training
from qanchor.train.recipes import Recipe
from qanchor.tune.config import TuneConfig
from tests.unit.eval.conftest import TINY

STUDY = """
title = "Small"
text = "Two <runs>."

[[variants]]
name = "base"
paper_auc = 0.8

[[variants]]
name = "tuned"
prompt_rows = 2
paper_auc = 0.81

[[variants]]
name = "untrained"
is_pretrained = false

[[variants]]
name = "user-only"
about = "no query"
schema = ["query_template="]
set = ["train.queries_per_user=1"]
users_factor = 2

[[variants]]
name = "half"
schema = ["has_user_token=false", "has_modality_tokens=false"]
users_share = 0.5
steps_share = 0.34

[[curves]]
name = "data"
x_label = "share of users"
points = [{ variant = "half", x = 0.5 }, { variant = "base", x = 1 }]
"""


def test_a_killed_study_goes_on_and_a_finished_one_only_reads(
    wallet: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "small.toml").write_text(STUDY)
    out = tmp_path / "study"
    words = ["study", str(tmp_path / "small.toml"), str(wallet), str(out)]
    # The toy recipe's checkpoints lie at every step, so that a kill leaves something to go on with.
    for assignment in [*TINY, "train.checkpoint_every=1", "train.heldout_users=4"]:
        words += ["--set", assignment]
    words += ["--set-tune", "steps=2", "--set-tune", "max_train_users=40"]
    calls = 0
    original = training.backward

    def killed_in_the_fourth_run(*args: Any, **kwargs: Any) -> training.StepLosses:
        nonlocal calls
        calls += 1
        # Three steps of base, then two of the user-only run.
        if calls == 5:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "backward", killed_in_the_fourth_run)
        with pytest.raises(KeyboardInterrupt):
            main(words)
    finished = {path.stem for path in (out / "variants").glob("*.json")}
    assert finished == {"base", "tuned", "tuned.scenarios", "tuned.scenarios.report", "untrained"}
    started = list((out / "runs").iterdir())
    assert len(started) == 2, "tuned and untrained share the run of base"

    resumed: list[Path] = []
    monkeypatch.setattr(
        runs, "resume", lambda *args: (resumed.append(args[2]), training.resume(*args))[1]
    )
    assert main(words) == 0
    assert len(resumed) == 1
    shown = capsys.readouterr().out
    result = config.load(StudyResult, out / "study.json")
    names = ["base", "tuned", "untrained", "user-only", "half"]
    assert [one.variant.name for one in result.outcomes] == names
    assert list(json.loads(shown.splitlines()[-1])["auc"]) == names
    assert result.outcomes[0].difference is None
    assert all(one.difference is not None for one in result.outcomes[1:])
    assert "| tuned |" in (out / "study.md").read_text()
    assert "0.8100 (+0.0100)" in (out / "study.md").read_text()
    page = (out / "study.html").read_text()
    assert "Two &lt;runs&gt;." in page
    assert "share of users" in page
    steps = {one.variant.name: one.step for one in result.outcomes}
    assert steps == {"base": 3, "tuned": 3, "untrained": 0, "user-only": 3, "half": 1}
    user_only = load_checkpoint(out / result.outcome("user-only").checkpoint)
    assert user_only.encode_query("Will the user travel?") == ()
    assert user_only.meta.recipe.train.users_per_batch == 8
    half = load_checkpoint(out / result.outcome("half").checkpoint).meta
    assert not half.tokens.has_user_token
    assert not half.tokens.has_modality_tokens
    aucs = {score.auc for score in result.outcome("user-only").scores.scenarios}
    assert len(aucs) > 1, "one embedding, but a label and a probe of its own for every scenario"

    def never(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(runs, "pretrain", never)
    monkeypatch.setattr(runs, "resume", never)
    monkeypatch.setattr("qanchor.study.work.load_for_inference", never)
    assert main(words) == 0
    assert config.load(StudyResult, out / "study.json").outcomes == result.outcomes

    record = out / "variants" / "half.json"
    earlier = json.loads(record.read_text())
    del earlier["data_id"]
    record.write_text(json.dumps(earlier))
    capsys.readouterr()
    assert main(words) == 2
    assert "earlier version" in capsys.readouterr().err


def test_variants_side_by_side_come_out_as_in_turn(wallet: Path, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(STUDY)
    results = []
    for jobs in (1, 2):
        out = tmp_path / f"study{jobs}"
        words = ["study", str(tmp_path / "small.toml"), str(wallet), str(out), f"--jobs={jobs}"]
        for assignment in TINY:
            words += ["--set", assignment]
        words += ["--set-tune", "steps=2", "--set-tune", "max_train_users=40"]
        assert main(words) == 0
        assert len(list((out / "runs").iterdir())) == 3, "variants that agree share a run"
        results.append(config.load(StudyResult, out / "study.json"))
    assert results[0].outcomes == results[1].outcomes


def test_wrong_use_is_told_before_any_work(
    wallet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["study", "ablation", str(wallet), str(tmp_path / "study")]
    assert main([*base, "--only", "no user tokens"]) == 2
    assert "did you mean 'no user token'" in capsys.readouterr().err
    assert main([*base, "--set-tune", "step=1"]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err
    assert main([*base, "--jobs", "0"]) == 2
    assert "--jobs" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_a_scenario_without_both_classes_is_left_out_of_judging_alone(
    one_sided: Dataset, tiny_mini: Recipe, tmp_path: Path
) -> None:
    names = [scenario.name for scenario in one_sided.scenarios]
    plain = Variant(name="plain", is_pretrained=False)
    tuned = Variant(name="tuned", is_pretrained=False, prompt_rows=1)
    given = StudyInput(
        study=Study(title="Small", variants=(plain, tuned)),
        recipe=override(tiny_mini, ["train.steps=1"]),
        dataset=one_sided,
        settings=StudyConfig(tune=TuneConfig(steps=1, max_train_users=40), num_draws=5),
    )
    result = run_study(given, tmp_path)
    assert [one.scenario for one in result.skipped] == [names[1], names[3]]
    for outcome in result.outcomes:
        assert [one.scenario for one in outcome.scores.scenarios] == names[0:3:2]
    write_html(document(result), tmp_path / "page.html")
    assert f"{names[3]}: {result.skipped[1].reason}." in (tmp_path / "page.html").read_text()
    checkpoint = load_checkpoint(tmp_path / result.outcomes[0].checkpoint)
    assert [scenario.name for scenario in checkpoint.meta.scenarios] == names
