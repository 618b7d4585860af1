"""Sections in the terminal show what the HTML report shows, figures excepted."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from inlay.report import Code, Section, Table, Text
from inlay.report.console import print_section, styled


@pytest.mark.parametrize(
    ("markup", "shown"),
    [
        ("**4,096 tokens** fit", "4,096 tokens fit"),
        ("set `memory.eta: 3`", "set memory.eta: 3"),
        ("[the paper](https://arxiv.org/abs/2604.06169)", "the paper (https://arxiv.org/abs/2604.06169)"),
        ("layers [7] and [bold] stay", "layers [7] and [bold] stay"),
    ],
)
def test_inline_markup_becomes_style_and_brackets_stay(markup: str, shown: str) -> None:
    console = Console(record=True, width=100, file=StringIO())
    console.print(styled(markup), highlight=False)
    assert console.export_text().strip() == shown


def test_a_section_shows_its_tables_texts_and_code() -> None:
    table = Table(["what", "figure"], [["a [b]", 1234.5], ["c", None]], "A **caption**", verdicts=["good", "bad"])
    section = Section("Title [x]", "Intro", [table, Text("- one\n- two", tone="warning"), Code("x = [1]")])
    console = Console(record=True, width=100, file=StringIO())
    print_section(console, section)
    text = console.export_text()
    for shown in ("Title [x]", "Intro", "A caption", "✓ a [b]", "✗ c", "1,234", "- one", "x = [1]"):
        assert shown in text
