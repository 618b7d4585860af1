"""Numbers as people read them: the same decimals down a column, thousands separated, a real minus sign."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Literal, TypeAlias, TypeGuard

Cell: TypeAlias = str | int | float | bool | None

MINUS = "\u2212"
MISSING = "\u2013"
_NUMERIC = re.compile(
    r"[~<>≤≥±+\-\u2212]?\s*\d[\d,. ]*(e[+\-\u2212]?\d+)?(\s*±\s*\d[\d,.]*)?"
    r"\s*(%|[x\u00d7]|[a-zA-Zµ]{1,6}(/[a-zA-Z]{1,6})?)?",
    re.IGNORECASE,
)


def short(value: float, digits: int = 3) -> str:
    """`value` to about `digits` significant digits, for labels: 2.613 → 2.61, 32000 → 32,000, 0.00002 → 2e−05."""
    if not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4 or magnitude >= 9:
        return _minus(f"{value:.{digits - 1}e}")
    return _minus(f"{value:,.{max(0, digits - 1 - magnitude)}f}")


def alike(values: Sequence[float]) -> list[str]:
    """Labels with the same decimals for values of similar size, or each with its own past a ratio of a hundred."""
    finite = [abs(value) for value in values if math.isfinite(value) and value != 0]
    if not finite or max(finite) / min(finite) > 100:
        return [short(value) for value in values]
    style = _float_format(finite, digits=3)
    return [_minus(format(value, style)) if math.isfinite(value) else MISSING for value in values]


def alignments(rows: Sequence[Sequence[Cell]], width: int) -> list[Literal["left", "right"]]:
    """ "right" for the columns that hold numbers and nothing else, "left" for the others."""
    return ["right" if _is_numeric([row[i] for row in rows]) else "left" for i in range(width)]


def display_rows(rows: Sequence[Sequence[Cell]], width: int) -> list[list[str]]:
    """Cells as text, formatted column by column."""
    columns = [_format_column([row[i] for row in rows]) for i in range(width)]
    return [list(cells) for cells in zip(*columns, strict=True)]


def _is_numeric(cells: Sequence[Cell]) -> bool:
    present = [cell for cell in cells if not _is_missing(cell)]
    return bool(present) and all(
        (_NUMERIC.fullmatch(cell.strip()) is not None) if isinstance(cell, str) else _is_number(cell)
        for cell in present
    )


def _is_number(cell: Cell) -> TypeGuard[float]:
    return isinstance(cell, Real) and not isinstance(cell, bool)


def _is_missing(cell: Cell) -> bool:
    if isinstance(cell, str):
        return cell.strip() in {"", "-", MISSING, "—"}
    return cell is None or (_is_number(cell) and not math.isfinite(cell))


def _format_column(cells: Sequence[Cell]) -> list[str]:
    floats = [float(c) for c in cells if c is not None and _is_number(c) and not isinstance(c, Integral)]
    style = _float_format([value for value in floats if math.isfinite(value)])
    shown = []
    for cell in cells:
        if _is_number(cell) and math.isinf(cell):
            shown.append("∞" if cell > 0 else f"{MINUS}∞")
        elif _is_missing(cell):
            shown.append(MISSING)
        elif isinstance(cell, bool):
            shown.append("yes" if cell else "no")
        elif isinstance(cell, Integral):
            shown.append(_minus(f"{int(cell):,}"))
        elif isinstance(cell, Real):
            shown.append(_minus(format(float(cell), style)))
        else:
            shown.append(str(cell))
    return shown


def _float_format(values: Sequence[float], digits: int = 4) -> str:
    """A format with at most `digits` significant digits of the largest value, and no decimals that none needs."""
    sizes = [abs(value) for value in values if value != 0]
    if not sizes:
        return ",.0f"
    largest, smallest = max(sizes), min(sizes)
    if largest < 1e-3 or largest >= 1e9 or largest / smallest > 1e5:
        return ".2e"
    limit = max(0, digits - 1 - math.floor(math.log10(largest)))
    needed = max(len(f"{value:.{limit}f}".rstrip("0").partition(".")[2]) for value in values) if limit else 0
    return f",.{needed}f"


def _minus(text: str) -> str:
    return text.replace("-", MINUS)
