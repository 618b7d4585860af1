"""The same sections in the terminal: tables as rich tables, plots left to the HTML report."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table as RichTable

from inlay.report.document import Code, Section, Table, Text

_MARKS = {"good": "[green]✓[/] ", "warning": "[yellow]![/] ", "bad": "[red]✗[/] ", "neutral": "  "}


def print_section(console: Console, section: Section) -> None:
    """Print ``section`` to ``console``, without its figures."""
    console.print(f"\n[bold]{escape(section.title)}[/]")
    if section.text:
        console.print(styled(section.text), highlight=False)
    for item in section.items:
        if isinstance(item, Table):
            console.print(rich_table(item))
        elif isinstance(item, Text):
            console.print(styled(item.body), style="yellow" if item.tone == "warning" else "", highlight=False)
        elif isinstance(item, Code):
            console.print(escape(item.body), highlight=False)


def styled(text: str) -> str:
    """The inline markup of a report's texts (``**bold**``, `` `code` ``, links) as rich's."""
    text = re.sub(r"\[([^\[\]]+)\]\((https?://[^)]+)\)", r"\1 (\2)", text)
    text = re.sub(r"\*\*(.+?)\*\*", r"[bold]\1[/]", escape(text))
    return re.sub(r"`([^`]+)`", r"[cyan]\1[/]", text)


def rich_table(table: Table) -> RichTable:
    """A report's table for the terminal, with the same cells."""
    shown = RichTable(title=styled(table.caption) or None, title_justify="left", title_style="")
    for heading, align in zip(table.columns, table.alignments, strict=True):
        shown.add_column(escape(heading), justify=align)
    verdicts: Sequence[str | None] = table.verdicts or [None] * len(table.rows)
    for cells, verdict in zip(table.display_rows, verdicts, strict=True):
        first, *rest = map(escape, cells)
        shown.add_row(_MARKS.get(verdict or "", "") + first, *rest)
    return shown


@contextmanager
def progress_bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that is gone when all is done. Gives what is called with how much is done, and of how much."""
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
