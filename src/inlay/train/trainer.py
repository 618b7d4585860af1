"""transformers' ``Trainer`` for a model with a memory."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from inlay.data.packing import NO_LABEL
from inlay.fastweight import Memory
from inlay.files import write_whole
from inlay.sliced_loss import label_nats, nats_of, whole_logits
from inlay.train.callback import FiniteMemory
from inlay.train.monitor import PREFIX, MemoryMonitor
from inlay.train.resuming import ResumableTrainer
from inlay.train.weights import load_weights, save_weights


class InlayTrainer(ResumableTrainer):
    """A ``Trainer`` that hands document ids to the memory and saves what was trained, not the frozen base.

    Checkpoints hold the memory and the base weights that took part in training (``memory/``) and PEFT adapters
    (``adapter/``); optimizer, scheduler and random state are the Trainer's own, so a resumed run goes on exactly.

    The evaluation loss is the mean over all tokens that are predicted, in nats. The Trainer's own is the mean of the
    batches' means, in which a token of a short row weighs more than one of a long row, by how rows fall into batches.

    Args:
        memory: The memory attached to ``model``; None for a plain model.
        memory_learning_rate: For the memory's own parameters; None for ``args.learning_rate``.
        monitor: What it measures of the memory goes into the logs; None for nothing.
        kwargs: As ``transformers.Trainer`` takes them.
    """

    def __init__(
        self,
        *,
        memory: Memory | None,
        memory_learning_rate: float | None = None,
        monitor: MemoryMonitor | None = None,
        **kwargs: Any,
    ) -> None:
        self.memory = memory
        self.memory_learning_rate = memory_learning_rate
        self.monitor = monitor
        self._scored: list[Tensor] = []
        super().__init__(**kwargs)
        if memory is not None:
            self.add_callback(FiniteMemory(memory))
        if monitor is not None:
            self.add_callback(monitor)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own loss; document ids go to the memory, if there is one."""
        return super().compute_loss(model, self._given(inputs), *args, **kwargs)

    def _given(self, inputs: dict[str, Any]) -> dict[str, Any]:
        unused = set() if self.memory is not None else {"document_ids"}
        return {name: value for name, value in inputs.items() if name not in unused} | {"use_cache": False}

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one microbatch, under the eyes of the monitor."""
        if self.monitor is None:
            return super().training_step(*args, **kwargs)
        with self.monitor.observing():
            loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.monitor.note_gradients(self.accelerator.scaler)
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """The Trainer's step of an evaluation, with nats and tokens of each row kept for the loss per token. Without
        logits, unless somebody wants them.
        """
        if "labels" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        loss = outputs = None
        if prediction_loss_only:
            given = self._given(self._prepare_inputs(inputs))
            labels = given.pop("labels")
            with torch.no_grad(), self.compute_loss_context_manager():
                nats = label_nats(model, given, labels)
        else:
            with whole_logits(model):
                loss, outputs, labels = super().prediction_step(model, inputs, False, ignore_keys)
            nats = nats_of(outputs[0] if isinstance(outputs, tuple) else outputs, labels)
        tokens = (labels[:, 1:] != NO_LABEL).to(nats.device).sum(1)
        # Row by row: gathered like this, rows that only fill up the last batch of several processes fall away.
        self._scored.append(self.gather_function(torch.stack([nats.sum(1), tokens.float()], dim=1)))
        return (nats.sum() / tokens.sum(), None, None) if loss is None else (loss, outputs, labels)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The Trainer's evaluation, whose loss is per token."""
        self._scored.clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._scored:
            nats, tokens = torch.cat(self._scored).cpu().double().sum(0).tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = nats / tokens if tokens else math.nan
            self._scored.clear()
        return output

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """The Trainer's log, with what the monitor measured of the step."""
        if self.monitor is not None:
            logs.update(self.monitor.collect(self.args, self.state))
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with the memory's parameters in groups of their own."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        if self.memory is None or self.memory_learning_rate is None:
            return optimizer
        own = {id(parameter) for parameter in self.memory.parameters()}
        for group in list(optimizer.param_groups):
            mine = [p for p in group["params"] if id(p) in own]
            if mine:
                group["params"] = [p for p in group["params"] if id(p) not in own]
                optimizer.add_param_group({**group, "params": mine, "lr": self.memory_learning_rate})
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.memory is None:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:  # the Trainer asks every process
            save_weights(self.model, self.memory, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.memory is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_weights(self.model, self.memory, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(best_checkpoint(self.state, self.args)))


class MetricsFile(TrainerCallback):
    """Writes what the Trainer logs to a JSONL file, one line per log.

    Args:
        path: The file. When a run resumes, lines beyond the step it resumes from are dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the lines up to the step the run starts from."""
        if not state.is_world_process_zero:
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line."""
        if not state.is_world_process_zero or not logs:
            return
        line = {"step": state.global_step, **{key: _plain(value) for key, value in logs.items()}}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


class ProgressBar(ProgressCallback):
    """transformers' progress bar with the latest figures beside it rather than as lines between."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show loss, learning rate and how much the memory says."""
        if state.is_world_process_zero and self.training_bar is not None and logs:
            names = ("loss", "eval_loss", "grad_norm", "learning_rate", PREFIX + "output_share")
            shown = {name: f"{logs[name]:.4g}" for name in names if name in logs}
            self.training_bar.set_postfix(shown)


def best_checkpoint(state: TrainerState, arguments: TrainingArguments) -> Path:
    """Where the best checkpoint lies now: ``state`` has its path when it was written, and a run may be renamed.

    Args:
        state: Knows a best checkpoint.
        arguments: The run's as it goes on.
    """
    assert state.best_model_checkpoint is not None
    return Path(arguments.output_dir) / Path(state.best_model_checkpoint).name


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line cut short by a kill is left out."""
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _plain(value: Any) -> Any:
    """A JSON value: numbers as they are, what is no finite number as text."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
