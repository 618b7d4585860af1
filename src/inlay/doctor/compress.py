"""``examine_compression``: everything the doctor looks at before a compressor is trained.

Nothing of the task is changed: weights, gradient flags, modes and random state are afterwards what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from inlay.doctor.compress_alignment import examine_alignment
from inlay.doctor.compress_baselines import Baselines, examine_baselines
from inlay.doctor.compress_baselines import why_not as why_no_baselines
from inlay.doctor.compress_case import CompressCase, Steps
from inlay.doctor.compress_evaluation import examine_evaluation
from inlay.doctor.compress_layout import examine_layout
from inlay.doctor.compress_lengths import examine_lengths
from inlay.doctor.compress_objectives import examine_objectives
from inlay.doctor.compress_overfit import overfit_one_batch
from inlay.doctor.compress_overfit import why_not as why_no_overfit
from inlay.doctor.compress_questions import examine_questions
from inlay.doctor.compress_slots import examine_slots
from inlay.doctor.diagnosis import Diagnosis
from inlay.doctor.examine import Progress
from inlay.doctor.findings import Examination, Finding, Severity
from inlay.fastweight import InlayError
from inlay.report import Section, Text
from inlay.report.provenance import provenance

OVERFIT, BASELINES = "one batch by heart", "before training"


@dataclass(frozen=True)
class Refused:
    """An examination that the task itself did not let be made.

    Attributes:
        name: The examination's.
        why: What was raised, with its fix.
    """

    name: str
    why: str

    def findings(self) -> list[Finding]:
        """That it was refused: training would be too."""
        return [Finding("refused", Severity.FATAL, f"{self.name}: {self.why}")]

    def section(self) -> Section:
        """The error."""
        return Section(self.name.capitalize(), items=[Text(self.why, tone="warning")])


def examine_compression(case: CompressCase, *, progress: Progress | None = None) -> Diagnosis:
    """Say whether, and why, a compression run will learn or not.

    Args:
        case: The run before its first step.
        progress: Called with the name of each examination before it is made, and with its steps where it takes long.
    """
    tell = progress or (lambda name: None)
    skipped = {name: why for name, why in ((OVERFIT, why_no_overfit(case)), (BASELINES, why_no_baselines(case))) if why}
    made: dict[str, Examination] = {}

    def told(name: str) -> Steps:
        return lambda done, total: tell(f"{name}, {done} of {total}")

    def evaluation() -> Examination:
        measured = made.get(BASELINES)
        return examine_evaluation(case, measured if isinstance(measured, Baselines) else None)

    steps: Mapping[str, Callable[[], Examination]] = {
        "lengths": lambda: examine_lengths(case),
        "questions": lambda: examine_questions(case),
        "layout": lambda: examine_layout(case),
        "label alignment": lambda: examine_alignment(case),
        "slots": lambda: examine_slots(case),
        "objectives": lambda: examine_objectives(case),
        OVERFIT: lambda: overfit_one_batch(case, progress=told(OVERFIT)),
        BASELINES: lambda: examine_baselines(case, progress=told(BASELINES)),
        "evaluation": evaluation,
    }
    device = case.compressor.lm.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for name, step in steps.items():
            if name in skipped:
                continue
            tell(name)
            try:
                made[name] = step()
            except InlayError as error:
                made[name] = Refused(name, str(error))
    return Diagnosis(case.recipe.name, made, skipped, provenance(device))
