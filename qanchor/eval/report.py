"""An evaluation as a page: what is said of it, in which order, with which plots."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from qanchor.environment import Environment
from qanchor.eval.bootstrap import Interval
from qanchor.eval.projection import Projection
from qanchor.eval.results import (
    Attention,
    Difference,
    Evaluation,
    FewLabels,
    MethodScore,
    OutcomeScore,
    OutcomeScores,
    QueryEffect,
    ScenarioScore,
    SkippedScenario,
    ZeroShot,
    ZeroShotScore,
)
from qanchor.report.document import Cell, Document, Plot, Section, Table, Tile
from qanchor.report.figures import Point, dots, heatmap, scatters, stacked_bars


def document(result: Evaluation, projections: Sequence[Projection], dataset_note: str) -> Document:
    """The whole page; `dataset_note` is what the data set says of itself."""
    sections = [
        _overview(result),
        methods_section(result.methods, result.differences),
        scenario_section(result.methods, result.skipped),
    ]
    if result.zero_shot:
        sections.append(_zero_shot(result.zero_shot))
    if result.outcomes:
        sections.append(_outcomes(result.outcomes))
    if result.queries:
        sections.append(_queries(result.queries))
    if result.few_labels:
        sections.append(_few_labels(result.few_labels))
    if result.attention:
        sections.append(_attention(result.attention))
    if projections:
        sections.append(_projections(projections))
    sections.append(_how(result, dataset_note))
    main = result.methods[0]
    return Document(
        title=f"User embeddings on {result.dataset}",
        subtitle=(
            f"{main.method}, recipe {result.recipe} at step {result.step}: linear probes on frozen "
            f"embeddings, {result.num_test:,} test users"
        ),
        facts=(
            *facts_of(result.environment, result.dataset, result.num_users, result.num_test),
            ("recipe", f"{result.recipe}, step {result.step:,}"),
            ("checkpoint", result.checkpoint_id),
            ("intervals", f"95 %, {result.num_draws:,} bootstrap draws of test users"),
        ),
        sections=tuple(sections),
    )


def facts_of(
    environment: Environment, dataset: str, num_users: int, num_test: int
) -> tuple[tuple[str, str], ...]:
    """What every page says of data, code and machine."""
    dirty = ", with uncommitted changes" if environment.is_dirty else ""
    return (
        ("data set", dataset),
        ("users (train, valid and test)", f"{num_users:,}"),
        ("test users", f"{num_test:,}"),
        ("commit", environment.commit + dirty),
        ("machine", f"{environment.cpu}, {environment.cores} cores"),
        ("software", f"Python {environment.python}, torch {environment.packages['torch']}"),
    )


def _overview(result: Evaluation) -> Section:
    main = result.methods[0]
    tiles = [
        Tile("average AUC", f"{main.average_auc:.3f}", _within(main.auc_interval)),
        Tile("average KS", f"{main.average_ks:.3f}", _within(main.ks_interval)),
    ]
    kinds = {method.method: method.kind for method in result.methods}
    baselines = [one for one in result.differences if one.method == main.method]
    for kind in ("embedding baseline", "features baseline"):
        of_kind = [one for one in baselines if kinds[one.over] == kind]
        if of_kind:
            hardest = min(of_kind, key=lambda one: one.auc)
            note = f"95 %: {_signed(hardest.auc_interval)}; {hardest.over}"
            tiles.append(Tile(f"AUC over the best {kind}", f"{hardest.auc:+.3f}", note))
    if baselines:
        num_sure = sum(one.auc_interval.is_above_zero for one in baselines)
        beaten = f"{num_sure} of {len(baselines)}"
        tiles.append(Tile("baselines beaten", beaten, "whole 95 % interval of the gain above 0"))
    for tuned in (one for one in result.differences if one.over == main.method):
        note = f"better in {tuned.num_better} of {tuned.num_scenarios} scenarios"
        tiles.append(Tile(f"AUC gained, {tuned.method}", f"{tuned.auc:+.3f}", note))
    if result.zero_shot:
        note = "the question alone, no label, no fit"
        tiles.append(Tile("zero-shot AUC", f"{result.zero_shot.average_auc:.3f}", note))
    if result.queries:
        note = f"own query above the others in {result.queries.num_own_above_mean} of "
        tiles.append(
            Tile(
                "AUC gained by the right query",
                f"{result.queries.own_minus_others:+.3f}",
                note + f"{len(result.queries.scenarios)} scenarios",
            )
        )
    return Section("At a glance", tiles=tuple(tiles))


def methods_section(
    methods: Sequence[MethodScore], differences: Sequence[Difference], title: str = "Methods"
) -> Section:
    """All methods on average: a plot, and a table with the differences to the first."""
    main, by_method = methods[0], {}
    for one in differences:
        by_method[one.over if one.method == main.method else one.method] = one
    best = max(method.average_auc for method in methods)
    rows = [
        (
            Cell(method.method, note=method.about),
            _scored(method.average_auc, method.auc_interval, is_best=method.average_auc == best),
            _scored(method.average_ks, method.ks_interval),
            _difference_cell(by_method.get(method.method), main.method),
            Cell(str(method.num_features), float(method.num_features)),
        )
        for method in methods
    ]
    table = Table(
        ("method", "AUC", "KS", f"AUC minus {main.method}", "numbers per user"),
        tuple(rows),
        "Averages over all scenarios with 95 % intervals. Differences are paired: both methods "
        "are judged on the same draws of users.",
    )
    plot = dots(
        [method.method for method in methods],
        [point_of(0.0, method) for method in methods],
        "average test AUC, 95 % interval",
    )
    return Section(title, tables=(table,), plots=(Plot(plot),))


def point_of(x: float, method: MethodScore) -> Point:
    """A method's average AUC with its interval, at place `x`."""
    return Point(x, method.average_auc, method.auc_interval.low, method.auc_interval.high)


def _difference_cell(found: Difference | None, main: str) -> Cell:
    """How a method differs from the first, whichever way round it was measured."""
    if found is None:
        return Cell("", 0.0)
    sign = -1 if found.method == main else 1
    ends = sorted((sign * found.auc_interval.low, sign * found.auc_interval.high))
    bounds = Interval(low=ends[0], high=ends[1])
    return Cell(f"{sign * found.auc:+.4f}", sign * found.auc, note=_signed(bounds))


def scenario_section(methods: Sequence[MethodScore], skipped: Sequence[SkippedScenario]) -> Section:
    """AUC and KS of every method by scenario, and which scenarios could not be judged."""
    text = "The best embedding or feature set of each row is set in bold."
    if skipped:
        reasons = " ".join(f"{one.scenario}: {one.reason}." for one in skipped)
        text += f" Left out everywhere, as it takes users of both classes in each split: {reasons}"
    return Section(
        "By scenario",
        text,
        tables=(
            _scenario_table(methods, "Test AUC", lambda one: (one.auc, one.auc_interval)),
            _scenario_table(methods, "Test KS", lambda one: (one.ks, one.ks_interval)),
        ),
    )


def _scenario_table(
    methods: Sequence[MethodScore],
    caption: str,
    value_of: Callable[[ScenarioScore], tuple[float, Interval]],
) -> Table:
    rows = []
    for scores in zip(*(method.scenarios for method in methods), strict=True):
        best = max(value_of(score)[0] for score in scores)
        cells = [_scored(*value_of(score), is_best=value_of(score)[0] == best) for score in scores]
        note = f"{scores[0].num_test:,} users, {scores[0].base_rate:.1%} positive"
        rows.append((Cell(scores[0].scenario, note=note), *cells))
    averages = [
        float(np.mean([value_of(score)[0] for score in method.scenarios])) for method in methods
    ]
    rows.append((Cell("average"), *(Cell(f"{value:.3f}", value) for value in averages)))
    head = ("scenario", *(method.method for method in methods))
    return Table(head, tuple(rows), caption, last_row_is_total=True)


def _zero_shot(result: ZeroShot) -> Section:
    worded_auc, together_auc = result.average_wording_auc, result.average_together_auc
    soft_auc = result.average_soft_auc
    rows = [
        (
            Cell(one.scenario, note=one.question),
            _scored(one.auc, one.auc_interval),
            Cell(f"{one.num_test:,}", float(one.num_test)),
            *(() if worded_auc is None else _worded(one)),
            *(() if soft_auc is None else (_maybe(one.soft_auc),)),
        )
        for one in result.scenarios
    ]
    average = _scored(result.average_auc, result.auc_interval)
    means: list[Cell] = []
    if worded_auc is not None:
        means += [_number(worded_auc), _maybe(together_auc), Cell("")]
    if soft_auc is not None:
        means.append(_number(soft_auc))
    rows.append((Cell("average"), average, Cell(""), *means))
    text = (
        "Each scenario is given as its question only. A user's score is the similarity of the "
        "embedding to the vectors of answers that say yes, minus that to answers that say no; no "
        f"label is used. Answers that say yes: {_quoted(result.yes)}; no: {_quoted(result.no)}."
    )
    head = ["scenario", "AUC", "test users"]
    if worded_auc is not None:
        head += ["other wordings, mean AUC", "all of them at once", "least"]
    head += [] if soft_auc is None else ["with soft prompt"]
    return Section("Zero-shot", text, tables=(Table(tuple(head), tuple(rows), "", True),))


def _worded(asked: ZeroShotScore | OutcomeScore) -> tuple[Cell, Cell, Cell]:
    """Mean AUC of the wordings, that of their mean score, and the least."""
    if not asked.wordings:
        return Cell(""), Cell(""), Cell("")
    found = [one.auc for one in asked.wordings]
    worst = min(asked.wordings, key=lambda one: one.auc)
    least = replace(_number(worst.auc), note=worst.question)
    return _number(sum(found) / len(found)), _maybe(asked.together_auc), least


def _outcomes(result: OutcomeScores) -> Section:
    rows = [
        (
            Cell(one.outcome, note=f"{one.days} days, {one.base_rate:.1%} say yes"),
            _maybe(one.heldout_auc),
            *_worded(one),
            Cell(f"{one.num_users:,}", float(one.num_users)),
        )
        for one in result.outcomes
    ]
    average = _maybe(result.average_heldout_auc)
    if result.heldout_auc_interval:
        average = replace(average, note=_within(result.heldout_auc_interval))
    means = (
        _number(result.average_auc), _maybe(result.average_together_auc), Cell(""), Cell(""),
    )  # fmt: skip
    rows.append((Cell("average"), average, *means))
    text = (
        f"Yes or no as the recorded futures of {result.num_users:,} train users say, scored "
        f"zero-shot as above; {result.num_heldout:,} of them were held out from training. Each "
        "outcome is asked in several wordings: their mean, the mean of the scores (asked in all "
        "of them at once), and the one that did worst."
    )
    head = ("outcome", "AUC, held-out users", "AUC, all", "all wordings at once", "least", "users")
    return Section(
        "Outcomes of recorded futures", text, tables=(Table(head, tuple(rows), "", True),)
    )


def _maybe(value: float | None) -> Cell:
    return Cell("") if value is None else _number(value)


def _queries(effect: QueryEffect) -> Section:
    names = effect.scenarios
    count = len(names)
    tiles = (
        Tile(
            "own query is the best of all", f"{effect.num_own_best} of {count}", "scenarios, by AUC"
        ),
        Tile("own above the mean of the others", f"{effect.num_own_above_mean} of {count}"),
        Tile(
            "AUC, own minus others",
            f"{effect.own_minus_others:+.4f}",
            f"95 %: {_signed(effect.own_minus_others_interval)}",
        ),
        Tile("variance: the query alone", f"{effect.variance_of_query:.0%}"),
        Tile("variance: the user alone", f"{effect.variance_of_user:.0%}"),
        Tile("variance: only both together", f"{effect.variance_of_both:.0%}", "what asking adds"),
    )
    rows = [
        (
            Cell(name),
            _number(own := effect.cross_auc[index][index]),
            _number(own - effect.own_minus_others_by_scenario[index]),
            Cell(
                f"{effect.own_minus_others_by_scenario[index]:+.4f}",
                effect.own_minus_others_by_scenario[index],
            ),
            _number((sum(effect.cosine[index]) - 1) / max(count - 1, 1)),
            _number(effect.other_user_cosine[index]),
        )
        for index, name in enumerate(names)
    ]
    head = (
        "scenario",
        "AUC, own query",
        "AUC, others' mean",
        "difference",
        "cosine: same user, other scenarios",
        "cosine: other users, same scenario",
    )
    text = (
        "Do embeddings follow the question? The table compares a scenario's own question with the "
        "others', and how alike embeddings are when only the question or only the user changes. "
        "Below: AUC of a probe of the row's label on embeddings made with the column's question "
        "(red: better than the row's mean); and the cosine of one user's embeddings for two "
        "scenarios, as they are and after taking away what all users share."
    )
    plots = (
        Plot(
            heatmap(
                effect.cross_auc, names, names, "AUC: label by row, query by column", is_by_row=True
            ),
            is_wide=False,
        ),
        Plot(heatmap(effect.cosine, names, names, "cosine, one user's embeddings"), is_wide=False),
        Plot(
            heatmap(effect.centred_cosine, names, names, "the same, common part taken away"),
            is_wide=False,
        ),
    )
    return Section("What a query changes", text, tiles, (Table(head, tuple(rows)),), plots)


def _few_labels(result: FewLabels) -> Section:
    counts = sorted({one.num_labels for one in result.scores})
    scores = {(one.method, one.num_labels): one for one in result.scores}
    gains = {(one.over, one.num_labels): one for one in result.gains}
    methods = list(dict.fromkeys(one.method for one in result.scores))
    best = {count: max(scores[method, count].auc for method in methods) for count in counts}
    rows = []
    for method in methods:
        found = [scores[method, count] for count in counts]
        cells = [
            _scored(one.auc, one.auc_interval, is_best=one.auc == best[one.num_labels])
            for one in found
        ]
        for count in counts:
            gain = gains.get((method, count))
            cells.append(
                Cell(f"{gain.auc:+.4f}", gain.auc, note=_signed(gain.auc_interval))
                if gain
                else Cell("", 0.0)
            )
        rows.append((Cell(method), *cells))
    head = (
        "method",
        *(f"AUC, {count} labels" for count in counts),
        *(f"{methods[0]} minus it, {count}" for count in counts),
    )
    text = (
        "With thousands of labels a probe finds what it needs under any question. Here it sees "
        "a few users of each scenario, half of each class. Means over scenarios and "
        f"{result.num_draws} draws of labels, each judged on another draw of test users; the "
        "strength of regularisation is chosen on valid, once per method and number of labels."
    )
    return Section("With few labels", text, tables=(Table(head, tuple(rows)),))


def _attention(attention: Attention) -> Section:
    tuned = {one.scenario: one for one in attention.shares if one.is_tuned}
    names: list[str] = []
    bars: list[tuple[float, ...]] = []
    for base in (one for one in attention.shares if not one.is_tuned):
        names.append(base.scenario)
        bars.append(base.total)
        if base.scenario in tuned:
            names.append(f"{base.scenario}, tuned")
            bars.append(tuned[base.scenario].total)
    text = (
        "Share of the attention that the embedding token gives to each part of its input: mean "
        f"over {attention.num_users} test users, all heads and layers."
    )
    caption = "The change by tuning stands below each share, relative to before." if tuned else ""
    rows = []
    for base in (one for one in attention.shares if not one.is_tuned):
        after = tuned.get(base.scenario)
        cells = [
            Cell(f"{share:.1%}", share, note=_change(share, after.total[index] if after else None))
            for index, share in enumerate(base.total)
        ]
        rows.append((Cell(base.scenario), *cells))
    table = Table(("scenario", *attention.groups), tuple(rows), caption)
    layers = _attention_by_layer(attention)
    plots = (Plot(stacked_bars(names, attention.groups, bars)), layers)
    return Section("Where the embedding token looks", text, (), (table,), plots)


def _attention_by_layer(attention: Attention) -> Plot:
    """Mean over scenarios, layer by layer, before and after tuning."""
    names, bars = [], []
    for is_tuned in (False, True):
        chosen = [one.by_layer for one in attention.shares if one.is_tuned == is_tuned]
        if not chosen:
            continue
        for layer, shares in enumerate(np.mean(chosen, axis=0)):
            names.append(f"layer {layer + 1}" + (", tuned" if is_tuned else ""))
            bars.append(shares)
    caption = "The same layer by layer, mean over scenarios."
    return Plot(stacked_bars(names, attention.groups, bars), caption)


def _change(before: float, after: float | None) -> str:
    if after is None:
        return ""
    return f"{after / before - 1:+.1%}" if before > 0 else f"to {after:.1%}"


def _projections(projections: Sequence[Projection]) -> Section:
    by_scenario: dict[str, list[Projection]] = {}
    for one in projections:
        by_scenario.setdefault(one.scenario, []).append(one)
    plots = []
    for name, of_scenario in by_scenario.items():
        panels = {}
        for one in of_scenario:
            kind = "tuned" if one.is_tuned else "base"
            panels[f"PCA, {kind}"] = one.pca
            panels[f"t-SNE, {kind}"] = one.tsne
        svg = scatters(panels, of_scenario[0].labels)
        plots.append(Plot(svg, name, is_wide=len(panels) > 2))
    text = (
        "Test users in the plane, coloured by the scenario's label. PCA keeps large distances, "
        "t-SNE neighbourhoods; neither was told the labels."
    )
    return Section("Embeddings in the plane", text, plots=tuple(plots))


def _how(result: Evaluation, dataset_note: str) -> Section:
    text = (
        "Every method gives each user some numbers; a logistic regression (one method: boosted "
        "trees) is fitted on train users, its strength chosen on valid users, and judged once on "
        "test users. AUC is the chance that a positive user scores above a negative one; KS is the "
        "largest gap between true- and false-positive rate. Intervals come from drawing test users "
        f"with replacement {result.num_draws:,} times, the same draws for all methods and "
        f"scenarios. {dataset_note}"
    )
    return Section("How it was measured", text)


def _quoted(texts: Sequence[str]) -> str:
    return ", ".join(f'"{text}"' for text in texts)


def _scored(value: float, bounds: Interval, *, is_best: bool = False) -> Cell:
    return Cell(f"{value:.3f}", value, is_best, _within(bounds))


def _number(value: float) -> Cell:
    return Cell(f"{value:.4f}", value)


def _within(bounds: Interval) -> str:
    return f"{bounds.low:.3f} to {bounds.high:.3f}"


def _signed(bounds: Interval) -> str:
    return f"{bounds.low:+.4f} to {bounds.high:+.4f}"
