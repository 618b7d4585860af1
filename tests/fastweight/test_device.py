"""Float32 on the device that is here, a GPU if there is one, gives what float64 gives on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import inlay
from inlay.fastweight import fast_weight_linear, fast_weight_linear_reference
from inlay.fastweight.causal_lm import with_cache
from tests.closeness import assert_close
from tests.fastweight.families import BY_NAME, MODELS, Model, enable_checkpointing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IN_FLOAT64 = [family for family in MODELS if family.name != "qwen3-moe"]  # whose experts know no float64
TOKENS = 22
PIECES = ((0, 9), (9, 10), (10, 11), (11, 20), (20, 21), (21, TOKENS))
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 13, [0] * 16 + [-1] * 6])
CASES: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "whole rows": ({}, {}),
    "documents and padding": ({}, {"document_ids": DOCUMENTS}),
    "left padding, hidden target": ({"target": "hidden"}, {"attention_mask": (DOCUMENTS >= 0).long().flip(1)}),
    "clipped and exposed": ({"max_update_norm": 0.5, "exposure": 0.5, "normalize_target": True}, {}),
}


@pytest.fixture(autouse=True)
def without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def twins(family: Model, **changes: Any) -> tuple[nn.Module, nn.Module]:
    """The same model with the same memory: in float64 on the CPU, in float32 on the device."""
    exact, here = family.make().double(), family.make().to(DEVICE)
    for model in (exact, here):
        inlay.attach(model, family.config(**changes))
    here.load_state_dict(exact.state_dict())
    return exact, here


def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


@pytest.mark.parametrize("exposure", [0.0, 0.5])
def test_the_operation_and_its_gradients(exposure: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, TOKENS, 24), (2, TOKENS, 16), (16, 24)]
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    here = [tensor.detach().to(DEVICE, torch.float32).requires_grad_() for tensor in exact]
    given: dict[str, Any] = {"eta": 0.1, "chunk_size": 5, "exposure": exposure}
    expected, end = fast_weight_linear_reference(*exact, **given, documents=DOCUMENTS)
    out, state = fast_weight_linear(*here, **given, documents=DOCUMENTS.to(DEVICE))
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    expected.backward(grad)
    out.backward(grad.to(out))
    assert_close(out.cpu(), expected, 1e-5, "output")
    assert_close(state.sum.cpu(), end.sum, 1e-5, "sum")
    for name, ours, right in zip(("z", "v", "weight"), here, exact, strict=True):
        assert ours.grad is not None
        assert right.grad is not None
        assert_close(ours.grad.cpu(), right.grad, 1e-5, f"gradient of {name}")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", IN_FLOAT64, ids=lambda family: family.name)
def test_a_training_step(family: Model, case: str) -> None:
    changes, extra = CASES[case]
    ids = family.tokens(2, TOKENS)
    models = twins(family, **changes)
    losses = []
    for model, given, more in zip(models, (ids, ids.to(DEVICE)), (extra, moved(extra)), strict=True):
        memory = inlay.find_memory(model)
        assert memory is not None
        memory.train_only("all")
        if case == "documents and padding" and family.checkpointing:
            enable_checkpointing(model)
        loss = family.loss(model.train(), given, **more)
        loss.backward()
        memory.raise_if_not_finite()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    right = {name: parameter.grad for name, parameter in models[0].named_parameters() if parameter.grad is not None}
    for name, parameter in models[1].named_parameters():
        if name in right:
            assert parameter.grad is not None
            assert_close(parameter.grad.cpu(), right[name], 1e-3, name)
    assert any("target.conv" in name for name in right)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "moshi"])
def test_prefill_and_decode_are_the_whole_forward(name: str) -> None:
    family = BY_NAME[name]
    exact, here = twins(family)
    ids, cache, logits = family.tokens(2, TOKENS), DynamicCache(), []
    with torch.no_grad():
        for start, stop in PIECES:
            piece = ids[:, start:stop].to(DEVICE)
            logits.append(here(input_ids=piece, **with_cache(here, cache)).logits.cpu())
        assert_close(torch.cat(logits, 1), family.logits(exact, ids), 1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "moshi"])
def test_a_session_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    family, path = BY_NAME[name], tmp_path / "session.safetensors"
    ids, read = family.tokens(2, TOKENS), []
    for model, device in zip(twins(family), ("cpu", DEVICE), strict=True):
        memory = inlay.find_memory(model)
        assert memory is not None
        session, logits = memory.session(2), []
        with torch.no_grad():
            for start, stop in PIECES:
                if start == PIECES[3][0]:
                    session.save(path)
                    session = memory.load_session(path)
                logits.append(session.step(ids[:, start:stop].to(device)).logits.cpu())
        session.reset([1])
        assert session.chunks_committed.tolist() == [TOKENS // memory.config.chunk_size, 0]
        read.append(torch.cat(logits, 1))
    assert_close(read[1], read[0], 1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation(options: dict[str, Any]) -> None:
    family = BY_NAME["llama"]
    ids, mask = family.tokens(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[1, :4] = 0
    written = [
        model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=9, do_sample=False, **options
        ).cpu()
        for model, device in zip(twins(family), ("cpu", DEVICE), strict=True)
    ]
    assert torch.equal(*written)
