"""Moshi on a device that is not the CPU, shown without one: what the CPU gives, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import inlay
from inlay.moshi.checkpoint import load_trained, save_finetuned
from inlay.moshi.lora import LoraConfig, add_lora, fuse_lora
from inlay.moshi.model import MoshiForTraining
from inlay.moshi.session import load_session, save_session
from inlay.moshi.streaming import steps_of
from inlay.moshi.yarn import YarnConfig, apply_yarn
from tests.moshi.models import make_codes, make_lm
from tests.moshi.streams import CHUNK, CONFIGS, KINDS, tiny_lm, user_codes
from tests.other_device import Elsewhere, back, elsewhere, other_device

__all__ = ["other_device"]

DOCUMENTS = torch.tensor([[0] * 18 + [1] * 22, [0] * 31 + [-1] * 9])
SETTINGS: dict[str, Any] = {"layers": [1, 3], "chunk_size": 8, "eta": 0.1, "init": {"normal": 0.1}}
TRAINING: dict[str, dict[str, Any]] = {
    "whole rows": {},
    "documents, LoRA, checkpointing": {"documents": DOCUMENTS, "lora": True, "checkpointing": True},
    "YaRN, clipped": {"yarn": True, "memory": {"max_update_ratio": 0.01}},
}


def there_or_here(tensors: Any, there: bool) -> Any:
    return tree_map_only(Tensor, Elsewhere, tensors) if there else tensors


@pytest.mark.parametrize("case", TRAINING)
def test_a_training_step_is_the_same_as_on_the_cpu(case: str, tmp_path: Path) -> None:
    options, losses, gradients = TRAINING[case], [], []
    for there in (False, True):
        lm = make_lm()
        torch.manual_seed(0)
        if "lora" in options:
            add_lora(lm, LoraConfig(enable=True, rank=2))
        lm = elsewhere(lm) if there else lm
        if "yarn" in options:
            apply_yarn(lm, YarnConfig(factor=2.0))
        lm.transformer.checkpointing = options.get("checkpointing", False)
        memory = inlay.attach(lm.train(), inlay.FastWeightConfig(**SETTINGS | options.get("memory", {})))
        memory.train_only("memory+lora" if "lora" in options else "all")
        task = MoshiForTraining(lm, frames_at_once=16, queries_at_once=8)
        result = task(**there_or_here({"codes": make_codes(), "documents": options.get("documents")}, there))
        result.loss.backward()
        losses.append([value.item() for value in (result.loss, result.text, result.audio)])
        gradients.append({name: back(p.grad) for name, p in lm.named_parameters() if p.requires_grad})
        save_finetuned(tmp_path / str(there), lm, {})
        load_trained(lm, tmp_path / str(there))
    assert losses[0] == losses[1]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    for file in (tmp_path / "False").iterdir():
        assert file.read_bytes() == (tmp_path / "True" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_the_same_as_on_the_cpu(kind: str, tmp_path: Path) -> None:
    """Rows that stop and start over, and the rest from a session's file."""
    frames, rows, said, chunks = 24, 2, [], []
    codes = user_codes(rows, frames)
    for there in (False, True):
        lm = tiny_lm(**CONFIGS["ratio"])
        lm = elsewhere(lm) if there else lm
        heard: list[Tensor] = []
        gen = KINDS[kind](lm, use_sampling=False, on_text_logits_hook=lambda x, heard=heard: heard.append(back(x)))
        with gen.streaming(rows):
            for t in range(frames):
                if t in (6, 9):
                    gen.set_exec_mask(there_or_here(torch.tensor([True, t == 9]), there))
                if t == 12:
                    gen.reset_streaming(there_or_here(torch.tensor([False, True]), there))
                if t == 20:
                    save_session(tmp_path / "session", gen)
                gen.step(there_or_here(codes[:, :, t : t + 1], there))
            chunks.append(steps_of(gen).chunks.tolist())
        with gen.streaming(rows):
            load_session(tmp_path / "session", gen)
            for t in range(20, frames):
                gen.step(there_or_here(codes[:, :, t : t + 1], there))
        said.append(torch.cat(heard))
        assert torch.equal(said[-1][-8 * rows : -4 * rows], said[-1][-4 * rows :])
    assert chunks[0] == chunks[1]
    assert chunks[0][0] >= frames // CHUNK - 1
    assert torch.equal(*said)


def test_adapters_are_fused_where_they_are() -> None:
    fused = []
    for there in (False, True):
        lm = make_lm()
        torch.manual_seed(0)
        add_lora(lm, LoraConfig(enable=True, rank=2))
        for name, parameter in lm.named_parameters():
            if ".lora_B" in name:
                torch.nn.init.normal_(parameter)
        lm = elsewhere(lm) if there else lm
        inlay.attach(lm, inlay.FastWeightConfig(**SETTINGS | {"init": "zero"}))
        fuse_lora(lm)
        fused.append({name: back(parameter) for name, parameter in lm.named_parameters()})
    for name, parameter in fused[0].items():
        assert torch.equal(parameter, fused[1][name]), name
