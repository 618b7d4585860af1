"""Going on from a checkpoint with other settings than it was written with."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from transformers import Trainer


class ResumableTrainer(Trainer):
    """A ``Trainer`` that goes on by its own arguments: learning rate, schedule, weight decay and betas.

    The Trainer takes them from the checkpoint, together with the optimizer's moments and the schedule's place, so that
    whoever resumes a run with another learning rate gets the old one.
    """

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        asked = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        schedule = scheduler.state_dict()
        super()._load_optimizer_and_scheduler(checkpoint)
        done = scheduler.state_dict()
        # Both give the rate of a step from its number; what others have come to could not be worked out anew.
        if done == schedule or not isinstance(scheduler, LambdaLR | OneCycleLR):
            return
        for group, settings in zip(optimizer.param_groups, asked, strict=True):
            group.update(settings)
        scheduler.load_state_dict(schedule | {"last_epoch": done["last_epoch"] - 1, "_step_count": done["_step_count"]})
        scheduler.step()
