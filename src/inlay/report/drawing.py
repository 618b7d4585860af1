"""Curves on a canvas: axes without clutter, and lines named at their ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from inlay.report.canvas import TEXT_SIZE, Canvas
from inlay.report.series import Curve
from inlay.report.ticks import linear_ticks, log_ticks

EndLabel: TypeAlias = tuple[Any, float]
_DASHES = ["-", "-", "-", (0, (5, 1.5)), (0, (1.5, 1.2))]


def draw_curves(
    canvas: Canvas,
    curves: Sequence[Curve],
    xlabel: str,
    ylabel: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    marks: Mapping[float, str] | None = None,
    y_limits: tuple[float, float] | None = None,
    y_ticks: Sequence[float] | None = None,
    markers: bool = False,
) -> None:
    """One panel of lines that fills the canvas."""
    axes = canvas.figure.subplots()
    _style(axes, canvas, log_x=log_x, log_y=log_y)
    if y_limits is not None:
        axes.set_ylim(*y_limits)
    if y_ticks is not None:
        axes.set_yticks(y_ticks)
    colors = _colors(canvas, curves)
    _lines(axes, canvas, curves, colors, markers)
    if log_x:
        log_ticks(axes.xaxis, narrow=canvas.narrow)
    else:
        _from_zero(axes)
    if log_y:
        log_ticks(axes.yaxis, narrow=canvas.narrow)
    axes.set_xlabel(xlabel)
    ends = _name(axes, canvas, curves, colors)
    _settle(canvas, [(axes, ylabel, ends)])
    _marks(axes, canvas, marks, curves)


def draw_with_gap(
    canvas: Canvas,
    curves: Sequence[Curve],
    gains: Sequence[Curve],
    xlabel: str,
    ylabel: str,
    gain_label: str,
    *,
    marks: Mapping[float, str] | None = None,
) -> None:
    """Lines above, and below them on the same horizontal axis their distance from the baseline, shaded from zero."""
    top, bottom = canvas.figure.subplots(2, 1, sharex=True, height_ratios=(1.9, 1))
    for axes in (top, bottom):
        _style(axes, canvas)
    linear_ticks(bottom.yaxis, 3)
    colors = _colors(canvas, curves)
    by_name = {curve.name: color for curve, color in zip(curves, colors, strict=True)}
    _lines(top, canvas, curves, colors)
    gain_colors = [by_name[gain.name] for gain in gains]
    for gain, color in zip(gains, gain_colors, strict=True):
        bottom.fill_between(gain.x, 0, gain.y, color=color, alpha=0.18, linewidth=0)
        bottom.plot(gain.x, gain.y, color=color, linewidth=1.3)
    bottom.axhline(0, color=canvas.theme.muted, linewidth=0.8)
    _from_zero(bottom)
    low, high = bottom.get_ylim()
    lowest = min((float(gain.drawn.min()) for gain in gains if len(gain.drawn)), default=0.0)
    bottom.set_ylim(low if lowest < 0 else 0, max(high, 0))
    bottom.spines["bottom"].set_visible(False)
    top.spines["bottom"].set_visible(False)
    bottom.set_xlabel(xlabel)
    top.tick_params(labelbottom=False, length=0)
    ends = _name(top, canvas, curves, colors)
    mean_ends: list[EndLabel] = []
    means = [Curve(g.name, g.x, g.y, label=f"mean {g.label}") for g in gains]
    if ends and canvas.fits_beside([mean.label for mean in means]):
        mean_ends = _end_labels(bottom, means, gain_colors, at_mean=True)
    else:
        gain_label += " (mean " + ", ".join(gain.label for gain in gains) + ")"
    _settle(canvas, [(top, ylabel, ends), (bottom, gain_label, mean_ends)])
    _marks(top, canvas, marks, curves)
    _marks(bottom, canvas, dict.fromkeys(marks or {}, ""))


def _style(axes: Any, canvas: Canvas, *, log_x: bool = False, log_y: bool = False) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.margins(x=0.0, y=0.08)
    if log_x:
        axes.set_xscale("log")
    else:
        linear_ticks(axes.xaxis, 5 if canvas.narrow else 8)
    if log_y:
        axes.set_yscale("log")
    else:
        linear_ticks(axes.yaxis, 5)


def _from_zero(axes: Any) -> None:
    """Let a linear axis that almost starts at zero start there."""
    low, high = axes.get_xlim()
    if 0 < low < 0.1 * high:
        axes.set_xlim(0, high)


def _lines(axes: Any, canvas: Canvas, curves: Sequence[Curve], colors: Sequence[str], markers: bool = False) -> None:
    for index, (curve, color) in enumerate(zip(curves, colors, strict=True)):
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.16, linewidth=0)
        if curve.ghost is not None:
            axes.plot(curve.x, curve.ghost, color=color, alpha=0.28, linewidth=0.7)
        axes.plot(
            curve.x,
            curve.y,
            color=color,
            linewidth=1.5 if curve.muted else 1.8,
            linestyle="-" if curve.muted else _DASHES[index % len(_DASHES)],
            marker="o" if markers or len(curve.drawn) < 3 else None,
            markersize=4.0,
            markeredgewidth=0,
            clip_on=not markers,
            zorder=2.5 if curve.muted else 3,
        )
        alone = _alone(curve.y)
        axes.plot(
            curve.x[alone], curve.y[alone], color=color, linestyle="none", marker=".", markersize=3.5, markeredgewidth=0
        )


def _name(axes: Any, canvas: Canvas, curves: Sequence[Curve], colors: Sequence[str]) -> list[EndLabel]:
    """Names at the ends of the lines; below the axes where there is no room for that."""
    if canvas.fits_beside([curve.name for curve in curves]):
        return _end_labels(axes, curves, colors)
    handles = [axes.plot([], [], color=color, linewidth=2.2)[0] for color in colors]
    names = [curve.name for curve in curves]
    columns = max(1, min(len(names), int(canvas.width / ((max(map(len, names)) + 4) * TEXT_SIZE * 0.6))))
    rows = -(-len(names) // columns)
    canvas.figure.set_figheight(canvas.figure.get_figheight() + rows * TEXT_SIZE * 1.6 / 72)
    canvas.figure.legend(
        handles,
        names,
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        labelcolor="linecolor",
        handlelength=1.2,
        borderpad=0.2,
        borderaxespad=0.0,
        columnspacing=1.4,
    )
    return []


def _end_labels(axes: Any, curves: Sequence[Curve], colors: Sequence[str], *, at_mean: bool = False) -> list[EndLabel]:
    """Texts right of the axes; `_settle` moves each to the height of its line's end once the layout is known."""
    labels = []
    for curve, color in zip(curves, colors, strict=True):
        last = curve.drawn if at_mean else curve.drawn[-max(1, len(curve.drawn) // 20) :]
        text = axes.annotate(
            curve.label or curve.name,
            (1, 0),
            (6, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            color=color,
            fontweight="normal" if curve.muted else "bold",
            annotation_clip=False,
        )
        labels.append((text, float(np.mean(last))))
    return labels


def _spread(wanted: Sequence[float], distance: float) -> list[float]:
    """Heights at least `distance` apart, close to the wanted ones and in the same order."""
    order = np.argsort(wanted, kind="stable")
    placed = np.asarray(wanted, dtype=float)[order]
    for _ in range(60):
        overlap = distance - np.diff(placed)
        if (overlap <= 1e-3).all():
            break
        for i in np.flatnonzero(overlap > 1e-3):
            placed[i] -= overlap[i] / 2
            placed[i + 1] += overlap[i] / 2
            overlap = distance - np.diff(placed)
    result = np.empty_like(placed)
    result[order] = placed
    return [float(height) for height in result]


def _marks(axes: Any, canvas: Canvas, marks: Mapping[float, str] | None, curves: Sequence[Curve] = ()) -> None:
    """Dashed vertical lines, their labels at the first height, from the top, where no curve runs through them."""
    low, high = axes.get_xlim()
    box = axes.get_window_extent()
    pixels = canvas.figure.dpi / 72
    points = [axes.transData.transform(np.column_stack([curve.x, curve.y])) for curve in curves]
    for x, label in (marks or {}).items():
        if not low <= x <= high:
            continue
        axes.axvline(x, color=canvas.theme.muted, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1.5)
        if not label:
            continue
        at = axes.transData.transform((x, axes.get_ylim()[0]))[0]
        width = len(label) * TEXT_SIZE * 0.6 * pixels
        left = at + width > box.x1
        span = np.linspace(at - width if left else at, at if left else at + width, 20)
        heights = np.array([np.interp(span, line[:, 0], line[:, 1]) for line in points]).ravel()
        heights = heights[np.isfinite(heights)]
        choices = [(fraction, box.y0 + fraction * box.height) for fraction in (0.95, 0.82, 0.68, 0.54, 0.4, 0.26, 0.12)]
        room = [float(np.abs(heights - y).min()) if len(heights) else np.inf for _, y in choices]
        clear = next((i for i, gap in enumerate(room) if gap > TEXT_SIZE * 1.2 * pixels), int(np.argmax(room)))
        axes.annotate(
            label,
            (x, choices[clear][0]),
            (-5 if left else 5, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="center",
            ha="right" if left else "left",
            color=canvas.theme.muted,
        )


def _settle(canvas: Canvas, panels: Sequence[tuple[Any, str, Sequence[EndLabel]]]) -> None:
    """Finish what depends on the layout.

    Each vertical axis' label goes above its panel, flush left with the title, where it can be read without tilting the
    head, and the names of the lines go to the heights of their ends, pushed apart where they would overlap.
    """

    def head(axes: Any, label: str, x: float) -> None:
        text = canvas.wrap(label, TEXT_SIZE)
        axes.set_title(text, loc="left", x=x, fontsize=TEXT_SIZE, color=canvas.theme.muted, pad=7)

    for axes, label, _ in panels:
        head(axes, label, 0.0)
    canvas.figure.draw_without_rendering()
    points = 72 / canvas.figure.dpi
    for axes, label, ends in panels:
        box = axes.get_position()
        head(axes, label, -box.x0 / box.width)
        floor = axes.get_window_extent().y0
        wanted = [(axes.transData.transform((axes.get_xlim()[1], level))[1] - floor) * points for _, level in ends]
        for (text, _), height in zip(ends, _spread(wanted, TEXT_SIZE * 1.35), strict=True):
            text.set_position((6, height))


def _colors(canvas: Canvas, curves: Sequence[Curve]) -> list[str]:
    colored = iter(range(len(curves)))
    return [canvas.theme.baseline if curve.muted else canvas.color(next(colored)) for curve in curves]


def _alone(y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Values between two gaps, which a line would not show."""
    known = np.concatenate([[False], np.isfinite(y), [False]])
    alone: NDArray[np.bool_] = known[1:-1] & ~known[:-2] & ~known[2:]
    return alone
