"""The benchmark of Moshi's streaming: what it compares with is Kyutai's model."""

from __future__ import annotations

import torch
from moshi.modules.gating import ActivationGating

import inlay
from benchmarks import moshi_stream


def test_no_memory_is_measured_on_kyutais_own_modules() -> None:
    lm = moshi_stream._model(moshi_stream.QUICK, torch.device("cpu"))
    memory = inlay.find_memory(lm)
    assert memory is not None
    gatings = [layer.gating for layer in lm.transformer.layers]
    assert not all(isinstance(gating, ActivationGating) for gating in gatings)
    with moshi_stream._detached(lm):
        assert inlay.find_memory(lm) is None
        assert all(isinstance(layer.gating, ActivationGating) for layer in lm.transformer.layers)
    again = inlay.find_memory(lm)
    assert again is not None
    assert again.config == memory.config
