"""transformers' ``Trainer`` for Kyutai's Moshi: the same machinery as for text, with Moshi's loss and files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from moshi.modules.transformer import RMSNorm
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from inlay.moshi.checkpoint import load_trained, save_finetuned
from inlay.moshi.loss import MoshiLoss, perplexity
from inlay.moshi.model import MoshiForTraining
from inlay.train.loss_parts import LossPartsTrainer
from inlay.train.muon import MuonAdamW
from inlay.train.trainer import InlayTrainer

FINETUNED = "moshi"
"""The folder of a run or checkpoint that holds what was trained."""


class MoshiTrainer(LossPartsTrainer, InlayTrainer):
    """A ``Trainer`` of a :class:`~inlay.moshi.model.MoshiForTraining`.

    Checkpoints hold what is trained (``moshi/``: adapters, memory, base weights), and the Trainer's own optimizer,
    scheduler and random state. Text and audio are logged by themselves.

    Args:
        checkpoint_config: What ``config.json`` of the model's checkpoint holds.
        pct_start: Share of the steps in which the learning rate rises.
        muon: Highest learning rate of Muon; None for the Trainer's own optimizer.
        kwargs: As :class:`~inlay.train.trainer.InlayTrainer` takes them; ``model`` is the task.
    """

    if_not_finite = "lower optim.lr or max_norm, and go on from the last checkpoint with --resume"

    def __init__(
        self, *, checkpoint_config: Mapping[str, Any], pct_start: float, muon: float | None = None, **kwargs: Any
    ) -> None:
        self.checkpoint_config = checkpoint_config
        self.pct_start = pct_start
        self.muon = muon
        super().__init__(**kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Moshi's loss of one batch."""
        result: MoshiLoss = model(inputs["codes"], inputs.get("documents"))
        self.note_parts(model.training, {"text": result.text, "audio": result.audio})
        return (result.loss, {"nats": result.nats}) if return_outputs else result.loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's, or with ``muon`` Muon for weights of linear layers and AdamW for the rest."""
        if self.muon is not None and vars(self)["optimizer"] is None:
            self.optimizer: torch.optim.Optimizer = MuonAdamW.of([self.model], self.args, self.muon)
        return super().create_optimizer(model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The Trainer's, without Kyutai's norms, whose names do not tell."""
        norms = {name for name, module in model.named_modules() if isinstance(module, RMSNorm)}
        return [name for name in super().get_decay_parameter_names(model) if name.rpartition(".")[0] not in norms]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> OneCycleLR:
        """moshi-finetune's: one cycle, up along a cosine in ``pct_start`` of the steps and down in the rest."""
        scheduler: OneCycleLR | None = vars(self)["lr_scheduler"]
        if scheduler is None:
            optimizer = optimizer or self.optimizer
            peaks = [group["lr"] for group in optimizer.param_groups]
            steps = max(2, num_training_steps)
            rises = abs(self.pct_start * steps - 1) > 1e-6  # OneCycleLR divides by a rise of no step
            scheduler = OneCycleLR(
                optimizer,
                max_lr=peaks,
                total_steps=steps,
                pct_start=self.pct_start if rises else 0.0,
                # Muon's is no beta of AdamW's, and some optimizers have neither.
                cycle_momentum=self.muon is None and not {"betas", "momentum"}.isdisjoint(optimizer.defaults),
            )
            self.lr_scheduler = scheduler
            self._created_lr_scheduler = True
        return scheduler

    def more_to_log(self, training: bool, means: Mapping[str, float]) -> dict[str, float]:
        """Perplexities of an evaluation."""
        return {} if training else {f"eval_perplexity/{part}": perplexity(mean) for part, mean in means.items()}

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
