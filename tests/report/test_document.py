"""A report is one safe, self-contained file that follows the reader's light or dark setting."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from inlay.report import (
    Code,
    Figure,
    Headline,
    Report,
    ReportError,
    Section,
    Series,
    Table,
    Text,
    line_plot,
    render_report,
    write_report,
)
from inlay.report.numbers import MINUS, MISSING

SQUARE = (
    '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'viewBox="0 0 10 10"><defs><clipPath id="c"><rect id="r" width="9" height="9"/></clipPath></defs>'
    '<g clip-path="url(#c)"><use xlink:href="#r"/></g></svg>'
)


class Page(HTMLParser):
    """Every element of a page with its attributes, and the table cells with their text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.cells: list[tuple[str, str]] = []
        self._cell: str | None = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag in {"td", "th"}:
            self._cell = dict(attrs).get("class") or ""
            self.cells.append((self._cell, ""))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        if tag in {"td", "th"}:
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            css, text = self.cells[-1]
            self.cells[-1] = (css, text + data.strip())

    def values(self, *names: str) -> list[str]:
        return [value for _, attrs in self.elements for name, value in attrs.items() if name in names]


def report(*items: object, **changes: object) -> Report:
    return Report(**{"title": "Recall", "sections": [Section("Results", items=items)], **changes})


@pytest.fixture(scope="module")
def full() -> Page:
    plot = line_plot([Series("memory", [1, 2, 3], [3.0, 2.0, 1.5])], xlabel="step", ylabel="loss, nats", title="Loss")
    return Page(
        render_report(
            report(
                plot.figure("A caption."),
                plot.figure("The same plot again."),
                Table(["run", "recall"], [["memory", 0.996]]),
                Text("See [the log](https://example.org/log) and **this**."),
                Code("inlay demo"),
                summary=[Headline("Recall", "99.6 %", "1.6 % without memory", "good")],
                provenance={"commit": "3f2a91c"},
            )
        )
    )


def test_nothing_on_the_page_is_fetched(full):
    assert not {"script", "link", "iframe", "object", "embed", "img"} & {tag for tag, _ in full.elements}
    assert not full.values("src", "srcset", "xlink:href")
    outside = [
        (tag, attrs["href"]) for tag, attrs in full.elements if "href" in attrs and not attrs["href"].startswith("#")
    ]
    assert outside == [("a", "https://example.org/log")]


def test_style_sheets_load_nothing():
    html = render_report(report())
    assert "@import" not in html
    assert "url(" not in html


def test_ids_are_unique_even_when_the_same_figure_stands_twice(full):
    ids = full.values("id")
    assert len(ids) > 20
    assert len(ids) == len(set(ids))


def test_every_reference_inside_a_figure_finds_its_target(full):
    ids = set(full.values("id"))
    targets = [value[1:] for value in full.values("href") if value.startswith("#")]
    targets += [
        name for _, attrs in full.elements for v in attrs.values() for name in re.findall(r"url\(#([^)]+)\)", v)
    ]
    assert targets
    assert set(targets) <= ids


def test_light_and_dark_wide_and_narrow_versions_are_all_there_and_switched_by_style():
    html = render_report(report(line_plot([Series("a", [0, 1], [1, 2])], xlabel="x", ylabel="y").figure()))
    for css in ("wide two-tone", "narrow two-tone", "light", "dark"):
        assert f'class="{css}"' in html
    assert html.count('role="img" aria-label="y against x. a runs from 1.00 to 2.00."') == 4
    assert "@media screen and (prefers-color-scheme: dark)" in html
    assert "#1d5fc2" in html
    assert "#7ab0ff" in html


def test_a_figure_without_a_dark_version_is_shown_in_both_modes():
    html = render_report(report(Figure(SQUARE, "", alt="a square")))
    assert '<div class="wide">' in html
    assert html.count('aria-label="a square"') == 1


def test_text_from_the_caller_is_escaped_everywhere():
    evil = "<script>alert('x')</script>"
    html = render_report(
        Report(
            evil,
            evil,
            [Headline(evil, evil, evil)],
            [
                Section(
                    evil,
                    evil,
                    [
                        Table([evil], [[evil]], evil),
                        Text(f'- {evil}\n\n**{evil}** `{evil}` [{evil}](https://e.org/"onclick=)'),
                        Code(evil, evil),
                        Figure(SQUARE, SQUARE, evil, evil, evil),
                        line_plot([Series(evil, [0, 1], [1, 2])], xlabel=evil, ylabel=evil, title=evil).figure(evil),
                    ],
                )
            ],
            {evil: evil},
        )
    )
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.elements}
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]


def test_links_with_other_schemes_stay_text():
    html = render_report(report(Text("[press](javascript:alert(1))")))
    assert "[press](javascript:alert(1))" in html


def test_markdown_light_gives_paragraphs_lists_bold_and_code():
    html = render_report(report(Text("One\nline.\n\nList:\n- **a**\n- `b**c**`\n  goes on")))
    assert "<p>One line.</p>" in html
    assert "<p>List:</p>" in html
    assert "<ul><li><strong>a</strong></li><li><code>b**c**</code> goes on</li></ul>" in html


@pytest.mark.parametrize(
    ("svg", "reason"),
    [
        ("<svg viewBox='0 0 1 1'>", "not well-formed"),
        ("<p/>", "expected an <svg>"),
        ("<svg/>", "viewBox"),
        ("<svg viewBox='0 0 1 1'><script/></svg>", "<script>"),
        ("<svg viewBox='0 0 1 1'><style>*{}</style></svg>", "<style>"),
        ("<svg viewBox='0 0 1 1' onload='x()'/>", "onload"),
        ("<svg viewBox='0 0 1 1'><image href='https://e.org/a.png'/></svg>", "outside the page"),
        ("<svg viewBox='0 0 1 1'><g fill='url(https://e.org/a#b)'/></svg>", "outside the page"),
    ],
)
def test_an_svg_that_would_reach_beyond_its_frame_is_refused(svg, reason):
    with pytest.raises(ReportError, match=r"Figure 'bad picture'.*" + re.escape(reason)):
        render_report(report(Figure(svg, "", alt="bad picture")))


def test_columns_of_numbers_line_up():
    rows = [
        ["window 256", 4.85, 32000, "99.6 %", None],
        ["memory", -3.5, 7, "1.6 %", 0.25],
        ["none", float("nan"), None, MISSING, np.float32(12.5)],
    ]
    page = Page(render_report(report(Table(["run", "loss", "tokens", "recall", "gain"], rows))))
    assert [css.split()[0] for css, _ in page.cells] == ["left", "right", "right", "right", "right"] * 4
    assert [text for _, text in page.cells[5:]] == [
        *("window 256", "4.85", "32,000", "99.6 %", MISSING),
        *("memory", f"{MINUS}3.50", "7", "1.6 %", "0.25"),
        *("none", MISSING, MISSING, MISSING, "12.50"),
    ]


def test_very_different_sizes_in_a_column_are_written_with_powers_of_ten():
    assert Table(["norm"], [[2.4e-9], [4.4e-3]]).display_rows == [[f"2.40e{MINUS}09"], [f"4.40e{MINUS}03"]]


def test_alignment_can_be_chosen():
    assert Table(["a", "b"], [[1, "x"]], align=["left", "right"]).alignments == ["left", "right"]


def test_rows_carry_their_verdict_as_a_mark_with_words():
    html = render_report(report(Table(["check"], [["a"], ["b"]], verdicts=["good", "bad"])))
    assert html.count('role="img" aria-label="good"') == 1
    assert html.count('role="img" aria-label="bad"') == 1


def test_a_table_without_rows_says_so():
    assert "No rows." in render_report(report(Table(["a", "b"], [])))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Table([], []), "no columns"),
        (lambda: Table(["a", "b"], [[1]]), "row 0 should be a list of 2 cells"),
        (lambda: Table(["a"], [[object()]]), r"holds a object: cells are strings, numbers or None"),
        (lambda: Table(["a"], [[1]], align=["center"]), "one of left, right"),
        (lambda: Table(["a"], [[1]], verdicts=["good", "bad"]), "2 entries for 1 rows"),
        (lambda: Headline("a", "1", verdict="great"), "one of good, warning, bad, neutral"),
        (lambda: Text("a", "shout"), "one of plain, note, warning"),
        (lambda: Figure("", ""), "no light_svg"),
        (lambda: Figure(SQUARE, SQUARE), "alt is empty"),
        (lambda: Report(" "), "title is empty"),
        (lambda: Section("Loss", items=["text"]), "'Loss' holds a str"),
        (
            lambda: Section("Loss", items=[line_plot([], xlabel="x", ylabel="y")]),
            r"holds a Plot.*call its figure\(\) method",
        ),
    ],
)
def test_mistakes_are_reported_where_they_are_made(make, message):
    with pytest.raises(ReportError, match=message):
        make()


def test_a_written_report_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_report(report(title="First"), path)
    assert write_report(report(title="Second"), path) == path
    assert "<title>Second</title>" in path.read_text("utf-8")
    assert os.listdir(path.parent) == ["report.html"]


def test_a_report_that_fails_to_render_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ReportError):
        write_report(report(Figure("<svg", "", alt="broken")), path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_disk_that_fills_up_while_writing_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def half(self: Path, data: bytes) -> int:
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space"):
        write_report(report(), path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        write_report(report(), tmp_path)
