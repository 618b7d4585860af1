"""How often Moshi makes the host wait for a GPU: never within a step, and once a frame to see what was committed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import inlay
from inlay.moshi.commits import CommitLog
from inlay.moshi.model import MoshiForTraining
from tests.moshi.models import make_codes, make_lm
from tests.moshi.streams import CHUNK, KINDS, tiny_lm, user_codes
from tests.moshi.test_other_device import DOCUMENTS, SETTINGS, there_or_here
from tests.other_device import elsewhere, other_device
from tests.waits import waits

__all__ = ["other_device"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream(kind: str) -> None:
    """Commits included. ``MemoryLMGen`` asks where the rows stand before its first step and when they are reset."""
    lm = elsewhere(tiny_lm(max_update_ratio=2.0))
    gen = KINDS[kind](lm)
    counts, watching = [], []
    with gen.streaming(2):
        log = CommitLog(lm)
        for codes in there_or_here(user_codes(2, 2 * CHUNK + 1), True).unbind(2):
            with waits() as seen:
                gen.step(codes.unsqueeze(2))
            counts.append(len(seen))
            with waits() as seen:
                committed = log.observe()
            watching.append((len(seen), len(committed)))
        with waits() as seen:
            gen.reset_streaming(there_or_here(torch.tensor([True, False]), True))
    asks = int(kind == "MemoryLMGen")
    assert counts == [asks] + [0] * (2 * CHUNK)
    assert len(seen) == asks
    layers = len(log._weights)
    assert watching == ([(1, 0)] * (CHUNK - 1) + [(2, 2 * layers)]) * 2 + [(1, 0)]


@pytest.mark.parametrize(("options", "most"), [({}, 0), ({"documents": DOCUMENTS}, 4)])
def test_a_training_step(options: dict[str, Any], most: int) -> None:
    lm = elsewhere(make_lm())
    lm.transformer.checkpointing = True
    memory = inlay.attach(lm.train(), inlay.FastWeightConfig(**SETTINGS | {"layers": "all", "max_update_ratio": 0.1}))
    memory.train_only("all")
    task = MoshiForTraining(lm, frames_at_once=16, queries_at_once=8)
    for wanted in (most + bool(options), most):  # the first step also asks whether a document is long enough
        with waits() as seen:
            task(**there_or_here({"codes": make_codes(), **options}, True)).loss.backward()
        assert len(seen) == wanted, seen
