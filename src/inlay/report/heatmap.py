"""A matrix as a map of colours: two hues that meet in the page's own colour at zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from numpy.typing import NDArray

from inlay.report.canvas import TEXT_SIZE, Canvas, Plot
from inlay.report.document import ReportError
from inlay.report.numbers import MINUS, short

_WRITTEN_OUT = 8
"""Most rows and columns of a map whose values stand in its cells."""


def heatmap(values: Sequence[Sequence[float]], *, unit: str, title: str = "", limit: float = 1.0) -> Plot:
    """A matrix of signed values, such as cosines; rows and columns are numbered from 1.

    Args:
        values: Rows from top to bottom, `[N][M]`; what is not finite is left blank.
        unit: Quantity and unit of the values, and what rows and columns are, shown above the map.
        title: Heading inside the picture.
        limit: Value at which the colours are full; zero is the colour of the page.

    Raises:
        ReportError: The rows differ in length, or `limit` is not positive.
    """
    lengths = sorted({len(row) for row in values})
    if len(lengths) > 1:
        raise ReportError(f"heatmap: all rows should have the same length, got {lengths}")
    if not limit > 0:
        raise ReportError(f"heatmap: limit should be above 0, got {limit}")
    matrix = np.array([[float(value) for value in row] for row in values], dtype=np.float64)
    known = matrix[np.isfinite(matrix)]

    def paint(canvas: Canvas) -> None:
        _draw(canvas, matrix, unit, limit)

    if not known.size:
        return Plot(title, paint, title or unit, note="Nothing to draw.", empty=True)
    blank = matrix.size - known.size
    note = f"{blank} of {matrix.size} values are not finite and left blank." if blank else ""
    low, mean, high = (short(float(one)) for one in (known.min(), known.mean(), known.max()))
    alt = f"{unit}; {matrix.shape[0]} by {matrix.shape[1]} values from {low} to {high}, mean {mean}."
    return Plot(title, paint, f"{title}: {alt}" if title else alt, (4.3, 3.7), note, mixes_colors=True)


def _draw(canvas: Canvas, matrix: NDArray[np.float64], unit: str, limit: float) -> None:
    theme = canvas.theme
    colors = LinearSegmentedColormap.from_list("inlay", [canvas.color(1), theme.page, canvas.color(0)])
    axes = canvas.figure.subplots()
    # A picture of one pixel a cell, which the browser enlarges without smoothing: a path for each would be much larger.
    image = axes.imshow(matrix, cmap=colors, vmin=-limit, vmax=limit, interpolation="none")
    for axis, count in ((axes.xaxis, matrix.shape[1]), (axes.yaxis, matrix.shape[0])):
        _number(axis, count)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_color(theme.rule)
    if max(matrix.shape) <= _WRITTEN_OUT:
        decimals = max(0, 2 - math.floor(math.log10(limit)))
        for (row, column), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                color = theme.page if abs(value) > 0.6 * limit else theme.ink
                text = f"{value:.{decimals}f}".replace("-", MINUS)
                axes.text(column, row, text, ha="center", va="center", color=color)
    axes.set_anchor("NW")
    bar = canvas.figure.colorbar(image, cax=axes.inset_axes((1.04, 0, 0.05, 1)), ticks=[-limit, 0, limit])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    heading = canvas.wrap(unit, TEXT_SIZE)
    axes.set_title(heading, loc="left", x=0, fontsize=TEXT_SIZE, color=theme.muted, pad=7)
    canvas.figure.draw_without_rendering()
    box = axes.get_position()
    axes.set_title(heading, loc="left", x=-box.x0 / box.width, fontsize=TEXT_SIZE, color=theme.muted, pad=7)


def _number(axis: Any, count: int) -> None:
    """Every cell up to ten; beyond, the first and round numbers."""
    step = next(step for step in (1, 5, 10, 50, 100, count) if count <= 10 * step)
    places = [*range(count)] if step == 1 else [0, *range(step - 1, count, step)]
    axis.set_ticks(places, [str(place + 1) for place in places])
