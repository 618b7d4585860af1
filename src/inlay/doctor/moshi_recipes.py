"""``inlay doctor RECIPE`` where the recipe is one of Moshi: its codes and its model, examined before training."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import set_seed

from inlay.data.problems import DataError
from inlay.doctor.diagnosis import Diagnosis
from inlay.doctor.dry_run import PlanError
from inlay.doctor.examine import Progress, examine
from inlay.doctor.findings import Examination, Severity
from inlay.doctor.moshi_lint import MoshiCase, lint_moshi
from inlay.doctor.moshi_model import MoshiCausalLM
from inlay.doctor.plan_moshi import LENGTH_KEY, MOST_FRAMES, plan_moshi_recipe
from inlay.doctor.recipes import MEASURED
from inlay.moshi.model import MoshiForTraining
from inlay.moshi.sequences import frames_of, load_sequences
from inlay.moshi.weights import load_checkpoint
from inlay.report.provenance import provenance
from inlay.train.directory import mixed_precision, training_device
from inlay.train.moshi import DTYPES, build_moshi
from inlay.train.moshi_recipe import MoshiRecipe
from inlay.train.yaml_recipe import RecipeError

_BEFORE_IT_IS_BUILT = {"lint.layers", "lint.other_codes"}
"""Findings with which the model is not built: it could not be given its memory, or not be trained on these codes."""


def examine_moshi_recipe(
    recipe: MoshiRecipe, *, source: Path | None = None, budget_gb: float | None = None, progress: Progress | None = None
) -> Diagnosis:
    """Say whether the recipe's memory will learn from these conversations, and whether its training fits.

    Args:
        recipe: A checked recipe with a memory.
        source: The file it was read from, for the headings.
        budget_gb: Memory that a training step may take, in GB (10⁹ bytes); the recipe's own, or the machine's, when not
            given.
        progress: Called with the name of each examination before it is made.

    Raises:
        RecipeError: The recipe has no memory.
        DataError: Its codes cannot be read.
        MoshiWeightsError: Its model's files are not all there.
    """
    if recipe.memory is None:
        raise RecipeError(f"{source or recipe.name} has no memory (memory: null): there is nothing to examine")
    tell = progress or (lambda name: None)
    made: dict[str, Examination] = {}
    skipped: dict[str, str] = {}

    def stop(why: str) -> Diagnosis:
        return Diagnosis(recipe.name, made, {**skipped, **dict.fromkeys(MEASURED, why)}, provenance())

    tell("lint")
    set_seed(recipe.seed)
    device = training_device(recipe.trainer)
    checkpoint = load_checkpoint(recipe.moshi_paths.hf_repo_id, device=device, dtype=DTYPES[recipe.param_dtype])
    data = recipe.load_data()
    made["lint"] = lint_moshi(MoshiCase(recipe, checkpoint, data), source=source)
    if any(finding.code in _BEFORE_IT_IS_BUILT for finding in made["lint"].findings()):
        return stop("the model was not built, see the lint")
    tell("memory")
    try:
        made["memory"] = plan_moshi_recipe(
            recipe,
            lm_config=checkpoint.lm_config,
            budget_gb=budget_gb,
            progress=lambda what: tell(f"memory, {what}"),
        )
    except PlanError as error:
        skipped["memory"] = str(error)
    if "memory" in made and any(finding.severity is Severity.FATAL for finding in made["memory"].findings()):
        return stop("the training step does not fit, so the model was not built")
    tell("model")
    lm, _ = build_moshi(recipe, checkpoint)
    task = MoshiForTraining(lm, recipe.loss)
    model = MoshiCausalLM(task)
    try:
        with mixed_precision(recipe.trainer_arguments(), device):
            measured = examine(
                model,
                model.sample(data.train, recipe.batch_size, recipe.seed),
                longer_batch=_longer_batch(model, recipe),
                frame_rate=recipe.doctor.frame_rate,
                length_key=LENGTH_KEY,
                progress=progress,
            )
    finally:
        task.restore()
    return Diagnosis(recipe.name, {**measured.examinations, **made}, skipped, measured.provenance)


def _longer_batch(model: MoshiCausalLM, recipe: MoshiRecipe) -> dict[str, Tensor] | None:
    """The same conversations in sequences twice as long; None where they, or what a recipe may ask for, end before."""
    seconds = 2 * recipe.duration_sec
    if frames_of(seconds) > MOST_FRAMES:
        return None
    whole = recipe.data.model_copy(update={"min_sec": seconds})
    try:
        data = load_sequences(whole, duration_sec=seconds, seed=recipe.seed, needs_eval=False)
    except DataError:
        return None
    return model.sample(data.train, recipe.batch_size, recipe.seed)
