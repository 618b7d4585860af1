"""A map of colours says in words what it shows and what it could not show."""

from __future__ import annotations

import math
import re

import pytest

from inlay.report import Report, ReportError, Section, heatmap, render_report

NAN = float("nan")


def test_small_maps_have_their_values_written_out_and_rows_and_columns_numbered() -> None:
    svg = heatmap([[1, -0.25, 0.5], [0.125, 1, -1]], unit="cosine", title="Likeness").svg()
    texts = re.findall(r">([^<>\n]+)</text>", svg)
    assert {"Likeness", "cosine", "1.00", "−0.25", "0.50", "0.12", "−1.00"} <= set(texts)
    assert texts.count("1") == 3  # first row, first column, and the end of the scale


def test_large_maps_are_numbered_at_the_first_and_at_round_numbers() -> None:
    texts = re.findall(r">([^<>\n]+)</text>", heatmap([[0.5] * 23] * 23, unit="cosine").svg())
    assert [text for text in texts if text.isdigit() and text not in "01"] == ["5", "10", "15", "20"] * 2


def test_values_that_are_not_finite_are_left_blank_and_counted() -> None:
    plot = heatmap([[1, NAN], [math.inf, 0.5]], unit="cosine", title="Likeness")
    assert plot.note == "2 of 4 values are not finite and left blank."
    assert plot.alt == "Likeness: cosine; 2 by 2 values from 0.500 to 1.00, mean 0.750."
    nothing = heatmap([[NAN]], unit="cosine")
    assert nothing.empty
    assert "Nothing to draw" in nothing.figure().note
    assert heatmap([], unit="cosine").empty


def test_dark_and_light_differ_in_colour_and_both_stand_in_a_report() -> None:
    plot = heatmap([[1, 0], [0, 1]], unit="cosine")
    assert plot.svg() != plot.svg(dark=True)
    assert render_report(Report("Map", sections=[Section("Map", items=[plot.figure()])])).count("<svg") == 4


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(ReportError, match=r"same length, got \[1, 2\]"):
        heatmap([[1], [1, 2]], unit="cosine")
    with pytest.raises(ReportError, match="limit should be above 0"):
        heatmap([[1]], unit="cosine", limit=0)
