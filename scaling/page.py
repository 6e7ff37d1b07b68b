"""A page: sections of paragraphs, plots, tables and notes, written as one HTML file that needs no network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import jinja2

from ..base.files import write_atomically
from .figures import Plot

TEMPLATES = Path(__file__).parent / "templates"
LONG = 16  # rows from which a plot's data are folded away at first


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Heading:
    """Of a part of a section."""

    text: str
    kind: ClassVar[str] = "heading"


@dataclass(frozen=True)
class Points:
    """Sentences, one below the other; with ``warning`` set off from the rest."""

    texts: Sequence[str]
    warning: bool = False
    kind: ClassVar[str] = "points"


@dataclass(frozen=True)
class Terms:
    """Names and what they mean; with ``summary`` folded away under it."""

    terms: Mapping[str, str]
    summary: str = ""
    kind: ClassVar[str] = "terms"


@dataclass(frozen=True)
class Table:
    """Rows of text. Columns of numbers alone are aligned to the right; with ``summary`` folded away under it."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    summary: str = ""
    kind: ClassVar[str] = "table"

    @property
    def numeric(self) -> set[int]:
        """Columns in which every cell that says something starts like a number."""
        cells = [[row[i] for row in self.rows if row[i].strip("\N{EN DASH} ")] for i in range(len(self.columns))]
        return {i for i, column in enumerate(cells) if column and all(cell[0] in "+-.0123456789" for cell in column)}


@dataclass(frozen=True)
class Picture:
    """A plot with its data below; its title is a heading where a section has several."""

    plot: Plot
    kind: ClassVar[str] = "picture"

    @property
    def data(self) -> Table:
        rows = self.plot.rows
        return Table(self.plot.columns, rows, f"Data ({len(rows)} rows)" if len(rows) != 1 else "Data (1 row)")

    @property
    def folded(self) -> bool:
        return len(self.plot.rows) > LONG


Block = Text | Heading | Points | Terms | Table | Picture


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it; without blocks it is left out of the page."""

    key: str
    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write the sections that have something in them, with a table of contents.

    Raises:
        OSError: ``path`` cannot be written; nothing is left behind.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    template = environment.get_template("report.html.j2")
    write_atomically(path, template.render(title=title, sections=[section for section in sections if section.blocks]))
