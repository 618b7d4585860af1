"""What an entry gives back: tables for the terminal, aims with their verdicts, and everything measured as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all and what is running."""


@dataclass(frozen=True)
class Aim:
    """A claim with its figure.

    Attributes:
        claim: What the figure is.
        value: The figure.
        limit: What it should reach.
        at_least: Whether it should be at least the limit, or at most.
        quiet: The same figure from the fastest rounds, for a time on a noisy machine.
    """

    claim: str
    value: float
    limit: float
    at_least: bool
    quiet: float | None = None

    @property
    def met(self) -> bool:
        """Whether the figure reaches the limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Plain types; a missed aim says so and fails nothing."""
        return {
            "claim": self.claim,
            "value": self.value,
            "quiet": self.quiet,
            "aim": f"{'>=' if self.at_least else '<='} {self.limit:g}",
            "met": self.met,
        }


@dataclass(frozen=True)
class Entry:
    """One benchmark, done.

    Attributes:
        title: What was compared.
        tables: The measurements, for the terminal.
        aims: The claims.
        data: Everything measured, in plain types.
    """

    title: str
    tables: list[Table]
    aims: list[Aim]
    data: Mapping[str, Any] = field(default_factory=dict)

    def aims_table(self) -> Table:
        """The claims with a tick or a cross each."""
        table = Table(title="Aims", title_justify="left")
        for heading in ("", "claim", "measured", "fastest", "aim"):
            table.add_column(heading, justify="left" if heading in ("", "claim") else "right")
        for aim in self.aims:
            table.add_row(
                "[green]✓[/]" if aim.met else "[red]✗[/]",
                aim.claim,
                f"{aim.value:.3g}x",
                "" if aim.quiet is None else f"{aim.quiet:.3g}x",
                f"{'≥' if aim.at_least else '≤'} {aim.limit:g}x",
            )
        return table

    def to_json(self) -> dict[str, Any]:
        """Title, aims and data in plain types."""
        return {"title": self.title, "aims": [aim.to_json() for aim in self.aims], **self.data}


Benchmark = Callable[[bool, torch.device, Progress], Entry]
"""An entry's ``run(quick, device, progress)``; ``quick`` takes sizes that show only that it works."""
