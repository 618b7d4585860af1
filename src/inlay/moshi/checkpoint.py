"""What fine-tuning leaves behind: moshi-finetune's files, with the memory's own beside them.

    DIR/
      config.json               the model's sizes, and ``lora``, ``lora_rank``, ``lora_scaling``: moshi-finetune's
      lora.safetensors          adapters, and embeddings trained with ``ft_embed``: moshi-finetune's
      memory.safetensors, memory.json   the memory, and base weights trained with it: :mod:`inlay.fastweight.checkpoint`
      yarn.json                 the longer window that it was trained with, if it was: :mod:`inlay.moshi.yarn`
      consolidated.safetensors  the whole model, where it was trained without memory and adapters: moshi-finetune's

Kyutai's own loader reads ``config.json`` with ``lora.safetensors`` or ``consolidated.safetensors``;
:func:`load_finetuned` reads everything. Adapters that the checkpoint itself has are fused into its weights first, which
Kyutai's loader would have to be told of.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from inlay.fastweight import CheckpointError, Memory, attach_pretrained, find_memory
from inlay.fastweight import checkpoint as memory_files
from inlay.files import replacing, write_whole
from inlay.moshi.lora import LoraConfig, add_lora, lora_layers
from inlay.moshi.weights import CONFIG_NAME, MoshiCheckpoint
from inlay.moshi.yarn import YarnConfig, apply_yarn, yarn_of

LORA_NAME = "lora.safetensors"
WHOLE_NAME = "consolidated.safetensors"
YARN_NAME = "yarn.json"
_LORA_KEYS = ("lora", "lora_rank", "lora_scaling", "lora_name")

# An attribute of a model: names of what its adapters' file held besides, to be saved with them again.
_WITH_ADAPTERS = "_inlay_with_adapters"


def save_finetuned(directory: str | Path, lm: LMModel, config: Mapping[str, Any]) -> None:
    """Write everything that was trained. Each file is written beside its place and renamed.

    Args:
        directory: Made if it is not there.
        lm: The model, with its memory and its adapters.
        config: What ``config.json`` of the model's checkpoint holds.

    Raises:
        NonFiniteMemoryError: The memory holds NaN or infinity.
        CheckpointError: Something that is trained has no place in these files.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    memory, adapters = find_memory(lm), list(lora_layers(lm))
    saved: set[int] = set()
    if memory is not None:
        memory.save_pretrained(directory, base=not adapters)
        saved |= {id(p) for p in memory.parameters()}
        saved |= {id(p) for p in memory.base_parameters().values()} if not adapters else set()
    if adapters:
        tensors = _adapter_tensors(lm)
        with replacing(directory / LORA_NAME) as path:
            save_file(_copies(tensors), path, metadata={"format": "pt"})
        saved |= {id(p) for p in tensors.values()}
    elif memory is None:
        with replacing(directory / WHOLE_NAME) as path:
            save_file(_copies(lm.state_dict()), path, metadata={"format": "pt"})
        saved |= {id(p) for p in lm.parameters()}
    unsaved = [name for name, p in lm.named_parameters() if p.requires_grad and id(p) not in saved]
    if unsaved:
        raise CheckpointError(
            f"these are trained and have no file: {', '.join(unsaved[:5])}{' …' if len(unsaved) > 5 else ''}. With "
            "LoRA only adapters and embeddings are (ft_embed); use mode: all without LoRA to train more"
        )
    kept = {LORA_NAME} if adapters else {WHOLE_NAME} if memory is None else set()
    kept |= set() if memory is None else {memory_files.HEADER, memory_files.TENSORS}
    for name in {LORA_NAME, WHOLE_NAME, memory_files.HEADER, memory_files.TENSORS} - kept:
        (directory / name).unlink(missing_ok=True)  # of what was saved here before
    yarn = yarn_of(lm)
    if yarn is None:
        (directory / YARN_NAME).unlink(missing_ok=True)
    else:
        write_whole(directory / YARN_NAME, yarn.model_dump_json(indent=2) + "\n")
    raw = {key: value for key, value in config.items() if key not in _LORA_KEYS}
    if adapters:
        raw |= {"lora": True, "lora_rank": adapters[0].rank, "lora_scaling": adapters[0].scaling}
    write_whole(directory / CONFIG_NAME, json.dumps(raw, indent=2) + "\n")  # last: with it the directory is whole


def load_finetuned(
    checkpoint: MoshiCheckpoint, directory: str | Path, **overrides: Any
) -> tuple[LMModel, Memory | None]:
    """A checkpoint's model as fine-tuned: adapters, memory, trained base weights and window, in eval mode.

    Everything takes the dtype of the checkpoint's model, but for the memory, which keeps its own (float32). With
    adapters, what the directory holds asks for gradients and nothing else does, so it can be saved again as it is.

    Args:
        checkpoint: What was fine-tuned.
        directory: Written by :func:`save_finetuned`, or by moshi-finetune.
        overrides: Arguments of ``LMModel``, such as ``gradient_checkpointing=True``.

    Returns:
        The model, and its memory if the directory holds one.

    Raises:
        CheckpointError: A file is missing, damaged or of another model.
    """
    directory = Path(directory)
    config = _read_config(directory)
    sizes = {key: value for key, value in checkpoint.lm_config.items() if key not in _LORA_KEYS}
    differing = sorted(key for key in sizes if key in config and config[key] != sizes[key])
    if differing:
        key = differing[0]
        raise CheckpointError(
            f"{directory / CONFIG_NAME} is of another model than {checkpoint.source}: {key} is {config[key]!r} there "
            f"and {sizes[key]!r} here"
        )
    lm = checkpoint.load_lm(**overrides)
    yarn = _read_yarn(directory)
    if yarn is not None:
        apply_yarn(lm, yarn)
    if config.get("lora"):
        lora = LoraConfig(enable=True, rank=config["lora_rank"], scaling=config["lora_scaling"])
        add_lora(lm, lora)
    memory = attach_pretrained(lm, directory) if (directory / memory_files.HEADER).is_file() else None
    load_trained(lm, directory)
    if config.get("lora"):
        of_memory = set() if memory is None else {id(p) for p in memory.parameters()}
        beside = lm.__dict__[_WITH_ADAPTERS]
        for name, parameter in lm.named_parameters():
            parameter.requires_grad_(id(parameter) in of_memory or ".lora_" in name or name in beside)
    return lm.eval(), memory


def load_trained(lm: LMModel, directory: str | Path) -> None:
    """Load what :func:`save_finetuned` wrote into a model that has its adapters and its memory already.

    Raises:
        CheckpointError: A file is missing, damaged or does not fit. Nothing is loaded in part from a file.
    """
    directory = Path(directory)
    memory, adapters = find_memory(lm), any(True for _ in lora_layers(lm))
    if memory is not None:
        memory.load(directory)
    if adapters:
        needed = [name for name, _ in lm.named_parameters() if ".lora_" in name]
        lm.__dict__[_WITH_ADAPTERS] = _load(lm, directory / LORA_NAME, needed) - set(needed)
    elif memory is None:
        _load(lm, directory / WHOLE_NAME, list(lm.state_dict()))


def _adapter_tensors(lm: LMModel) -> dict[str, nn.Parameter]:
    """The adapters, and the base's own parameters that are trained with them, by the names the files have."""
    memory = find_memory(lm)
    own = set() if memory is None else {id(p) for p in memory.parameters()}
    base = {} if memory is None else memory.base_parameters()
    trained = set() if memory is None else {id(base[name]) for name in memory.trained_base if name in base}
    beside = lm.__dict__.get(_WITH_ADAPTERS, ())
    return {
        name: p
        for name, p in lm.named_parameters()
        if id(p) not in own
        and (".lora_" in name or name in beside or ("emb" in name and (p.requires_grad or id(p) in trained)))
    }


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _load(lm: LMModel, path: Path, needed: Iterable[str]) -> set[str]:
    """Copy a file's tensors into the model: every name in it has its place, and every name in ``needed`` is there.

    Returns:
        The names.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    places = lm.state_dict(keep_vars=True)
    tensors = {name if name in places else _of_today(name): tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if name not in places:
            close = difflib.get_close_matches(name, places, n=1, cutoff=0.6)
            raise CheckpointError(f"{path}: {name!r} has no place in this model" + _did_you_mean(close))
        if tensor.shape != places[name].shape:
            raise CheckpointError(
                f"{path}: {name!r} is {[*tensor.shape]} there and {[*places[name].shape]} in this model"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name!r} holds NaN or infinity")
    missing = sorted(set(needed) - tensors.keys())
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} tensors of this model are not there, {missing[0]!r} among them")
    with torch.no_grad():
        for name, tensor in tensors.items():
            places[name].copy_(tensor)
    return set(tensors)


def _of_today(name: str) -> str:
    """What a tensor is called since attention has a projection for each step, as Kyutai's own hook renames it."""
    return re.sub(r"\b(in|out)_proj\.", r"\1_projs.0.", name)


def _did_you_mean(close: list[str]) -> str:
    return f"; its nearest is {close[0]!r}" if close else ""


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no fine-tuned Moshi: {CONFIG_NAME} is missing")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not an object")
    absent = [key for key in ("lora_rank", "lora_scaling") if key not in config] if config.get("lora") else []
    if absent:
        raise CheckpointError(f"{path} says lora but not {absent[0]}")
    return config


def _read_yarn(directory: Path) -> YarnConfig | None:
    path = directory / YARN_NAME
    if not path.is_file():
        return None
    try:
        return YarnConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
