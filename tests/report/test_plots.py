"""Plots show what was measured, say what could not be shown, and change nothing outside themselves."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest

import inlay.report
from inlay.report import (
    ReportError,
    Series,
    accuracy_by_distance,
    bars,
    heatmap,
    line_plot,
    loss_by_position,
    save_png,
    training_curves,
)
from inlay.report.canvas import DARK, LIGHT, Plot
from inlay.report.drawing import _spread
from inlay.report.numbers import MINUS, MISSING, alike, short
from inlay.report.series import clean as clean_series
from inlay.report.series import gain_over, running_mean

NAN = float("nan")


def texts(plot: Plot, **mode: bool) -> list[str]:
    root = ElementTree.fromstring(plot.svg(**mode))
    return ["".join(element.itertext()).strip() for element in root.iter() if element.tag.endswith("text")]


def curve(name, x, y, **options):
    return clean_series([Series(name, x, y, **options)])[0][0]


def contrast(a: str, b: str) -> float:
    """WCAG contrast ratio of two `#rrggbb` colours."""

    def luminance(color: str) -> float:
        channels = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_every_colour_that_carries_text_is_readable_on_its_page(theme):
    for color in (theme.ink, theme.muted, theme.baseline, *theme.series):
        assert contrast(color, theme.page) >= 4.5, color


def test_lines_are_named_at_their_ends_and_axes_have_units():
    plot = line_plot([Series("memory", [0, 1], [2, 1])], xlabel="step", ylabel="loss, nats", title="Loss")
    assert {"Loss", "memory", "step", "loss, nats"} <= set(texts(plot))


def test_names_too_long_for_the_margin_stand_below_the_axes():
    name = "an exceptionally long name for a line"
    plot = line_plot([Series(name, [0, 1], [2, 1])], xlabel="step", ylabel="loss")
    heights = {}
    for element in ElementTree.fromstring(plot.svg(narrow=True)).iter():
        if element.tag.endswith("text"):
            where = re.search(r"translate\([\d.]+ ([\d.]+)\)", element.get("transform", ""))
            heights["".join(element.itertext())] = float(where[1] if where else element.get("y"))
    assert heights[name] > heights["step"]


def test_dark_and_light_differ_in_colour_alone():
    plot = line_plot([Series("a", [0, 1, 2], [2, 1, 3])], xlabel="x", ylabel="y", title="T")
    light, dark = plot.svg(), plot.svg(dark=True)
    assert LIGHT.series[0] in light
    assert DARK.series[0] in dark
    colors, numbers = re.compile("#[0-9a-f]{6}"), re.compile(r'(?<=[#"( ])[a-z][0-9a-f]{10}\b')
    assert numbers.sub("id", colors.sub("color", light)) == numbers.sub("id", colors.sub("color", dark))


@pytest.mark.parametrize(
    "plot",
    [
        line_plot(
            [Series("a # b", [0, 1, 2], [2, 1, 3], band=([1, 0, 2], [3, 2, 4])), Series("c", [0], [1])],
            xlabel="x",
            ylabel="y",
        ),
        loss_by_position({"memory": ([1, 2, 3], [3, 2, 1]), "no memory": ([1, 2, 3], [3, 3, 3])}, title="T"),
        training_curves({"a": ([1, 2, 3], [3, 2, 1]), "b": ([1], [2])}, title="T", baseline="b"),
        bars({"": {"scan": 1.0, "Linear": NAN}}, unit="s", title="T", reference=0.5),
        heatmap([[1, -0.25], [0.125, NAN]], unit="cosine"),
    ],
)
def test_a_figures_dark_half_is_what_the_dark_theme_paints(plot):
    figure, numbers = plot.figure(), re.compile(r'(?<=[#"( ])[a-z][0-9a-f]{10}\b')
    for shown, narrow in ((figure.dark_svg, False), (figure.narrow_dark_svg, True)):
        painted = plot.svg(dark=True, narrow=narrow)
        assert numbers.sub("id", shown) == numbers.sub("id", painted)
        assert not set(re.findall("#[0-9a-f]{6}", shown)) & {LIGHT.ink, LIGHT.muted, *LIGHT.series}


def test_the_same_data_gives_the_same_svg():
    make = lambda: line_plot([Series("a", [0, 1], [1, 2])], xlabel="x", ylabel="y").svg()  # noqa: E731
    assert make() == make()


def test_text_in_a_plot_is_not_read_as_mathematics_and_needs_no_installed_font():
    plot = line_plot([Series("기억 $x_1$", [0, 1], [1, 2])], xlabel="$", ylabel="loss_per_$token$")
    assert {"기억 $x_1$", "loss_per_$token$"} <= set(texts(plot))


def test_a_gap_in_the_data_is_a_gap_in_the_line_and_in_the_note():
    plot = line_plot([Series("a", [0, 1, 2, 3], [1, NAN, np.inf, 2])], xlabel="x", ylabel="y")
    assert plot.note == "“a”: 2 of 4 values are not finite and leave gaps."
    assert plot.figure().note == plot.note


def test_a_series_with_no_values_is_named_and_the_others_are_drawn():
    plot = line_plot([Series("lost", [0, 1], [NAN, NAN]), Series("kept", [0, 1], [1, 2])], xlabel="x", ylabel="y")
    assert plot.note == "“lost” has no finite values."
    assert "kept" in texts(plot)
    assert "lost" not in texts(plot)


@pytest.mark.parametrize(
    "plot",
    [
        line_plot([], xlabel="x", ylabel="y", title="T"),
        line_plot([Series("a", [], [])], xlabel="x", ylabel="y", title="T"),
        line_plot([Series("a", [1.0], [-1.0])], xlabel="x", ylabel="y", title="T", log_y=True),
        loss_by_position({}, title="T"),
        loss_by_position({"no memory": ([1, 2], [NAN, NAN])}, title="T"),
        training_curves({"a": ([], [])}, title="T"),
        accuracy_by_distance({"a": ([0, 10], [NAN], [NAN], [NAN])}, title="T"),
        bars({"": {"scan": NAN}}, unit="s", title="T"),
        bars({}, unit="s", title="T"),
    ],
)
def test_a_plot_with_nothing_to_draw_says_so_instead_of_showing_an_empty_chart(plot, tmp_path):
    figure = plot.figure()
    assert figure.light_svg == ""
    assert figure.note.startswith("T. Nothing to draw.")
    assert any(text.startswith("Nothing to draw.") for text in texts(plot))
    assert save_png(plot, tmp_path / "empty.png").stat().st_size > 0


@pytest.mark.parametrize("n", [1, 2])
def test_very_short_series_are_visible_as_points(n):
    svg = line_plot([Series("a", range(n), range(n))], xlabel="x", ylabel="y").svg()
    assert svg.count("<use ") >= n


def test_lengths_that_do_not_match_are_an_error_that_names_the_series():
    with pytest.raises(ReportError, match=r"series 'a': x, y and band should have the same length, got 2, 3"):
        line_plot([Series("a", [1, 2], [1, 2, 3])], xlabel="x", ylabel="y")
    with pytest.raises(ReportError, match="series 'a': expected numbers"):
        line_plot([Series("a", ["one"], [1])], xlabel="x", ylabel="y")
    with pytest.raises(ReportError, match=r"series 'a': expected one row of numbers, got shape \(1, 2\)"):
        line_plot([Series("a", [[1, 2]], [1])], xlabel="x", ylabel="y")


def test_the_gain_is_the_baseline_minus_the_curve_at_the_same_position():
    base = curve("no memory", [0, 2, 4], [5.0, 4.0, 3.0])
    same = gain_over(curve("memory", [0, 2, 4], [4.5, 3.25, 2.5]), base)
    np.testing.assert_allclose(same.y, [0.5, 0.75, 0.5])
    between = gain_over(curve("memory", [1, 3, 9], [4.0, 3.0, 1.0]), base)
    np.testing.assert_allclose(between.y, [0.5, 0.5, NAN])
    assert between.label == "+0.50"


def test_loss_by_position_shows_the_mean_gain_and_refuses_an_unknown_baseline():
    curves = {"memory": ([0, 1], [3.0, 2.0]), "no memory": ([0, 1], [3.5, 2.25])}
    plot = loss_by_position(curves)
    assert "mean +0.38" in texts(plot)
    assert "memory gains +0.38 bits per token on average" in plot.alt
    with pytest.raises(ReportError, match="no curve is called 'base'"):
        loss_by_position(curves, baseline="base")
    assert "gain" not in " ".join(texts(loss_by_position(curves, baseline=None)))


def test_a_running_mean_is_centred_keeps_gaps_and_does_not_droop_at_the_ends():
    np.testing.assert_allclose(running_mean(np.array([1.0, 2, NAN, 4, 6]), 3), [1.5, 1.5, NAN, 5, 5])
    np.testing.assert_allclose(running_mean(np.full(9, 2.5), 5), 2.5)


def test_a_long_history_is_smoothed_and_says_over_how_many_values():
    steps = np.arange(400)
    assert "loss, nats per token (bold: mean of 21 values)" in texts(training_curves({"a": (steps, steps + 1.0)}))
    assert "loss, nats per token" in texts(training_curves({"a": (steps, steps + 1.0)}, window=1))


def test_the_run_to_compare_with_is_grey_in_training_curves_too():
    steps = np.arange(40)
    histories = {"without": (steps, steps + 1.0), "with": (steps, steps + 2.0)}
    colors = {baseline: training_curves(histories, baseline=baseline).svg() for baseline in (None, "without")}
    assert LIGHT.baseline not in colors[None]
    assert LIGHT.series[1] in colors[None]
    assert LIGHT.baseline in colors["without"]
    assert LIGHT.series[1] not in colors["without"]


def test_the_interval_of_an_accuracy_is_shaded_and_a_bin_without_one_keeps_its_point():
    plot = accuracy_by_distance({"memory": ([0, 10, 20, 30], [1.0, 0.5, 0.75], [0.8, 0.25, NAN], [1.0, 0.75, NAN])})
    with plot._painted(False, False, "DejaVu Sans") as figure:
        (band,) = figure.axes[0].collections
    shaded = band.get_paths()[0].vertices
    assert {tuple(point) for point in shaded} == {(5.0, 80.0), (5.0, 100.0), (15.0, 25.0), (15.0, 75.0)}
    assert "memory runs from 100 to 75.0" in plot.alt


def test_bins_without_questions_are_left_out_and_counted():
    plot = accuracy_by_distance({"memory": ([0, 10, 20, 30], [1.0, NAN, 0.5], [0.7, NAN, 0.2], [1.0, NAN, 0.8])})
    assert plot.note == "1 bin without questions left out."
    assert "memory runs from 100 to 50.0" in plot.alt


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (([0, 1], [0.5, 0.5], [0, 0], [1, 1]), "N bins need N"),
        (([0, 1, 2], [0.5, 0.5], [0, 0], [1]), "N bins need N"),
        (([0, 1, 1], [0.5, 0.5], [0, 0], [1, 1]), "should increase"),
        (([0, 1, 2], [50.0, 99.0], [0, 0], [1, 1]), "not percent"),
    ],
)
def test_accuracies_that_cannot_be_right_are_refused(arrays, message):
    with pytest.raises(ReportError, match=message):
        accuracy_by_distance({"memory": arrays})


@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
def test_bars_carry_their_values_and_name_what_was_not_measured(narrow):
    groups = {"time": {"scan": 1.94, "authors": 5.0623}, "memory": {"scan": 1.26, "authors": NAN}}
    plot = bars(groups, unit="times a plain Linear", highlight="scan", reference=1)
    assert {"time", "memory", "scan", "1.94", "5.06", "1.26", "not measured"} <= set(texts(plot, narrow=narrow))
    assert plot.note == "Not measured: memory: authors."


def test_a_bar_below_zero_is_refused():
    with pytest.raises(ReportError, match="start at zero"):
        bars({"": {"a": -1.0}}, unit="s")


def test_labels_that_would_overlap_are_pushed_apart_in_order():
    placed = _spread([10.0, 11.0, 10.5, 40.0], 12.0)
    assert np.diff(np.sort(placed)).min() >= 12.0 - 1e-2
    assert np.argsort(placed).tolist() == [0, 2, 1, 3]
    assert _spread([], 12.0) == []


def test_numbers_are_written_for_people():
    assert [short(v) for v in (0, 2.613, 32000, 2e-5, NAN)] == ["0", "2.61", "32,000", f"2.00e{MINUS}05", MISSING]
    assert alike([0.5, 0.98, NAN]) == ["0.50", "0.98", MISSING]
    assert alike([0.012, 540.0]) == ["0.0120", "540"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_png_is_written_at_twice_the_resolution_on_the_pages_colour(dark, tmp_path):
    path = save_png(
        line_plot([Series("a", [0, 1], [1, 2])], xlabel="x", ylabel="y"), tmp_path / "new" / "a.png", dark=dark
    )
    from matplotlib.image import imread

    pixels = imread(path)
    assert pixels.shape[1] == pytest.approx((6.9 + 0.4) * 192, abs=2)
    page = (DARK if dark else LIGHT).page
    np.testing.assert_allclose(pixels[0, 0, :3] * 255, [int(page[i : i + 2], 16) for i in (1, 3, 5)], atol=1)


def test_a_png_needs_the_name_of_one(tmp_path):
    with pytest.raises(ReportError, match=r"ends in \.png"):
        save_png(line_plot([], xlabel="x", ylabel="y"), tmp_path / "a.jpg")


def test_drawing_leaves_matplotlibs_settings_as_they_were():
    before = dict(mpl.rcParams)
    line_plot([Series("a", [0, 1], [1, 2])], xlabel="x", ylabel="y").svg(dark=True)
    assert dict(mpl.rcParams) == before


def test_no_file_of_the_room_uses_pyplot_and_its_global_state():
    for file in Path(inlay.report.__file__).parent.glob("*.py"):
        assert not re.search(r"import.*pyplot", file.read_text("utf-8")), file.name
