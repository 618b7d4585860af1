"""Labels and places of the ticks along an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import Formatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from inlay.report.numbers import MINUS, short


def linear_ticks(axis: Any, most: int) -> None:
    """At most `most` intervals at round numbers."""
    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(PlainFormatter())


def log_ticks(axis: Any, *, narrow: bool) -> None:
    """Decades, and steps between them where the axis spans few decades. Call once the data is drawn."""
    low, high = axis.get_view_interval()
    within = math.log10(high / low) < 2.5
    axis.set_major_locator(
        LogLocator(subs=((1.0, 3.0) if narrow else (1.0, 2.0, 5.0)) if within else (1.0,), numticks=9)
    )
    axis.set_major_formatter(FuncFormatter(_power))
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(which="minor", length=0)


class PlainFormatter(Formatter):
    """The same number of decimals along the axis, and separated thousands."""

    def __call__(self, value: float, pos: int | None = None) -> str:
        """The label of a single value."""
        return self.format_ticks([value])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """The labels of all values of an axis."""
        largest = max((abs(value) for value in values), default=0.0)
        if largest >= 1e9 or 0 < largest < 1e-3:
            return [short(value, 2) for value in values]
        decimals = max((len(f"{value:.6f}".rstrip("0").partition(".")[2]) for value in values), default=0)
        return [f"{value:,.{decimals}f}".replace("-", MINUS) for value in values]


def _power(value: float, _position: int | None = None) -> str:
    return f"{value:,.10g}" if 1e-4 <= value < 1e6 else short(value, 1)
