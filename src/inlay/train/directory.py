"""What every run on disk has in common: one recipe per directory, and a Trainer that writes everything into it."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from inlay.devices import chosen_device
from inlay.fastweight import InlayError
from inlay.files import replacing, write_whole
from inlay.train.trainer import MetricsFile, ProgressBar, best_checkpoint
from inlay.train.yaml_recipe import RecipeError, RunRecipe, dump_recipe, read_recipe

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
TOKENIZER = "tokenizer"
DONE = "finished"

_STATE = "trainer_state.json"
_STEP = re.compile(r"checkpoint-(\d+)")

_DEFAULTS: dict[str, Any] = {"report_to": "none", "logging_steps": 10, "save_total_limit": 2}


class RunError(InlayError, RuntimeError):
    """A run's directory is not what was asked for."""


def prepare_run(
    directory: Path, recipe: RunRecipe, trainer: dict[str, Any], *, resume: bool, console: Console | None
) -> tuple[TrainingArguments, Console]:
    """What comes before a run's data and model: what must be refused is, and the seed is set.

    Args:
        directory: The run's own directory. Nothing is written.
        recipe: What it is to run.
        trainer: The recipe's arguments for the Trainer.
        resume: Go on from the last checkpoint in ``directory``.
        console: Of the caller; None for nowhere.

    Returns:
        The Trainer's arguments, and the console, on which one process alone prints.

    Raises:
        RunError: ``directory`` holds a run already (without ``resume``), or another one (with it), or a checkpoint
            beyond the steps that are asked for.
        RecipeError: The Trainer does not take the arguments.
    """
    refuse_another_run(directory, recipe, resume)
    arguments = training_arguments(directory, recipe.seed, trainer)
    if resume:
        refuse_fewer_steps(directory, arguments)
    set_seed(recipe.seed)
    return arguments, told_once(console)


def told_once(console: Console | None) -> Console:
    """The console in the main process; one that says nothing in the others, and where there is none."""
    return console if console is not None and PartialState().is_main_process else Console(quiet=True)


def refuse_another_run(directory: Path, recipe: RunRecipe, resume: bool) -> None:
    """Make sure that ``directory`` holds no run, or with ``resume`` none but this recipe's.

    Raises:
        RunError: It does, or the run has finished and kept nothing to go on from. Only what the recipe says to be
            ``free_when_resumed`` may differ when a run is resumed.
    """
    path = directory / RECIPE
    if not path.exists():
        return
    if not resume:
        raise RunError(f"{directory} holds a run already. Go on with --resume, start another with name=…, or remove it")
    before = read_recipe(type(recipe), path)
    free = recipe.free_when_resumed
    was, now = before.kept_when_resumed(), recipe.kept_when_resumed()
    odd = ", ".join(key for key in was if was[key] != now[key])
    if odd:
        raise RunError(
            f"{directory} was trained with another recipe ({path}), which differs in {odd}: when a run is resumed only "
            f"{', '.join(sorted(free))} may change. Resume with that one, or choose another name"
        )
    if (directory / DONE).is_file() and not _checkpoints(directory):
        raise RunError(
            f"{directory} has finished and kept no checkpoint to go on from (trainer.save_strategy); start another run "
            "with name=…, or remove it"
        )


def refuse_fewer_steps(directory: Path, arguments: TrainingArguments) -> None:
    """Make sure that no checkpoint in ``directory`` is beyond the steps or epochs that are asked for.

    Raises:
        RunError: One is.
    """
    by_steps = arguments.max_steps > 0
    name, asked = ("max_steps", arguments.max_steps) if by_steps else ("num_train_epochs", arguments.num_train_epochs)
    for path, step in _checkpoints(directory).items():
        if (step if by_steps else _epoch(path)) > asked:
            raise RunError(
                f"{path} is beyond {name}: {asked:g}; raise that, or remove the checkpoints that are too late"
            )


def refuse_empty_epochs(rows: int, arguments: TrainingArguments) -> None:
    """Make sure that the data fill at least one batch, where those that they do not fill are dropped.

    Args:
        rows: Sequences to train on.
        arguments: The Trainer's.

    Raises:
        RunError: They do not, so that nothing would be trained.
    """
    batch = arguments.train_batch_size * arguments.world_size
    if arguments.dataloader_drop_last and rows < batch:
        raise RunError(
            f"{rows:,} sequences fill no batch of {batch:,}, and trainer.dataloader_drop_last leaves out what is not "
            "full: nothing would be trained. Take it out, or lower trainer.per_device_train_batch_size"
        )


def require_finished(directory: Path) -> None:
    """Make sure that ``directory`` is a run that was trained to its end.

    Raises:
        RunError: It is none, or it has to be gone on with; says how.
    """
    path = directory / RECIPE
    if not path.is_file():
        hint = "; it is a recipe: train it first" if directory.is_file() else ""
        raise RunError(f"{directory} is no run: it has no {RECIPE}{hint}")
    if not (directory / DONE).is_file():
        place = f"name={directory.name} --runs {directory.parent}"
        raise RunError(f"the run in {directory} has not finished; go on with: inlay train {path} {place} --resume")


def begin_run(directory: Path, recipe: RunRecipe) -> None:
    """Make ``directory`` the run of ``recipe``, which has not finished. One of the processes writes."""
    processes = PartialState()
    processes.wait_for_everyone()  # the others must not take this run for one that was there before
    if processes.is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / RECIPE, dump_recipe(recipe))
        (directory / DONE).unlink(missing_ok=True)
    processes.wait_for_everyone()


def finish_run(directory: Path, save: Callable[[], object]) -> None:
    """Let one of the processes ``save`` what was trained and call the run finished, while the others wait."""
    processes = PartialState()
    if processes.is_main_process:
        save()
        (directory / DONE).write_text("")
    processes.wait_for_everyone()


def training_arguments(directory: Path, seed: int, trainer: dict[str, Any]) -> TrainingArguments:
    """The Trainer's arguments for a run in ``directory``: a recipe's ``trainer`` section over the run's defaults.

    One GPU a process; several are for ``torchrun`` or ``accelerate launch``.

    Raises:
        RecipeError: A value that ``TrainingArguments`` does not take, alone or with another.
    """
    try:
        arguments = TrainingArguments(
            output_dir=str(directory),
            seed=seed,
            remove_unused_columns=False,
            label_names=["labels"],
            **(_DEFAULTS | uploads(trainer) | trainer),
        )
    except (ValueError, TypeError) as error:
        wants_gpu = "use_cpu" in str(error)
        hint = " There is no GPU here; to train on the CPU as it is: trainer.use_cpu=true" if wants_gpu else ""
        raise RecipeError(f"trainer: {error}{hint}") from error
    arguments._n_gpu = min(1, arguments.n_gpu)  # DataParallel splits neither these models nor what they are given
    return arguments


def uploads(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The Trainer's arguments by which batches come to a GPU while the host goes on: pinned, and without waiting.

    What is pinned and waited for, as by default, waits with each tensor of a batch for all that the GPU has to do.
    """
    on_gpu = torch.cuda.is_available() and not trainer.get("use_cpu")
    pinned = bool(trainer.get("dataloader_pin_memory", on_gpu))
    return {"dataloader_pin_memory": pinned, "accelerator_config": {"non_blocking": pinned}}


def training_device(trainer: Mapping[str, Any]) -> torch.device:
    """Where a run with this ``trainer`` section trains: the GPU if there is one."""
    return chosen_device("cpu" if trainer.get("use_cpu") else None)


def mixed_precision(trainer: Mapping[str, Any], device: torch.device) -> AbstractContextManager[object]:
    """What the Trainer runs the model in: autocast with ``bf16`` or ``fp16``, nothing without."""
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if trainer.get(key):
            return torch.autocast(device.type, dtype)
    return nullcontext()


def run_trainer(trainer: Trainer, directory: Path, *, resume: bool, console: Console) -> dict[str, float]:
    """Train, with ``metrics.jsonl``, ``tensorboard/`` and checkpoints in ``directory`` and a progress bar.

    Args:
        trainer: Ready to train.
        directory: Of the run.
        resume: Go on from the last whole checkpoint in ``directory``; from the start if there is none.
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
    last = _last_whole_checkpoint(directory, trainer.args, console) if resume else None
    if last is not None:
        state = TrainerState.load_from_json(str(last / _STATE))
        if _is_over(state, trainer.args):
            console.print(f"{last} is the end of the training")
            best = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
            trainer._load_from_checkpoint(str(best_checkpoint(state, trainer.args) if best else last))
            writer.close()
            return {}
        console.print(f"resuming from {last}")
        if trainer.is_world_process_zero():
            _find_best_again(state, trainer.args, last)
        PartialState().wait_for_everyone()
    elif resume:
        console.print(f"no checkpoint in {directory}: training begins anew")
    try:
        outcome = trainer.train(resume_from_checkpoint=None if last is None else str(last))
    finally:
        writer.close()
    return {key: float(value) for key, value in outcome.metrics.items()}


def _checkpoints(directory: Path) -> dict[Path, int]:
    """The checkpoints in a run's directory, whole or not, and their steps, the latest first."""
    steps = {path: int(found[1]) for path in directory.glob("checkpoint-*") if (found := _STEP.fullmatch(path.name))}
    return dict(sorted(steps.items(), key=lambda item: -item[1]))


def _last_whole_checkpoint(directory: Path, arguments: TrainingArguments, console: Console) -> Path | None:
    """The latest that can be gone on from; what is wrong with later ones is told."""
    for path in _checkpoints(directory):
        fault = _fault(path, arguments)
        if fault is None:
            return path
        console.print(f"{path} {fault}: it is passed over")
    return None


def _fault(checkpoint: Path, arguments: TrainingArguments) -> str | None:
    """Why a checkpoint cannot be gone on from; None where it can. The Trainer writes its state last."""
    try:
        json.loads((checkpoint / _STATE).read_text())
    except (OSError, ValueError):
        return f"was cut off while it was written (no whole {_STATE})"
    for name in () if arguments.save_only_model else ("optimizer.pt", "scheduler.pt"):
        if not (checkpoint / name).is_file():
            return f"has no {name}"
        if not zipfile.is_zipfile(checkpoint / name):
            return f"holds a damaged {name}"
    return None


def _epoch(checkpoint: Path) -> float:
    """Of a checkpoint; 0 where it does not say."""
    try:
        return float(json.loads((checkpoint / _STATE).read_text()).get("epoch") or 0.0)
    except (OSError, ValueError):
        return 0.0


def _find_best_again(state: TrainerState, arguments: TrainingArguments, checkpoint: Path) -> None:
    """Write into a checkpoint where the best one lies now; the Trainer forgets one that is not where it was."""
    if state.best_model_checkpoint is None or Path(state.best_model_checkpoint).is_dir():
        return
    best = best_checkpoint(state, arguments)
    if best.is_dir():
        state.best_model_checkpoint = str(best)
        with replacing(checkpoint / _STATE) as new:
            state.save_to_json(str(new))


def _is_over(state: TrainerState, arguments: TrainingArguments) -> bool:
    """Whether a checkpoint is of the last step: the Trainer would take one more."""
    if arguments.max_steps <= 0:
        return state.epoch is not None and state.epoch >= arguments.num_train_epochs
    return state.global_step >= arguments.max_steps
