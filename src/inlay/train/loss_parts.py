"""A ``Trainer`` whose model gives a loss and its parts: what every such trainer evaluates and logs alike."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from accelerate.data_loader import DataLoaderShard
from torch import Tensor, nn
from transformers.trainer_pt_utils import find_batch_size

from inlay.fastweight import InlayError
from inlay.train.resuming import ResumableTrainer
from inlay.train.trainer import best_checkpoint


class TrainingError(InlayError, RuntimeError):
    """A loss is not a number."""


class LossTrainer(ResumableTrainer):
    """A ``Trainer`` whose evaluation is the loss and nothing else: its models give no logits to gather. What its
    checkpoints hold is loaded by ``_load_from_checkpoint`` alone.

    Several processes evaluate each row once: accelerate fills the last batches up with rows from the beginning, which
    are taken out before the model sees them.
    """

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(best_checkpoint(self.state, self.args)))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of an evaluation batch."""
        inputs = self._without_repeated(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def _rows_to_count(self, inputs: dict[str, Any]) -> tuple[int, int]:
        """Rows of the evaluation batch at hand that no other process and no earlier batch has, and rows in all."""
        loader = self.accelerator.gradient_state.active_dataloader
        processes = self.accelerator.num_processes
        if not isinstance(loader, DataLoaderShard):  # one process reads for all (dispatch_batches)
            rows = find_batch_size(inputs) or 1
            return rows, rows
        rows = loader.total_batch_size // processes
        if not loader.end_of_dataloader or loader.remainder <= 0:
            return rows, rows
        own = min(max(loader.remainder - rows * self.accelerator.process_index, 0), rows)
        return own, own if processes == 1 else rows

    def _without_repeated(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch without rows that only fill it up; one that holds nothing else stays, and is not counted."""
        own, rows = self._rows_to_count(inputs)
        if own in (0, rows):
            return inputs
        loader = self.accelerator.gradient_state.active_dataloader
        first = len(loader.dataset) - loader.remainder + rows * self.accelerator.process_index
        batch: dict[str, Any] = loader.collate_fn([loader.dataset[index] for index in range(first, first + own)])
        return batch


class LossPartsTrainer(LossTrainer):
    """A :class:`LossTrainer` that logs each part of the loss by itself (``loss/NAME``, ``eval_loss/NAME``), as the mean
    over the batches since the last log that had it. A batch weighs as its rows: a short last one does not count as much
    as a full one.
    """

    part: ClassVar[str] = "loss"
    """What a part is called in an error."""

    if_not_finite: ClassVar[str] = "lower the learning rate"
    """What to do where a part is not a number."""

    def __init__(self, **kwargs: Any) -> None:
        self._parts: dict[bool, dict[str, list[tuple[Tensor, int]]]] = {
            True: defaultdict(list),
            False: defaultdict(list),
        }
        self._rows = 1
        super().__init__(**kwargs)

    def note_parts(self, training: bool, parts: Mapping[str, Tensor]) -> None:
        """Keep the parts of one batch's loss for the log."""
        for name, value in parts.items():
            self._parts[training][name].append((value.detach(), self._rows))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one microbatch, whose rows are counted."""
        self._rows = find_batch_size(inputs) or 1
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of an evaluation batch, whose rows are counted."""
        self._rows, _ = self._rows_to_count(inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def more_to_log(self, training: bool, means: Mapping[str, float]) -> dict[str, float]:
        """What a subclass logs beside the means of the parts."""
        return {}

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """The Trainer's log, with each part by itself.

        Raises:
            TrainingError: One of them is not finite.
        """
        for name, training in (("loss", True), ("eval_loss", False)):
            if name in logs:
                means = self._means(training)
                logs.update({f"{name}/{part}": mean for part, mean in means.items()})
                logs.update(self.more_to_log(training, means))
        super().log(logs, start_time)

    def _means(self, training: bool) -> dict[str, float]:
        """The mean of each part over the rows since the last call, of all processes."""
        parts = self._parts[training]
        means = {name: self._mean(noted) for name, noted in parts.items()}
        parts.clear()
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise TrainingError(
                    f"the {self.part} {name!r} is {mean} at step {self.state.global_step}; {self.if_not_finite}"
                )
        return means

    def _mean(self, noted: Sequence[tuple[Tensor, int]]) -> float:
        values = torch.stack([value for value, _ in noted]).float()
        rows = values.new_tensor([count for _, count in noted])
        total, weight = self.accelerator.reduce(torch.stack([(rows * values).sum(), rows.sum()]), "sum").tolist()
        return float(total / weight)
