"""What the doctor says: findings, and the examinations that make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from inlay.report import Section
from inlay.report.document import Verdict


class Severity(IntEnum):
    """How bad a finding is. The worst one of a diagnosis is the exit code of ``inlay doctor``."""

    HEALTHY = 0
    WARNING = 1
    FATAL = 2
    """The memory will not learn, or the run will not fit."""

    @property
    def verdict(self) -> Verdict:
        """Its mark in a table."""
        marks: tuple[Verdict, ...] = ("good", "warning", "bad")
        return marks[self]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
        code: Stable name for programs, ``room.what``: ``gradient.clip``, ``reach.too_short``.
        severity: How bad.
        says: The measured figures in a clause, as in an error message: no capital, no full stop.
        fix: What to change, likewise, with the recipe's key and a value. Empty where nothing is to be done.
    """

    code: str
    severity: Severity
    says: str
    fix: str = ""


class Examination(Protocol):
    """The result of one examination: plain numbers and strings in a frozen dataclass, shown in three ways.

    JSON is the dataclass itself; terminal and HTML both draw ``section()``.
    """

    def findings(self) -> Sequence[Finding]:
        """What it found, the worst first."""
        ...

    def section(self) -> Section:
        """Its tables and plots."""
        ...
