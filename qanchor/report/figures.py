"""Plots as SVG that take the page's text colour, so that they read on light and dark ground.

Needs matplotlib, without its global state: no pyplot.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

INK = "#010203"
"""Stands for the page's text colour until the SVG is put out."""
COLOURS = (
    "#4a8fe0", "#e58a35", "#3fae7a", "#c65fb8", "#d9564f", "#8f7be8", "#a8884c", "#35aab8",
    "#9aa2ad", "#e0b03a", "#6a9c3a", "#e77ba0", "#5f7fb0", "#b5651d", "#7a8a99", "#46c0a0",
)  # fmt: skip
HEAT_COLOURS = "RdYlBu_r"


@dataclass(frozen=True, slots=True)
class Point:
    """A value with the ends of its interval."""

    x: float
    y: float
    low: float
    high: float


def dots(names: Sequence[str], points: Sequence[Point], x_label: str) -> str:
    """One value per line with its interval, the first name on top; `Point.x` is not read."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        places = np.arange(len(names))[::-1]
        for index, (place, point) in enumerate(zip(places, points, strict=True)):
            colour = COLOURS[0] if index == 0 else COLOURS[8]
            axes.plot([point.low, point.high], [place, place], color=colour, lw=2.5, alpha=0.55)
            axes.plot(point.y, place, "o", color=colour, ms=7)
        axes.set_yticks(places, names)
        axes.set_xlabel(x_label)
        axes.grid(axis="x", alpha=0.25)
        _bare(axes)

    return _svg(draw, width=8.5, height=0.9 + 0.36 * len(names))


def heatmap(
    matrix: npt.ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    *,
    is_by_row: bool = False,
) -> str:
    """A matrix with its numbers; `is_by_row` colours a cell by its distance to its row's mean."""
    values = np.asarray(matrix, dtype=np.float64)
    shades = values - values.mean(axis=1, keepdims=True) if is_by_row else values

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        image = axes.imshow(shades, cmap=HEAT_COLOURS, aspect="auto")
        axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
        axes.set_yticks(range(len(rows)), rows)
        axes.set_title(title, fontsize=11)
        for row, column in np.ndindex(*values.shape):
            red, green, blue, _ = image.cmap(image.norm(shades[row, column]))
            is_dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            colour = "white" if is_dark else "#101010"
            text = f"{values[row, column]:.2f}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)

    return _svg(draw, width=2.6 + 0.62 * len(columns), height=1.9 + 0.4 * len(rows))


def stacked_bars(names: Sequence[str], groups: Sequence[str], shares: npt.ArrayLike) -> str:
    """Horizontal bars of shares that sum to 1; an empty name leaves a gap."""
    values = np.asarray(shares, dtype=np.float64)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        places = np.arange(len(names))[::-1]
        left = np.zeros(len(names))
        for index, group in enumerate(groups):
            colour = COLOURS[index % len(COLOURS)]
            axes.barh(places, values[:, index], left=left, color=colour, label=group, height=0.8)
            left += values[:, index]
        axes.set_yticks(places, names)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=4, frameon=False)
        _bare(axes)

    return _svg(draw, width=9.5, height=1.9 + 0.26 * len(names))


def scatters(panels: Mapping[str, npt.NDArray[np.float32]], labels: npt.NDArray[np.int64]) -> str:
    """Panels of points [U, 2] side by side, coloured by label 0 or 1; points are rasterised."""

    def draw(figure: Any) -> None:
        for index, (title, points) in enumerate(panels.items()):
            axes = figure.add_subplot(1, len(panels), index + 1)
            for label, colour in ((0, COLOURS[0]), (1, COLOURS[1])):
                chosen = points[labels == label]
                axes.scatter(
                    chosen[:, 0], chosen[:, 1], s=5, color=colour, alpha=0.65, linewidths=0,
                    rasterized=True, label=f"label {label}",
                )  # fmt: skip
            axes.set_title(title, fontsize=10)
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_alpha(0.3)
        figure.axes[0].legend(loc="best", frameon=False, markerscale=2, fontsize=8)

    return _svg(draw, width=2.5 * len(panels), height=2.7)


def curve(points: Sequence[Point], x_label: str, y_label: str, *, is_log: bool) -> str:
    """A line through points with a band of their intervals."""
    ordered = sorted(points, key=lambda point: point.x)
    places = [point.x for point in ordered]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        low, high = [point.low for point in ordered], [point.high for point in ordered]
        axes.fill_between(places, low, high, color=COLOURS[0], alpha=0.2, lw=0)
        axes.plot(places, [point.y for point in ordered], "o-", color=COLOURS[0])
        if is_log:
            axes.set_xscale("log", base=2)
            axes.minorticks_off()
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.25)
        _bare(axes)

    return _svg(draw, width=5.2, height=3.4)


def _bare(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _svg(draw: Callable[[Any], None], *, width: float, height: float) -> str:
    """Run `draw` on a new figure of these inches and return it as SVG without size or origin."""
    import matplotlib
    from matplotlib.figure import Figure

    ink = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    )
    style: Any = {**ink, "svg.fonttype": "none", "font.size": 9.5, "svg.hashsalt": "qanchor"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained", dpi=140)
        draw(figure)
        stream = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    opening = rf'<svg style="max-width: {width * 84:.0f}px" role="img" '
    text = re.sub(r"<svg ", opening, text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*pt"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", text, count=1)
    return text.replace(INK, "currentColor")
