"""The doctor examines a model where it is, shown without another device: what it finds on the CPU, it finds there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import inlay
from inlay.doctor import examine
from tests.fastweight.test_other_device import llama, settings, tokens
from tests.other_device import Elsewhere, elsewhere, other_device

__all__ = ["other_device"]

DOCUMENTS = torch.tensor([[0] * 11 + [1] * 12, [0] * 20 + [-1] * 3])


def test_a_diagnosis_is_the_same_as_on_the_cpu() -> None:
    ids, told = tokens(), []
    batch = {"input_ids": ids, "labels": ids.where(DOCUMENTS >= 0, -100), "document_ids": DOCUMENTS}
    for there in (False, True):
        model: Any = elsewhere(llama()) if there else llama()
        memory = inlay.attach(model.train(), settings(max_update_ratio=0.5, init="zero"))
        memory.train_only("all")
        given = tree_map_only(Tensor, Elsewhere, batch) if there else batch
        torch.manual_seed(0)
        found = examine(model, given).to_json()
        told.append({name: value for name, value in found.items() if name != "provenance"})
    assert told[0] == told[1]
