"""Who is judged on what: scenarios without both classes are left out, limits draw users fairly."""

from pathlib import Path

import numpy as np
import pytest

from qanchor.checkpoint import load_checkpoint
from qanchor.config import Scenario
from qanchor.data.dataset import Dataset, open_dataset
from qanchor.data.statistics import learn_space, past_statistics
from qanchor.errors import DataError
from qanchor.eval.config import EvalConfig
from qanchor.eval.evaluate import Evaluated, evaluate
from qanchor.eval.methods import Subject, handmade_matrix
from qanchor.eval.report import document
from qanchor.eval.results import SkippedScenario, difference_table, markdown_table
from qanchor.eval.splits import chosen_users, judged_users
from qanchor.report.document import write_html
from tests.unit.eval.conftest import relabelled


def test_a_scenario_without_both_classes_is_left_out_and_the_others_are_judged(
    one_sided: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third, fourth = (scenario.name for scenario in one_sided.scenarios)
    judged = judged_users(one_sided, one_sided.user_ids())
    assert list(judged.by_scenario) == [first, third]
    assert [scenario.name for scenario in judged.narrowed(one_sided).scenarios] == [first, third]
    num_test = sum(one_sided.split_of[user] == "test" for user in one_sided.labels(second)[0])
    assert judged.skipped == (
        SkippedScenario(
            scenario=second, reason=f"all {num_test} labelled users of test have label 0"
        ),
        SkippedScenario(scenario=fourth, reason="no user of valid has a label"),
    )
    assert all(one.reason in caplog.text for one in judged.skipped)


def test_it_is_an_error_only_when_no_scenario_is_left(wallet: Path, tmp_path: Path) -> None:
    nobody = relabelled(wallet, tmp_path / "data", lambda *_: 0)
    everybody = nobody.user_ids()
    with pytest.raises(DataError, match=r"no scenario has users of both.*; label users of the oth"):
        judged_users(nobody, everybody)
    with pytest.raises(DataError, match=r"no scenario has users of both.*; judge more users"):
        judged_users(nobody, everybody[:50])


@pytest.fixture(scope="module")
def evaluated(one_sided: Dataset, run_dir: Path) -> Evaluated:
    """Every part that goes by scenario, with soft prompts and wordings for the skipped, too."""
    rows = ((0.5,) * 32,)
    tuned = [
        Scenario(name=one.name, question=one.question, soft_prompt=rows)
        for one in one_sided.scenarios[1:3]
    ]
    settings = EvalConfig(
        parts=("universal", "zero-shot", "queries", "few-labels", "attention", "plots"),
        num_draws=10,
        label_counts=(10,),
        label_draws=2,
        attention_users=2,
        plot_users=20,
        wordings={one.name: (f"{one.question} Soon?",) for one in one_sided.scenarios},
    )
    checkpoint = load_checkpoint(run_dir / "checkpoint")
    subject = Subject(checkpoint, untrained=checkpoint, tuned=tuple(tuned))
    return evaluate(subject, one_sided, settings)


def test_every_part_of_an_evaluation_goes_on_without_it(
    evaluated: Evaluated, one_sided: Dataset
) -> None:
    first, second, third, fourth = (scenario.name for scenario in one_sided.scenarios)
    result = evaluated.evaluation
    assert [one.scenario for one in result.skipped] == [second, fourth]
    for method in result.methods:
        assert [score.scenario for score in method.scenarios] == [first, third]
    main, tuned = result.methods[0], result.method("prompt-tuned")
    assert tuned is not None
    # The soft prompt is that of the third scenario, wherever it stood in file and data set.
    assert tuned.scenarios[0] == main.scenarios[0]
    assert result.zero_shot is not None
    assert [one.scenario for one in result.zero_shot.scenarios] == [first, third]
    assert [one.wordings[0].question for one in result.zero_shot.scenarios] == [
        f"{one.question} Soon?" for one in one_sided.scenarios[0:3:2]
    ]
    assert result.queries is not None
    assert result.queries.scenarios == (first, third)
    assert result.few_labels is not None
    assert result.attention is not None
    assert [(one.scenario, one.is_tuned) for one in result.attention.shares] == [
        (first, False),
        (third, False),
        (third, True),
    ]
    assert [one.scenario for one in evaluated.projections] == [first, third, third]


def test_the_page_says_what_was_left_out_and_why(
    evaluated: Evaluated, one_sided: Dataset, tmp_path: Path
) -> None:
    result = evaluated.evaluation
    write_html(document(result, (), ""), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for one in result.skipped:
        assert f"{one.scenario}: {one.reason}." in page
    table = markdown_table(result.methods) + difference_table(result.differences)
    assert one_sided.scenarios[1].name not in table


def test_a_limit_draws_users_at_random_but_always_the_same(wallet: Path) -> None:
    dataset = open_dataset(wallet)
    drawn = chosen_users(dataset, 10)
    assert drawn == chosen_users(dataset, 10)
    assert chosen_users(dataset, 0) == [
        user for split in ("train", "valid", "test") for user in dataset.user_ids(split)
    ]
    for split in ("train", "valid", "test"):
        everybody = dataset.user_ids(split)
        places = [everybody.index(user) for user in drawn if dataset.split_of[user] == split]
        assert len(places) == 10
        assert places == sorted(places), "in the order of ids"
        # Ten users of N from the front would all stand in the first ten places.
        assert max(places) >= len(everybody) // 2
    assert set(drawn) < set(chosen_users(dataset, 20))
    assert chosen_users(dataset, 10_000) == chosen_users(dataset, 0)


def test_hand_made_features_stand_in_the_order_of_the_users(wallet: Path) -> None:
    dataset = open_dataset(wallet)
    users = chosen_users(dataset, 5)
    matrix_UF = handmade_matrix(dataset, users)
    by_user = {profile.user_id: profile for profile in dataset.profiles(users)}
    space = learn_space(by_user[user] for user in users if dataset.split_of[user] == "train")
    wanted = np.stack([past_statistics(by_user[user], space) for user in users])
    np.testing.assert_array_equal(matrix_UF, np.nan_to_num(wanted))
