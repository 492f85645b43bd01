"""What an evaluation says: the JSON behind every table, plot and report."""

from collections.abc import Sequence
from typing import Literal

from qanchor.config import Config
from qanchor.environment import Environment
from qanchor.eval.bootstrap import Interval

Kind = Literal["query-conditioned", "embedding baseline", "features baseline"]


class SkippedScenario(Config, frozen=True, kw_only=True):
    """A scenario that was left out."""

    scenario: str
    reason: str


class ScenarioScore(Config, frozen=True, kw_only=True):
    """Probe quality of one scenario on the test users that have a label."""

    scenario: str
    auc: float
    ks: float
    auc_interval: Interval
    ks_interval: Interval
    valid_auc: float
    """AUC on valid, by which the probe was chosen; compare recipes by this, not by test."""
    num_test: int
    base_rate: float


class MethodScore(Config, frozen=True, kw_only=True):
    """One method over all scenarios."""

    method: str
    kind: Kind
    about: str
    """What the method is, in a sentence."""
    num_features: int
    """Numbers per user that the probe sees."""
    average_auc: float
    average_ks: float
    auc_interval: Interval
    ks_interval: Interval
    average_valid_auc: float
    scenarios: tuple[ScenarioScore, ...]


class Difference(Config, frozen=True, kw_only=True):
    """One method minus another on the same draws of test users."""

    method: str
    over: str
    auc: float
    """Difference of the average AUC."""
    auc_interval: Interval
    ks: float
    ks_interval: Interval
    num_better: int
    """Scenarios in which the method's AUC is higher."""
    num_scenarios: int


class WordingScore(Config, frozen=True, kw_only=True):
    """A scenario asked with another question."""

    question: str
    auc: float


class ZeroShotScore(Config, frozen=True, kw_only=True):
    """One scenario known by its question alone."""

    scenario: str
    question: str
    auc: float
    auc_interval: Interval
    num_test: int
    wordings: tuple[WordingScore, ...] = ()
    """The same asked in other words."""
    together_auc: float | None = None
    """Of the mean score over those wordings: asked in all of them at once."""
    soft_auc: float | None = None
    """With the soft prompt of a scenario file, tuned or compiled."""


class ZeroShot(Config, frozen=True, kw_only=True):
    """u(user, question) against the vectors v("yes ...") and v("no ..."): no label, no fit."""

    yes: tuple[str, ...]
    no: tuple[str, ...]
    """Default answer texts; a scenario may have its own."""
    average_auc: float
    auc_interval: Interval
    scenarios: tuple[ZeroShotScore, ...]
    average_wording_auc: float | None = None
    """Mean over scenarios of the mean over their other wordings; None where there are none."""
    average_together_auc: float | None = None
    """Mean over scenarios of their `together_auc`."""
    average_soft_auc: float | None = None
    """Mean over scenarios of their `soft_auc`."""


class OutcomeScore(Config, frozen=True, kw_only=True):
    """An outcome of train users' recorded futures, asked in some wordings."""

    outcome: str
    kind: str
    days: int
    auc: float
    """Mean over the wordings, zero-shot, all users asked."""
    heldout_auc: float | None
    """The same among users held out from training; None where all of those come out alike."""
    num_users: int
    """Whose future says yes or no."""
    base_rate: float
    wordings: tuple[WordingScore, ...]
    together_auc: float | None = None
    """Of the mean score over the wordings, all users asked: asked in all of them at once."""


class OutcomeScores(Config, frozen=True, kw_only=True):
    """Questions about train users' recorded futures, scored as `ZeroShot` scores."""

    num_users: int
    num_heldout: int
    """Of those, held out from training."""
    average_auc: float
    average_heldout_auc: float | None
    heldout_auc_interval: Interval | None
    outcomes: tuple[OutcomeScore, ...]
    average_together_auc: float | None = None
    """Mean of the outcomes' `together_auc`."""


class QueryEffect(Config, frozen=True, kw_only=True):
    """What a query does to test users' embeddings, and which query serves which scenario."""

    scenarios: tuple[str, ...]
    cosine: tuple[tuple[float, ...], ...]
    """[a][b]: one user's embeddings of scenarios a and b, mean over users."""
    centred_cosine: tuple[tuple[float, ...], ...]
    """The same after taking away each scenario's mean embedding, which all users share."""
    other_user_cosine: tuple[float, ...]
    """[a]: two different users' embeddings of scenario a, mean over pairs."""
    variance_of_query: float
    """Share of the embeddings' variance that the query alone explains; the three sum to 1."""
    variance_of_user: float
    variance_of_both: float
    """What only user and query together explain: the part that conditioning adds."""
    cross_auc: tuple[tuple[float, ...], ...]
    """[a][b]: test AUC of a probe of scenario a's label on embeddings with scenario b's query."""
    num_own_best: int
    """Scenarios whose own query has the highest AUC of all queries."""
    num_own_above_mean: int
    """Scenarios whose own query is above the mean of the others."""
    own_minus_others: float
    """AUC with the own query minus the mean over the others', averaged over scenarios."""
    own_minus_others_interval: Interval
    own_minus_others_by_scenario: tuple[float, ...]


class FewLabelsScore(Config, frozen=True, kw_only=True):
    """A method's AUC where probes see few labels, mean over scenarios and draws."""

    method: str
    num_labels: int
    """Labelled train users of each scenario, half of each class."""
    auc: float
    auc_interval: Interval
    """Over draws of labels and of test users."""


class FewLabelsGain(Config, frozen=True, kw_only=True):
    """A method minus another with the same few labels, draws paired."""

    method: str
    over: str
    num_labels: int
    auc: float
    auc_interval: Interval


class FewLabels(Config, frozen=True, kw_only=True):
    """What probes reach with few labels."""

    num_draws: int
    """Of labels; each is judged on another draw of test users."""
    scores: tuple[FewLabelsScore, ...]
    gains: tuple[FewLabelsGain, ...]
    """The method with each scenario's own question over each other."""


class AttentionShares(Config, frozen=True, kw_only=True):
    """Where <USER_EMB> looks: shares that sum to 1, mean over users and heads."""

    scenario: str
    is_tuned: bool
    total: tuple[float, ...]
    """By group, mean over layers."""
    by_layer: tuple[tuple[float, ...], ...]
    """[layer][group]."""


class Attention(Config, frozen=True, kw_only=True):
    """Attention of <USER_EMB> by what is looked at, before and after tuning."""

    groups: tuple[str, ...]
    num_users: int
    shares: tuple[AttentionShares, ...]


class Evaluation(Config, frozen=True, kw_only=True):
    """All methods on one data set."""

    dataset: str
    num_users: int
    num_test: int
    recipe: str
    step: int
    checkpoint_id: str
    num_draws: int
    """Bootstrap draws behind every interval."""
    environment: Environment
    methods: tuple[MethodScore, ...]
    """The first is the query-conditioned model."""
    differences: tuple[Difference, ...]
    """The first method minus each other; and the tuned minus the first."""
    zero_shot: ZeroShot | None = None
    outcomes: OutcomeScores | None = None
    queries: QueryEffect | None = None
    few_labels: FewLabels | None = None
    attention: Attention | None = None
    skipped: tuple[SkippedScenario, ...] = ()
    """Scenarios that no part judges; averages are over the others."""

    def method(self, name: str) -> MethodScore | None:
        """The method of that name, if it was judged."""
        return next((one for one in self.methods if one.method == name), None)


def markdown_table(methods: Sequence[MethodScore]) -> str:
    """Methods as columns, scenarios as rows, `AUC / KS` in the cells."""
    header = ["scenario", "base rate", *(method.method for method in methods)]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in zip(*(method.scenarios for method in methods), strict=True):
        cells = [f"{score.auc:.4f} / {score.ks:.4f}" for score in row]
        lines.append(f"| {row[0].scenario} | {row[0].base_rate:.3f} | {' | '.join(cells)} |")
    averages = [f"**{m.average_auc:.4f} / {m.average_ks:.4f}**" for m in methods]
    lines.append(f"| **average** | | {' | '.join(averages)} |")
    return "\n".join(lines)


def difference_table(differences: Sequence[Difference]) -> str:
    """One line per difference, with its 95 % interval."""
    lines = [
        "| method | minus | AUC | 95 % | KS | 95 % | better in |",
        "|---|---|---|---|---|---|---|",
    ]
    lines.extend(
        f"| {one.method} | {one.over} | {one.auc:+.4f} | {shown(one.auc_interval)} | "
        f"{one.ks:+.4f} | {shown(one.ks_interval)} | {one.num_better} of {one.num_scenarios} |"
        for one in differences
    )
    return "\n".join(lines)


def shown(bounds: Interval) -> str:
    """An interval of a difference in words: signed ends."""
    return f"{bounds.low:+.4f} to {bounds.high:+.4f}"
