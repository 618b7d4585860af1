"""The doctor: why a memory learns or does not, measured on the model and a real batch.

    diagnosis = inlay.doctor.examine(model, batch)
    diagnosis.print(rich.console.Console())

:func:`examine` makes every examination of a model; each can be made alone. What needs a recipe stands in
:mod:`inlay.doctor.recipes` (``inlay doctor RECIPE``), :mod:`inlay.doctor.lint` and :mod:`inlay.doctor.plan`.
"""

from inlay.doctor.attribution import Attribution, attribute_gradients
from inlay.doctor.causality import Causality, probe_causality
from inlay.doctor.diagnosis import Diagnosis
from inlay.doctor.examine import examine
from inlay.doctor.findings import Examination, Finding, Severity
from inlay.doctor.gradients import GradientNorms, gradient_norms
from inlay.doctor.reach import Reach, examine_reach
from inlay.doctor.reach_plan import ReachPlan, plan_reach
from inlay.doctor.scale import Scale, examine_scale
from inlay.doctor.step_size import StepSize, recommend_step_size

__all__ = [
    "Attribution",
    "Causality",
    "Diagnosis",
    "Examination",
    "Finding",
    "GradientNorms",
    "Reach",
    "ReachPlan",
    "Scale",
    "Severity",
    "StepSize",
    "attribute_gradients",
    "examine",
    "examine_reach",
    "examine_scale",
    "gradient_norms",
    "plan_reach",
    "probe_causality",
    "recommend_step_size",
]
