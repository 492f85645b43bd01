"""One method judged: a probe per scenario, scores with intervals, differences to other methods."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from qanchor.eval.bootstrap import Bootstrap, Draws, TestScores, interval
from qanchor.eval.metrics import auc, ks
from qanchor.eval.probe import Features, ProbeResult, SplitData, linear_probe
from qanchor.eval.results import Difference, Kind, MethodScore, ScenarioScore
from qanchor.eval.splits import JudgedUsers

Probe = Callable[[Mapping[str, SplitData]], ProbeResult]


@dataclass(frozen=True, slots=True)
class Method:
    """What stands at the head of a method's column."""

    name: str
    kind: Kind
    about: str


@dataclass(frozen=True, slots=True)
class Probed:
    """What the probes of a method say, by scenario."""

    tests: Mapping[str, TestScores]
    valid_auc: Mapping[str, float]
    num_features: int


@dataclass(frozen=True, slots=True)
class Judged:
    """A method's scores, and its draws for differences to other methods."""

    score: MethodScore
    draws: Draws


def probe_all(
    judged: JudgedUsers, tables: Sequence[Features], title: str, probe: Probe = linear_probe
) -> Probed:
    """Fit a probe per scenario; `tables` [users, F] are in the order of the scenarios."""
    tests, valid_auc = {}, {}
    pairs = list(zip(judged.by_scenario, tables, strict=True))
    for name, table in tqdm(pairs, desc=f"probing {title}", unit="scenario"):
        result = probe(judged.split_data(name, table))
        tests[name] = judged.test_scores(name, result.test_scores)
        valid_auc[name] = result.valid_auc
    return Probed(tests, valid_auc, tables[0].shape[1])


def judge(method: Method, probed: Probed, bootstrap: Bootstrap) -> Judged:
    """Scores and intervals of a method."""
    draws = bootstrap.draws(list(probed.tests.values()))
    scores = tuple(
        ScenarioScore(
            scenario=name,
            auc=auc(one.labels, one.scores),
            ks=ks(one.labels, one.scores),
            auc_interval=interval(draws.auc[:, index]),
            ks_interval=interval(draws.ks[:, index]),
            valid_auc=probed.valid_auc[name],
            num_test=len(one.labels),
            base_rate=float(one.labels.mean()),
        )
        for index, (name, one) in enumerate(probed.tests.items())
    )
    auc_B, ks_B = draws.average
    score = MethodScore(
        method=method.name,
        kind=method.kind,
        about=method.about,
        num_features=probed.num_features,
        average_auc=float(np.mean([one.auc for one in scores])),
        average_ks=float(np.mean([one.ks for one in scores])),
        auc_interval=interval(auc_B),
        ks_interval=interval(ks_B),
        average_valid_auc=float(np.mean([one.valid_auc for one in scores])),
        scenarios=scores,
    )
    return Judged(score, draws)


def difference(method: Judged, over: Judged) -> Difference:
    """`method` minus `over`, user draws paired; both from one bootstrap and the same scenarios."""
    score, other = method.score, over.score
    auc_B, ks_B = (
        mine - theirs for mine, theirs in zip(method.draws.average, over.draws.average, strict=True)
    )
    pairs = zip(score.scenarios, other.scenarios, strict=True)
    return Difference(
        method=score.method,
        over=other.method,
        auc=score.average_auc - other.average_auc,
        auc_interval=interval(auc_B),
        ks=score.average_ks - other.average_ks,
        ks_interval=interval(ks_B),
        num_better=sum(mine.auc > theirs.auc for mine, theirs in pairs),
        num_scenarios=len(score.scenarios),
    )
