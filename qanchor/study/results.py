"""What a study says: its JSON and its Markdown table."""

from qanchor.config import Config
from qanchor.environment import Environment
from qanchor.eval.results import Difference, MethodScore, SkippedScenario, shown
from qanchor.study.plan import Curve, Variant


class VariantOutcome(Config, frozen=True, kw_only=True):
    """One variant, judged."""

    variant: Variant
    checkpoint: str
    """Below the study's directory."""
    step: int
    scores: MethodScore
    difference: Difference | None = None
    """To the study's first variant; null for that one."""


class StudyResult(Config, frozen=True, kw_only=True):
    """All variants of a study on one data set."""

    title: str
    text: str
    dataset: str
    num_users: int
    num_test: int
    recipe: str
    num_draws: int
    environment: Environment
    outcomes: tuple[VariantOutcome, ...]
    curves: tuple[Curve, ...] = ()
    skipped: tuple[SkippedScenario, ...] = ()
    """Scenarios that are not judged; averages are over the others."""

    def outcome(self, name: str) -> VariantOutcome:
        """The outcome of the variant of that name."""
        return next(one for one in self.outcomes if one.variant.name == name)


def markdown_table(result: StudyResult) -> str:
    """One line per variant: averages, difference to the first with its interval, the paper's."""
    base = result.outcomes[0].variant
    lines = [
        "| variant | AUC | KS | AUC minus base | 95 % | KS minus base | better in | paper, AUC |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in result.outcomes:
        cells = [one.variant.name, f"{one.scores.average_auc:.4f}", f"{one.scores.average_ks:.4f}"]
        apart = one.difference
        if apart is None:
            cells += ["", "", "", ""]
        else:
            cells += [f"{apart.auc:+.4f}", shown(apart.auc_interval), f"{apart.ks:+.4f}"]
            cells.append(f"{apart.num_better} of {apart.num_scenarios}")
        cells.append(paper(one.variant, base))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paper(variant: Variant, base: Variant) -> str:
    """The paper's AUC of a variant and its difference to the paper's base, or nothing."""
    if variant.paper_auc is None:
        return ""
    if base.paper_auc is None or variant.name == base.name:
        return f"{variant.paper_auc:.4f}"
    return f"{variant.paper_auc:.4f} ({variant.paper_auc - base.paper_auc:+.4f})"
