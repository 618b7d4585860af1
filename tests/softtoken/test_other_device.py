"""Soft tokens on a device that is not the CPU, shown without one: what the CPU gives, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from inlay.softtoken.compressors import (
    CrossAttentionConfig,
    EncoderPoolConfig,
    EncoderTokensConfig,
    PoolConfig,
    build_compressor,
)
from inlay.softtoken.cues import Cues
from inlay.softtoken.layout import PromptLayout
from inlay.softtoken.objectives import OBJECTIVES, ObjectiveInputs, weighted_sum
from inlay.softtoken.store import SoftTokenStore, save_store
from tests.other_device import Elsewhere, back, elsewhere, other_device
from tests.softtoken.local import byte_level, llama
from tests.softtoken.stored import HEADER, contents, notes

__all__ = ["other_device"]

KINDS: dict[str, Callable[..., Any]] = {
    "encoder-pool": EncoderPoolConfig,
    "encoder-tokens": EncoderTokensConfig,
    "crossattention": CrossAttentionConfig,
    "pool": PoolConfig,
}
QUESTIONS = ["Who lives in Paris?", "Who?", "What is the capital of Austria?"]
ANSWERS = ["Ada Lovelace", "Bob", "Vienna"]


@pytest.mark.parametrize("form", ["embeddings", "kv"])
@pytest.mark.parametrize("kind", KINDS)
def test_objectives_answers_and_stored_slots_are_the_same_as_on_the_cpu(kind: str, form: str, tmp_path: Path) -> None:
    ids = torch.randint(5, 200, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(30) < torch.tensor([[30], [17]])
    batch = {"contexts": ids, "mask": mask, "index": torch.tensor([0, 0, 1])}
    losses, gradients, answers, stored = [], [], [], []
    for there in (False, True):
        model: Any = llama(len(byte_level()))
        model.config._attn_implementation = "eager"  # made of operators that any device has
        model = elsewhere(model) if there else model
        torch.manual_seed(1)
        compressor = build_compressor(KINDS[kind](form=form, segment_tokens=16), model)
        cues = Cues(["reconstruction", "continuation"], 32, 0.3)
        cues = elsewhere(cues) if there else cues
        layout = PromptLayout(bos_after=True, question="{question}\n", answer_tokens=6).bind(byte_level())
        given = tree_map_only(Tensor, Elsewhere, batch) if there else batch
        inputs = ObjectiveInputs(model, compressor, layout, cues, questions=QUESTIONS, answers=ANSWERS, **given)
        names = [name for name in OBJECTIVES if form == "embeddings" or name != "diversity"]
        loss, parts = weighted_sum(inputs, dict.fromkeys(names, 1.0))
        loss.backward()
        losses.append([float(back(value)) for value in (loss.detach(), *parts.values())])
        learned = [*compressor.named_trainable_parameters(), *cues.named_parameters()]
        gradients.append({name: back(parameter.grad) for name, parameter in learned})

        with torch.no_grad():
            memory = compressor.compress(given["contexts"], given["mask"])
        answers.append([layout.answer(model, memory.select(given["index"]), QUESTIONS)])
        slots = [int(n) for n in mask.sum(1).add(3).div(4, rounding_mode="floor")]
        save_store(tmp_path / f"{there}.safetensors", HEADER, notes(slots), memory)
        store = SoftTokenStore.open(tmp_path / f"{there}.safetensors")
        read = store.load([note.id for note in notes(slots)])
        answers[-1].append(layout.answer(model, read.select(batch["index"]), QUESTIONS))
        stored.append(contents(store))
    assert losses[0] == losses[1]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is gradients[1][name] is None or torch.equal(gradient, gradients[1][name]), name
    assert answers[0] == answers[1]
    assert answers[0][0] == answers[0][1]
    assert stored[0] == stored[1]
