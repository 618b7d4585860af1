"""A device that is not the CPU, without one: whoever mixes the two, or reads without fetching, is told.

``Elsewhere`` is a tensor that says it lives on another device and computes on the CPU. An operator given operands of
both raises, as CUDA does; so does data that is read without being fetched. (The device calls itself ``meta``, the only
one besides the CPU for which any build of PyTorch runs a backward.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from inlay.fastweight.layer import Statistics

M = TypeVar("M", bound=nn.Module)

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

    @property
    def data(self) -> Tensor:
        return Elsewhere(self.cpu_tensor.detach())

    @data.setter
    def data(self, value: Elsewhere) -> None:
        self.cpu_tensor = value.cpu_tensor

    def new_tensor(self, data: Any, **options: Any) -> Elsewhere:
        return Elsewhere(self.cpu_tensor.new_tensor(data, **options))

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


def elsewhere(model: M) -> M:
    """Move ``model``."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, Elsewhere):
                module._parameters[name] = nn.Parameter(Elsewhere(parameter.data.clone()), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(buffer, Elsewhere):
                module._buffers[name] = Elsewhere(buffer.clone())
        if isinstance(module, Statistics):
            module._apply(lambda counter: counter if isinstance(counter, Elsewhere) else Elsewhere(counter.clone()))
    return model


def back(tensors: Any) -> Any:
    return tree_map_only(Elsewhere, lambda tensor: tensor.cpu_tensor, tensors)


@pytest.fixture(autouse=True)
def other_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it there is one: tensors made of data go there, autocast is off there, attention has one kernel."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled

    def of_data(make: Any) -> Any:
        def made(data: Any, **options: Any) -> Tensor:
            device = options.get("device")
            if device is None or torch.device(device).type != ELSEWHERE:
                return make(data, **options)
            there = data if isinstance(data, Elsewhere) else Elsewhere(make(back(data), **options | {"device": "cpu"}))
            return there.to(options.get("dtype") or there.dtype)

        return made

    def maybe(device: str, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if device == ELSEWHERE else autocast(device, *args, **kwargs)

    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, of_data(getattr(torch, name)))
    monkeypatch.setattr(torch, "autocast", maybe)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cuda": device != ELSEWHERE and enabled(device))
    with TwoDevices(), sdpa_kernel(SDPBackend.MATH):
        yield
