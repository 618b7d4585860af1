"""A recipe under examination: what is known of its model, data and trainer without loading the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedConfig, TrainingArguments

from inlay.data import Data, TextConfig
from inlay.fastweight import FastWeightConfig
from inlay.train.pretrained import model_config
from inlay.train.recipe import Recipe, RecipeError

TYPICAL_STD = 0.02
"""Standard deviation of the weights of a model that does not tell its own (``initializer_range``)."""


class NotChecked(Exception):  # noqa: N818, it is no error
    """A check could not be made; the message says why."""


class Case(ABC):
    """What the checks of a memory ask, whatever is trained with it.

    A figure that cannot be had raises :class:`NotChecked`.
    """

    @property
    @abstractmethod
    def configured(self) -> FastWeightConfig | None:
        """The memory's configuration; None for a recipe without one."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """T, tokens or frames of a training sequence."""

    @abstractmethod
    def length(self, tokens: int) -> str:
        """The recipe's key and value for sequences of so many tokens."""

    @property
    @abstractmethod
    def blocks(self) -> int:
        """Blocks of the decoder."""

    @property
    @abstractmethod
    def width(self) -> int:
        """D, the hidden size."""

    @property
    @abstractmethod
    def inner(self) -> int:
        """F, what the down projections read."""

    @property
    @abstractmethod
    def weight_std(self) -> float:
        """Standard deviation of the base weights, or a typical one."""

    @property
    @abstractmethod
    def output_dtype(self) -> torch.dtype:
        """Dtype that the layers' outputs are rounded to while training."""

    @property
    @abstractmethod
    def adam(self) -> bool:
        """Whether the optimizer is one of the Adam family, whose steps have a known size."""

    @property
    @abstractmethod
    def rates(self) -> Mapping[str, float]:
        """The learning rates that drive something, by the recipe's keys."""

    @property
    def memory(self) -> FastWeightConfig:
        """The memory's configuration. Raises :class:`NotChecked` if the recipe has none."""
        if self.configured is None:
            raise NotChecked("not checked: the recipe has no memory")
        return self.configured


@dataclass(frozen=True)
class TextCase(Case):
    """A recipe under examination, with what is known about it.

    Attributes:
        recipe: The recipe.
        data: Its data, if they are loaded.
    """

    recipe: Recipe
    data: Data | None

    @property
    def configured(self) -> FastWeightConfig | None:
        """See :class:`Case`."""
        return self.recipe.memory

    @property
    def tokens(self) -> int:
        """See :class:`Case`."""
        return self.recipe.data.sequence_length

    def length(self, tokens: int) -> str:
        """See :class:`Case`."""
        return f"data.sequence_length: {tokens}"

    @property
    def blocks(self) -> int:
        """See :class:`Case`."""
        return self.size("num_hidden_layers")

    @property
    def width(self) -> int:
        """See :class:`Case`."""
        return self.size("hidden_size")

    @property
    def inner(self) -> int:
        """See :class:`Case`; four times the width where the configuration does not tell."""
        return getattr(self.architecture.get_text_config(), "intermediate_size", None) or 4 * self.width

    @property
    def rates(self) -> dict[str, float]:
        """See :class:`Case`."""
        rates = {"trainer.learning_rate": self.number("learning_rate")}
        if self.recipe.memory is not None and self.recipe.memory_learning_rate is not None:
            rates["memory_learning_rate"] = self.recipe.memory_learning_rate
            if self.recipe.mode == "memory":
                rates.pop("trainer.learning_rate")  # drives nothing
        return rates

    @property
    def text(self) -> TextConfig:
        """The data's configuration. Raises :class:`NotChecked` for data that are generated."""
        if not isinstance(self.recipe.data, TextConfig):
            raise NotChecked("not checked: these data are generated")
        return self.recipe.data

    @cached_property
    def architecture(self) -> PreTrainedConfig:
        """The model's transformers configuration. Raises :class:`NotChecked` if it cannot be had."""
        try:
            return model_config(self.recipe.model)
        except RecipeError as error:
            reason = str(error).partition("\n")[0]
            raise NotChecked(f"not checked: {reason}") from error

    def size(self, name: str) -> int:
        """A size of the decoder. Raises :class:`NotChecked` if its configuration does not tell."""
        value = getattr(self.architecture.get_text_config(), name, None)
        if not isinstance(value, int):
            raise NotChecked(f"not checked: the model's configuration has no {name}")
        return value

    @property
    def weight_std(self) -> float:
        """Standard deviation of the base weights, by the model's own account or a typical one."""
        try:
            return float(self.architecture.get_text_config().initializer_range or TYPICAL_STD)
        except (NotChecked, AttributeError):
            return TYPICAL_STD

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the base weights; ``auto`` is the one they are stored in."""
        name: Any = self.recipe.model.dtype
        if name == "auto":
            name = "float32" if self.recipe.model.config is not None else getattr(self.architecture, "dtype", None)
        return name if isinstance(name, torch.dtype) else getattr(torch, str(name or "float32"))

    @property
    def output_dtype(self) -> torch.dtype:
        """Dtype that the layers' outputs are rounded to while training."""
        for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            if self.recipe.trainer.get(key):
                return dtype
        return self.weight_dtype

    @property
    def adam(self) -> bool:
        """Whether the optimizer is one of the Adam family (transformers' default), whose steps have a known size."""
        return str(self.recipe.trainer.get("optim", "adamw")).startswith("adam")

    def number(self, key: str) -> float:
        """A number of the trainer section, with transformers' default. What is no number is the Trainer's to refuse."""
        default = float(getattr(TrainingArguments, key))
        try:
            return float(self.recipe.trainer.get(key, default))
        except (TypeError, ValueError):
            return default
