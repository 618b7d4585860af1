"""The plots of Inlay's reports.

Every function checks its data and returns a `Plot`, which draws itself light or dark, wide or narrow. Values that
cannot be drawn (NaN, infinities, and zero or less on a log axis) leave a gap and are counted in the plot's note, and
a plot left with nothing says so in words: a measurement that failed should be visible, not a blank rectangle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from inlay.report.barchart import draw_bars
from inlay.report.canvas import Canvas, Plot
from inlay.report.document import ReportError
from inlay.report.drawing import draw_curves, draw_with_gap
from inlay.report.numbers import short
from inlay.report.series import Curve, Series, clean, gain_over, numbers, running_mean

Pair: TypeAlias = tuple[ArrayLike, ArrayLike]
Row: TypeAlias = NDArray[np.float64]


def line_plot(
    series: Sequence[Series],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    marks: Mapping[float, str] | None = None,
) -> Plot:
    """Lines with their names at their ends.

    Args:
        series: What to draw, at best five or fewer.
        xlabel: Quantity and unit of the horizontal axis ("position, tokens").
        ylabel: Quantity and unit of the vertical axis.
        title: Heading inside the picture.
        log_x: Logarithmic horizontal axis.
        log_y: Logarithmic vertical axis.
        marks: Vertical reference lines, x to label, such as `{256: "attention window"}`.

    Raises:
        ReportError: `x`, `y` or the band of a series differ in length or are not numbers.
    """
    cleaned, notes = clean(series, log_x=log_x, log_y=log_y)

    def paint(canvas: Canvas) -> None:
        draw_curves(canvas, cleaned, xlabel, ylabel, log_x=log_x, log_y=log_y, marks=marks)

    return _plot(title, paint, cleaned, notes, f"{ylabel} against {xlabel}")


def loss_by_position(
    curves: Mapping[str, Pair],
    *,
    baseline: str | None = "no memory",
    title: str = "Loss by position",
    marks: Mapping[float, str] | None = None,
) -> Plot:
    """Loss in bits per token against position in the document, above the gain over the baseline.

    The gain is the baseline's loss minus the curve's at the same position (interpolated where they differ), so above
    zero the memory helps. Its mean over positions stands beside it.

    Args:
        curves: Name to (positions in tokens `[N]`, loss in bits per token `[N]`).
        baseline: The curve the others are compared with, drawn in grey; None to leave the gain out.
        title: Heading inside the picture.
        marks: Vertical reference lines, position to label.

    Raises:
        ReportError: Positions and losses differ in length, or `baseline` is not one of the curves.
    """
    if baseline is not None and curves and baseline not in curves:
        raise ReportError(
            f"loss_by_position: no curve is called {baseline!r}; pass baseline=None or one of {list(curves)}"
        )
    cleaned, notes = clean([Series(name, x, y, muted=name == baseline) for name, (x, y) in curves.items()])
    base = next((curve for curve in cleaned if curve.muted), None)
    others = [curve for curve in cleaned if not curve.muted]
    xlabel, ylabel = "position, tokens", "loss, bits per token"
    if base is None or not others:
        return _plot(
            title,
            lambda canvas: draw_curves(canvas, cleaned, xlabel, ylabel, marks=marks),
            cleaned,
            notes,
            f"{ylabel} against {xlabel}",
        )
    gains = [gain_over(curve, base) for curve in others]

    def paint(canvas: Canvas) -> None:
        draw_with_gap(canvas, cleaned, gains, xlabel, ylabel, f"gain over {base.name}, bits per token", marks=marks)

    means = ", ".join(f"{gain.name} gains {gain.label} bits per token on average" for gain in gains)
    plot = _plot(title, paint, cleaned, notes, f"{ylabel} against {xlabel}; compared with {base.name}, {means}")
    return Plot(plot.title, plot.paint, plot.alt, (4.9, 4.6), plot.note, plot.empty)


def training_curves(
    histories: Mapping[str, Pair],
    *,
    baseline: str | None = None,
    title: str = "Training loss",
    ylabel: str = "loss, nats per token",
    window: int | None = None,
) -> Plot:
    """Loss against training steps: every value faintly, and a running mean over it.

    Args:
        histories: Name to (steps `[N]`, loss `[N]`).
        baseline: Name of the run to compare with, drawn in grey.
        title: Heading inside the picture.
        ylabel: Quantity and unit of the loss.
        window: Values in the centred running mean; made odd; by default a twentieth of the longest history. 1 turns
            it off.

    Raises:
        ReportError: Steps and losses differ in length, or `window` is below 1.
    """
    if window is not None and window < 1:
        raise ReportError(f"training_curves: window should be at least 1, got {window}")
    raw, notes = clean([Series(name, x, y, muted=name == baseline) for name, (x, y) in histories.items()])
    span = window if window is not None else max((len(curve.x) for curve in raw), default=0) // 20
    span = span // 2 * 2 + 1
    smooth = [replace(c, y=running_mean(c.y, span), ghost=c.y) for c in raw] if span > 1 else raw
    label = f"{ylabel} (bold: mean of {span} values)" if span > 1 else ylabel

    def paint(canvas: Canvas) -> None:
        draw_curves(canvas, smooth, "step", label)

    return _plot(title, paint, smooth, notes, f"{label} against training step")


def accuracy_by_distance(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]],
    *,
    baseline: str | None = None,
    title: str = "Recall by distance",
    xlabel: str = "distance to the fact, tokens",
    marks: Mapping[float, str] | None = None,
) -> Plot:
    """Share of right answers against distance, with its 95 % interval.

    Points stand at the middle of their bin. The axis is logarithmic where the edges grow more than thirtyfold.

    Args:
        curves: Name to (edges of the distance bins `[N+1]`; accuracy from 0 to 1 `[N]`, NaN in a bin without questions;
            lower and upper end of its interval, `[N]` each, NaN where there is none).
        baseline: The curve to draw in grey, if any.
        title: Heading inside the picture.
        xlabel: Quantity and unit of the distance.
        marks: Vertical reference lines, distance to label.

    Raises:
        ReportError: Lengths do not fit, edges do not increase, or an accuracy lies outside 0 to 1 (percent passed for
            shares).
    """
    bins = {name: _bins(name, *arrays) for name, arrays in curves.items()}
    first = min((edges[0] for edges, *_ in bins.values()), default=0.0)
    last = max((edges[-1] for edges, *_ in bins.values()), default=0.0)
    log_x = bool(first > 0 and last / first > 30)
    series, empty_bins = [], 0
    for name, (edges, accuracy, low, high) in bins.items():
        used = ~np.isnan(accuracy)
        empty_bins += int((~used).sum())
        middle = np.sqrt(edges[1:] * edges[:-1]) if log_x else (edges[1:] + edges[:-1]) / 2
        band = (100 * low[used], 100 * high[used])
        series.append(Series(name, middle[used], 100 * accuracy[used], band, name == baseline))
    cleaned, notes = clean(series, log_x=log_x)
    if empty_bins:
        notes.append(f"{empty_bins} {'bin' if empty_bins == 1 else 'bins'} without questions left out.")
    ylabel = "right answers, % (shaded: 95 % interval)"

    def paint(canvas: Canvas) -> None:
        draw_curves(
            canvas,
            cleaned,
            xlabel,
            ylabel,
            log_x=log_x,
            marks=marks,
            y_limits=(-3, 103),
            markers=True,
            y_ticks=(0, 25, 50, 75, 100),
        )

    return _plot(title, paint, cleaned, notes, f"right answers in percent against {xlabel}")


def bars(
    groups: Mapping[str, Mapping[str, float]],
    *,
    unit: str,
    title: str = "",
    highlight: str | None = None,
    reference: float | None = None,
) -> Plot:
    """Horizontal bars from zero with their values written out, in groups.

    Args:
        groups: Heading of the group to (name of the bar to value). A single group may have the heading "".
        unit: Quantity and unit of all values, shown above the bars ("seconds per step", "times a plain Linear").
        title: Heading inside the picture.
        highlight: Name of the bars in the accent colour; the others are grey. By default all carry it.
        reference: Value at which a dashed line crosses the bars, such as 1 for ratios; say in `unit` what it is.

    Raises:
        ReportError: A value is negative.
    """
    rows = [(group, name, float(value)) for group, values in groups.items() for name, value in values.items()]
    for group, name, value in rows:
        if value < 0:
            raise ReportError(
                f"bars: {name!r} in {group!r} is {value}; bars start at zero, use line_plot for signed values"
            )
    missing = [f"{group}: {name}" if group else name for group, name, value in rows if not np.isfinite(value)]
    notes = [f"Not measured: {', '.join(missing)}."] if missing else []
    present = [f"{group} {name} {short(value)}".strip() for group, name, value in rows if np.isfinite(value)]
    headings = sum(1 for group in groups if group)

    def paint(canvas: Canvas) -> None:
        draw_bars(canvas, groups, unit, highlight, reference)

    heights = (0.62 + 0.29 * len(rows) + 0.4 * headings, 0.62 + 0.45 * len(rows) + 0.4 * headings)
    if not present:
        return Plot(title, paint, title or unit, note=" ".join(["Nothing to draw.", *notes]), empty=True)
    return Plot(title, paint, _sentence(title, f"{unit}: {', '.join(present)}"), heights, " ".join(notes))


def _bins(name: str, *arrays: ArrayLike) -> tuple[Row, Row, Row, Row]:
    edges, accuracy, low, high = (numbers(values, name) for values in arrays)
    if not len(edges) - 1 == len(accuracy) == len(low) == len(high) or not len(accuracy):
        raise ReportError(
            f"accuracy_by_distance: {name!r} has {len(edges)} edges, {len(accuracy)} accuracies and intervals from "
            f"{len(low)} to {len(high)} values; N bins need N+1, N, N and N, and N is at least 1"
        )
    if not (np.diff(edges) > 0).all():
        raise ReportError(f"accuracy_by_distance: the edges of {name!r} should increase")
    if ((accuracy < 0) | (accuracy > 1)).any():
        raise ReportError(f"accuracy_by_distance: {name!r} should be shares from 0 to 1, not percent")
    return edges, accuracy, low, high


def _plot(title: str, paint: Callable[[Canvas], None], curves: Sequence[Curve], notes: list[str], what: str) -> Plot:
    ranges = [f"{c.name} runs from {short(float(c.drawn[0]))} to {short(float(c.drawn[-1]))}" for c in curves]
    alt = _sentence(title, f"{what}. {'; '.join(ranges)}" if ranges else what)
    if not curves:
        return Plot(title, paint, alt, note=" ".join(["Nothing to draw.", *notes]), empty=True)
    return Plot(title, paint, alt, note=" ".join(notes))


def _sentence(title: str, text: str) -> str:
    return f"{title}: {text}." if title else f"{text}."
