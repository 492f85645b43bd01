"""A study as a page: its table, its curves, its scenarios."""

from qanchor.eval.report import facts_of, methods_section, point_of, scenario_section
from qanchor.report.document import Cell, Document, Plot, Section, Table
from qanchor.report.figures import curve
from qanchor.study.plan import Curve
from qanchor.study.results import StudyResult, paper


def document(result: StudyResult) -> Document:
    """The whole page."""
    scores = [one.scores for one in result.outcomes]
    differences = [one.difference for one in result.outcomes if one.difference is not None]
    sections = [methods_section(scores, differences, "Variants")]
    if result.curves:
        plots = tuple(_plot(result, one) for one in result.curves)
        sections.append(Section("Curves", "Average test AUC with 95 % intervals.", plots=plots))
    sections += [scenario_section(scores, result.skipped), _settings(result)]
    return Document(
        title=f"{result.title} on {result.dataset}",
        subtitle=f"Recipe {result.recipe}. {result.text}",
        facts=facts_of(result.environment, result.dataset, result.num_users, result.num_test),
        sections=tuple(sections),
    )


def _plot(result: StudyResult, one: Curve) -> Plot:
    points = [point_of(place.x, result.outcome(place.variant).scores) for place in one.points]
    svg = curve(points, one.x_label, "average test AUC", is_log=one.is_log)
    return Plot(svg, one.name, is_wide=False)


def _settings(result: StudyResult) -> Section:
    base = result.outcomes[0].variant
    rows = []
    for one in result.outcomes:
        variant = one.variant
        changes = [*variant.set, *(f"schema: {text}" for text in variant.schema)]
        if variant.users_share != 1:
            changes.append(f"{variant.users_share:g} of the train users")
        if variant.users_factor != 1:
            changes.append(f"{variant.users_factor} x users per step")
        if variant.prompt_rows:
            changes.append(f"{variant.prompt_rows} soft-prompt rows")
        rows.append(
            (
                Cell(variant.name),
                Cell("; ".join(changes) or "nothing"),
                Cell(f"{one.step:,}", float(one.step)),
                Cell(paper(variant, base)),
                Cell(one.checkpoint),
            )
        )
    head = ("variant", "what is changed", "steps", "paper, AUC", "checkpoint")
    return Section("What each variant is", tables=(Table(head, tuple(rows)),))
