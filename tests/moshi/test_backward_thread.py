"""The backward in a thread of its own, where autograd runs a GPU's: what is run again there knows its forward still.

Thread-local state (the context of a forward, context variables, autocast) is another thread's there. On the CPU
autograd stays in the caller's thread, so it is moved by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.moshi.lora import LoraConfig, add_lora
from inlay.moshi.model import MoshiForTraining
from tests.fastweight.test_other_device import DOCUMENTS, llama, settings, tokens
from tests.moshi.models import make_codes, make_lm
from tests.moshi.test_other_device import DOCUMENTS as FRAMES
from tests.moshi.test_other_device import SETTINGS


def gradients(make: Callable[[], tuple[nn.Module, Tensor]], threads: int) -> dict[str, Tensor]:
    model, loss = make()
    if threads:
        with ThreadPoolExecutor(threads) as pool:
            pool.submit(loss.backward).result()
    else:
        loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_the_same(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    here, there = gradients(make, 0), gradients(make, 1)
    assert here
    assert here.keys() == there.keys()
    for name, gradient in here.items():
        assert torch.equal(gradient, there[name]), name


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("target", ["embeddings", "hidden"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as it is", "autocast"])
def test_text(reentrant: bool, target: str, dtype: torch.dtype | None) -> None:
    """Between forward and backward another forward comes and goes."""

    def make() -> tuple[nn.Module, Tensor]:
        model = llama().train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        memory = inlay.attach(model, settings(layers="all", target=target, max_update_ratio=0.1))
        ids: dict[str, Any] = {"input_ids": tokens(), "labels": tokens()}
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = memory.train_only("all").model(**ids, document_ids=DOCUMENTS, use_cache=False).loss
        with torch.no_grad():
            model(input_ids=tokens()[:, :7], use_cache=False)
        return model, loss

    assert_the_same(make)


@pytest.mark.parametrize("memory", [True, False])
def test_moshi(memory: bool) -> None:
    """Whose attention is told the documents by a context variable."""

    def make() -> tuple[nn.Module, Tensor]:
        lm = make_lm().train()
        torch.manual_seed(0)
        add_lora(lm, LoraConfig(enable=True, rank=2))
        lm.transformer.checkpointing = True
        if memory:
            inlay.attach(lm, inlay.FastWeightConfig(**SETTINGS)).train_only("memory+lora")
        task = MoshiForTraining(lm, frames_at_once=16, queries_at_once=8)
        return lm, task(make_codes(), FRAMES).loss

    assert_the_same(make)
