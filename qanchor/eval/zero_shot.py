"""A scenario given as a question only: users scored by whether "yes" or "no" answers it better.

u(user, question) is compared with the semantic tower's vectors of answer texts; no label is read
before the AUC is counted, and nothing is fitted.

Legend: U users, A answer texts, W wordings, Z embedding_dim.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from qanchor.checkpoint import Checkpoint
from qanchor.config import Scenario
from qanchor.eval.bootstrap import Bootstrap, interval
from qanchor.eval.config import EvalConfig
from qanchor.eval.embed import embed_answers
from qanchor.eval.metrics import auc, known_mean
from qanchor.eval.results import WordingScore, ZeroShot, ZeroShotScore
from qanchor.eval.splits import JudgedUsers

Floats = npt.NDArray[np.float32]


def yes_minus_no(embeddings_UZ: Floats, yes_AZ: Floats, no_AZ: Floats) -> npt.NDArray[np.float64]:
    """Cosine to the mean "yes" vector minus cosine to the mean "no" vector [U]; unit rows in.

    Of [U, W, Z] the scores of each wording [U, W]; their mean over wordings is the score of the
    mean embedding.
    """
    direction_Z = _mean_direction(yes_AZ) - _mean_direction(no_AZ)
    return np.asarray(embeddings_UZ @ direction_Z, dtype=np.float64)


def zero_shot(
    checkpoint: Checkpoint,
    scenarios: Sequence[Scenario],
    judged: JudgedUsers,
    embeddings: Mapping[str, Floats],
    settings: EvalConfig,
    bootstrap: Bootstrap,
    worded: Mapping[str, Floats] = MappingProxyType({}),
    soft: Mapping[str, Floats] = MappingProxyType({}),
) -> ZeroShot:
    """AUC of every scenario on its test users; `embeddings[name]` [users, Z] with its question.

    `worded[name]`: of all test users with the other wordings of the settings [U, W, Z];
    `soft[name]` [users, Z]: with a soft prompt, where the scenario has one.
    """
    answers = settings.answers
    tests, wordings, together, softly = {}, {}, {}, {}
    for scenario in scenarios:
        part = judged.by_scenario[scenario.name]["test"]
        texts = answers.scenarios.get(scenario.name, answers)
        yes_AZ, no_AZ = embed_answers(checkpoint, texts.yes), embed_answers(checkpoint, texts.no)
        scores = yes_minus_no(embeddings[scenario.name][part.rows], yes_AZ, no_AZ)
        tests[scenario.name] = judged.test_scores(scenario.name, scores)
        if scenario.name in soft:
            soft_U = yes_minus_no(soft[scenario.name][part.rows], yes_AZ, no_AZ)
            softly[scenario.name] = auc(part.labels, soft_U)
        questions = settings.wordings.get(scenario.name, ())
        if not questions:
            continue
        worded_UWZ = worded[scenario.name][tests[scenario.name].rows]
        scores_UW = yes_minus_no(worded_UWZ, yes_AZ, no_AZ)
        wordings[scenario.name] = tuple(
            WordingScore(question=question, auc=auc(part.labels, scores_U))
            for question, scores_U in zip(questions, scores_UW.T, strict=True)
        )
        together[scenario.name] = auc(part.labels, scores_UW.mean(axis=1))
    draws = bootstrap.draws(list(tests.values()))
    scores_of = tuple(
        ZeroShotScore(
            scenario=scenario.name,
            question=scenario.question,
            auc=auc(tests[scenario.name].labels, tests[scenario.name].scores),
            auc_interval=interval(draws.auc[:, index]),
            num_test=len(tests[scenario.name].labels),
            wordings=wordings.get(scenario.name, ()),
            together_auc=together.get(scenario.name),
            soft_auc=softly.get(scenario.name),
        )
        for index, scenario in enumerate(scenarios)
    )
    means = [float(np.mean([one.auc for one in found])) for found in wordings.values()]
    return ZeroShot(
        yes=answers.yes,
        no=answers.no,
        average_auc=float(np.mean([one.auc for one in scores_of])),
        auc_interval=interval(draws.average[0]),
        scenarios=scores_of,
        average_wording_auc=known_mean(means),
        average_together_auc=known_mean(together.values()),
        average_soft_auc=known_mean(softly.values()),
    )


def _mean_direction(vectors_AZ: Floats) -> Floats:
    mean_Z = vectors_AZ.mean(axis=0)
    direction: Floats = mean_Z / max(float(np.linalg.norm(mean_Z)), 1e-12)
    return direction
