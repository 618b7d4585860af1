"""What every run on disk has in common: one recipe per directory, and a Trainer that writes everything into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from inlay.fastweight import InlayError
from inlay.train.trainer import MetricsFile, ProgressBar
from inlay.train.yaml_recipe import RecipeError, Section, dump_recipe, read_recipe

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
TOKENIZER = "tokenizer"
DONE = "finished"

_DEFAULTS: dict[str, Any] = {"report_to": "none", "logging_steps": 10, "save_total_limit": 2}


class RunError(InlayError, RuntimeError):
    """A run's directory is not what was asked for."""


def refuse_another_run(directory: Path, recipe: Section, resume: bool) -> None:
    """Make sure that ``directory`` holds no run, or with ``resume`` none but this recipe's.

    Raises:
        RunError: It does. Only the recipe's ``trainer`` section may differ when a run is resumed.
    """
    path = directory / RECIPE
    if not path.exists():
        return
    if not resume:
        raise RunError(f"{directory} holds a run already. Go on with --resume, start another with name=…, or remove it")
    before = read_recipe(type(recipe), path)
    if before.model_copy(update={"trainer": {}}) != recipe.model_copy(update={"trainer": {}}):
        raise RunError(
            f"{directory} was trained with another recipe ({path}): only its trainer section may change when it is "
            "resumed. Resume with that one, or choose another name"
        )


def begin_run(directory: Path, recipe: Section) -> None:
    """Make ``directory`` the run of ``recipe``, which has not finished."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RECIPE).write_text(dump_recipe(recipe))
    (directory / DONE).unlink(missing_ok=True)


def training_arguments(directory: Path, seed: int, trainer: dict[str, Any]) -> TrainingArguments:
    """The Trainer's arguments for a run in ``directory``: a recipe's ``trainer`` section over the run's defaults.

    Raises:
        RecipeError: A value that ``TrainingArguments`` does not take, alone or with another.
    """
    try:
        return TrainingArguments(
            output_dir=str(directory),
            seed=seed,
            remove_unused_columns=False,
            label_names=["labels"],
            **(_DEFAULTS | {"dataloader_pin_memory": torch.cuda.is_available()} | trainer),
        )
    except (ValueError, TypeError) as error:
        raise RecipeError(f"trainer: {error}") from error


def run_trainer(trainer: Trainer, directory: Path, *, resume: bool, console: Console) -> dict[str, float]:
    """Train, with ``metrics.jsonl``, ``tensorboard/`` and checkpoints in ``directory`` and a progress bar.

    Args:
        trainer: Ready to train.
        directory: Of the run.
        resume: Go on from the last checkpoint in ``directory``; from the start if there is none.
        console: Is told what is resumed.

    Returns:
        The Trainer's closing metrics.
    """
    writer = SummaryWriter(str(directory / "tensorboard"))
    trainer.add_callback(MetricsFile(directory / METRICS))
    trainer.add_callback(TensorBoardCallback(writer))
    trainer.remove_callback(PrinterCallback)
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressBar)
    last = get_last_checkpoint(str(directory)) if resume else None
    if last is not None:
        console.print(f"resuming from {last}")
    try:
        outcome = trainer.train(resume_from_checkpoint=last)
    finally:
        writer.close()
    return {key: float(value) for key, value in outcome.metrics.items()}
