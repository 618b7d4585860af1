"""A memory beside PEFT LoRA, attached before it or after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import inlay
from inlay.fastweight import FastWeightProjection
from tests.closeness import assert_close, relative_error
from tests.fastweight.families import Model, enable_checkpointing, trainable
from tests.fastweight.test_attach import GPT2, IDS, LLAMA, logits


def lora(model: nn.Module, targets: Any = "all-linear", **options: Any) -> nn.Module:
    """A PEFT model whose adapters already do something."""
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", **options)
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    return wrapped


def both(
    order: str, targets: Any = "all-linear", family: Model = LLAMA, **changes: Any
) -> tuple[nn.Module, inlay.Memory]:
    model = family.make()
    options = {"fan_in_fan_out": family is GPT2}
    if order == "lora first":
        wrapped = lora(model, targets, **options)
        torch.manual_seed(5)
        return wrapped, inlay.attach(wrapped, family.config(**changes))
    torch.manual_seed(5)
    memory = inlay.attach(model, family.config(**changes))
    return lora(model, targets, **options), memory


both_orders = pytest.mark.parametrize("order", ["lora first", "memory first"])


@both_orders
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"]])
@pytest.mark.parametrize("target", ["embeddings", "hidden"])
def test_lora_and_a_fresh_memory_give_what_lora_alone_gives(order: str, targets: Any, target: str) -> None:
    expected = logits(lora(LLAMA.make(), targets))
    model, memory = both(order, targets, init="zero", target=target)
    assert_close(logits(model), expected, 1e-6)
    assert relative_error(logits(model), logits(LLAMA.make())) > 0.01
    assert not any("target" in name and "lora" in name for name, _ in model.named_parameters())
    with memory.disabled():
        assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # PEFT 0.18, of a base that has no folder
def test_the_order_of_lora_and_memory_does_not_matter() -> None:
    one, _ = both("lora first")
    two, _ = both("memory first")
    assert set(one.state_dict()) == set(two.state_dict())
    assert set(peft.get_peft_model_state_dict(one)) == set(peft.get_peft_model_state_dict(two))
    assert torch.equal(logits(one), logits(two))


@both_orders
def test_memory_and_lora_are_trained_together_and_nothing_else(order: str) -> None:
    model, memory = both(order)
    memory.train_only("memory+lora")
    names = set(trainable(model))
    assert names == {n for n, _ in model.named_parameters() if "lora_" in n or ".target." in n}
    assert any("down_proj.lora_A" in n for n in names)
    assert not any("lora_" in name for name in memory.base_parameters())
    model.train()
    LLAMA.loss(model, IDS).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


@both_orders
def test_whole_modules_that_peft_trains_and_saves_go_with_its_adapters(order: str, tmp_path: Path) -> None:
    options = {"modules_to_save": ["lm_head"], "targets": ["q_proj"]}
    asked = {name for name in trainable(lora(LLAMA.make(), **options)) if "lm_head" in name}
    assert len(asked) == 1
    if order == "lora first":
        model = lora(LLAMA.make(), **options)
        memory = inlay.attach(model, LLAMA.config())
    else:
        memory = inlay.attach(LLAMA.make(), LLAMA.config())
        model = lora(memory.model, **options)
    memory.train_only("memory+lora")
    assert {name for name in trainable(model) if "lm_head" in name} == asked
    assert set(memory.base_parameters()) == {name for name, _ in LLAMA.make().named_parameters()}
    LLAMA.loss(model.train(), IDS).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    memory.save_pretrained(tmp_path)
    inlay.attach_pretrained(LLAMA.make(), tmp_path)  # PEFT keeps the head's copy


def test_adapters_that_do_not_run_are_not_trained() -> None:
    """Parameters without a gradient stop DistributedDataParallel."""
    model, memory = both("memory first")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    names = set(trainable(memory.train_only("memory+lora").model))
    assert any(".lora_A.default." in name for name in names)
    assert not any(".lora_A.other." in name for name in names)
    assert not any("lora_" in name for name in memory.base_parameters())


@both_orders
def test_base_parameters_have_the_names_of_the_plain_model(order: str) -> None:
    _, memory = both(order)
    assert set(memory.base_parameters()) == {name for name, _ in LLAMA.make().named_parameters()}


@both_orders
def test_detach_from_a_peft_model_leaves_lora_alone(order: str) -> None:
    expected = logits(lora(LLAMA.make()))
    model, memory = both(order)
    keys = set(lora(LLAMA.make()).state_dict())
    memory.detach()
    assert set(model.state_dict()) == keys
    assert not any(isinstance(module, FastWeightProjection) for module in model.modules())
    assert torch.equal(logits(model), expected)


@both_orders
def test_peft_can_switch_its_adapters_off_beside_a_memory(order: str) -> None:
    torch.manual_seed(5)
    alone = LLAMA.make()
    torch.manual_seed(5)
    inlay.attach(alone, LLAMA.config())
    model, _ = both(order)
    with model.disable_adapter():
        assert_close(logits(model), logits(alone), 1e-6)
    assert relative_error(logits(model), logits(alone)) > 0.01


@both_orders
@pytest.mark.parametrize(("family", "projection"), [(LLAMA, nn.Linear), (GPT2, Conv1D)], ids=["llama", "gpt2"])
def test_lora_can_be_merged_below_a_memory(order: str, family: Model, projection: type) -> None:
    model, memory = both(order, family=family)
    expected = logits(model)
    model.merge_adapter()
    assert_close(logits(model), expected, 1e-5)
    model.unmerge_adapter()
    assert_close(logits(model), expected, 1e-5)
    merged = model.merge_and_unload()
    assert_close(logits(merged), expected, 1e-5)
    below = memory.layers[0].base
    memory.detach()
    assert type(below) is projection
    assert any(module is below for module in merged.modules())
    plain, _ = both("memory first", family=family)
    inlay.find_memory(plain).detach()
    assert_close(logits(merged), logits(plain), 1e-5)


@both_orders
def test_document_ids_pass_through_a_peft_model(order: str) -> None:
    model, memory = both(order)
    document_ids = torch.tensor([0] * 10 + [1] * 12).expand(2, -1)
    out = logits(model, document_ids=document_ids)
    assert relative_error(out, logits(model)) > 0.01
    with memory.disabled():
        logits(model, document_ids=document_ids)


@both_orders
def test_checkpointing_a_peft_model_gives_the_plain_gradients(order: str) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model, memory = both(order)
        memory.train_only("memory+lora")
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            enable_checkpointing(model.get_base_model())
        (LLAMA.loss(model, IDS) + LLAMA.loss(model, IDS.flip(1))).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert_close(checkpointed[name], gradient, 1e-6, name)
