"""The models that runs begin with: loaded from the hub or a folder, or of an architecture with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from inlay.train.recipe import LoraSection, ModelSection
from inlay.train.yaml_recipe import RecipeError


def load_causal_lm(place: str | Path, section: ModelSection, key: str = "model") -> PreTrainedModel:
    """The model that lies in ``place``, in the dtype and with the attention of ``section``.

    Args:
        place: A folder that ``save_pretrained`` wrote, or a hub id.
        section: The recipe's.
        key: Of the section, for the message.

    Raises:
        RecipeError: It cannot be loaded.
    """
    try:  # a missing or damaged folder, no network, a gated repository, an unknown attention: errors of many kinds
        return AutoModelForCausalLM.from_pretrained(place, dtype=section.dtype, **_attention(section))
    except Exception as error:
        raise _not_loaded(place, key, error) from error


def model_config(section: ModelSection, key: str = "model", **defaults: Any) -> PreTrainedConfig:
    """The architecture alone. Runs no code that comes with a model, nor asks whether it may.

    Args:
        section: The recipe's.
        key: Of the section, for the message.
        defaults: What the config says where ``section.config`` does not.

    Raises:
        RecipeError: It cannot be loaded, or its sizes do not go together.
    """
    options = _attention(section)
    if section.config is None:
        try:  # as many kinds of errors
            return AutoConfig.from_pretrained(section.name_or_path, trust_remote_code=False, **options)
        except Exception as error:
            raise _not_loaded(section.name_or_path, key, error) from error
    try:
        return AutoConfig.for_model(**{**defaults, **section.config, **options})
    except Exception as error:
        raise RecipeError(f"{key}: cannot be built: {error}") from error


def untrained_causal_lm(
    section: ModelSection, key: str = "model", *, dtype: torch.dtype, **defaults: Any
) -> PreTrainedModel:
    """The architecture of ``section.config`` with random weights.

    Args:
        section: The recipe's, with a ``config``.
        key: Of the section, for the message.
        dtype: Of the weights.
        defaults: What the config says where ``section.config`` does not.

    Raises:
        RecipeError: Its sizes do not go together, or the attention is unknown.
    """
    config = model_config(section, key, **defaults)
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:
        raise RecipeError(f"{key}: cannot be built: {error}") from error


def with_lora(model: PreTrainedModel, section: LoraSection | None, key: str = "lora") -> PreTrainedModel | PeftModel:
    """``model`` with PEFT's adapters in it; as it is without a ``section``.

    Raises:
        RecipeError: It has none of the layers that are to get one.
    """
    if section is None:
        return model
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    config = LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=transposed, **section.model_dump())
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(f"{key}: {error}") from error


def _not_loaded(place: str | Path | None, key: str, error: Exception) -> RecipeError:
    fix = f"{key}.name_or_path is a hub id, or a folder that save_pretrained wrote"
    return RecipeError(f"cannot load the {key} {place}: {error}\n{fix}")


def _attention(section: ModelSection) -> dict[str, Any]:
    return {} if section.attn_implementation is None else {"attn_implementation": section.attn_implementation}
