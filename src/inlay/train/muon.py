"""Muon for the matrices and AdamW for the rest, as one optimizer that a Trainer schedules, saves and resumes.

Muon (Jordan et al., 2024) makes the update of a weight matrix orthogonal, so that all of its directions are learnt at
one pace. It is meant for the weights of linear layers; embeddings, norms and single vectors stay with AdamW. Both come
from ``torch.optim``, and Muon's steps are scaled to the size of AdamW's (``match_rms_adamw``), so that learning rates
of one order of magnitude suit both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import nn
from transformers import TrainingArguments

from inlay.fastweight.target import TargetGenerator


class MuonAdamW(torch.optim.Optimizer):
    """``torch.optim.Muon`` and ``torch.optim.AdamW`` side by side.

    Args:
        matrices: Parameters for Muon, each of two dimensions.
        others: Parameters for AdamW.
        matrix_lr: Muon's learning rate.
        lr: AdamW's.
        betas: AdamW's.
        weight_decay: Of the matrices, by either optimizer's rule (decoupled).
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        *,
        matrix_lr: float,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        self.parts: list[torch.optim.Optimizer] = []
        if given := [*matrices]:
            self.parts.append(
                torch.optim.Muon(given, lr=matrix_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        if rest := [*others]:
            self.parts.append(torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=0.0))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    @classmethod
    def of(cls, modules: Iterable[nn.Module], arguments: TrainingArguments, matrix_lr: float) -> Self:
        """For what is trained in ``modules``, AdamW's settings as a Trainer has them."""
        return cls(
            *split_matrices(modules),
            matrix_lr=matrix_lr,
            lr=arguments.learning_rate,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            weight_decay=arguments.weight_decay,
        )

    def _share(self) -> None:
        """Let the groups here be the parts' own, so that a scheduler moves theirs."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Both states, by part."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share()


def split_matrices(modules: Iterable[nn.Module]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What is trained in ``modules``: weights of linear layers (not tied to an embedding) and the two matrices of a
    memory's target; and all else.

    A parameter that several modules hold is counted once.
    """
    every = {id(module): module for root in modules for module in root.modules()}.values()
    tables = {id(module.weight) for module in every if isinstance(module, nn.Embedding)}
    matrices = {
        id(module.weight)
        for module in every
        if isinstance(module, nn.Linear) and isinstance(module.weight, nn.Parameter) and id(module.weight) not in tables
    }
    matrices |= {id(p) for module in every if isinstance(module, TargetGenerator) for p in module.parameters()}
    trained = {id(p): p for module in every for p in module.parameters(recurse=False) if p.requires_grad}
    return (
        [parameter for key, parameter in trained.items() if key in matrices],
        [parameter for key, parameter in trained.items() if key not in matrices],
    )
