"""One training run of Moshi: from a recipe to a directory that holds everything about it.

runs/NAME/
  recipe.yaml       the recipe as it ran, overrides included
  metrics.jsonl     what the Trainer logged, one line per log
  tensorboard/      the same for TensorBoard
  checkpoint-N/     to resume from
  moshi/            what was trained: see :mod:`inlay.moshi.checkpoint`
  report.html
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel
from rich.console import Console

from inlay.data.problems import DataError
from inlay.devices import chosen_device
from inlay.doctor.attribution import attribute_gradients
from inlay.doctor.moshi_model import MoshiCausalLM
from inlay.fastweight import Memory, attach
from inlay.moshi.checkpoint import load_finetuned
from inlay.moshi.duplex import Moshi
from inlay.moshi.lora import add_lora, embedding_parameters, lora_layers
from inlay.moshi.model import PACKED, MoshiForTraining, counts_positions
from inlay.moshi.sequences import MoshiData, collate_sequences
from inlay.moshi.weights import MoshiCheckpoint, load_checkpoint
from inlay.moshi.yarn import apply_yarn
from inlay.train.directory import (
    RECIPE,
    begin_run,
    finish_run,
    mixed_precision,
    prepare_run,
    require_finished,
    run_trainer,
)
from inlay.train.monitor import monitor_on
from inlay.train.moshi_recipe import MoshiRecipe, load_moshi_recipe
from inlay.train.moshi_trainer import FINETUNED, MoshiTrainer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class MoshiRun:
    """A finished run, loaded.

    Attributes:
        directory: Where it lies.
        recipe: What it ran.
        checkpoint: The checkpoint that was fine-tuned: Mimi and the text tokenizer are its.
        lm: The trained model, in eval mode and in the dtype of the recipe's base model.
        memory: Its memory; None if it has none.
    """

    directory: Path
    recipe: MoshiRecipe
    checkpoint: MoshiCheckpoint
    lm: LMModel
    memory: Memory | None

    @property
    def moshi(self) -> Moshi:
        """The model with its codec and tokenizer, to be talked with."""
        checkpoint = self.checkpoint
        return Moshi(
            self.lm, checkpoint.mimi, checkpoint.text_tokenizer, str(self.directory), checkpoint.info.lm_gen_config
        )


def train_moshi(
    recipe: MoshiRecipe, directory: Path, *, resume: bool = False, console: Console | None = None
) -> dict[str, float]:
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
        DataError: The data cannot be read or were encoded for another model.
        MemoryNeverReadError: No document is longer than a chunk.
    """
    arguments, console = prepare_run(directory, recipe, recipe.trainer_arguments(), resume=resume, console=console)
    data = recipe.load_data()
    checkpoint = load_checkpoint(
        recipe.moshi_paths.hf_repo_id, device=arguments.device, dtype=DTYPES[recipe.param_dtype]
    )
    refuse_other_codes(data, checkpoint)
    lm, memory = build_moshi(recipe, checkpoint)
    _refuse_packed(data, lm, memory)
    if memory is not None:
        memory.check_lengths([_longest(data, memory)])
        for name, split in (("Training", data.train_statistics), ("Evaluation", data.eval_statistics)):
            if split.rows:
                console.print(split.table(name, chunk_size=memory.config.chunk_size, boundary=memory.config.boundary))
    console.print(_model_line(lm, memory))

    begin_run(directory, recipe)
    task = MoshiForTraining(lm, recipe.loss)

    def diagnose() -> str:
        assert memory is not None
        model = MoshiCausalLM(task)
        with mixed_precision(recipe.trainer_arguments(), arguments.device):
            batch = model.sample(data.train, recipe.batch_size, recipe.seed)
            return attribute_gradients(memory, model, batch).sentence

    trainer = MoshiTrainer(
        checkpoint_config=checkpoint_config(checkpoint),
        pct_start=recipe.optim.pct_start,
        muon=recipe.optim.muon,
        memory=memory,
        memory_learning_rate=recipe.optim.memory_lr,
        monitor=None if memory is None else monitor_on(console, memory, diagnose),
        model=task,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.eval,
        data_collator=collate_sequences,
    )
    try:
        metrics = run_trainer(trainer, directory, resume=resume, console=console)
        finish_run(directory, lambda: trainer.save_model(str(directory)))
    finally:
        task.restore()
    return metrics


def build_moshi(recipe: MoshiRecipe, checkpoint: MoshiCheckpoint) -> tuple[LMModel, Memory | None]:
    """The recipe's model with adapters and memory, in training mode, its parameters chosen by the recipe's mode."""
    lm = checkpoint.load_lm(gradient_checkpointing=recipe.gradient_checkpointing)
    return lm, equip_moshi(recipe, lm)


def equip_moshi(recipe: MoshiRecipe, lm: LMModel) -> Memory | None:
    """Give a language model the recipe's window, adapters and memory, which is returned, and choose what is trained."""
    if recipe.yarn is not None:
        apply_yarn(lm, recipe.yarn)
    lm.train()
    if recipe.lora.enable:
        add_lora(lm, recipe.lora)
    memory = None if recipe.memory is None else attach(lm, recipe.memory)
    if memory is not None and recipe.mode != "lora":
        memory.train_only(recipe.mode)
    else:
        lm.requires_grad_(recipe.mode == "all")
        for layer in lora_layers(lm):
            layer.lora_A.requires_grad_(True)
            layer.lora_B.requires_grad_(True)
    if recipe.lora.enable and recipe.lora.ft_embed:
        for parameter in embedding_parameters(lm).values():
            parameter.requires_grad_(True)
    for parameter in lm.parameters():  # the optimizer's steps are smaller than bfloat16 can tell
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    return memory


def load_moshi_run(directory: Path, *, device: str | torch.device | None = None, **overrides: Any) -> MoshiRun:
    """Load a finished run.

    Args:
        directory: The run's.
        device: The GPU if there is one, else the CPU.
        overrides: Arguments of ``LMModel``.

    Raises:
        RunError: ``directory`` is no run, or one that has not finished.
        CheckpointError: Its files are damaged.
    """
    require_finished(directory)
    recipe = load_moshi_recipe(directory / RECIPE)
    checkpoint = load_checkpoint(
        recipe.moshi_paths.hf_repo_id, device=chosen_device(device), dtype=DTYPES[recipe.param_dtype]
    )
    lm, memory = load_finetuned(checkpoint, directory / FINETUNED, **overrides)
    return MoshiRun(directory, recipe, checkpoint, lm, memory)


def checkpoint_config(checkpoint: MoshiCheckpoint) -> dict[str, Any]:
    """What ``config.json`` of a checkpoint holds, or would hold."""
    raw = checkpoint.info.raw_config
    return dict(checkpoint.lm_config if raw is None else raw)


def refuse_other_codes(data: MoshiData, checkpoint: MoshiCheckpoint) -> None:
    """Make sure that the codes were made for this model.

    Raises:
        DataError: Another Mimi or text tokenizer made them, or they have other streams or tokens than the model reads.
    """
    for store in (*data.train.stores, *data.eval.stores):
        for what, theirs, ours in (
            ("Mimi", store.identity.mimi, checkpoint.mimi_hash),
            ("text tokenizer", store.identity.tokenizer, checkpoint.tokenizer_hash),
        ):
            if theirs != ours:
                raise DataError(
                    f"{store.directory} was encoded with another {what} than {checkpoint.source} has; encode the "
                    f"audio with it: inlay moshi encode DATA OUT --weights {checkpoint.source}"
                )
        for what, there, here in (
            ("streams of codes", 2 * store.identity.codebooks, int(checkpoint.lm_config["n_q"])),
            ("codes in a codebook", store.identity.card, int(checkpoint.lm_config["card"])),
            ("as the text's padding", store.identity.text_padding_id, checkpoint.text_padding_id),
            ("as its last padding", store.identity.end_of_text_padding_id, checkpoint.end_of_text_padding_id),
        ):
            if there != here:
                raise DataError(
                    f"{store.directory} has {there} {what}, {checkpoint.source} reads {here}: it cannot be trained on "
                    "these conversations, which need a model of both speakers with the same sizes"
                )


def _refuse_packed(data: MoshiData, lm: LMModel, memory: Memory | None) -> None:
    apart = memory is None or memory.config.boundary == "reset"
    rows = (*data.train_statistics.rows, *data.eval_statistics.rows)
    if apart and counts_positions(lm) and any(len(row) > 1 for row in rows):
        raise DataError(PACKED)


def _longest(data: MoshiData, memory: Memory) -> int:
    rows = data.train_statistics.rows
    if memory.config.boundary == "carry":
        return max(map(sum, rows))
    return max(max(row) for row in rows)


def _model_line(lm: LMModel, memory: Memory | None) -> str:
    count = sum(parameter.numel() for parameter in lm.parameters())
    trained = sum(parameter.numel() for parameter in lm.parameters() if parameter.requires_grad)
    line = f"Moshi: {count:,} parameters, {trained:,} trained"
    return line if memory is None else f"{line}\n{memory}"
