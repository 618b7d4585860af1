"""Everything measured of a finished compressor: its answers beside every baseline, and collapse at each budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from inlay.data import QAExample
from inlay.evaluate.collapse import examine_collapse
from inlay.evaluate.collapse_results import Collapse
from inlay.evaluate.compress import evaluate_compression
from inlay.evaluate.compress_methods import budgets_of
from inlay.evaluate.compress_results import CompressEvaluation
from inlay.evaluate.scoring import Progress
from inlay.report import Section, Text
from inlay.report.jsonfile import write_json
from inlay.softtoken.compressors import Compressor
from inlay.softtoken.prompting import BoundLayout

Shown: TypeAlias = Callable[[str], AbstractContextManager[Progress | None]]
"""Opens what shows the progress of a part, given its name."""


_NOT_MEASURED = Section(
    "Collapse",
    items=[Text("Not measured: all questions are about one context, which has no other to be told from.", tone="note")],
)


@dataclass(frozen=True)
class CompressSuite:
    """A compressor beside its baselines, and whether its slots say anything.

    Attributes:
        evaluation: Answers and costs.
        collapses: One for each budget; none where all questions are about one context, which has no other to be
            told from.
    """

    evaluation: CompressEvaluation
    collapses: tuple[Collapse, ...]

    @property
    def alarms(self) -> list[Collapse]:
        """The budgets at which it is not shown that the slots say anything."""
        return [collapse for collapse in self.collapses if collapse.alarm]

    def sections(self) -> list[Section]:
        """For the terminal and the report."""
        collapses = [collapse.section() for collapse in self.collapses]
        return [*self.evaluation.sections(), *(collapses or [_NOT_MEASURED])]

    def to_json(self) -> dict[str, Any]:
        """Everything in plain JSON types."""
        return self.evaluation.to_json() | {"collapse": [collapse.to_json() for collapse in self.collapses]}

    def write(self, path: Path) -> Path:
        """Write :meth:`to_json` to ``path``, whole or not at all."""
        return write_json(self.to_json(), path)


def measure_compression(
    model: Any,
    compressor: Compressor[Any],
    layout: BoundLayout,
    examples: Sequence[QAExample],
    *,
    shown: Shown,
    ratios: Sequence[int] | None = None,
    context_tokens: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> CompressSuite:
    """Run :func:`~inlay.evaluate.compress.evaluate_compression`, then look for collapse at each of its budgets.

    Args:
        shown: Opens what shows the progress of each part.
        model: This and all others as there.

    Raises:
        EvaluationError: As there.
    """
    settings: dict[str, Any] = {"context_tokens": context_tokens, "batch_size": batch_size, "seed": seed}
    with shown("answering") as progress:
        evaluation = evaluate_compression(
            model, compressor, layout, examples, ratios=ratios, progress=progress, **settings
        )
    if evaluation.contexts < 2:
        return CompressSuite(evaluation, ())
    with shown("looking for collapse") as progress:
        collapses = [
            examine_collapse(model, compressor, layout, examples, ratio=budget.ratio, progress=progress, **settings)
            for budget in budgets_of(compressor.config, ratios)
        ]
    return CompressSuite(evaluation, tuple(collapses))
