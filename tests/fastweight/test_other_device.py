"""The memory on a device that is not the CPU, shown without one: every tensor the memory makes is where the model is.

``Elsewhere`` is a tensor that says it lives on another device and computes on the CPU. An operator given operands of
both raises, as CUDA does; so does data that is read without being fetched. What comes out is compared, bit for bit,
with the same on the CPU. (The device calls itself ``meta``, the only one besides the CPU for which any build of
PyTorch runs a backward.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import inlay
from inlay.fastweight.causal_lm import with_cache
from tests.closeness import relative_error

ELSEWHERE = "meta"
aten = torch.ops.aten
_MAY_MIX = {aten._to_copy.default, aten.copy_.default, aten.index.Tensor}
"""Copies go from device to device, and CUDA lets a tensor be indexed by one on the CPU."""


class Elsewhere(Tensor):
    """A tensor on the other device; ``cpu_tensor`` holds its numbers."""

    cpu_tensor: Tensor
    is_cuda = True  # what the scan asks, to multiply bfloat16 as it is
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, cpu_tensor: Tensor) -> Elsewhere:
        tensor = Tensor._make_wrapper_subclass(
            cls,
            cpu_tensor.size(),
            strides=cpu_tensor.stride(),
            storage_offset=cpu_tensor.storage_offset(),
            dtype=cpu_tensor.dtype,
            device=ELSEWHERE,
        )
        tensor.cpu_tensor = cpu_tensor
        return tensor

    def tolist(self) -> Any:
        return self.cpu_tensor.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class TwoDevices(TorchDispatchMode):
    """Within it tensors can be made on the other device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the CPU; its results are where its operands, or ``device``, say."""
    operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [operand for operand in operands if isinstance(operand, Elsewhere)]
    here = [operand for operand in operands if not isinstance(operand, Elsewhere) and operand.dim()]
    if here and there and func not in _MAY_MIX:
        raise RuntimeError(f"{func}: {[*here[0].shape]} is on the CPU, {[*there[0].shape]} is not")
    device = kwargs.get("device")
    is_there = bool(there) if device is None else torch.device(device).type == ELSEWHERE
    on_cpu = kwargs if device is None else kwargs | {"device": "cpu"}
    args_here, kwargs_here = back((args, on_cpu))
    result = func(*args_here, **kwargs_here)
    returns = func._schema.returns
    if returns and all(each.alias_info is not None and each.alias_info.is_write for each in returns):
        return kwargs.get("out", args[0])
    return tree_map_only(Tensor, Elsewhere, result) if is_there else result


def elsewhere(model: nn.Module) -> nn.Module:
    """Move ``model``."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, Elsewhere):
                module._parameters[name] = nn.Parameter(Elsewhere(parameter.data.clone()), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(buffer, Elsewhere):
                module._buffers[name] = Elsewhere(buffer.clone())
    return model


def back(tensors: Any) -> Any:
    return tree_map_only(Elsewhere, lambda tensor: tensor.cpu_tensor, tensors)


@pytest.fixture(autouse=True)
def other_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Autocast knows no such device, so it is off there; and ``torch.tensor`` passes no dispatcher."""
    autocast, enabled, tensor = torch.autocast, torch.is_autocast_enabled, torch.tensor

    def tensor_there(data: Any, **options: Any) -> Tensor:
        device = options.get("device")
        is_there = device is not None and torch.device(device).type == ELSEWHERE
        return Elsewhere(tensor(data, **options | {"device": "cpu"})) if is_there else tensor(data, **options)

    def maybe(device: str, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if device == ELSEWHERE else autocast(device, *args, **kwargs)

    monkeypatch.setattr(torch, "tensor", tensor_there)
    monkeypatch.setattr(torch, "autocast", maybe)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cuda": device != ELSEWHERE and enabled(device))
    with TwoDevices():
        yield


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
