"""The parts a report is made of, and the one function that turns them into a file.

Every part is a frozen dataclass that is checked when made, so that a mistake is reported where it was made and not in
the middle of a template. `write_report` renders to a single HTML file that needs nothing else: no network, no script,
no font file. It follows the reader's light or dark setting and the width of the screen, and prints light on white.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import count
from numbers import Real
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias, get_args

import jinja2
from markupsafe import Markup

from inlay.files import write_whole
from inlay.report.markup import blocks, inline, whole_words
from inlay.report.numbers import Cell, alignments, display_rows
from inlay.report.svg import inline_svg

Verdict: TypeAlias = Literal["good", "warning", "bad", "neutral"]
Align: TypeAlias = Literal["left", "right"]
Tone: TypeAlias = Literal["plain", "note", "warning"]


class ReportError(ValueError):
    """A report that cannot be rendered or written; the message names the part and the fix."""


@dataclass(frozen=True)
class Headline:
    """One of the cards at the top: a big number with what it means.

    Attributes:
        label: What was measured, in a few words.
        value: The number as it should be read, with its unit ("99.6 %").
        note: One line of context ("1.6 % without memory").
        verdict: Marks the card as good or bad news; neutral cards carry no mark.
    """

    label: str
    value: str
    note: str = ""
    verdict: Verdict = "neutral"

    def __post_init__(self) -> None:
        _one_of(self.verdict, Verdict, "Headline.verdict")


@dataclass(frozen=True)
class Table:
    """A table whose numbers line up.

    Attributes:
        columns: Headings, one per column.
        rows: Cells. Numbers are formatted per column (same decimals, thousands separators), None and NaN show as a
            dash, strings as they are.
        caption: Sentence above the table; inline markup as in `Text`.
        align: "left" or "right" per column. By default columns of numbers go right, also of numbers written as strings
            ("1.9 GiB").
        verdicts: One per row, shown as a mark before the first cell.

    Raises:
        ReportError: A row or `align` or `verdicts` has the wrong length, or an unknown value.
    """

    kind: ClassVar[str] = "table"

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    align: Sequence[Align] | None = None
    verdicts: Sequence[Verdict] | None = None

    def __post_init__(self) -> None:
        if not self.columns:
            raise ReportError("Table has no columns: give at least one heading")
        for index, row in enumerate(self.rows):
            if isinstance(row, str) or len(row) != len(self.columns):
                raise ReportError(
                    f"Table row {index} should be a list of {len(self.columns)} cells, one for each of "
                    f"{list(self.columns)}, got {row!r}"
                )
            for cell in row:
                if cell is not None and not isinstance(cell, str | Real):
                    raise ReportError(
                        f"Table row {index} holds a {type(cell).__name__}: cells are strings, numbers or None; "
                        "use float() or str()"
                    )
        if self.align is not None:
            if len(self.align) != len(self.columns):
                raise ReportError(f"Table.align has {len(self.align)} entries for {len(self.columns)} columns")
            for align in self.align:
                _one_of(align, Align, "Table.align")
        if self.verdicts is not None:
            if len(self.verdicts) != len(self.rows):
                raise ReportError(f"Table.verdicts has {len(self.verdicts)} entries for {len(self.rows)} rows")
            for verdict in self.verdicts:
                _one_of(verdict, Verdict, "Table.verdicts")

    @property
    def alignments(self) -> list[Align]:
        """ "left" or "right" for each column."""
        return list(self.align) if self.align is not None else alignments(self.rows, len(self.columns))

    @property
    def display_rows(self) -> list[list[str]]:
        """Cells as they are shown."""
        return display_rows(self.rows, len(self.columns))


@dataclass(frozen=True)
class Figure:
    """A picture in a light and a dark version, usually made by `Plot.figure()`.

    Attributes:
        light_svg: SVG text with a `viewBox`. Ids are made unique when the report is rendered.
        dark_svg: The same for dark pages; empty to use `light_svg` for both.
        caption: Sentence below; inline markup as in `Text`.
        alt: The picture in words. Required.
        note: What is missing from the picture and why. With both SVGs empty, the note stands in the picture's place.
        narrow_light_svg: Version for phones; empty to shrink `light_svg`.
        narrow_dark_svg: Version for phones on dark pages.
    """

    kind: ClassVar[str] = "figure"

    light_svg: str
    dark_svg: str
    caption: str = ""
    alt: str = ""
    note: str = ""
    narrow_light_svg: str = ""
    narrow_dark_svg: str = ""

    def __post_init__(self) -> None:
        if not self.light_svg and not self.note:
            raise ReportError("Figure has no light_svg: pass the SVG text, or a note that says why there is none")
        if self.light_svg and not self.alt:
            raise ReportError("Figure.alt is empty: say in a sentence what the picture shows")


@dataclass(frozen=True)
class Text:
    """Paragraphs, with `**bold**`, `` `code` ``, `[text](https://…)`, and lists of lines that start with "- ".

    Everything else is shown as it is; HTML is escaped. `tone` sets it apart as a note or a warning.
    """

    kind: ClassVar[str] = "text"

    body: str
    tone: Tone = "plain"

    def __post_init__(self) -> None:
        _one_of(self.tone, Tone, "Text.tone")


@dataclass(frozen=True)
class Code:
    """A block in a fixed-width font, such as a command or a sample; shown as it is."""

    kind: ClassVar[str] = "code"

    body: str
    caption: str = ""


Item: TypeAlias = Table | Figure | Text | Code


@dataclass(frozen=True)
class Section:
    """A heading, an introduction (markup as in `Text`) and items in the order they are shown."""

    title: str
    text: str = ""
    items: Sequence[Item] = ()

    def __post_init__(self) -> None:
        for item in self.items:
            if not isinstance(item, Table | Figure | Text | Code):
                hint = ": call its figure() method" if hasattr(item, "figure") else ""
                raise ReportError(
                    f"Section {self.title!r} holds a {type(item).__name__}, not a Table, Figure, Text or Code{hint}"
                )


@dataclass(frozen=True)
class Report:
    """A whole report.

    Attributes:
        title: Heading of the page and name of the browser's tab.
        subtitle: One sentence under it; inline markup as in `Text`.
        summary: The cards on top, best three or four.
        sections: The body.
        provenance: Where the numbers come from (command, commit, device, date, seed), shown in the footer.
    """

    title: str
    subtitle: str = ""
    summary: Sequence[Headline] = ()
    sections: Sequence[Section] = ()
    provenance: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.title.strip():
            raise ReportError("Report.title is empty: it names the page and the browser's tab")


def render_report(report: Report) -> str:
    """The report as one HTML document.

    Raises:
        ReportError: An SVG is malformed or brings scripts, style sheets or outside references; the message names the
            figure.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(inline=inline, blocks=blocks, whole_words=whole_words)
    serial = count(1)

    def picture(svg: str, alt: str) -> Markup:
        try:
            return inline_svg(svg, prefix=f"f{next(serial)}-", label=alt)
        except ValueError as error:
            raise ReportError(f"Figure {alt!r}: {error}") from error

    template = environment.from_string(resources.files("inlay.report").joinpath("report.html.j2").read_text("utf-8"))
    return template.render(report=report, picture=picture)


def write_report(report: Report, path: str | Path) -> Path:
    """Render `report` and write it to `path`, whole or not at all.

    A file that is already there stays as it was until the new one is complete.

    Args:
        report: What to render.
        path: Target file; its folder is made if missing.

    Returns:
        The path written.

    Raises:
        ReportError: The report cannot be rendered.
        OSError: `path` cannot be written, or is a folder.
    """
    return write_whole(path, render_report(report))


def _one_of(value: str, allowed: object, name: str) -> None:
    if value not in get_args(allowed):
        raise ReportError(f"{name} should be one of {', '.join(get_args(allowed))}, got {value!r}")
