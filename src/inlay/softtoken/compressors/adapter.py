"""The encoder's LoRA adapter on the decoder's own weights, by PEFT: no second copy of the model.

The adapter is on while a context is read and at no other time; the decoder then computes bit for bit what the base
model does (or, where its owner gave it adapters too, what those make of it). Switching never changes what requires a
gradient, and is undone when reading fails.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from inlay.softtoken.compressors.config import LoraSettings
from inlay.softtoken.compressors.errors import CompressorError

NAME = "compressor"
PREFIX = "base_model.model."
"""What PEFT puts before the names of an adapter's tensors in a file."""


class Adapter:
    """A LoRA adapter in ``model``, switched off.

    Attributes:
        model: The model it is in.
        name: ``compressor``, or ``compressor-2`` and so on where the model has one already.
        config: As PEFT saves it.
    """

    def __init__(self, model: Any, blocks: nn.ModuleList, settings: LoraSettings) -> None:
        self.model = model
        self.name = _free_name(model)
        targets = settings.target_modules
        self.config = LoraConfig(
            r=settings.r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=linear_names(blocks) if targets == "all-linear" else list(targets),
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in blocks.modules()),
            base_model_name_or_path=getattr(model, "name_or_path", None),
            task_type="CAUSAL_LM",
        )
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        with adapters(tuner_layers(model), []), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several compressors may share a model
            try:
                inject_adapter_in_model(self.config, model, self.name)
            except ValueError as error:
                self.detach()
                raise CompressorError(f"lora: no adapter can be put into {type(model).__name__}: {error}") from error
            finally:
                for parameter, flag in flags:  # PEFT freezes whatever is not the new adapter's
                    parameter.requires_grad_(flag)
        for layer in tuner_layers(model):
            if layer.active_adapters == [self.name]:  # wrapped just now
                layer._active_adapter = []
        for parameter in self.tensors().values():
            parameter.requires_grad_(True)
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()  # steps of the optimizer would be rounded away

    def tensors(self) -> dict[str, nn.Parameter]:
        """Its parameters themselves, by the names that PEFT saves them under."""
        parameters = dict(self.model.named_parameters())
        named = get_peft_model_state_dict(self.model, parameters, self.name, save_embedding_layers=False)
        return {PREFIX + name: parameter for name, parameter in named.items()}

    def detach(self) -> None:
        """Take it out; layers that have no adapter left are the original modules again."""
        for path, module in list(self.model.named_modules()):
            if not isinstance(module, BaseTunerLayer) or self.name not in _available(module):
                continue
            module.delete_adapter(self.name)
            if not _available(module):
                parent, _, name = path.rpartition(".")
                setattr(self.model.get_submodule(parent), name, module.base_layer)
        configs = getattr(self.model, "peft_config", {})
        configs.pop(self.name, None)
        if not configs and hasattr(self.model, "peft_config"):
            del self.model.peft_config


@contextmanager
def adapters(layers: Sequence[Any], names: Sequence[str]) -> Iterator[None]:
    """Run PEFT's ``layers`` with these adapters and no others; afterwards with those of before."""
    before = [(layer, layer.active_adapter, layer.disable_adapters) for layer in layers]
    try:
        for layer in layers:  # not by set_adapter(), which turns gradients on and off as well
            layer._active_adapter, layer._disable_adapters = list(names), False
        yield
    finally:
        for layer, active, disabled in before:
            layer._active_adapter, layer._disable_adapters = active, disabled


@contextmanager
def recomputed_within(model: nn.Module, within: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Blocks that gradient checkpointing runs again in backward are then run within ``within()`` too.

    By the time of the backward the adapter is off, so without this a block would be recomputed without it.
    """
    checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    functions = [m._gradient_checkpointing_func for m in checkpointed]

    def checkpoint_within(function: Any) -> Any:
        def checkpoint(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def run_within(*inputs: Any) -> Any:
                with within():
                    return run(*inputs)

            return function(run_within, *args, **kwargs)

        return checkpoint

    try:
        for module, function in zip(checkpointed, functions, strict=True):
            module._gradient_checkpointing_func = checkpoint_within(function)
        yield
    finally:
        for module, function in zip(checkpointed, functions, strict=True):
            module._gradient_checkpointing_func = function


def tuner_layers(model: nn.Module) -> list[Any]:
    """The layers of ``model`` that PEFT has put adapters into."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def adapter_parameters(model: nn.Module) -> set[int]:
    """The ``id`` of every parameter of ``model`` that belongs to an adapter, whoever's it is."""
    return {
        id(parameter)
        for layer in tuner_layers(model)
        for name in layer.adapter_layer_names
        for parameter in getattr(layer, name).parameters()
    }


def linear_names(blocks: nn.ModuleList) -> list[str]:
    """The last names of the linear layers inside ``blocks``, adapters on them left out; of a mixture of experts, those
    of its attention, since PEFT takes the names of an MLP there for the experts' parameters."""
    found: set[str] = set()
    experts = any("experts" in path for path, _ in blocks.named_modules())
    for block in blocks:
        inner = {
            f"{path}.{name}"
            for path, layer in block.named_modules()
            if isinstance(layer, BaseTunerLayer)
            for name, _ in layer.named_modules()
            if name
        }
        for path, module in block.named_modules():
            linear = isinstance(module, (nn.Linear, Conv1D, BaseTunerLayer)) and path not in inner
            if linear and ("att" in path or not experts):
                found.add(path.rpartition(".")[2])
    return sorted(found)


def _free_name(model: nn.Module) -> str:
    taken = {name for layer in tuner_layers(model) for name in _available(layer)}
    number = 1
    while (name := NAME if number == 1 else f"{NAME}-{number}") in taken:
        number += 1
    return name


def _available(layer: Any) -> set[str]:
    return {key for name in layer.adapter_layer_names for key in getattr(layer, name)}
