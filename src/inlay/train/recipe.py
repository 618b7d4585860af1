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

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from transformers import TrainingArguments

from inlay.data import DataConfig
from inlay.fastweight import FastWeightConfig, InlayError, TrainMode


class RecipeError(InlayError, ValueError):
    """A recipe that cannot be run; the message names file, key and fix."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
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
        return self


class LoraSection(_Section):
    """PEFT LoRA adapters on the base model, for ``mode: memory+lora``."""

    r: int = Field(default=16, ge=1)
    """Rank."""

    lora_alpha: float = Field(default=32, gt=0)
    """Scaling: the adapter's output is multiplied by lora_alpha / r."""

    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""

    target_modules: str | list[str] = "all-linear"
    """Which layers get one, as PEFT takes it."""


class EvaluateSection(_Section):
    """What ``inlay evaluate`` measures."""

    batch_size: int = Field(default=8, ge=1)
    """Sequences per forward."""

    block: int | None = Field(default=None, ge=1)
    """Tokens of the fixed final block of the growing-context perplexity; an eighth of the sequence when not given."""

    contexts: list[int] | None = None
    """Tokens of context before the block, ascending; doubling from one block when not given."""


class DoctorSection(_Section):
    """What ``inlay doctor`` holds the recipe against."""

    budget_gb: float | None = Field(default=None, gt=0)
    """Memory that a training step may take, in GB (10⁹ bytes); the machine's own when not given."""

    frame_rate: float | None = Field(default=None, gt=0)
    """Frames per second, where tokens are frames of audio (Moshi: 12.5), so that lengths are told in seconds too."""


class Recipe(_Section):
    """One training run."""

    name: str = Field(pattern=r"^[\w.+-]+$")
    """Names the run's directory."""

    model: ModelSection
    memory: FastWeightConfig | None = None
    data: DataConfig
    mode: TrainMode = "memory"
    """What is trained: ``memory``, ``memory+layers``, ``memory+lora`` or ``all``. Without a memory: ``all``."""

    lora: LoraSection | None = None
    memory_learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of the memory's own parameters; ``trainer.learning_rate`` when not given."""

    seed: int = Field(default=0, ge=0)
    """Fixes initial weights, the order of batches and dropout."""

    trainer: dict[str, Any] = Field(default_factory=dict)
    """Arguments of transformers' ``TrainingArguments`` by their own names."""

    evaluate: EvaluateSection = EvaluateSection()
    doctor: DoctorSection = DoctorSection()

    @field_validator("trainer")
    @classmethod
    def _trainer_takes_these(cls, value: dict[str, Any]) -> dict[str, Any]:
        known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
        for key in value:
            if key in _OWNED:
                raise ValueError(f"{key!r} is set by the run: {_OWNED[key]}")
            if key not in known:
                raise ValueError(f"unknown key {key!r}{_nearest(key, known)}")
        return value

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        if self.memory is None and self.mode != "all":
            raise ValueError(f"mode is {self.mode!r} but there is no memory; without one use mode: all")
        if (self.mode == "memory+lora") != (self.lora is not None):
            raise ValueError("mode: memory+lora and a lora section go together; one of them is missing")
        if self.model.config is not None and self.mode != "all":
            raise ValueError(f"mode is {self.mode!r} but the model has random weights (model.config); use mode: all")
        return self


_OWNED = {
    "output_dir": "runs are named by `name` and kept under --runs",
    "seed": "use the recipe's own `seed`",
    "data_seed": "use the recipe's own `seed`",
    "resume_from_checkpoint": "use --resume",
    "logging_dir": "TensorBoard files go to the run's directory",
    "remove_unused_columns": "the memory needs the document ids",
    "label_names": "labels are `labels`",
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply ``overrides`` (``"section.key=value"``, values in YAML) and check it.

    Raises:
        RecipeError: The file is missing or no YAML mapping, or a key or value is wrong; names the key and, for an
            unknown one, its nearest neighbour.
    """
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{where}: not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections; this file holds a {type(raw).__name__}")
    raw.setdefault("name", path.stem)
    for override in overrides:
        _override(raw, override)
    return parse_recipe(raw, str(path))


def parse_recipe(raw: dict[str, Any], source: str = "recipe") -> Recipe:
    """Check a recipe given as a dictionary. Raises :class:`RecipeError`."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        lines = [f"  {_explain(problem)}" for problem in error.errors()]
        raise RecipeError(f"{source} is no valid recipe:\n" + "\n".join(lines)) from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that :func:`load_recipe` reads back to the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Reads ``1e-3`` as a number, which YAML 1.1 does only with a point and a sign."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def _override(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"{override!r} is no override; write section.key=value, e.g. trainer.max_steps=100")
    *sections, key = path.split(".")
    target = raw
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise RecipeError(f"{override!r}: {section!r} is a value, not a section")
    try:
        target[key] = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{override!r}: the value is no YAML: {error}") from error


def _explain(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    where = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key{_nearest(location[-1], _fields_at(location[:-1]))}"
    if problem["type"] == "missing":
        return f"{where}: is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _nearest(key: str, known: typing.Iterable[str]) -> str:
    known = sorted(known)
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; known are {', '.join(known)}"


def _fields_at(location: Sequence[str]) -> set[str]:
    """Names of the fields that exist at a place of the recipe."""
    models: list[type[BaseModel]] = [Recipe]
    for step in location:
        inner = [
            m for model in models if step in model.model_fields for m in _models(model.model_fields[step].annotation)
        ]
        # A step that is no field is the tag by which a discriminated union chose its member.
        models = inner or [m for m in models if any(_is_tag(f.annotation, step) for f in m.model_fields.values())]
    return {name for model in models for name in model.model_fields}


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [model for argument in typing.get_args(annotation) for model in _models(argument)]
    return []


def _is_tag(annotation: Any, tag: str) -> bool:
    return typing.get_origin(annotation) is Literal and tag in typing.get_args(annotation)
