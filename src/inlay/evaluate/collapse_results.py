"""The verdict on collapse: information first, likeness second, and what to try."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from inlay.evaluate.collapse_geometry import Geometry
from inlay.evaluate.intervals import Interval
from inlay.report import Plot, Section, Table, Text, heatmap
from inlay.report.document import Align
from inlay.report.jsonfile import plain
from inlay.report.numbers import MINUS, MISSING, Cell

LEAST_GAIN = 1e-3
"""Nats per token that a gain has to be shown to exceed: rounding in bfloat16 makes differences of about this size."""
ALIKE = 0.99
"""Cosine across contexts above which all contexts count as written alike."""
_MAPPED = 16


@dataclass(frozen=True)
class Collapse:
    """What was measured of the slots of a compressor at one budget.

    Attributes:
        budget: ``4×`` or ``16 slots``.
        questions: Questions asked.
        contexts: Different contexts that they are about.
        candidates: Contexts B that each question was asked of, the right one among them.
        right: Nats per token of the right answer behind its own context's slots.
        wrong: Behind those of the B − 1 other contexts, their mean.
        none: Behind no slots.
        over_wrong: ``wrong`` − ``right``, paired by context.
        over_none: ``none`` − ``right``, likewise.
        retrieval: Share of the questions whose right answer is likeliest behind their own context; by chance 1/B.
        slots: How alike the slots are (of 32 contexts at most).
        pooled: How alike mean-pooled embeddings of the same contexts are, in the same budget.
    """

    budget: str
    questions: int
    contexts: int
    candidates: int
    right: Interval
    wrong: Interval
    none: Interval
    over_wrong: Interval
    over_none: Interval
    retrieval: Interval
    slots: Geometry
    pooled: Geometry

    @property
    def chance(self) -> float:
        """Retrieval without any information."""
        return 1 / self.candidates

    @property
    def alarm(self) -> bool:
        """Whether it is not shown that the slots say anything about their context."""
        return not (self.over_wrong.low > LEAST_GAIN and self.retrieval.low > self.chance)

    @property
    def says(self) -> str:
        """The verdict in a sentence, with its figures."""
        gain, found = self.over_wrong, self.retrieval
        figures = (
            f"behind the right context's slots the answer costs {self.right.mean:.3f} nats per token, behind another's "
            f"{self.wrong.mean:.3f} (gain {_signed(gain.mean)}, 95 % interval {_signed(gain.low)} to "
            f"{_signed(gain.high)}), and the right one of {self.candidates} contexts is found for "
            f"{_percent(found.mean)} of {self.questions:,} questions ({_percent(found.low)} to {_percent(found.high)}; "
            f"by chance {_percent(self.chance)})"
        )
        if not self.alarm:
            return f"At {self.budget} the slots tell contexts apart: {figures}."
        return f"At {self.budget} it is not shown that the slots say anything about their context: {figures}."

    @property
    def fix(self) -> str:
        """What to try; empty without an alarm."""
        if not self.alarm:
            return ""
        if self.slots.cosine_across > ALIKE:
            advice = (
                f"All contexts are written as nearly the same slots (cosine {self.slots.cosine_across:.3f}; "
                f"mean-pooled {self.pooled.cosine_across:.3f}). See that slots and inputs have the embeddings' scale "
                "(compressor.calibrate: true; with crossattention, positions: calibrated) and that the compressor gets "
                "a gradient; lower trainer.learning_rate; objectives.diversity keeps them apart by force"
            )
        else:
            advice = (
                f"Contexts are written as different slots (cosine {self.slots.cosine_across:.3f}), which the decoder "
                "does not read. See first that it answers from full text; then train longer, with "
                "pretraining.reconstruction, objectives.distillation or a smaller ratio"
            )
        if self.over_wrong.mean > LEAST_GAIN and self.retrieval.mean > self.chance:
            advice += f"; or measure on more than these {self.contexts:,} contexts, the gain may be real"
        return advice + "."

    def to_json(self) -> dict[str, Any]:
        """Plain types; what is not a finite number is None."""
        names = ("right", "wrong", "none", "over_wrong", "over_none", "retrieval")
        return plain(
            {
                "budget": self.budget,
                "questions": self.questions,
                "contexts": self.contexts,
                "candidates": self.candidates,
                **{name: getattr(self, name).to_json() for name in names},
                "chance": self.chance,
                "slots": vars(self.slots),
                "pooled": vars(self.pooled),
                "alarm": self.alarm,
                "says": self.says,
                "fix": self.fix,
            }
        )

    def section(self) -> Section:
        """The verdict, information and likeness in tables, and the cosine map."""
        verdict = Text(f"{self.says} {self.fix}".strip(), tone="warning" if self.alarm else "plain")
        return Section(
            f"Collapse at {self.budget}",
            "Whether slots say anything about their context is for the decoder to show; likeness says what kind of "
            "collapse it is.",
            [verdict, self._information(), self._likeness(), self.plot().figure()],
        )

    def plot(self) -> Plot:
        """The cosine of each context's slots with each other's."""
        return heatmap(
            [row[:_MAPPED] for row in self.slots.map[:_MAPPED]],
            unit="cosine of each context's slots with those of each other",
            title=f"How alike contexts are written at {self.budget}",
        )

    def _information(self) -> Table:
        rows: list[list[Cell]] = [
            ["nats per token, right context", *_cells(self.right)],
            ["nats per token, another context", *_cells(self.wrong)],
            ["nats per token, no context", *_cells(self.none)],
            ["gain over another context", *_cells(self.over_wrong, signed=True)],
            ["gain over no context", *_cells(self.over_none, signed=True)],
            [
                f"right one of {self.candidates} found (chance {_percent(self.chance)})",
                *_cells(self.retrieval, share=True),
            ],
        ]
        align: list[Align] = ["left", "right", "right"]
        caption = f"{self.questions:,} questions about {self.contexts:,} contexts."
        return Table(["", "mean", "95 % interval"], rows, caption, align)

    def _likeness(self) -> Table:
        both = (self.slots, self.pooled)
        rows: list[list[Cell]] = [
            ["cosine within a context", *(_plain(one.cosine_within) for one in both)],
            ["cosine across contexts", *(_plain(one.cosine_across) for one in both)],
            ["effective rank of a context's slots", *(f"{one.rank_within:.1f}" for one in both)],
            [f"effective rank of {len(self.slots.map)} contexts' means", *(f"{one.rank_across:.1f}" for one in both)],
        ]
        align: list[Align] = ["left", "right", "right"]
        return Table(["", "soft tokens", "mean-pooled embeddings"], rows, align=align)


def _cells(interval: Interval, *, signed: bool = False, share: bool = False) -> list[Cell]:
    show = _percent if share else _signed if signed else _plain
    return [show(interval.mean), f"{show(interval.low)} to {show(interval.high)}"]


def _plain(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else MISSING


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", MINUS)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
