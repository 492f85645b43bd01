"""`qanchor eval` on a small wallet: JSON, tables, and one page that loads nothing."""

import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
import torch

from qanchor import config
from qanchor.bundle.scenario_file import ScenarioFile
from qanchor.checkpoint import checkpoint_id, load_checkpoint
from qanchor.cli import build_parser, main
from qanchor.config import Scenario, override
from qanchor.data.dataset import open_dataset
from qanchor.data.measures import NUM_MEASURES
from qanchor.errors import ConfigError
from qanchor.eval.cli import subject_of
from qanchor.eval.config import PARTS, EvalConfig
from qanchor.eval.evaluate import evaluate
from qanchor.eval.methods import Subject
from qanchor.eval.results import Evaluation

FEW = ["--set", "num_draws=20", "--set", "plot_users=20", "--set", "attention_users=4"]
FEW += ["--set", "label_counts=[10,30]", "--set", "label_draws=3"]


class Page(HTMLParser):
    """What a page loads, which ids it has and where its links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.add(value or "")
            elif name in {"src", "xlink:href", "data", "action", "poster", "srcset"}:
                self.loaded.append(value or "")
            elif name == "href":
                self.links.append(value or "")


@pytest.fixture(scope="module")
def evaluated(
    wallet: Path, run_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Evaluation]:
    """Everything at once: a tuned scenario, another checkpoint, own answers, JSON and page."""
    place = tmp_path_factory.mktemp("eval-out")
    checkpoint, dataset = load_checkpoint(run_dir / "checkpoint"), open_dataset(wallet)
    first = dataset.scenarios[0]
    tuned = Scenario(name=first.name, question=first.question, soft_prompt=((0.5,) * 32,) * 2)
    file = ScenarioFile(
        checkpoint_id=checkpoint_id(checkpoint),
        hidden_dim=32,
        dataset=dataset.name,
        scenarios=(tuned,),
    )
    config.save(file, place / "tuned.json")
    (place / "answers.toml").write_text('yes = ["Yes <b>&</b> often."]\nno = ["Never."]\n')
    words = ["eval", str(run_dir / "checkpoint"), str(wallet), *FEW]
    words += ["--scenarios", str(place / "tuned.json"), "--answers", str(place / "answers.toml")]
    (place / "wordings.json").write_text(json.dumps({first.name: [first.question, "<i>Soon?</i>"]}))
    words += ["--wordings", str(place / "wordings.json")]
    bike = {"kind": "frequency", "days": 14, "event_types": ["shared_bike"], "questions": ["<u>?"]}
    (place / "outcomes.json").write_text(json.dumps({"bike": bike}))
    words += ["--outcomes", str(place / "outcomes.json")]
    words += ["--also", f"twin={run_dir / 'checkpoint'}"]
    words += ["--out", str(place / "eval.json"), "--report", str(place / "eval.html")]
    assert main(words) == 0
    return place, config.load(Evaluation, place / "eval.json")


def test_every_method_is_judged_on_every_scenario(
    evaluated: tuple[Path, Evaluation], wallet: Path
) -> None:
    _, result = evaluated
    assert [method.method for method in result.methods] == [
        "Q-Anchor", "prompt-tuned", "universal", "twin", "untrained model",
        "mean event vectors by modality", "mean event vector",
        "hand-made, logistic regression", "hand-made, gradient boosting",
    ]  # fmt: skip
    names = [scenario.name for scenario in open_dataset(wallet).scenarios]
    for method in result.methods:
        assert [score.scenario for score in method.scenarios] == names
        for score in method.scenarios:
            assert 0 <= score.auc_interval.low <= score.auc_interval.high <= 1
    by_name = {method.method: method for method in result.methods}
    # The same checkpoint by another name is the same to the last digit.
    assert by_name["twin"].average_auc == by_name["Q-Anchor"].average_auc
    assert by_name["prompt-tuned"].scenarios[1] == by_name["Q-Anchor"].scenarios[1]
    num_modalities = len(open_dataset(wallet).schema.modalities)
    assert (
        by_name["mean event vectors by modality"].num_features
        == (16 + NUM_MEASURES) * num_modalities
    )
    pairs = {(one.method, one.over) for one in result.differences}
    assert ("prompt-tuned", "Q-Anchor") in pairs
    assert ("Q-Anchor", "hand-made, gradient boosting") in pairs


def test_the_other_parts_are_there(evaluated: tuple[Path, Evaluation]) -> None:
    _, result = evaluated
    assert result.few_labels is not None
    assert result.few_labels.num_draws == 3
    methods = {one.method for one in result.few_labels.scores}
    assert {"Q-Anchor", "other scenarios' questions", "universal"} < methods
    assert {one.num_labels for one in result.few_labels.gains} == {10, 30}
    assert result.zero_shot is not None
    assert result.zero_shot.yes == ("Yes <b>&</b> often.",)
    first, second, *_ = result.zero_shot.scenarios
    assert [one.question for one in first.wordings] == [first.question, "<i>Soon?</i>"]
    # The scenario's own words, asked apart from all others.
    assert first.wordings[0].auc == pytest.approx(first.auc, abs=1e-6)
    assert second.wordings == ()
    mean = (first.wordings[0].auc + first.wordings[1].auc) / 2
    assert result.zero_shot.average_wording_auc == pytest.approx(mean)
    assert result.outcomes is not None
    assert [one.outcome for one in result.outcomes.outcomes] == ["bike"]
    assert result.outcomes.average_auc == result.outcomes.outcomes[0].wordings[0].auc
    assert result.queries is not None
    variance = (
        result.queries.variance_of_query
        + result.queries.variance_of_user
        + result.queries.variance_of_both
    )
    assert variance == pytest.approx(1)
    for index, own in enumerate(result.methods[0].scenarios):
        assert result.queries.cross_auc[index][index] == pytest.approx(own.auc)
    assert result.attention is not None
    assert result.attention.num_users == 4
    names = [score.scenario for score in result.methods[0].scenarios]
    shares = [(one.scenario, one.is_tuned) for one in result.attention.shares]
    assert shares == [*((name, False) for name in names), (names[0], True)]


def test_the_page_loads_nothing_and_says_what_it_rests_on(
    evaluated: tuple[Path, Evaluation],
) -> None:
    place, result = evaluated
    text = (place / "eval.html").read_text()
    page = Page(text)
    assert page.loaded, "the scatter plots are images in the page"
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in page.loaded)
    assert not re.search(r"@import|url\((?!#)", text)
    assert {"link", "iframe"}.isdisjoint(page.tags)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    facts = [result.dataset, result.recipe, result.checkpoint_id, result.environment.commit]
    assert all(fact in text for fact in [*facts, f"{result.num_users:,}"])
    assert all(method.about in html.unescape(text) for method in result.methods)
    assert "Yes &lt;b&gt;&amp;&lt;/b&gt; often." in text
    assert result.zero_shot is not None
    wordings = result.zero_shot.scenarios[0].wordings
    assert html.escape(min(wordings, key=lambda one: one.auc).question) in text
    assert "<i>Soon?" not in text
    assert "&lt;u&gt;?" in text
    assert "<u>" not in text
    assert "#010203" not in text
    assert text.count("<table") >= 6


def test_parts_can_be_left_out_and_wrong_words_are_told(
    wallet: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["eval", str(run_dir / "untrained"), str(wallet), *FEW]
    few = [part for part in PARTS if part != "plots"]
    without = [word for part in few for word in ("--without", part)]
    out = tmp_path / "deep" / "eval.json"
    assert main([*base, *without, "--max-users", "60", "--out", str(out)]) == 0
    result = config.load(Evaluation, out)
    assert [method.method for method in result.methods] == ["Q-Anchor", "untrained model"]
    parts = (result.zero_shot, result.queries, result.few_labels, result.attention)
    assert parts == (None,) * 4
    shown = capsys.readouterr().out
    assert json.loads(shown.splitlines()[-1])["Q-Anchor"]["auc"] == result.methods[0].average_auc
    assert "| Q-Anchor | untrained model | +0.0000 |" in shown
    assert main([*base, "--without", "atention"]) == 2
    assert "did you mean 'attention'" in capsys.readouterr().err
    assert main([*base, "--also", "twin"]) == 2
    assert "NAME=CHECKPOINT" in capsys.readouterr().err
    wrong = tmp_path / "answers.json"
    wrong.write_text('{"scenarios": {"fraud_3d": {"yes": ["Yes."]}}}')
    assert main([*base, "--answers", str(wrong)]) == 2
    assert "did you mean 'fraud_30d'" in capsys.readouterr().err
    for wordings, said in (
        ('{"fraud_3d": ["Is it a thief?"]}', "did you mean 'fraud_30d'"),
        ('{"fraud_30d": []}', "needs questions"),
        ('{"fraud_30d": [" "]}', "needs questions"),
        ('{"fraud_30d": "Is it a thief?"}', "Expected `array`"),
    ):
        wrong.write_text(wordings)
        assert main([*base, "--wordings", str(wrong)]) == 2
        assert said in capsys.readouterr().err


def test_a_question_longer_than_a_model_takes_is_told_before_any_work(
    wallet: Path, run_dir: Path
) -> None:
    checkpoint, dataset = load_checkpoint(run_dir / "checkpoint"), open_dataset(wallet)
    first, *rest = dataset.scenarios
    # Two that differ only where the model would not hear it.
    base = first.question * 20
    longer = [Scenario(name=name, question=base + name) for name in ("stay", "leave")]
    limit = checkpoint.meta.recipe.train.max_query_len
    asked = replace(dataset, scenarios=(first, *longer, *rest))
    with pytest.raises(ConfigError, match=rf"stay\.question=.* takes {limit}; shorten it"):
        evaluate(Subject(checkpoint), asked, EvalConfig(parts=()))
    settings = EvalConfig(wordings={first.name: ("Soon?", base)})
    with pytest.raises(ConfigError, match=rf"{first.name}\.question=.* takes {limit}"):
        evaluate(Subject(checkpoint), dataset, settings)
    tuned = Scenario(name=first.name, question=base, soft_prompt=((0.5,) * 32,))
    with pytest.raises(ConfigError, match=rf"{first.name}\.question=.* takes {limit}"):
        evaluate(Subject(checkpoint, tuned=(tuned,)), dataset, EvalConfig(parts=()))
    silent = override(checkpoint.meta.recipe, ["train.max_query_len=3"])
    other = replace(checkpoint, meta=msgspec.structs.replace(checkpoint.meta, recipe=silent))
    with pytest.raises(ConfigError, match=rf"{first.name}\.question=.* takes 3"):
        evaluate(Subject(checkpoint, untrained=other), dataset, EvalConfig(parts=()))


def test_all_models_run_where_models_that_are_not_trained_run(
    wallet: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A device every machine has, and no model is on by itself.
    elsewhere = torch.device("meta")
    monkeypatch.setattr("qanchor.checkpoint.inference_device", lambda: elsewhere)
    words = ["eval", str(run_dir / "checkpoint"), str(wallet)]
    words += ["--also", f"twin={run_dir / 'untrained'}"]
    subject = subject_of(build_parser().parse_args(words))
    assert subject.untrained is not None
    for checkpoint in (subject.checkpoint, subject.untrained, subject.others["twin"]):
        assert {one.device for one in checkpoint.model.parameters()} == {elsewhere}
