"""What callers measured, made ready to draw: checked, sorted, with gaps and notes where a value cannot be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from inlay.report.document import ReportError
from inlay.report.numbers import MINUS


@dataclass(frozen=True)
class Series:
    """One line of a plot.

    Attributes:
        name: Its label.
        x: Positions, `[N]`.
        y: Values, `[N]`; NaN leaves a gap.
        band: Lower and upper limits, `[N]` each, shaded around the line.
        muted: Draw in grey: the baseline that the others are compared with.
    """

    name: str
    x: ArrayLike
    y: ArrayLike
    band: tuple[ArrayLike, ArrayLike] | None = None
    muted: bool = False


@dataclass(frozen=True)
class Curve:
    """A line ready to draw: float64 `[N]`, sorted by x, NaN where there is a gap.

    `low` and `high` limit the shaded band, `ghost` holds the values behind a running mean, and `label` replaces the
    name at the line's end.
    """

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None
    muted: bool = False
    ghost: NDArray[np.float64] | None = None
    label: str = ""

    @property
    def drawn(self) -> NDArray[np.float64]:
        """Values without the gaps."""
        return self.y[np.isfinite(self.y)]


def clean(series: Sequence[Series], *, log_x: bool = False, log_y: bool = False) -> tuple[list[Curve], list[str]]:
    """Series with what cannot be drawn set to NaN, and the notes about it."""
    ready: list[Curve] = []
    notes: list[str] = []
    needed = "finite and positive" if log_x or log_y else "finite"
    for one in series:
        x, y = numbers(one.x, one.name), numbers(one.y, one.name)
        bands = [numbers(limit, one.name) for limit in one.band] if one.band is not None else []
        if any(len(values) != len(x) for values in (y, *bands)):
            lengths = ", ".join(str(len(values)) for values in (x, y, *bands))
            raise ReportError(f"series {one.name!r}: x, y and band should have the same length, got {lengths}")
        good = np.isfinite(x) & np.isfinite(y)
        if log_x:
            good &= x > 0
        if log_y:
            good &= y > 0
        if not good.any():
            notes.append(f"“{one.name}” has no {needed if len(x) else ''} values.".replace("  ", " "))
            continue
        lost = int((~good).sum())
        if lost:
            notes.append(f"“{one.name}”: {lost} of {len(x)} values are not {needed} and leave gaps.")
        keep = np.isfinite(x) & (x > 0 if log_x else True)
        order = np.argsort(x[keep], kind="stable")
        shown = [np.where(good, values, np.nan)[keep][order] for values in (y, *bands)]
        low, high = (shown[1], shown[2]) if bands else (None, None)
        ready.append(Curve(one.name, x[keep][order], shown[0], low, high, one.muted))
    return ready, notes


def numbers(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """`values` as a float64 row; `name` is for the error."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ReportError(f"series {name!r}: expected numbers ({error})") from error
    if array.ndim != 1:
        raise ReportError(f"series {name!r}: expected one row of numbers, got shape {array.shape}")
    return array


def gain_over(curve: Curve, base: Curve) -> Curve:
    """`base` minus `curve` where both are known, interpolated to the curve's x; `label` is the mean with its sign."""
    inside = (curve.x >= base.x[0]) & (curve.x <= base.x[-1])
    known = np.isfinite(base.y)
    reference = base.y if np.array_equal(curve.x, base.x) else np.interp(curve.x, base.x[known], base.y[known])
    difference = np.where(inside, reference - curve.y, np.nan)
    mean = float(np.nanmean(difference)) if np.isfinite(difference).any() else float("nan")
    return Curve(curve.name, curve.x, difference, label=f"{mean:+.2f}".replace("-", MINUS))


def running_mean(y: NDArray[np.float64], span: int) -> NDArray[np.float64]:
    """Centred mean of `span` values, of those there are at the ends; gaps stay gaps."""
    known = np.isfinite(y)
    sums = np.convolve(np.pad(np.where(known, y, 0.0), span // 2), np.ones(span), "valid")
    counts = np.convolve(np.pad(known.astype(float), span // 2), np.ones(span), "valid")
    return np.where(known, sums / np.maximum(counts, 1), np.nan)
