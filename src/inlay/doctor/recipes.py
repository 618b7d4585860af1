"""``inlay doctor RECIPE``: what needs the recipe alone (lint, the memory plan), then what needs its model and data.

The cheap come first, and what they find may end the examination: a model that would not fit is not built to be looked
at, nor one whose memory layers do not exist.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import set_seed

from inlay.data import DataError, load_data
from inlay.doctor.diagnosis import Diagnosis
from inlay.doctor.examine import Progress, examine
from inlay.doctor.findings import Examination, Severity
from inlay.doctor.lint import Outcome, lint_model, lint_recipe
from inlay.doctor.plan import PlanError, plan_recipe
from inlay.fastweight import attach
from inlay.report.provenance import provenance
from inlay.train.directory import mixed_precision, training_device
from inlay.train.recipe import Recipe, RecipeError
from inlay.train.run import build_model

MEASURED = ("reach", "gradients", "causality", "scale", "step_size")


def examine_recipe(
    recipe: Recipe, *, source: Path | None = None, budget_gb: float | None = None, progress: Progress | None = None
) -> Diagnosis:
    """Say whether the recipe's memory will learn, and whether its training fits.

    Args:
        recipe: A checked recipe with a memory.
        source: The file it was read from, for the headings.
        budget_gb: Memory that a training step may take, in GB (10⁹ bytes); the recipe's own, or the machine's, when not
            given.
        progress: Called with the name of each examination before it is made.

    Raises:
        RecipeError: The recipe has no memory.
        DataError: Its data cannot be read.
    """
    if recipe.memory is None:
        raise RecipeError(f"{source or recipe.name} has no memory (memory: null): there is nothing to examine")
    tell = progress or (lambda name: None)
    made: dict[str, Examination] = {}
    skipped: dict[str, str] = {}

    def stop(why: str) -> Diagnosis:
        return Diagnosis(recipe.name, made, {**skipped, **dict.fromkeys(MEASURED, why)}, provenance())

    tell("lint")
    made["lint"] = lint_recipe(recipe, source=source)
    if any(finding.code == "lint.layers" for finding in made["lint"].findings()):
        return stop("the memory cannot be attached, see the lint")
    tell("memory")
    try:
        made["memory"] = plan_recipe(recipe, budget_gb=budget_gb, progress=lambda what: tell(f"memory, {what}"))
    except PlanError as error:
        skipped["memory"] = str(error)
    if "memory" in made and any(finding.severity is Severity.FATAL for finding in made["memory"].findings()):
        return stop("the training step does not fit, so the model was not built")
    tell("data")
    set_seed(recipe.seed)
    data = load_data(recipe.data)
    device = training_device(recipe.trainer)
    model = build_model(recipe, data.vocab_size).to(device)
    memory = attach(model, recipe.memory).train_only(recipe.mode)
    lint = lint_recipe(recipe, data=data, source=source)
    unsaved = Outcome("Weights trained and not saved", tuple(lint_model(memory, model)))
    made["lint"] = replace(lint, outcomes=(*lint.outcomes, unsaved))
    rows = int(recipe.trainer.get("per_device_train_batch_size", 8))
    with mixed_precision(recipe.trainer, device):
        measured = examine(
            model,
            data.sample(rows, recipe.seed),
            longer_batch=_longer_batch(recipe, rows),
            frame_rate=recipe.doctor.frame_rate,
            progress=progress,
        )
    return Diagnosis(recipe.name, {**measured.examinations, **made}, skipped, measured.provenance)


def _longer_batch(recipe: Recipe, rows: int) -> dict[str, Tensor] | None:
    """The same data in sequences twice as long; None where its documents are too short for that."""
    config = recipe.data.model_copy(update={"sequence_length": 2 * recipe.data.sequence_length})
    try:
        return load_data(config).sample(rows, recipe.seed)
    except DataError:
        return None
