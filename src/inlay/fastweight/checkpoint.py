"""A memory on disk: ``memory.safetensors`` with its tensors and ``memory.json`` that says whose they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from inlay import __version__
from inlay.fastweight.config import FastWeightConfig
from inlay.fastweight.errors import CheckpointError
from inlay.fastweight.families import Decoder
from inlay.fastweight.layer import FastWeightProjection
from inlay.files import replacing_together, sha256

TENSORS = "memory.safetensors"
HEADER = "memory.json"
FORMAT = 1


@dataclass(frozen=True)
class SavedMemory:
    """A memory read from disk and checked in itself, not yet against a model."""

    directory: Path
    config: FastWeightConfig
    model: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def base_names(self) -> list[str]:
        """Names of the base parameters saved along with the memory."""
        return [name.removeprefix("base.") for name in self.tensors if name.startswith("base.")]


def describe_model(model: nn.Module, decoder: Decoder) -> dict[str, Any]:
    """What a saved memory notes of its model, to be refused by another one."""
    config = getattr(model, "config", None)
    return {
        "type": getattr(config, "model_type", type(decoder.model or model).__name__),
        "blocks": len(decoder.blocks),
        "projection": decoder.projection,
        "intermediate_size": getattr(config, "intermediate_size", None),
    }


def plain_name(name: str) -> str:
    """A parameter's name without the steps that PEFT, Kyutai's LoRA and torch.compile put in."""
    name = name.removeprefix("_orig_mod.").removeprefix("base_model.model.")
    for step in ("_orig_mod", "base_layer", "original_module", "frozen_W"):
        name = name.replace(f".{step}.", ".")
    return name


def write(
    directory: Path,
    config: FastWeightConfig,
    model: dict[str, Any],
    layers: Mapping[int, FastWeightProjection],
    base: Mapping[str, Tensor],
) -> None:
    """Write a memory to ``directory``, which is made if it is not there.

    The header holds a checksum of the tensors, so that two halves of different saves are never taken for one.
    """
    named: dict[str, Tensor] = {
        f"memory.{i}.{name}": p for i, layer in layers.items() for name, p in layer.memory_parameters()
    }
    named |= {f"base.{name}": parameter for name, parameter in base.items()}
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in named.items()}
    header = {
        "format": FORMAT,
        "inlay": __version__,
        "model": model,
        "config": config.model_dump(mode="json"),
        "tensors": {name: [*t.shape] for name, t in tensors.items()},
    }
    with replacing_together(directory / HEADER) as new:
        save_file(tensors, new / TENSORS, metadata={"format": "pt"})
        header["sha256"] = sha256(new / TENSORS)
        (new / HEADER).write_text(json.dumps(header, indent=2) + "\n")


def read(directory: Path) -> SavedMemory:
    """Read and check what :func:`write` wrote.

    Raises:
        CheckpointError: A file is missing or damaged, of a newer format, or the two are not of one save.
    """
    for name in (HEADER, TENSORS):
        if not (directory / name).is_file():
            raise CheckpointError(
                f"{directory} holds no memory: {name} is missing. Save one with memory.save_pretrained"
            )
    try:
        header = json.loads((directory / HEADER).read_text())
        if header["format"] != FORMAT:
            raise CheckpointError(
                f"{directory / HEADER} is of format {header['format']}, this version of inlay ({__version__}) reads "
                f"{FORMAT}; it was written by inlay {header.get('inlay')}"
            )
        config = FastWeightConfig(**header["config"])
        model, listed, digest = dict(header["model"]), dict(header["tensors"]), str(header["sha256"])
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / HEADER} is not a memory's header: {error}") from error
    if sha256(directory / TENSORS) != digest:
        raise CheckpointError(
            f"{directory / TENSORS} is damaged or is not of the same save as {HEADER}: its checksum differs. "
            "Copy both files again, or take an earlier save"
        )
    try:
        tensors = load_file(directory / TENSORS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{directory / TENSORS} is damaged: {error}") from error
    found = {name: [*t.shape] for name, t in tensors.items()}
    if found != listed:
        odd = sorted(name for name in found.keys() | listed.keys() if found.get(name) != listed.get(name))
        raise CheckpointError(f"{directory}: header and tensors are not of one save; they differ in {odd[:5]}")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{directory / TENSORS}: {name!r} holds NaN or infinity")
    return SavedMemory(directory, config, model, tensors)


def check_model(saved: SavedMemory, model: dict[str, Any]) -> None:
    """Refuse a memory of another kind of model.

    Raises:
        CheckpointError: Names what differs.
    """
    different = {k: (saved.model[k], model[k]) for k in model if k in saved.model and saved.model[k] != model[k]}
    if different:
        raise CheckpointError(
            f"the memory in {saved.directory} is of another model: "
            + ", ".join(f"{key} is {theirs!r} there and {ours!r} here" for key, (theirs, ours) in different.items())
            + ". Load it into the model that it was trained with"
        )


def load_tensors(
    saved: SavedMemory, layers: Mapping[int, FastWeightProjection], base: Mapping[str, nn.Parameter]
) -> None:
    """Copy the saved tensors into a model's memory and base. Checks all of them before it copies any.

    Raises:
        CheckpointError: A tensor is missing, has no place in the model, or is of another shape.
    """
    wanted = {f"memory.{i}.{name}": p for i, layer in layers.items() for name, p in layer.memory_parameters()}
    missing = sorted(wanted.keys() - saved.tensors.keys())
    available = wanted | {f"base.{name}": parameter for name, parameter in base.items()}
    unexpected = sorted(saved.tensors.keys() - available.keys())
    shapes = [
        f"{name} is {[*tensor.shape]} there and {[*available[name].shape]} here"
        for name, tensor in saved.tensors.items()
        if name in available and tensor.shape != available[name].shape
    ]
    problems = [f"missing there: {missing}"] * bool(missing) + [f"no place here: {unexpected}"] * bool(unexpected)
    if problems or shapes:
        raise CheckpointError(
            f"the memory in {saved.directory} does not fit: {'; '.join(problems + shapes)}. "
            "Load it into the model that it was trained with"
        )
    with torch.no_grad():
        for name, tensor in saved.tensors.items():
            available[name].copy_(tensor)
