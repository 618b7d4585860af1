"""Evaluations gathered by variant, as JSON, as tables and as sections of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from inlay.evaluate.intervals import Interval
from inlay.evaluate.position import NO_STEP, PositionLoss, difference
from inlay.evaluate.recall import RecallAccuracy
from inlay.evaluate.scoring import EvaluationError
from inlay.evaluate.window import GrowingContext
from inlay.report import Section, Series, Table, Text, accuracy_by_distance, line_plot, loss_by_position
from inlay.report.jsonfile import plain, write_json
from inlay.report.numbers import MINUS, MISSING

Result: TypeAlias = PositionLoss | GrowingContext | RecallAccuracy

CONTEXT_TITLE = "Loss with a growing context"
QUARTER_NAMES = ("1st quarter", "2nd quarter", "3rd quarter", "last quarter")
PLOTTED_POSITIONS = 48


@dataclass
class Evaluation:
    """What was measured of some variants of a model, such as "memory", "eta = 0" and "no memory".

    Attributes:
        baseline: The variant that the others' gains are counted from (its loss minus theirs: above zero they are
            better). None, or a variant that was not measured: no gains.
        window: Attention window in tokens, marked in the plots.
        losses: Loss by position by variant.
        contexts: Growing context by variant.
        recalls: Recall by variant.
        contexts_missing: Why growing context was not measured, and what to set; empty if it was, or was not asked for.
    """

    baseline: str | None = None
    window: int | None = None
    losses: dict[str, PositionLoss] = field(default_factory=dict)
    contexts: dict[str, GrowingContext] = field(default_factory=dict)
    recalls: dict[str, RecallAccuracy] = field(default_factory=dict)
    contexts_missing: str = ""

    def add(self, results: Mapping[str, Result]) -> Evaluation:
        """Add results by variant, of any kind; gives itself back.

        Raises:
            EvaluationError: A loss is of other sequences or pieces than those already here.
        """
        for name, result in results.items():
            if isinstance(result, PositionLoss):
                for other in self.losses.values():
                    difference(result, other)
                self.losses[name] = result
            elif isinstance(result, GrowingContext):
                for context in self.contexts.values():
                    result.gain(context)
                self.contexts[name] = result
            elif isinstance(result, RecallAccuracy):
                self.recalls[name] = result
            else:
                raise EvaluationError(f"{name!r} is a {type(result).__name__}, not a result of inlay.evaluate")
        return self

    def to_json(self) -> dict[str, Any]:
        """Everything in plain JSON types; what is not a finite number is None."""
        content: dict[str, Any] = {"baseline": self.baseline, "attention_window": self.window}
        if self.losses:
            gains = {name: self._loss_gain(name) for name in self._compared(self.losses)}
            content["loss_by_position"] = {
                "variants": {name: loss.to_json() for name, loss in self.losses.items()},
                "gain_over_baseline": {
                    name: {"mean": gain[-1].to_json(), "quarters": [one.to_json() for one in gain[:-1]]}
                    for name, gain in gains.items()
                },
            }
        if self.contexts:
            content["growing_context"] = {
                "variants": {name: context.to_json() for name, context in self.contexts.items()},
                "gain_over_baseline": {
                    name: [one.to_json() for one in self._context_gain(name)] for name in self._compared(self.contexts)
                },
            }
        if self.contexts_missing:
            content.setdefault("growing_context", {})["not_measured"] = self.contexts_missing
        if self.recalls:
            content["recall"] = {"variants": {name: recall.to_json() for name, recall in self.recalls.items()}}
        return plain(content)

    def write(self, path: str | Path) -> Path:
        """Write :meth:`to_json` to ``path``, whole or not at all; its folder is made if missing."""
        return write_json(self.to_json(), path)

    def sections(self) -> list[Section]:
        """One section for each kind of measurement, with a plot and its table: for a report and, without plots, the
        terminal (:func:`inlay.report.console.print_section`)."""
        marks = {float(self.window): "attention window"} if self.window else None
        plots = []
        if self.losses:
            curves = {name: loss.buckets(PLOTTED_POSITIONS)[:2] for name, loss in self.losses.items()}
            baseline = self.baseline if self.baseline in self.losses else None
            plots.append(loss_by_position(curves, baseline=baseline, marks=marks))
        if self.contexts:
            lines = [
                Series(name, context.contexts, context.bits, muted=name == self.baseline)
                for name, context in self.contexts.items()
            ]
            plots.append(
                line_plot(
                    lines,
                    xlabel="context before the block, tokens",
                    ylabel="loss on the final block, bits per token",
                    title=CONTEXT_TITLE,
                    log_x=True,
                    marks=marks,
                )
            )
        if self.recalls:
            answers = {name: (one.edges, *one.by_distance()) for name, one in self.recalls.items()}
            plots.append(accuracy_by_distance(answers, baseline=self.baseline, marks=marks))
        sections = [
            Section(title, items=[plot.figure(), grid])
            for (title, grid), plot in zip(self._grids(), plots, strict=True)
        ]
        if self.contexts_missing:
            sections.append(Section(CONTEXT_TITLE, items=[Text(self.contexts_missing, tone="note")]))
        return sections

    def _grids(self) -> list[tuple[str, Table]]:
        grids = []
        if self.losses:
            grids.append(("Loss by position", self._loss_grid()))
        if self.contexts:
            grids.append((CONTEXT_TITLE, self._context_grid()))
        if self.recalls:
            grids.append(("Recall", self._recall_grid()))
        return grids

    def _loss_grid(self) -> Table:
        columns = {name: [*map(_figure, loss.quarters()), _figure(loss.mean)] for name, loss in self.losses.items()}
        columns |= {f"gain of {name}": [*map(_gain, self._loss_gain(name))] for name in self._compared(self.losses)}
        first = next(iter(self.losses.values()))
        of = f"{first.tokens:,} tokens in {first.sequences:,} sequences of {first.documents:,} documents"
        caption = f"Bits per token, {of}{self._gain_note(columns)}"
        return _by_column("", [*QUARTER_NAMES, "all"], columns, caption)

    def _context_grid(self) -> Table:
        columns = {
            name: [
                f"{_figure(bits, 2)} ({_figure(perplexity, 1)})"
                for bits, perplexity in zip(c.bits, c.perplexity, strict=True)
            ]
            for name, c in self.contexts.items()
        }
        columns |= {
            f"gain of {name}": [*map(_gain, self._context_gain(name))] for name in self._compared(self.contexts)
        }
        first = next(iter(self.contexts.values()))
        caption = (
            f"Bits per token (perplexity) on the final {first.block:,} tokens of {first.pieces:,} pieces from "
            f"{first.documents:,} documents ({first.left_out:,} more too short), by tokens of context"
            f"{self._gain_note(columns)}"
        )
        return _by_column("context", [f"{context:,}" for context in first.contexts], columns, caption)

    def _recall_grid(self) -> Table:
        rows: list[list[str]] = []
        for name, recall in self.recalls.items():
            answer = recall.interval()
            known = math.isfinite(answer.half)
            rows.append(
                [
                    name,
                    f"{100 * answer.mean:.1f} %",
                    f"{100 * answer.low:.1f} to {100 * answer.high:.1f} %" if known else MISSING,
                    f"{recall.questions:,}",
                    f"{100 * recall.chance:.1f} %",
                ]
            )
        first = next(iter(self.recalls.values()))
        caption = f"Intervals are from the spread between {len(first.counts):,} sequences."
        return Table(["", "right answers", "95 % interval", "questions", "by chance"], rows, caption)

    def _compared(self, variants: Mapping[str, Result]) -> list[str]:
        if self.baseline not in variants:
            return []
        # What a model that was trained with a memory loses without it is another question than what the memory gains.
        return [name for name in variants if name != self.baseline and name != NO_STEP]

    def _loss_gain(self, name: str) -> tuple[Interval, ...]:
        assert self.baseline is not None
        gain = difference(self.losses[self.baseline], self.losses[name])
        return (*gain.quarters, gain.mean)

    def _context_gain(self, name: str) -> tuple[Interval, ...]:
        assert self.baseline is not None
        return self.contexts[name].gain(self.contexts[self.baseline])

    def _gain_note(self, columns: Mapping[str, object]) -> str:
        if not any(name.startswith("gain of ") for name in columns):
            return "."
        return f"; gains are over “{self.baseline}”, ± half the 95 % interval, from the spread between documents."


def _by_column(corner: str, labels: Sequence[str], columns: Mapping[str, Sequence[str]], caption: str) -> Table:
    """A table given column by column, with a label for each row."""
    rows = [[label, *cells] for label, *cells in zip(labels, *columns.values(), strict=True)]
    right: Literal["right"] = "right"
    return Table([corner, *columns], rows, caption, align=["left", *[right] * len(columns)])


def _figure(value: float, digits: int = 3) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else MISSING


def _gain(gain: Interval) -> str:
    if not math.isfinite(gain.mean):
        return MISSING
    spread = f" ± {gain.half:.3f}" if math.isfinite(gain.half) else ""
    return f"{gain.mean:+.3f}".replace("-", MINUS) + spread
