"""One training run: from a recipe to a directory that holds everything about it.

runs/NAME/
  recipe.yaml       the recipe as it ran, overrides included
  metrics.jsonl     what the Trainer logged, one line per log
  tensorboard/      the same for TensorBoard
  checkpoint-N/     to resume from
  model/            a model that was trained from scratch or as a whole without a memory
  memory/           the memory, with the base weights that were trained along
  adapter/          PEFT adapters
  tokenizer/
  report.html
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from inlay.data import Data, PackedStream, PackingStatistics, PretrainedTokenizer, RecallConfig, TextConfig, load_data
from inlay.devices import chosen_device
from inlay.doctor.attribution import attribute_gradients
from inlay.fastweight import Memory, attach, attach_pretrained
from inlay.sliced_loss import slice_loss
from inlay.train.directory import (
    RECIPE,
    TOKENIZER,
    RunError,
    begin_run,
    finish_run,
    prepare_run,
    refuse_empty_epochs,
    require_finished,
    run_trainer,
)
from inlay.train.monitor import MemoryMonitor, monitor_on
from inlay.train.pretrained import load_causal_lm, untrained_causal_lm, with_lora
from inlay.train.recipe import Recipe, RecipeError, load_recipe
from inlay.train.trainer import InlayTrainer
from inlay.train.weights import ADAPTER, MEMORY, MODEL, save_base


@dataclass(frozen=True)
class Run:
    """A finished run, loaded.

    Attributes:
        directory: Where it lies.
        recipe: What it ran.
        model: The trained model, in eval mode.
        memory: Its memory; None if it has none.
    """

    directory: Path
    recipe: Recipe
    model: PreTrainedModel | PeftModel
    memory: Memory | None

    @property
    def data_config(self) -> TextConfig | RecallConfig:
        """The run's data, read with the tokenizer it was trained with, which another machine might not learn again."""
        data = self.recipe.data
        if isinstance(data, RecallConfig):
            return data
        tokenizer = PretrainedTokenizer(kind="pretrained", name_or_path=str(self.directory / TOKENIZER))
        return data.model_copy(update={"tokenizer": tokenizer})


def train(recipe: Recipe, directory: Path, *, resume: bool = False, console: Console | None = None) -> dict[str, float]:
    """Train what ``recipe`` says and leave everything in ``directory``.

    Args:
        recipe: A checked recipe.
        directory: The run's own directory.
        resume: Go on from the last checkpoint in ``directory``; from the start if there is none.
        console: Where data and model are summed up before training; None for nowhere.

    Returns:
        The Trainer's closing metrics.

    Raises:
        RunError: ``directory`` holds a run already (without ``resume``), or another one (with it).
        MemoryNeverReadError: No document is longer than a chunk.
    """
    arguments, console = prepare_run(directory, recipe, recipe.trainer, resume=resume, console=console)
    data = load_data(recipe.data)
    if isinstance(data.train, PackedStream) and arguments.max_steps <= 0:
        raise RecipeError("a streamed data set has no length: say how many steps, trainer.max_steps")
    if not isinstance(data.train, PackedStream):
        refuse_empty_epochs(len(data.train), arguments)
    model = build_model(recipe, data.vocab_size)
    memory = _attach(model, recipe)
    _refuse_unreadable(recipe, data, memory)
    console.print(_data_table(data, recipe))
    console.print(_model_line(model, memory))

    begin_run(directory, recipe)
    trainer = InlayTrainer(
        memory=memory,
        memory_learning_rate=recipe.memory_learning_rate,
        monitor=None if memory is None else _monitor(memory, model, data, recipe, console),
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.eval,
        data_collator=data.collate,
    )
    metrics = run_trainer(trainer, directory, resume=resume, console=console)
    finish_run(directory, lambda: _save(model, memory, data, recipe, directory))
    return metrics


def build_model(recipe: Recipe, vocab_size: int) -> PreTrainedModel | PeftModel:
    """The recipe's model before any memory: pretrained or with random weights, with LoRA adapters if it asks for them.

    Raises:
        RecipeError: The architecture is unknown or its vocabulary is smaller than the data's.
    """
    section = recipe.model
    if section.name_or_path is not None:
        model = load_causal_lm(section.name_or_path, section)
        fix = "the tokenizer is another model's: take its own (data.tokenizer)"
    else:
        dtype = torch.float32 if section.dtype == "auto" else getattr(torch, section.dtype)
        model = untrained_causal_lm(section, dtype=dtype, vocab_size=vocab_size)
        fix = "set model.config.vocab_size, or leave it out"
    size = model.get_input_embeddings().num_embeddings
    if size < vocab_size:
        raise RecipeError(f"the model knows {size} tokens but the data has {vocab_size}: {fix}")
    _refuse_too_few_positions(model, recipe.data.sequence_length)
    slice_loss(model)
    return with_lora(model, recipe.lora)


def _refuse_too_few_positions(model: PreTrainedModel, sequence_length: int) -> None:
    """Learned positions end; rotary ones may be exceeded."""
    for name, module in model.named_modules():
        learned = isinstance(module, nn.Embedding) and ("wpe" in name or "position" in name)
        if learned and module.num_embeddings < sequence_length:
            raise RecipeError(
                f"the model has {module.num_embeddings} positions ({name}) and sequences have {sequence_length} "
                "tokens; set data.sequence_length"
            )


def load_run(directory: str | Path, *, device: str | torch.device | None = None) -> Run:
    """Load a finished run.

    Raises:
        RunError: ``directory`` is no run, or one that has not finished.
    """
    directory = Path(directory)
    require_finished(directory)
    recipe = load_recipe(directory / RECIPE)
    own = (directory / MODEL).is_dir()
    if not own and recipe.model.name_or_path is None:
        raise RunError(f"{directory} has lost its {MODEL}/, without which it cannot be loaded; train it again")
    model: PreTrainedModel | PeftModel = load_causal_lm(
        directory / MODEL if own else str(recipe.model.name_or_path), recipe.model
    )
    slice_loss(model)
    if (directory / ADAPTER).is_dir():
        model = PeftModel.from_pretrained(model, str(directory / ADAPTER))
    memory = attach_pretrained(model, directory / MEMORY) if recipe.memory is not None else None
    model.to(chosen_device(device)).eval()
    return Run(directory, recipe, model, memory)


def _attach(model: PreTrainedModel | PeftModel, recipe: Recipe) -> Memory | None:
    if recipe.memory is None:
        return None
    return attach(model, recipe.memory).train_only(recipe.mode)


def _refuse_unreadable(recipe: Recipe, data: Data, memory: Memory | None) -> None:
    statistics = data.statistics.train
    if memory is None:
        return
    if statistics is None or memory.config.boundary == "carry":  # a stream is not counted beforehand
        memory.check_lengths([recipe.data.sequence_length])
    else:
        memory.check_lengths([int(statistics.piece_tokens.max())])


def _monitor(
    memory: Memory, model: PreTrainedModel | PeftModel, data: Data, recipe: Recipe, console: Console
) -> MemoryMonitor:
    """Says why the memory does not learn as the doctor does."""

    def diagnose() -> str:
        rows = int(recipe.trainer.get("per_device_train_batch_size", 8))
        return attribute_gradients(memory, model, data.sample(rows, recipe.seed)).sentence

    return monitor_on(console, memory, diagnose)


def _data_table(data: Data, recipe: Recipe) -> Table:
    splits = {"training": data.statistics.train, "evaluation": data.statistics.eval}
    table = Table(title="Data", title_justify="left")
    table.add_column("")
    for name in splits:
        table.add_column(name, justify="right")
    counts = [_counts(split, recipe) for split in splits.values()]
    for label in counts[-1]:
        table.add_row(label, *(count.get(label, "streamed") for count in counts))
    if data.statistics.skipped:
        table.caption = f"{data.statistics.skipped} files or lines were skipped, see the warnings above"
    return table


def _counts(split: PackingStatistics | None, recipe: Recipe) -> dict[str, str]:
    """What is told of a split before training; nothing of a stream, which is not counted beforehand."""
    if split is None:
        return {}
    counts = {
        "documents": f"{split.documents:,}",
        "sequences": f"{split.sequences:,} × {split.sequence_length:,}",
        "tokens": f"{split.tokens:,}",
        "padding": f"{split.padding_share:.1%}",
    }
    if recipe.memory is not None:
        memory = split.memory(recipe.memory.chunk_size, recipe.memory.boundary)
        counts |= {
            f"chunks of {recipe.memory.chunk_size}": f"{memory.chunks:,}",
            "pieces of one chunk (never read)": f"{memory.single_chunk_pieces:,}",
            "tokens that read a memory": f"{memory.reading_share:.1%}",
        }
    return counts


def _model_line(model: PreTrainedModel | PeftModel, memory: Memory | None) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    line = f"{type(model).__name__}: {count:,} parameters, {trainable:,} trained"
    return line if memory is None else f"{line}\n{memory}"


def _save(
    model: PreTrainedModel | PeftModel, memory: Memory | None, data: Data, recipe: Recipe, directory: Path
) -> None:
    whole = recipe.model.name_or_path is None or memory is None
    if whole and isinstance(model, PreTrainedModel):
        save_base(model, memory, directory / MODEL)
    if memory is not None:
        memory.save_pretrained(directory / MEMORY, base=not whole)
    if isinstance(model, PeftModel):
        model.save_pretrained(str(directory / ADAPTER))
    if data.tokenizer is not None:
        data.tokenizer.save_pretrained(str(directory / TOKENIZER))
