"""What a run saves and loads: the memory with the trained base weights, PEFT adapters, and from-scratch models."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from inlay.fastweight import Memory

MEMORY = "memory"
ADAPTER = "adapter"
MODEL = "model"


def save_weights(model: nn.Module, memory: Memory, directory: Path) -> None:
    """Write ``memory/`` (with the base weights that were trained) and, of a PEFT model, ``adapter/``."""
    memory.save_pretrained(directory / MEMORY)
    if isinstance(model, PeftModel):
        model.save_pretrained(str(directory / ADAPTER))


def load_weights(model: nn.Module, memory: Memory, directory: Path) -> None:
    """Load what :func:`save_weights` wrote into a model that is built and has its memory.

    Raises:
        CheckpointError: The memory's files are missing, damaged or do not fit.
    """
    memory.load(directory / MEMORY)
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_file(directory / ADAPTER / "adapter_model.safetensors"))


def save_base(model: PreTrainedModel, memory: Memory | None, directory: Path) -> None:
    """Write the base model in transformers' own format, without the memory's tensors."""
    own = set() if memory is None else {id(parameter) for parameter in memory.parameters()}
    state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in own}
    model.save_pretrained(str(directory), state_dict=state)
