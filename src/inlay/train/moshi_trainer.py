"""transformers' ``Trainer`` for Kyutai's Moshi: the same machinery as for text, with Moshi's loss and files."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from inlay.fastweight.errors import InlayError
from inlay.moshi.checkpoint import load_trained, save_finetuned
from inlay.moshi.loss import MoshiLoss, perplexity
from inlay.moshi.model import MoshiForTraining
from inlay.train.trainer import InlayTrainer

FINETUNED = "moshi"
"""The folder of a run or checkpoint that holds what was trained."""


class MoshiTrainingError(InlayError, RuntimeError):
    """A loss is not a number."""


class MoshiTrainer(InlayTrainer):
    """A ``Trainer`` of a :class:`~inlay.moshi.model.MoshiForTraining`.

    Checkpoints hold what is trained (``moshi/``: adapters, memory, base weights), and the Trainer's own optimizer,
    scheduler and random state. Text and audio are logged by themselves.

    Args:
        checkpoint_config: What ``config.json`` of the model's checkpoint holds.
        pct_start: Share of the steps in which the learning rate rises.
        kwargs: As :class:`~inlay.train.trainer.InlayTrainer` takes them; ``model`` is the task.
    """

    def __init__(self, *, checkpoint_config: Mapping[str, Any], pct_start: float, **kwargs: Any) -> None:
        self.checkpoint_config = checkpoint_config
        self.pct_start = pct_start
        self._parts: dict[bool, dict[str, list[Tensor]]] = {True: defaultdict(list), False: defaultdict(list)}
        arguments = kwargs["args"]
        arguments._n_gpu = min(1, arguments.n_gpu)  # DataParallel would split the memory; several processes do not
        super().__init__(**kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Moshi's loss of one batch."""
        result: MoshiLoss = model(inputs["codes"], inputs.get("documents"))
        for name in ("text", "audio"):
            self._parts[model.training][name].append(getattr(result, name).detach())
        return (result.loss, {"nats": result.nats}) if return_outputs else result.loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of an evaluation batch, and nothing else."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> OneCycleLR:
        """moshi-finetune's: one cycle, up along a cosine in ``pct_start`` of the steps and down in the rest."""
        scheduler: OneCycleLR | None = vars(self)["lr_scheduler"]
        if scheduler is None:
            optimizer = optimizer or self.optimizer
            peaks = [group["lr"] for group in optimizer.param_groups]
            steps = max(2, num_training_steps)
            scheduler = OneCycleLR(optimizer, max_lr=peaks, total_steps=steps, pct_start=self.pct_start)
            self.lr_scheduler = scheduler
            self._created_lr_scheduler = True
        return scheduler

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """The Trainer's log, with text and audio by themselves.

        Raises:
            MoshiTrainingError: One of them is not finite.
        """
        for name, training in (("loss", True), ("eval_loss", False)):
            if name in logs:
                means = self._means(training)
                logs.update({f"{name}/{part}": mean for part, mean in means.items()})
                if not training:
                    logs.update({f"eval_perplexity/{part}": perplexity(mean) for part, mean in means.items()})
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
                raise MoshiTrainingError(
                    f"the {name} loss is {mean} at step {self.state.global_step}; lower optim.lr or max_norm, and go "
                    "on from the last checkpoint with --resume"
                )
        return means

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            directory = Path(output_dir or self.args.output_dir) / FINETUNED
            save_finetuned(directory, self._task.lm, self.checkpoint_config)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self._task.lm, Path(resume_from_checkpoint) / FINETUNED)

    @property
    def _task(self) -> MoshiForTraining:
        task = self.accelerator.unwrap_model(self.model)
        assert isinstance(task, MoshiForTraining)
        return task
