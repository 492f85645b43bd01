"""Eq. (7) against numpy; tuning and compiling learn what is there and keep what was best."""

import numpy as np
import pytest
import torch

from qanchor.checkpoint import Checkpoint
from qanchor.config import Scenario
from qanchor.tune.compiling import compile_scenario
from qanchor.tune.config import CompileConfig, SuffixTraining, TuneConfig
from qanchor.tune.fit import fit, learning_rate
from qanchor.tune.prompt_loss import class_means, prompt_loss, prototype_scores
from qanchor.tune.suffix_pass import SuffixPass
from qanchor.tune.tuning import tune_scenario
from qanchor.tune.users import CachedUsers, LabelledRows
from tests.unit.core.conftest import NUM_USERS, QUERIES

SCENARIO = Scenario(name="again", question=QUERIES[0], version=3)
TUNING = TuneConfig(steps=40, batch_users=8, evaluate_every=10, learning_rate=0.03)


def labelled(labels: list[int]) -> dict[str, LabelledRows]:
    """All users in both splits: what is tested is learning, not generalising."""
    rows = LabelledRows(np.arange(NUM_USERS), np.array(labels, dtype=np.int64))
    return {"train": rows, "valid": rows}


def tuned(
    passes: SuffixPass, checkpoint: Checkpoint, labels: list[int], config: TuneConfig = TUNING
):  # type: ignore[no-untyped-def]
    query = checkpoint.query(SCENARIO.question)
    return tune_scenario(passes, SCENARIO, query, labelled(labels), config, 0.07)


def test_the_loss_is_equation_seven() -> None:
    rng = np.random.default_rng(0)
    u, p = rng.normal(size=(5, 4)), rng.normal(size=(3, 4))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    unit_p = p / np.linalg.norm(p, axis=1, keepdims=True)
    y, tau, expected = [0, 2, 1, 1, 0], 0.07, 0.0
    for i in range(5):
        powers = np.exp([u[i] @ unit_p[k] / tau for k in range(3)])
        expected -= np.log(powers[y[i]] / powers.sum()) / 5
    found = prompt_loss(torch.tensor(u), torch.tensor(p), torch.tensor(y), tau)
    assert found.item() == pytest.approx(expected, abs=1e-10)


def test_prototypes_start_at_the_directions_of_the_class_means() -> None:
    anchors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.0, 1.0]])
    means = class_means(anchors, torch.tensor([0, 1, 1, 1]), 2)
    assert means[0].tolist() == [1, 0]
    assert (means[1] * means[1]).sum().item() == pytest.approx(1)
    assert (means[1][1] / means[1][0]).item() == pytest.approx(2.8 / 0.6)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_tuning_separates_the_classes_and_raises_the_version(
    passes: SuffixPass, checkpoint: Checkpoint, num_classes: int
) -> None:
    """Labels at random, so that only what the prompt learns can tell the classes apart."""
    labels = np.random.default_rng(5).permutation(NUM_USERS) % num_classes
    scenario, report = tuned(passes, checkpoint, labels.tolist())
    assert report.num_classes == num_classes
    assert report.judged_by == ("auc" if num_classes == 2 else "-loss")
    assert report.tuned > max(report.start, report.untuned)
    assert scenario.version == 4
    assert np.array(scenario.soft_prompt).shape == (6, checkpoint.hidden_dim)
    prototypes = np.array(scenario.prototypes)
    assert prototypes.shape == (num_classes, 8)
    np.testing.assert_allclose(np.linalg.norm(prototypes, axis=1), 1, atol=1e-6)
    assert not scenario.is_compiled


def test_the_scenario_written_scores_as_the_report_says(
    passes: SuffixPass, checkpoint: Checkpoint
) -> None:
    """The state kept is the best one, and it survives the way through plain numbers."""
    from qanchor.eval.metrics import auc

    labels = [0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 1]
    scenario, report = tuned(passes, checkpoint, labels)
    query = checkpoint.scenario(scenario)
    assert query.suffix_len == len(checkpoint.encode_query(QUERIES[0])) + 6 + 1
    anchors = passes.all_embeddings(range(NUM_USERS), passes.suffix_of(query))
    scores = prototype_scores(anchors, torch.tensor(scenario.prototypes), 0.07)
    found = auc(np.array(labels), (scores[:, 1] - scores[:, 0]).double().numpy())
    assert found == pytest.approx(report.tuned, abs=1e-9)


def test_the_same_seed_tunes_the_same_prompt(passes: SuffixPass, checkpoint: Checkpoint) -> None:
    labels = [0, 1] * 6
    assert tuned(passes, checkpoint, labels) == tuned(passes, checkpoint, labels)


def test_a_compiled_scenario_comes_close_to_its_text(
    passes: SuffixPass, checkpoint: Checkpoint
) -> None:
    config = CompileConfig(steps=150, batch_users=12, num_prompt_rows=4, learning_rate=0.03)
    # A random model and twelve users: what is tested is learning, not generalising.
    users = CachedUsers(passes.cache, np.arange(NUM_USERS), np.arange(NUM_USERS))
    query = checkpoint.query(SCENARIO.question)
    compiled, report = compile_scenario(passes, SCENARIO, [query], users, None, config)
    assert report.mean_cosine > 0.95
    assert 1 - report.mean_cosine < (1 - report.start_cosine) / 3
    assert report.min_cosine <= report.mean_cosine
    assert report.suffix_tokens_compiled == 5
    assert report.suffix_tokens_saved == query.suffix_len - 5
    assert report.probe_auc_text is None
    assert compiled.is_compiled
    assert compiled.version == 4
    assert compiled.question == SCENARIO.question
    suffix = checkpoint.scenario(compiled)
    assert suffix.token_ids == ()
    assert suffix.suffix_len == 5
    found = passes.all_embeddings(range(NUM_USERS), passes.suffix_of(suffix))
    wanted = passes.all_embeddings(range(NUM_USERS), passes.suffix_of(query))
    assert (found * wanted).sum(1).mean().item() == pytest.approx(report.mean_cosine, abs=1e-6)


def test_several_wordings_are_compiled_to_the_direction_of_their_mean(
    passes: SuffixPass, checkpoint: Checkpoint
) -> None:
    config = CompileConfig(steps=150, batch_users=12, num_prompt_rows=4, learning_rate=0.03)
    users = CachedUsers(passes.cache, np.arange(NUM_USERS), np.arange(NUM_USERS))
    wordings = [checkpoint.query(question) for question in QUERIES]
    compiled, report = compile_scenario(passes, SCENARIO, wordings, users, None, config)
    assert report.num_wordings == len(QUERIES) > 1
    assert report.suffix_tokens_text == sum(query.suffix_len for query in wordings)
    suffix = checkpoint.scenario(compiled)
    found = passes.all_embeddings(range(NUM_USERS), passes.suffix_of(suffix)).numpy()
    asked = [passes.all_embeddings(range(NUM_USERS), passes.suffix_of(one)) for one in wordings]
    mean_UZ = np.mean([one.numpy() for one in asked], axis=0)
    cosines = (found * mean_UZ).sum(axis=1) / np.linalg.norm(mean_UZ, axis=1)
    assert cosines.mean() == pytest.approx(report.mean_cosine, abs=1e-6)
    assert report.mean_cosine > 0.95
    assert compiled.question == SCENARIO.question


def test_a_tuned_scenario_is_compiled_with_its_soft_prompt_and_keeps_its_prototypes(
    passes: SuffixPass, checkpoint: Checkpoint
) -> None:
    scenario, _ = tuned(passes, checkpoint, [0, 1] * 6)
    query = checkpoint.scenario(scenario)
    config = CompileConfig(steps=20, batch_users=12, evaluate_every=10)
    users = CachedUsers(passes.cache, np.arange(8), np.arange(8, NUM_USERS))
    halves = {
        split: LabelledRows(rows, np.array([0, 1] * (len(rows) // 2)))
        for split, rows in (("train", users.train), ("valid", users.valid))
    }
    compiled, report = compile_scenario(passes, scenario, [query], users, halves, config)
    assert compiled.prototypes == scenario.prototypes
    assert compiled.version == scenario.version + 1
    assert report.suffix_tokens_text == query.suffix_len
    assert report.suffix_tokens_compiled == 9
    assert report.probe_auc_text is not None
    assert report.probe_auc_compiled is not None


def test_a_fit_keeps_the_best_state_and_stops_when_patience_ends() -> None:
    weight = torch.zeros(1, requires_grad=True)
    settings = SuffixTraining(
        steps=100, evaluate_every=2, patience=3, learning_rate=0.1, schedule="constant"
    )

    def judge() -> float:
        # Best near 0.5, although the loss pulls on and on.
        return -abs(weight.item() - 0.5)

    found = fit([weight], lambda batch: -weight.sum(), judge, 10, settings, "test")
    assert found.best_step == 4 or found.best_step == 6
    assert found.steps == found.best_step + 6
    assert judge() == found.best_score
    assert found.start_score == -0.5


def test_a_fit_that_only_makes_it_worse_gives_back_the_start() -> None:
    weight = torch.zeros(1, requires_grad=True)
    settings = SuffixTraining(steps=10, evaluate_every=5, learning_rate=0.1)
    found = fit([weight], lambda b: -weight.sum(), lambda: -weight.item(), 3, settings, "test")
    assert found.best_step == 0
    assert weight.item() == 0


def test_the_cosine_schedule_ends_at_a_tenth() -> None:
    settings = SuffixTraining(steps=100, learning_rate=0.2)
    assert learning_rate(0, settings) == pytest.approx(0.2)
    assert learning_rate(100, settings) == pytest.approx(0.02)
