"""The memory on a device that is not the CPU, shown without one: every tensor the memory makes is where the model is.

What comes out is compared, bit for bit, with the same on the CPU (:mod:`tests.other_device`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import inlay
from inlay.fastweight.causal_lm import with_cache
from tests.closeness import relative_error
from tests.other_device import Elsewhere, back, elsewhere, other_device

__all__ = ["other_device"]


def llama() -> Any:
    """Eager attention, which is made of operators that any device has."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
    config = LlamaConfig(vocab_size=64, initializer_range=0.3, attn_implementation="eager", **size, **special)
    return LlamaForCausalLM(config)


def settings(**changes: Any) -> inlay.FastWeightConfig:
    fields: dict[str, Any] = {"layers": [0, 2], "chunk_size": 5, "eta": 0.1, "init": "next_token"}
    return inlay.FastWeightConfig(**fields | changes)


def tokens(rows: int = 2, length: int = 23) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))


DOCUMENTS = torch.tensor([[0] * 9 + [1] * 14, [0] * 17 + [-1] * 6])
TRAINING: dict[str, tuple[dict[str, Any], dict[str, Tensor], bool]] = {
    "whole rows": ({}, {}, False),
    "checkpointing": ({}, {}, True),
    "documents and padding": ({}, {"document_ids": DOCUMENTS}, False),
    "documents, carried": ({"boundary": "carry"}, {"document_ids": DOCUMENTS}, False),
    "padding by mask": ({}, {"attention_mask": (DOCUMENTS >= 0).long()}, True),
    "packed by positions": ({}, {"position_ids": torch.tensor([[*range(9), *range(14)], [*range(23)]])}, False),
    "clipped by norm, exposed": ({"max_update_norm": 0.5, "exposure": 0.5}, {}, False),
    "clipped by ratio, hidden target": (
        {"max_update_ratio": 0.1, "target": "hidden", "normalize_target": True},
        {"document_ids": DOCUMENTS},
        True,
    ),
}


@pytest.mark.parametrize("case", TRAINING)
def test_a_training_step_is_the_same_as_on_the_cpu(case: str) -> None:
    changes, extra, checkpointing = TRAINING[case]
    ids, losses, gradients = tokens(), [], []
    for there in (False, True):
        model = elsewhere(llama()) if there else llama()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        memory = inlay.attach(model.train(), settings(**changes)).train_only("all")
        batch = {"input_ids": ids, "labels": ids, **extra}
        loss = model(**(tree_map_only(Tensor, Elsewhere, batch) if there else batch), use_cache=False).loss
        loss.backward()
        memory.raise_if_not_finite()
        memory.clip_rate()
        losses.append(loss.item())
        gradients.append({name: back(parameter.grad) for name, parameter in model.named_parameters()})
    assert losses[0] == losses[1]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("representation", ["auto", "dense", "deferred"])
@pytest.mark.parametrize("masked", [False, True])
def test_prefill_and_decode_are_the_same_as_on_the_cpu(representation: Any, masked: bool) -> None:
    ids, outputs = tokens(), []
    mask = (torch.arange(23) >= torch.tensor([[0], [4]])).long()
    for there in (False, True):
        model = (elsewhere(llama()) if there else llama()).eval()
        inlay.attach(model, settings()).representation = representation
        cache, logits = DynamicCache(), []
        for start, stop in ((0, 13), (13, 14), (14, 15), (15, 16), (16, 22), (22, 23)):
            piece = {"input_ids": ids[:, start:stop]} | ({"attention_mask": mask[:, :stop]} if masked else {})
            with torch.no_grad():
                given = tree_map_only(Tensor, Elsewhere, piece) if there else piece
                logits.append(back(model(**given, **with_cache(model, cache)).logits))
        outputs.append(torch.cat(logits, 1))
    assert torch.equal(*outputs)


def test_a_session_and_a_memory_go_to_files_and_come_back(tmp_path: Path) -> None:
    ids, outputs = tokens(), []
    for there in (False, True):
        model = (elsewhere(llama()) if there else llama()).eval()
        memory = inlay.attach(model, settings())
        pieces = [Elsewhere(ids[:, a:b]) if there else ids[:, a:b] for a, b in ((0, 12), (12, 13), (13, 20), (20, 23))]
        with torch.no_grad():
            session = memory.session(2)
            first = [back(session.step(piece).logits) for piece in pieces[:3]]
            session.save(tmp_path / "session.safetensors")
            again = memory.load_session(tmp_path / "session.safetensors")
            outputs.append(torch.cat([*first, back(again.step(pieces[3]).logits)], 1))
        memory.save_pretrained(tmp_path / "memory")
        memory.detach()
        inlay.attach_pretrained(model, tmp_path / "memory")
    assert torch.equal(*outputs)


def test_lora_beside_the_memory_is_the_same_as_on_the_cpu() -> None:
    ids, losses = tokens(), []
    for there in (False, True):
        model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        model = elsewhere(model) if there else model
        inlay.attach(model.train(), settings()).train_only("memory+lora")
        given = Elsewhere(ids) if there else ids
        loss = model(input_ids=given, labels=given, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]


def test_products_of_bfloat16_differ_from_those_of_float32_by_rounding_alone() -> None:
    """On CUDA the scan multiplies bfloat16 operands as they are and adds in float32."""
    gradients = []
    for there in (False, True):
        model = llama().to(torch.bfloat16)
        model = elsewhere(model) if there else model
        inlay.attach(model.train(), settings(exposure=0.5)).train_only("all")
        ids = Elsewhere(tokens()) if there else tokens()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: back(parameter.grad) for name, parameter in model.named_parameters()})
    errors = {name: relative_error(gradient, gradients[0][name]) for name, gradient in gradients[1].items()}
    assert 0 < max(errors.values()) <= 0.03, errors


def test_operands_on_two_devices_are_refused() -> None:
    with pytest.raises(RuntimeError, match="is on the CPU"):
        Elsewhere(torch.ones(3)) + torch.ones(3)


def test_rows_of_a_session_are_reset_chosen_and_copied_where_they_are() -> None:
    ids, outputs = tokens(3), []
    for there in (False, True):
        model = (elsewhere(llama()) if there else llama()).eval()
        memory = inlay.attach(model, settings())
        given = Elsewhere(ids) if there else ids
        with torch.no_grad():
            session = memory.session(3)
            session.step(given[:, :12])
            session.reset([1])
            session.select([2, 0, 1, 1])
            twin = session.copy()
            twin.reset(torch.tensor([True, False, False, False]))
            rest = ids[[2, 0, 1, 1], 12:]
            rest = Elsewhere(rest) if there else rest
            logits = [back(one.step(rest).logits) for one in (session, twin)]
            norms = torch.stack([back(norm) for norm in twin.sum_norms().values()])
        outputs.append([*logits, norms, session.tokens_read, twin.chunks_committed])
    for here, from_there in zip(*outputs, strict=True):
        assert torch.equal(here, from_there)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_generation_is_the_same_as_on_the_cpu(options: dict[str, Any]) -> None:
    ids, outputs = tokens(2, 12), []
    mask = (torch.arange(12) >= torch.tensor([[0], [4]])).long()
    for there in (False, True):
        model: Any = (elsewhere(llama()) if there else llama()).eval()
        inlay.attach(model, settings())
        given = {"inputs": ids, "attention_mask": mask}
        torch.manual_seed(0)
        new = model.generate(
            **(tree_map_only(Tensor, Elsewhere, given) if there else given), max_new_tokens=9, **options
        )
        outputs.append(back(new))
    assert torch.equal(*outputs)
