"""A recipe that compares the two memories: one decoder for each task, and for each memory a training on it.

    name: memories
    lm:           {config: {model_type: qwen3, …}}                 # as a compression recipe's decoder
    tasks:        {facts: {base: {…}, data: {source: facts}}, …}   # how the decoder learns to answer; what is asked
    fast_weights: {memory: {layers: [2], chunk_size: 8}, trainer: {…}}
    soft_tokens:  {compressor: {kind: encoder-pool}, trainer: {…}}
    lora:         {r: 16}                                          # of the compressor, and beside the memory
    trainer:      {max_steps: 400, …}                              # of both; each may change some

The number of soft tokens is no setting: it is what the fast weights' state takes in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from inlay.data import QAConfig
from inlay.fastweight import FastWeightConfig
from inlay.softtoken.compressors import CompressorConfig, CrossAttentionConfig, EncoderPoolConfig, PoolConfig
from inlay.softtoken.compressors.config import LoraSettings
from inlay.softtoken.layout import PromptLayout
from inlay.train.compress_recipe import BaseSection, CompressRecipe, check_compress_trainer
from inlay.train.kinds import RecipeKind
from inlay.train.reading import ReadingRecipe
from inlay.train.recipe import LoraSection, ModelSection
from inlay.train.yaml_recipe import RunRecipe, Section, check_recipe


class TaskSection(Section):
    """A task that both memories are trained and asked on."""

    data: QAConfig
    base: BaseSection | None = None
    """How a decoder with random weights learns to answer from the full text; with ``lm.config`` only."""

    trainer: dict[str, Any] = Field(default_factory=dict)
    """Arguments that differ from the recipe's ``trainer`` on this task, for both memories."""


class FastWeightsSection(Section):
    """The fast weights' side."""

    memory: FastWeightConfig
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Arguments that differ from the recipe's ``trainer``."""


class SoftTokensSection(Section):
    """The soft tokens' side."""

    compressor: CompressorConfig = EncoderPoolConfig()
    """Kind and form. Its slots come from the fast weights' bytes, its adapter is the recipe's ``lora``."""

    trainer: dict[str, Any] = Field(default_factory=dict)
    """Arguments that differ from the recipe's ``trainer``."""

    @field_validator("compressor")
    @classmethod
    def _leaves_slots_and_adapter_to_the_comparison(cls, value: CompressorConfig) -> CompressorConfig:
        theirs = sorted(value.model_fields_set & {"slots", "max_slots", "ratios", "lora"})
        if theirs:
            raise ValueError(
                f"{theirs[0]} is set by the comparison: slots by the bytes of the fast weights' state, the adapter by "
                "the recipe's lora; take it out"
            )
        if isinstance(value, PoolConfig):
            raise ValueError("kind pool learns nothing; compare with a compressor that is trained")
        return value


class MemoriesEvaluateSection(Section):
    """What is asked."""

    examples: int = Field(default=256, ge=2)
    """Questions of each task, spread over its evaluation data."""

    batch_size: int = Field(default=32, ge=1)
    """Questions per forward."""


class MemoriesRecipe(RunRecipe):
    """Both memories on every task; ``seed`` and ``trainer`` are of every training."""

    kind: ClassVar[RecipeKind] = "memories"
    trainer_check = check_compress_trainer

    lm: ModelSection
    """The decoder that both memories start from, the same weights for both."""

    tasks: dict[str, TaskSection] = Field(min_length=1)
    """By the names that they have in the table."""

    fast_weights: FastWeightsSection
    soft_tokens: SoftTokensSection = SoftTokensSection()
    lora: LoraSettings = LoraSettings()
    """One adapter for both sides: on while the compressor reads; on while the decoder reads and answers with fast
    weights."""

    layout: PromptLayout = PromptLayout()
    context_tokens: int | None = Field(default=None, ge=2)
    """Contexts are cut behind so many tokens, for both; None reads them whole."""

    questions_per_context: int = Field(default=1, ge=1)
    """Most questions about a context in one batch of training, for both."""

    evaluate: MemoriesEvaluateSection = MemoriesEvaluateSection()

    @model_validator(mode="after")
    def _every_arm_is_a_recipe(self) -> MemoriesRecipe:
        for name in self.tasks:
            self.task_recipe(name)
            self.reading(name, "decoder")
            self.compression(name, "decoder", slots=1)
        return self

    def task_recipe(self, task: str) -> CompressRecipe:
        """The compression recipe by which the decoder of a task is built."""
        return self._compress(task, {"decoder": self.lm, "base": self.tasks[task].base}, {})

    def compression(self, task: str, decoder: str, slots: int) -> CompressRecipe:
        """The soft tokens' training on a task.

        Args:
            task: Its name.
            decoder: Where the task's decoder lies.
            slots: M.
        """
        section = self.soft_tokens
        changes: dict[str, Any] = {"slots": slots, "max_slots": None}
        if not isinstance(section.compressor, CrossAttentionConfig) or section.compressor.form == "kv":
            changes["lora"] = self.lora
        compressor = section.compressor.model_copy(update=changes)
        sections = {"decoder": self._lm_at(decoder), "base": None, "compressor": compressor}
        return self._compress(task, sections, section.trainer)

    def reading(self, task: str, decoder: str) -> ReadingRecipe:
        """The fast weights' training on a task; arguments as for :meth:`compression`."""
        targets = self.lora.target_modules
        lora = LoraSection(
            **self.lora.model_dump(exclude={"target_modules"}),
            target_modules=targets if isinstance(targets, str) else [*targets],
        )
        return ReadingRecipe(
            name=f"{self.name}-{task}-fast-weights",
            seed=self.seed,
            decoder=self._lm_at(decoder),
            memory=self.fast_weights.memory,
            lora=lora,
            layout=self.layout,
            data=self.tasks[task].data,
            context_tokens=self.context_tokens,
            questions_per_context=self.questions_per_context,
            trainer=self.trainer | self.tasks[task].trainer | self.fast_weights.trainer,
        )

    def _lm_at(self, place: str) -> ModelSection:
        return self.lm.model_copy(update={"config": None, "name_or_path": place})

    def _compress(self, task: str, sections: Mapping[str, Any], trainer: Mapping[str, Any]) -> CompressRecipe:
        raw = {
            "name": f"{self.name}-{task}-soft-tokens",
            "seed": self.seed,
            "layout": self.layout,
            "data": self.tasks[task].data,
            "context_tokens": self.context_tokens,
            "questions_per_context": self.questions_per_context,
            "trainer": self.trainer | self.tasks[task].trainer | dict(trainer),
            **sections,
        }
        return check_recipe(CompressRecipe, raw, f"tasks.{task}")
