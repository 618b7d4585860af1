"""Horizontal bars with their values written out, so that no scale is needed to read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.transforms import blended_transform_factory

from inlay.report.canvas import TEXT_SIZE, Canvas
from inlay.report.numbers import alike

_BAR = 0.62


def draw_bars(
    canvas: Canvas,
    groups: Mapping[str, Mapping[str, float]],
    unit: str,
    highlight: str | None,
    reference: float | None,
) -> None:
    """Bars from top to bottom; names to the left, or above the bars on a narrow canvas."""
    axes = canvas.figure.subplots()
    drop, step = (0.66, 1.6) if canvas.narrow else (0.0, 1.0)
    values = [value for group in groups.values() for value in group.values()]
    labels = iter(alike(values))
    headings: list[tuple[float, str]] = []
    names: list[tuple[float, str]] = []
    y = 0.0
    for heading, group in groups.items():
        if heading:
            headings.append((y, heading))
            y += 1.0
        bars = []
        for name, value in group.items():
            bars.append(y + drop)
            names.append((y, name))
            _bar(axes, canvas, y + drop, value, next(labels), highlight in (None, name), name == highlight)
            y += step
        if reference is not None and bars:
            spans = [(at, at) for at in bars] if canvas.narrow else [(bars[0], bars[-1])]
            for first, last in spans:
                axes.plot(
                    [reference] * 2, [first - 0.42, last + 0.42], color=canvas.theme.ink, linewidth=0.9, dashes=(3, 2)
                )
        y += 0.35
    axes.set_ylim(y - 0.35 - step + drop + 0.5, -0.5)
    largest = max(reference or 0.0, *(value for value in values if math.isfinite(value)))
    axes.set_xlim(0, (largest or 1.0) * (1.2 if canvas.narrow else 1.13))
    axes.set_xticks([])
    shown = [] if canvas.narrow else names
    axes.set_yticks([at for at, _ in shown], [name for _, name in shown])
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    _texts_at_the_left(axes, canvas, unit, headings, names if canvas.narrow else [])


def _bar(axes: Any, canvas: Canvas, y: float, value: float, label: str, colored: bool, bold: bool) -> None:
    theme = canvas.theme
    known = math.isfinite(value)
    if known:
        color = canvas.color(0) if colored else theme.baseline
        axes.barh(y, value, height=_BAR, color=color, alpha=1.0 if colored else 0.7)
    axes.annotate(
        label if known else "not measured",
        (value if known else 0, y),
        (5 if known else 1, 0),
        textcoords="offset points",
        va="center_baseline",
        color=theme.ink if known else theme.muted,
        fontweight="bold" if bold else "normal",
    )


def _texts_at_the_left(
    axes: Any, canvas: Canvas, unit: str, headings: list[tuple[float, str]], names: list[tuple[float, str]]
) -> None:
    theme = canvas.theme
    text = canvas.wrap(unit, TEXT_SIZE)
    axes.set_title(text, loc="left", x=0, fontsize=TEXT_SIZE, color=theme.muted, pad=7)
    canvas.figure.draw_without_rendering()
    box = axes.get_position()
    axes.set_title(text, loc="left", x=-box.x0 / box.width, fontsize=TEXT_SIZE, color=theme.muted, pad=7)
    flush = blended_transform_factory(canvas.figure.transFigure, axes.transData)
    for at, heading in headings:
        axes.text(0, at, heading, transform=flush, va="center", fontweight="bold", color=theme.ink, in_layout=False)
    for at, name in names:
        axes.text(0, at, name, transform=flush, va="center", color=theme.muted, in_layout=False)
