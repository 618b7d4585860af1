"""A recipe: everything a training run is, in one YAML file.

    name: stdlib
    model:   {config: {model_type: mistral, hidden_size: 96, …}}    # from scratch; or {name_or_path: …}
    memory:  {layers: [1], chunk_size: 32, eta: 1.0e-3}             # or null, for the same run without a memory
    data:    {task: text, source: python-stdlib, sequence_length: 512, …}
    mode:    all
    trainer: {max_steps: 400, learning_rate: 4.0e-3, …}             # transformers' TrainingArguments

Every section is checked when the file is read. Any value can be overridden by its path: ``trainer.max_steps=100``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from transformers import CONFIG_MAPPING

from inlay.data import DataConfig
from inlay.fastweight import FastWeightConfig, TrainMode
from inlay.train.kinds import RecipeKind
from inlay.train.yaml_recipe import RecipeError, RunRecipe, Section, check_recipe, dump_recipe, nearest, read_recipe

__all__ = [
    "DoctorSection",
    "EvaluateSection",
    "LoraSection",
    "ModelSection",
    "Recipe",
    "RecipeError",
    "check_recipe",
    "dump_recipe",
    "load_recipe",
]


_OLDER = {"torch_dtype", "rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_emb_base"}
"""Names of before, which transformers' configs turn into today's."""


class ModelSection(Section):
    """The model to start from: one that exists, or an architecture with random weights."""

    name_or_path: str | None = None
    """Hub id or local folder of a pretrained causal LM."""

    config: dict[str, Any] | None = None
    """Architecture for training from scratch: ``model_type`` and whatever that type's transformers config takes.
    ``vocab_size`` is taken from the data when it is not given."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Dtype of the base weights. The memory's own parameters are always float32."""

    attn_implementation: str | None = None
    """``sdpa``, ``eager``, ``flash_attention_2``, …; transformers' choice when not given."""

    @model_validator(mode="after")
    def _one_of_two(self) -> ModelSection:
        if (self.name_or_path is None) == (self.config is None):
            raise ValueError("give either name_or_path (a pretrained model) or config (an architecture), not both")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs a model_type, e.g. {model_type: llama, hidden_size: 256, …}")
        if self.config is not None:
            _check_config(self.config)
        return self


def _check_config(config: dict[str, Any]) -> None:
    """Refuse what the architecture's config does not know: transformers takes any key and makes nothing of it."""
    kind = config["model_type"]
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"config.model_type: transformers knows no {kind!r}{nearest(str(kind), CONFIG_MAPPING)}")
    default = CONFIG_MAPPING[kind]()
    known = {*default.to_dict(), *default.attribute_map, *inspect.signature(type(default).__init__).parameters, *_OLDER}
    for key in config:
        if key not in known:
            raise ValueError(f"config: unknown key {key!r}{nearest(key, known - _OLDER)}")


class LoraSection(Section):
    """PEFT LoRA adapters on the base model, for ``mode: memory+lora``."""

    r: int = Field(default=16, ge=1)
    """Rank."""

    lora_alpha: float = Field(default=32, gt=0)
    """Scaling: the adapter's output is multiplied by lora_alpha / r."""

    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""

    target_modules: str | list[str] = "all-linear"
    """Which layers get one, as PEFT takes it."""


class EvaluateSection(Section):
    """What ``inlay evaluate`` measures."""

    batch_size: int = Field(default=8, ge=1)
    """Sequences per forward."""

    block: int | None = Field(default=None, ge=1)
    """Tokens of the fixed final block of the growing-context perplexity; an eighth of the sequence when not given."""

    contexts: list[int] | None = None
    """Tokens of context before the block, ascending; doubling from one block when not given."""


class DoctorSection(Section):
    """What ``inlay doctor`` holds the recipe against."""

    budget_gb: float | None = Field(default=None, gt=0)
    """Memory that a training step may take, in GB (10⁹ bytes); the machine's own when not given."""

    frame_rate: float | None = Field(default=None, gt=0)
    """Frames per second, where tokens are frames of audio (Moshi: 12.5), so that lengths are told in seconds too."""


class Recipe(RunRecipe):
    """One training run."""

    kind: ClassVar[RecipeKind] = "text"

    model: ModelSection
    memory: FastWeightConfig | None = None
    data: DataConfig
    mode: TrainMode = "memory"
    """What is trained: ``memory``, ``memory+layers``, ``memory+lora`` or ``all``. Without a memory: ``all``."""

    lora: LoraSection | None = None
    memory_learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of the memory's own parameters; ``trainer.learning_rate`` when not given."""

    evaluate: EvaluateSection = EvaluateSection()
    doctor: DoctorSection = DoctorSection()

    @model_validator(mode="before")
    @classmethod
    def _a_pretrained_model_has_its_tokenizer(cls, raw: Any) -> Any:
        match raw:
            case {"model": {"name_or_path": str(name)}, "data": {"task": "text", **data}} if "tokenizer" not in data:
                return raw | {"data": raw["data"] | {"tokenizer": {"kind": "pretrained", "name_or_path": name}}}
        return raw

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        if self.memory is None and self.memory_learning_rate is not None:
            raise ValueError("memory_learning_rate is set but there is no memory; take it out")
        if self.memory is None and self.mode != "all":
            raise ValueError(f"mode is {self.mode!r} but there is no memory; without one use mode: all")
        if (self.mode == "memory+lora") != (self.lora is not None):
            raise ValueError("mode: memory+lora and a lora section go together; one of them is missing")
        if self.model.config is not None and self.mode != "all":
            raise ValueError(f"mode is {self.mode!r} but the model has random weights (model.config); use mode: all")
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """As :func:`read_recipe`."""
    return read_recipe(Recipe, path, overrides)
