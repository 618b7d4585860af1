"""Muon for the matrices and AdamW for the rest, as one optimizer that a Trainer schedules, saves and resumes.

Muon (Jordan et al., 2024) makes the update of a weight matrix orthogonal, so that all of its directions are learnt at
one pace. It is meant for the weights of linear layers; embeddings, norms and single vectors stay with AdamW. Muon's
steps are scaled to the size of AdamW's (``match_rms_adamw``), so that learning rates of one order of magnitude suit
both.

``torch.optim.Muon`` makes one matrix after another orthogonal, in bfloat16. A small model has dozens of small ones, and
a CPU emulates bfloat16, so that this took a fifth to a third of a step. :class:`StackedMuon` is the same optimizer, but
takes matrices of one shape together, and on a CPU in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from inlay.fastweight.target import TargetGenerator

_STACK = 1 << 24
"""Numbers that are made orthogonal together, at most; a larger matrix goes alone."""


class StackedMuon(torch.optim.Muon):
    """``torch.optim.Muon``, its arguments and its state, stepping matrices of one shape together."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for matrices in _alike([p for p in group["params"] if p.grad is not None]):
                self._step_together(group, matrices)
        return loss

    def _step_together(self, group: dict[str, Any], matrices: list[nn.Parameter]) -> None:
        directions = []
        for p in matrices:
            assert p.grad is not None
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
            momentum = self.state[p]["momentum_buffer"]
            momentum.lerp_(p.grad, 1 - group["momentum"])
            directions.append(p.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum)
        updates = orthogonalised(torch.stack(directions), group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = matrices[0].shape
        scale = {
            "original": math.sqrt(max(1.0, rows / columns)),
            "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
        }[group["adjust_lr_fn"] or "original"]
        for p, update in zip(matrices, updates, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update, alpha=-group["lr"] * scale)


def orthogonalised(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float = 1e-7) -> Tensor:
    """Matrices with the singular vectors of those given and all singular values near 1 (Newton–Schulz iteration).

    A step takes a singular value s to a·s + b·s³ + c·s⁵; before the first one they are divided by the Frobenius norm.

    Args:
        matrices: `[n, rows, columns]`.
        coefficients: (a, b, c).
        steps: Steps.
        eps: Smallest norm that is divided by.

    Returns:
        `[n, rows, columns]`, bfloat16 on a CUDA device, float32 elsewhere.
    """
    a, b, c = coefficients
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _alike(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one shape, dtype and device together, in stacks of at most ``_STACK`` numbers."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for p in parameters:
        groups.setdefault((p.shape, p.dtype, p.device), []).append(p)
    for same in groups.values():
        count = max(1, _STACK // same[0].numel())
        yield from (same[start : start + count] for start in range(0, len(same), count))


class MuonAdamW(torch.optim.Optimizer):
    """:class:`StackedMuon` and ``torch.optim.AdamW`` side by side.

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
                StackedMuon(given, lr=matrix_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
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
