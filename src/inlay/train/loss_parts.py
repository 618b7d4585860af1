"""A ``Trainer`` whose model gives a loss and its parts: what every such trainer evaluates and logs alike."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.fastweight import InlayError
from inlay.train.resuming import ResumableTrainer


class TrainingError(InlayError, RuntimeError):
    """A loss is not a number."""


class LossTrainer(ResumableTrainer):
    """A ``Trainer`` whose evaluation is the loss and nothing else: its models give no logits to gather. What its
    checkpoints hold is loaded by ``_load_from_checkpoint`` alone."""

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of an evaluation batch."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


class LossPartsTrainer(LossTrainer):
    """A :class:`LossTrainer` that logs each part of the loss by itself (``loss/NAME``, ``eval_loss/NAME``), as the mean
    over the batches since the last log that had it.
    """

    part: ClassVar[str] = "loss"
    """What a part is called in an error."""

    if_not_finite: ClassVar[str] = "lower the learning rate"
    """What to do where a part is not a number."""

    def __init__(self, **kwargs: Any) -> None:
        self._parts: dict[bool, dict[str, list[Tensor]]] = {True: defaultdict(list), False: defaultdict(list)}
        super().__init__(**kwargs)

    def note_parts(self, training: bool, parts: Mapping[str, Tensor]) -> None:
        """Keep the parts of one batch's loss for the log."""
        for name, value in parts.items():
            self._parts[training][name].append(value.detach())

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
        """The mean of each part since the last call, over all processes."""
        parts = self._parts[training]
        means = {
            name: float(self.accelerator.reduce(torch.stack(values).float().mean(), "mean"))
            for name, values in parts.items()
        }
        parts.clear()
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise TrainingError(
                    f"the {self.part} {name!r} is {mean} at step {self.state.global_step}; {self.if_not_finite}"
                )
        return means
