"""A report as titled sections of text, tables and figures, written as one self-contained HTML file.

Knows nothing of what is reported. The page loads nothing: styles, script and plots stand in it.
"""

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

PAGE = "page.html.j2"


@dataclass(frozen=True, slots=True)
class Cell:
    """One table cell; `order` is what sorting compares (the text itself where it is None)."""

    text: str
    order: float | None = None
    is_best: bool = False
    """Set in bold."""
    note: str = ""
    """A second, smaller line."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose columns sort at a click on their heads."""

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    last_row_is_total: bool = False
    """The last row stays last, and is set in bold."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure as SVG text that holds all it needs."""

    svg: str
    caption: str = ""
    is_wide: bool = True
    """False: two stand side by side where there is room."""

    @property
    def markup(self) -> Markup:
        """The SVG as it goes into the page: made here, so not escaped."""
        return Markup(self.svg)


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure worth seeing first."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """A titled part of the page; its parts come in this order."""

    title: str
    text: str = ""
    tiles: tuple[Tile, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    details: str = ""
    """Heading of a fold that hides the plots until asked for; empty shows them."""

    @property
    def anchor(self) -> str:
        """The section's id within the page."""
        return "".join(char if char.isalnum() else "-" for char in self.title.lower())


@dataclass(frozen=True, slots=True)
class Document:
    """A whole report."""

    title: str
    subtitle: str
    facts: tuple[tuple[str, str], ...]
    """What it rests on: name and value."""
    sections: tuple[Section, ...]


def write_html(document: Document, path: Path) -> None:
    """Write the page."""
    environment = Environment(
        loader=PackageLoader("qanchor.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(environment.get_template(PAGE).render(document=document), encoding="utf-8")
