"""The same sections in the terminal: tables as rich tables, text as text, plots left to the HTML report."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text as RichText

from inlay.report.document import Code, Section, Table, Text

_MARKS = {"good": "[green]✓[/] ", "bad": "[red]✗[/] ", "neutral": "  "}


def print_section(console: Console, section: Section) -> None:
    """Print ``section`` to ``console``; markup of the texts is left as it is written, figures are not drawn."""
    console.print(f"\n[bold]{escape(section.title)}[/]")
    if section.text:
        console.print(RichText(section.text))
    for item in section.items:
        if isinstance(item, Table):
            console.print(rich_table(item))
        elif isinstance(item, Text):
            console.print(RichText(item.body, style="yellow" if item.tone == "warning" else ""))
        elif isinstance(item, Code):
            console.print(escape(item.body), highlight=False)


def rich_table(table: Table) -> RichTable:
    """A report's table for the terminal, with the same cells."""
    shown = RichTable(title=table.caption or None, title_justify="left", title_style="")
    for heading, align in zip(table.columns, table.alignments, strict=True):
        shown.add_column(escape(heading), justify=align)
    verdicts: Sequence[str | None] = table.verdicts or [None] * len(table.rows)
    for cells, verdict in zip(table.display_rows, verdicts, strict=True):
        first, *rest = map(escape, cells)
        shown.add_row(_MARKS.get(verdict or "", "") + first, *rest)
    return shown
