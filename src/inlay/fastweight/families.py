"""What the models look like: where their blocks are and which module of a block is the down projection.

The only place that knows. A new family is a line of ``FAMILIES``; a single odd model can instead be described by
``FastWeightConfig(projection="path.to.blocks.{layer}.path.to.projection")``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from inlay.fastweight.causal_lm import base_model
from inlay.fastweight.errors import AttachError


@dataclass(frozen=True)
class Family:
    """Where a kind of model keeps its blocks, and a block its down projection."""

    blocks: str
    """Attribute of the decoder that holds the list of blocks."""
    projection: str
    """Path from a block to its down projection."""


_LLAMA_LIKE = Family("layers", "mlp.down_proj")

# By ``config.model_type``. Whatever is not named is tried as llama-like, which most decoders are.
FAMILIES: dict[str, Family] = {
    "gpt2": Family("h", "mlp.c_proj"),
    "gpt_neox": Family("layers", "mlp.dense_4h_to_h"),
    "moshi": Family("layers", "mlp.fc2"),
    "kyutai_speech_to_text": Family("layers", "mlp.fc2"),
}


@dataclass(frozen=True)
class Site:
    """One place where a memory can be put."""

    index: int
    block: nn.Module
    mlp: nn.Module
    """The module of the block that calls the projection."""
    parent: nn.Module
    """What holds the projection: the MLP, or a PEFT layer around it."""
    name: str
    projection: nn.Module
    replaced: nn.Module | None = None
    """What ``mlp`` stands in for within ``block`` while a memory is attached; None: nothing."""

    def install(self) -> None:
        """Put ``mlp`` where it belongs, if it is not the block's own."""
        self._swap(self.replaced, self.mlp)

    def restore(self) -> None:
        """Give the block its own module back."""
        self._swap(self.mlp, self.replaced)

    def _swap(self, old: nn.Module | None, new: nn.Module | None) -> None:
        for module in list(self.block.modules()) if self.replaced is not None else ():
            for name, child in module._modules.items():
                if child is old:
                    module._modules[name] = new


@dataclass(frozen=True)
class Decoder:
    """The part of a model that runs the blocks."""

    module: nn.Module
    """Takes ``attention_mask`` and ``position_ids``; calls the blocks."""
    blocks: nn.ModuleList
    projection: str
    """Path from a block to its down projection."""
    model: nn.Module | None = None
    """The model around ``module`` that users call, where it is not the one that they attach to or a PEFT model."""
    entrances: tuple[str, ...] = ()
    """Methods of ``model`` that run ``module`` past the model's forward."""
    checkpointing: str | None = None
    """Attribute of ``module`` that, when true, makes it run its blocks under torch's checkpointing by itself."""

    def site(self, index: int) -> Site:
        """The down projection of block ``index``.

        Raises:
            AttachError: The block has none, or it is not a linear layer (a mixture of experts, say).
        """
        block = self.blocks[index]
        mlp, name, projection = self._look_up(block)
        parent = mlp
        replaced: nn.Module | None = None
        if mlp is not None and _reads_raw_weights(mlp):
            from inlay.moshi.gating import ModularGating

            mlp, replaced = ModularGating(mlp), mlp
        while isinstance(projection, nn.Module) and (below := _wrapped_linear(projection)):
            parent, name, projection = projection, below, getattr(projection, below)  # LoRA came first: go below it
        if mlp is not None and parent is not None and isinstance(projection, nn.Linear | Conv1D):
            if name not in parent._modules:
                raise AttachError(
                    f"{self.projection!r} of block {index} is inside a {type(parent).__name__}, which runs a copy of "
                    "it. Leave the MLP out of PEFT's modules_to_save; train_only('memory+layers') trains it whole"
                )
            if sum(other is block for other in self.blocks) > 1:
                raise AttachError(
                    f"block {index} stands in the model more than once, and a memory keeps one sum for each place: "
                    "choose a block that stands there once"
                )
            return Site(index, block, mlp, parent, name, projection, replaced)
        if isinstance(projection, nn.Module):
            raise AttachError(
                f"{self.projection!r} of block {index} is a {type(projection).__name__}; a memory can be attached to "
                f"nn.Linear, transformers' Conv1D, or a LoRA layer around one of them"
            )
        if any("expert" in name for name, _ in block.named_modules()):
            dense = [i for i, other in enumerate(self.blocks) if isinstance(self._look_up(other)[2], nn.Module)]
            raise AttachError(
                f"block {index} is a mixture of experts: its down projections see only the tokens routed to them, so "
                f"no memory can be written there. "
                + (f"Dense blocks of this model: {dense}" if dense else "This model has no dense block")
            )
        candidates = [name for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        raise AttachError(
            f"block {index} ({type(block).__name__}) has no module {self.projection!r}. Its linear layers are "
            f"{candidates}; name the down projection with "
            f"FastWeightConfig(projection='path.to.blocks.{{layer}}.path.to.projection')"
        )

    def _look_up(self, block: nn.Module) -> tuple[nn.Module | None, str, object]:
        """The module that holds the projection, the attribute's name, and what is there."""
        *path, name = self.projection.split(".")
        parent: object = block
        for step in path:
            parent = getattr(parent, step, None)
        if not isinstance(parent, nn.Module):
            return None, name, None
        return parent, name, getattr(parent, name, None)


def _wrapped_linear(module: nn.Module) -> str | None:
    """Where a LoRA layer (PEFT's, Kyutai's) keeps the linear layer it is around; None if it is none."""
    for name in ("base_layer", "frozen_W"):
        if isinstance(getattr(module, name, None), nn.Module):
            return name
    return None


def _reads_raw_weights(mlp: nn.Module) -> bool:
    """Whether it is Kyutai's gating, whose forward takes the weights of its linear layers and calls neither."""
    gating = sys.modules.get("moshi.modules.gating")
    return gating is not None and isinstance(mlp, gating.ActivationGating)


def projection_shape(projection: nn.Module) -> tuple[int, int]:
    """(D, F) of a linear layer or transformers' Conv1D."""
    if isinstance(projection, Conv1D):
        inner, width = projection.weight.shape
        return int(width), int(inner)
    assert isinstance(projection, nn.Linear)
    return projection.out_features, projection.in_features


def is_called(module: nn.Module) -> bool:
    """Whether the module has a forward: a ModuleDict that only keeps others does not, and its hooks never run."""
    return type(module).forward is not nn.Module.forward


def find_decoder(model: nn.Module, projection: str | None = None) -> Decoder:
    """The decoder of ``model``: by its family, or by a path pattern ``"path.to.blocks.{layer}.path.to.projection"``.

    Raises:
        AttachError: Nothing in the model looks like a decoder, or the pattern leads nowhere.
    """
    if projection is not None:
        return _by_pattern(model, projection)
    kyutai = _kyutai_decoder(model)
    if kyutai is not None:
        return kyutai
    for module in _decoding_part(model).modules():
        model_type = getattr(getattr(module, "config", None), "model_type", "")
        if model_type not in _text_types(model):  # the audio or vision tower of a composite model
            continue
        family = FAMILIES.get(model_type, _LLAMA_LIKE)
        blocks = module._modules.get(family.blocks)
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            return Decoder(module, blocks, family.projection)
    raise AttachError(
        f"no decoder blocks found in {type(model).__name__}. Say where the down projections are with "
        f"FastWeightConfig(projection='path.to.blocks.{{layer}}.path.to.projection')"
    )


def _kyutai_decoder(model: nn.Module) -> Decoder | None:
    """The main transformer of Kyutai's ``LMModel``: it has no Hugging Face config, so it is known by its class."""
    lm = sys.modules.get("moshi.models.lm")  # imported by whoever made the model, or it is none
    if lm is None:
        return None
    for module in model.modules():
        if isinstance(module, lm.LMModel):
            blocks = module.transformer.layers
            projection = "linear2" if blocks[0].gating is None else "gating.linear_out"
            return Decoder(module.transformer, blocks, projection, module, ("forward_text",), "checkpointing")
    return None


def _decoding_part(model: nn.Module) -> nn.Module:
    """The model, less its encoder if it has one."""
    inner = base_model(model)
    encodes = isinstance(inner, PreTrainedModel) and inner.config.is_encoder_decoder
    return inner.get_decoder() if encodes else model


def _text_types(model: nn.Module) -> set[str]:
    """The ``model_type`` of the model and of its text part."""
    config = getattr(model, "config", None)
    if config is None:
        return set()
    return {config.model_type, config.get_text_config().model_type}


def _by_pattern(model: nn.Module, pattern: str) -> Decoder:
    path, projection = pattern.split(".{layer}.")
    modules = dict(model.named_modules())
    blocks = modules.get(path)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
        raise AttachError(f"projection={pattern!r}: {path!r} is no list of blocks. The model's lists are {lists}")
    owner = path.rpartition(".")[0]
    while owner and not is_called(modules[owner]):
        owner = owner.rpartition(".")[0]
    return Decoder(modules[owner], blocks, projection)
