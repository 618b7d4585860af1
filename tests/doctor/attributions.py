"""A memory in a small Llama, as the tests of its gradients share it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import inlay
from inlay.doctor.attribution import Attribution
from inlay.doctor.trials import Trial
from tests.fastweight.families import BY_NAME

LLAMA = BY_NAME["llama"]
GROUPS = ["convolution", "projection", "base down projection", "rest"]


def batch_of(tokens: int, rows: int = 2, **more: Tensor) -> dict[str, Tensor]:
    ids = LLAMA.tokens(rows, tokens)
    return {"input_ids": ids, "labels": ids.clone(), **more}


def attached(mode: Any = "memory", *, model: nn.Module | None = None, **changes: Any) -> tuple[nn.Module, inlay.Memory]:
    model = LLAMA.make() if model is None else model
    torch.manual_seed(1)
    return model, inlay.attach(model, LLAMA.config(**changes)).train_only(mode)


def trial(attribution: Attribution, factor: str, setting: str) -> Trial:
    (found,) = [t for t in attribution.trials if t.factor == factor and t.setting.startswith(setting)]
    return found
