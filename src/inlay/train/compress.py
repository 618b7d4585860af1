"""One compression run: from a recipe to a directory that holds everything about it.

runs/NAME/
  recipe.yaml         the recipe as it ran, overrides included
  metrics.jsonl       what the Trainer logged, one line per log
  tensorboard/        the same for TensorBoard
  checkpoint-N/       to resume from
  pretraining/        the same of the stage before, with what it had trained by its end
  model/              the decoder, where it was trained here
  tokenizer/
  compressor/         what was trained, with cues.safetensors and decoder_adapter/ as far as the recipe has them
  report.html
  finished

The decoder and its tokenizer are written first, so that a run that was cut off goes on with the very same ones.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from peft import PeftModel
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments, set_seed

from inlay.data import FactsDataset, QAData, load_qa
from inlay.data.tokenizer import load_pretrained_tokenizer
from inlay.devices import chosen_device
from inlay.fastweight import InlayError
from inlay.files import write_folder
from inlay.softtoken.compressors import Compressor, build_compressor, load_compressor
from inlay.softtoken.objectives import Objective
from inlay.softtoken.prompting import BoundLayout
from inlay.train.compress_data import ByContext, ContextCollator
from inlay.train.compress_recipe import CompressRecipe, load_compress_recipe
from inlay.train.compress_trainer import (
    COMPRESSOR,
    DECODER_ADAPTER,
    PRETRAINING,
    CompressionTask,
    CompressTrainer,
    Stage,
    stages,
)
from inlay.train.directory import (
    DONE,
    RECIPE,
    TOKENIZER,
    begin_run,
    finish_run,
    refuse_another_run,
    refuse_fewer_steps,
    require_finished,
    run_trainer,
    told_once,
    training_arguments,
)
from inlay.train.loss_parts import TrainingError
from inlay.train.pretrained import load_causal_lm, with_lora
from inlay.train.weights import MODEL
from inlay.train.yaml_recipe import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "CompressRun",
    "CompressTrainer",
    "CompressionTask",
    "TrainingError",
    "build_task",
    "load_compress_run",
    "load_decoder",
    "train_compressor",
]


@dataclass(frozen=True)
class CompressRun:
    """A finished compression run, loaded.

    Attributes:
        directory: Where it lies.
        recipe: What it ran.
        model: The decoder, in eval mode.
        compressor: The trained compressor for it, in eval mode.
        layout: The recipe's layout in the decoder's tokens.
        tokenizer: The decoder's.
    """

    directory: Path
    recipe: CompressRecipe
    model: PreTrainedModel | PeftModel
    compressor: Compressor[Any]
    layout: BoundLayout
    tokenizer: PreTrainedTokenizerFast

    @property
    def context_tokens(self) -> int | None:
        """Tokens behind which contexts are cut, as the recipe says; None reads them whole."""
        return self.recipe.context_tokens


def train_compressor(
    recipe: CompressRecipe,
    directory: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    trainer_class: type[CompressTrainer] = CompressTrainer,
) -> dict[str, float]:
    """Train what ``recipe`` says and leave everything in ``directory``.

    A decoder with random weights is trained first, or taken from the cache. What the first question of the data, and
    one about its longest context, show to be wrong with layout, compressor or objectives is raised before anything is
    written.

    Args:
        recipe: A checked recipe.
        directory: The run's own directory.
        resume: Go on from the last checkpoint in ``directory``; from the start if there is none.
        console: Where decoder, data and stages are summed up; None for nowhere.
        trainer_class: The Trainer, or a subclass with other objectives.

    Returns:
        The closing metrics of the last stage's Trainer.

    Raises:
        RunError: ``directory`` holds a run already (without ``resume``), or another one (with it).
        RecipeError: The decoder's vocabulary is smaller than its tokenizer's.
        TrainingError: A loss is not a number.
    """
    refuse_another_run(directory, recipe, resume)
    for stage in stages(recipe):  # what this machine cannot do (bf16: true) is told before anything is made
        place = _place(stage, directory)
        arguments = _arguments(recipe, stage, place)
        if resume:
            refuse_fewer_steps(place, arguments)
    console, processes = told_once(console), PartialState()
    data = load_qa(recipe.data)
    model, tokenizer = _decoder(recipe, directory, console)
    weights = model.state_dict()  # by the names they have without adapters
    set_seed(recipe.seed)
    task = build_task(recipe, model, tokenizer)
    _try_one(task, data, trainer_class.objectives)
    console.print(_summary(task, data))

    begin_run(directory, recipe)
    if processes.is_main_process:
        if not (directory / TOKENIZER).is_dir():
            write_folder(directory / TOKENIZER, tokenizer.save_pretrained)
        if recipe.decoder.config is not None and not (directory / MODEL).is_dir():
            write_folder(directory / MODEL, lambda path: model.save_pretrained(path, state_dict=weights))
    processes.wait_for_everyone()

    metrics: dict[str, float] = {}
    for stage in stages(recipe):
        place = _place(stage, directory)
        done = (place / DONE).is_file()
        processes.wait_for_everyone()  # all have looked before one of them is done
        if done:
            task.load_trained(place)
            continue
        metrics = _train_stage(task, stage, data, place, trainer_class, resume, console)
        finish_run(place, functools.partial(task.save_trained, place))
    return metrics


def build_task(recipe: CompressRecipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> CompressionTask:
    """What the recipe trains, before its first step: LoRA, compressor and cues around a decoder.

    Args:
        recipe: A checked recipe.
        model: The decoder, without adapters. Its weights are frozen, and adapters are put into it.
        tokenizer: The decoder's.

    Raises:
        RecipeError: The decoder's vocabulary is smaller than its tokenizer's.
        InlayError: Layout or compressor do not go with the decoder.
    """
    known = model.get_input_embeddings().num_embeddings
    if known < len(tokenizer):
        raise RecipeError(f"the decoder knows {known} tokens and its tokenizer has {len(tokenizer)}: they do not match")
    layout = recipe.layout.bind(tokenizer)
    decoder = with_lora(model, recipe.decoder_lora, "decoder_lora")
    return CompressionTask(recipe, decoder, build_compressor(recipe.compressor, decoder), layout)


def load_compress_run(directory: str | Path, *, device: str | torch.device | None = None) -> CompressRun:
    """Load a finished run.

    Raises:
        RunError: ``directory`` is no compression run, or one that has not finished.
        CompressorError: The compressor's files are damaged, or the decoder it was trained for has changed.
    """
    directory = Path(directory)
    require_finished(directory)
    recipe = load_compress_recipe(directory / RECIPE)
    base, tokenizer = load_decoder(recipe, directory)
    model: PreTrainedModel | PeftModel = base.to(chosen_device(device))
    if (directory / DECODER_ADAPTER).is_dir():
        model = PeftModel.from_pretrained(base, str(directory / DECODER_ADAPTER))
    compressor = load_compressor(directory / COMPRESSOR, model)
    layout = compressor.layout = recipe.layout.bind(tokenizer)
    return CompressRun(directory, recipe, model.eval(), compressor.eval(), layout, tokenizer)


def _decoder(
    recipe: CompressRecipe, directory: Path, console: Console
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The decoder before any adapter: that of the run where it has one already, else trained here or loaded."""
    if recipe.decoder.config is not None and not (directory / MODEL).is_dir():
        from inlay.train.base_lm import build_base_lm

        return build_base_lm(recipe, console)
    return load_decoder(recipe, directory)


def load_decoder(
    recipe: CompressRecipe, directory: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The decoder, without adapters, from ``model/`` and ``tokenizer/`` of a run, or from where the recipe says.

    Args:
        recipe: With ``decoder.name_or_path``, or the run's own.
        directory: Of the run; None where there is none yet.

    Raises:
        RecipeError: The decoder cannot be loaded.
        DataError: Its tokenizer cannot.
    """
    own = None if directory is None else directory / MODEL
    kept = None if directory is None else directory / TOKENIZER
    place = own if own is not None and own.is_dir() else str(recipe.decoder.name_or_path)
    name = kept if kept is not None and kept.is_dir() else str(recipe.decoder.name_or_path)
    return load_causal_lm(place, recipe.decoder, "decoder"), load_pretrained_tokenizer(name)


def _try_one(task: CompressionTask, data: QAData, objectives: Mapping[str, Objective]) -> None:
    """Compute every objective of every stage for one question, and for those about either set's longest context.

    Raises:
        InlayError: It cannot be done; names the question.
    """
    tried = {data.train[0].id: data.train[0]}
    if not isinstance(data.train, FactsDataset):  # whose contexts are made when asked for, all of about one length
        longest = [max(part, key=lambda example: len(example.context)) for part in (data.train, data.eval)]
        tried |= {example.id: example for example in longest}
    recipe, device = task.recipe, task.compressor.lm.device
    ratio = min(
        (ratio for drawn in (recipe.draws, *(one.ratios for one in recipe.curriculum)) for ratio in drawn if ratio),
        default=None,
    )
    collate = ContextCollator(task.layout, recipe.context_tokens)
    task.eval()
    for example in tried.values():
        batch = collate([[example]])
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        try:
            with torch.no_grad():
                for stage in stages(recipe):
                    task(**inputs, weights=stage.weights, objectives=objectives, ratio=ratio)
        except InlayError as error:
            raise type(error)(f"question {example.id}: {error}") from error


def _place(stage: Stage, directory: Path) -> Path:
    return directory / PRETRAINING if stage.name == PRETRAINING else directory


def _train_stage(
    task: CompressionTask,
    stage: Stage,
    data: QAData,
    directory: Path,
    trainer_class: type[CompressTrainer],
    resume: bool,
    console: Console,
) -> dict[str, float]:
    recipe = task.recipe
    console.print(f"{stage.name}: {_in_words(stage.weights)}{', one drawn per step' if stage.drawn else ''}")
    trainer = trainer_class(
        recipe=recipe,
        stage=stage,
        model=task,
        args=_arguments(recipe, stage, directory),
        train_dataset=ByContext(data.train, recipe.questions_per_context),
        eval_dataset=ByContext(data.eval, recipe.questions_per_context),
        data_collator=ContextCollator(task.layout, recipe.context_tokens),
    )
    return run_trainer(trainer, directory, resume=resume, console=console)


def _arguments(recipe: CompressRecipe, stage: Stage, directory: Path) -> TrainingArguments:
    arguments = recipe.trainer
    if stage.name == PRETRAINING and recipe.pretraining is not None:
        arguments = arguments | recipe.pretraining.trainer | {"max_steps": recipe.pretraining.max_steps}
    return training_arguments(directory, recipe.seed, arguments)


def _summary(task: CompressionTask, data: QAData) -> str:
    trained = sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)
    count = sum(parameter.numel() for parameter in task.parameters())
    compressor = task.recipe.compressor
    budget = f"{compressor.slots} slots" if compressor.slots else "ratios " + ", ".join(map(str, compressor.ratios))
    return (
        f"{type(task.compressor.lm.model).__name__} with {compressor.kind} ({budget}): {count:,} parameters, "
        f"{trained:,} trained\n{len(data.train):,} questions to train on, {len(data.eval):,} to evaluate on"
    )


def _in_words(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
