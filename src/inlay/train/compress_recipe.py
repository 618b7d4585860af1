"""A recipe of soft tokens: everything a compression run is, in one YAML file.

    name: facts
    decoder:     {config: {model_type: llama, …}}          # the frozen LM that answers; or {name_or_path: …}
    base:        {stages: [{facts: 2, max_steps: 500}, …]}  # how a decoder from scratch learns to answer first
    compressor:  {kind: encoder-pool, ratios: [4, 8]}
    layout:      {anchor: "Answer: ", answer_tokens: 8}
    data:        {source: facts, facts: 8}
    objectives:  {answer: 1.0, distillation: 0.5}
    pretraining: {max_steps: 1000}                          # reconstruction and continuation, before the answers
    trainer:     {max_steps: 2000, learning_rate: 1.0e-3}   # transformers' TrainingArguments

What is trained is the compressor, and the decoder's own LoRA where ``decoder_lora`` asks for one. Each ratio of the
compressor's list is trained: a step draws one, or what ``curriculum`` and ``train_ratios`` say.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from inlay.data import FactsConfig, QAConfig
from inlay.softtoken.compressors import CompressorConfig, EncoderPoolConfig, PoolConfig
from inlay.softtoken.layout import PromptLayout
from inlay.train.kinds import RecipeKind
from inlay.train.recipe import LoraSection, ModelSection
from inlay.train.yaml_recipe import RunRecipe, Section, check_trainer, read_recipe


def check_compress_trainer(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments`` when :func:`check_trainer` takes them and they have an effect where a run computes its own loss.

    Raises:
        ValueError: Names the key and why it cannot be.
    """
    if arguments.get("label_smoothing_factor"):
        raise ValueError(
            "label_smoothing_factor has no effect: it is for a loss that the Trainer computes from a model's logits, "
            "and here the run computes its own; take it out"
        )
    accelerator = arguments.get("accelerator_config")
    if isinstance(accelerator, dict) and (accelerator.get("dispatch_batches") or accelerator.get("split_batches")):
        raise ValueError(
            "accelerator_config: batches cannot be cut for several processes, as they hold several questions about one "
            "context; take dispatch_batches and split_batches out"
        )
    return check_trainer(arguments)


class BaseStage(Section):
    """One step of the curriculum: contexts of so many facts, until they are answered or the steps are used up."""

    facts: int | None = Field(default=None, ge=1)
    """Facts in a context; those of the run's data when not given."""

    max_steps: int = Field(ge=1)
    """Most optimizer steps."""

    exact_match: float | None = Field(default=None, gt=0, le=1)
    """The stage ends when its held-out contexts are answered so well; the section's when not given. How long a model
    guesses among the facts of a context before it finds the one that is asked for differs much from seed to seed."""

    def data(self, config: FactsConfig) -> FactsConfig:
        """The run's data at this stage."""
        return config if self.facts is None else config.with_facts(self.facts)


class BaseSection(Section):
    """How a decoder with random weights learns to answer from the full text, before it is frozen."""

    stages: tuple[BaseStage, ...] = Field(min_length=1)
    """The curriculum, in order; the last at the difficulty of the run's data. A model of a few layers does not begin to
    find a fact among eight, but does among two."""

    exact_match: float = Field(default=0.95, gt=0, le=1)
    """A stage ends when the full text of held-out contexts is answered so well, by exact match."""

    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak learning rate of AdamW."""

    muon: float | None = Field(default=None, gt=0)
    """Peak learning rate of Muon for the weights of linear layers; null trains them with AdamW like all else."""

    batch_size: int = Field(default=64, ge=1)
    """Questions per step at the facts of the run's data, in whole contexts (at least one). A stage of fewer facts reads
    as many contexts, so a step has fewer questions where its contexts have."""

    text_weight: float = Field(default=0.0, ge=0)
    """Weight of the loss on the context's own tokens beside that on the answers. A decoder that has never predicted
    a context cannot be asked to reconstruct or continue one."""

    eval_steps: int = Field(default=100, ge=1)
    """Steps between two looks at the exact match."""

    eval_examples: int = Field(default=256, ge=1)
    """Held-out questions that it is measured on."""


class ObjectivesSection(Section):
    """Weights of the objectives; the loss is their weighted sum, and each is logged as ``loss/NAME``. 0 is off."""

    answer: float = Field(default=1.0, ge=0)
    """Cross-entropy of the answer's tokens and its end token."""

    first_token: float = Field(default=0.0, ge=0)
    """Cross-entropy of the answer's first token, which the tokens after it do not help to find."""

    first_k: float = Field(default=0.0, ge=0)
    """Cross-entropy of the answer's first ``k`` tokens."""

    distillation: float = Field(default=0.0, ge=0)
    """KL from the same model reading the full text, over the answer's first ``k`` tokens."""

    reconstruction: float = Field(default=0.0, ge=0)
    """Cross-entropy of the whole context, read from its slots."""

    continuation: float = Field(default=0.0, ge=0)
    """Cross-entropy of the context's second half, read from the slots of its first half."""

    diversity: float = Field(default=0.0, ge=0)
    """Penalty on slots that are alike, within a context and between contexts."""

    k: int = Field(default=4, ge=1)
    """Tokens that ``first_k`` and ``distillation`` look at."""

    temperature: float = Field(default=1.0, gt=0)
    """Of both distributions in ``distillation``."""

    scheduled_sampling: float = Field(default=0.0, ge=0, le=1)
    """Share of the answer's input tokens that are the model's own guesses by the end of the run; it grows from 0."""

    @model_validator(mode="after")
    def _something_is_learned(self) -> ObjectivesSection:
        if not self.weights:
            raise ValueError("every objective has weight 0, so nothing is learned; set answer: 1.0")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """The objectives that are on, with their weights."""
        options = ("k", "temperature", "scheduled_sampling")
        named = {name: float(getattr(self, name)) for name in type(self).model_fields if name not in options}
        return {name: weight for name, weight in named.items() if weight}


class PretrainingSection(Section):
    """A stage before the answers: the compressor learns to write down what its context says.

    Each step draws one of two objectives, in proportion to their shares.
    """

    max_steps: int = Field(ge=1)
    """Optimizer steps."""

    reconstruction: float = Field(default=0.2, ge=0)
    """Share of the steps on which the whole context is read from its slots."""

    continuation: float = Field(default=0.8, ge=0)
    """Share of the steps on which the context's second half is read from the slots of its first half."""

    trainer: dict[str, Any] = Field(default_factory=dict)
    """Arguments of ``TrainingArguments`` that differ from the recipe's ``trainer`` in this stage."""

    @field_validator("trainer")
    @classmethod
    def _trainer_takes_these(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "max_steps" in value:
            raise ValueError("max_steps is the section's own; take it out of trainer")
        return check_compress_trainer(value)

    @model_validator(mode="after")
    def _something_is_learned(self) -> PretrainingSection:
        if not self.shares:
            raise ValueError("reconstruction and continuation are both 0; set one, or pretraining: null")
        return self

    @property
    def shares(self) -> dict[str, float]:
        """The objectives that are drawn, with their shares of the steps, which sum to 1."""
        total = self.reconstruction + self.continuation
        named = {"reconstruction": self.reconstruction, "continuation": self.continuation}
        return {name: share / total for name, share in named.items() if share}


class RatioStage(Section):
    """A part of the run that draws from ratios of its own."""

    until: float = Field(gt=0, lt=1)
    """Where it ends, as a share of the run's steps."""

    ratios: tuple[int, ...] = Field(min_length=1)
    """What its steps draw from; a ratio that stands here twice is drawn twice as often."""


class CompressEvaluateSection(Section):
    """What ``inlay compress evaluate`` measures."""

    examples: int = Field(default=256, ge=1)
    """Questions, evenly spaced over the evaluation data, so that they are about as many contexts as can be."""

    ratios: tuple[int, ...] | None = None
    """Ratios that the compressor and its baselines are measured at; all of the compressor's when not given."""

    batch_size: int = Field(default=32, ge=1)
    """Questions per forward."""


class CompressRecipe(RunRecipe):
    """One compression run."""

    kind: ClassVar[RecipeKind] = "compress"
    trainer_check = check_compress_trainer

    decoder: ModelSection
    """The language model that answers. It is frozen."""

    base: BaseSection | None = None
    """How the decoder is trained first; with ``decoder.config`` only."""

    compressor: CompressorConfig = EncoderPoolConfig()
    """What writes the soft tokens; ``kind: encoder-pool`` when none is named."""

    decoder_lora: LoraSection | None = None
    """LoRA on the decoder, trained along and on only while it answers; None leaves it as it is."""

    layout: PromptLayout = PromptLayout()
    data: QAConfig
    objectives: ObjectivesSection = ObjectivesSection()
    pretraining: PretrainingSection | None = None

    curriculum: tuple[RatioStage, ...] = ()
    """Ratios that the first parts of the training draw from, in order: a frozen decoder reads slots of one or two
    tokens long before those of four. What is left of the run draws from ``train_ratios``."""

    train_ratios: tuple[int, ...] | None = None
    """Ratios that a step draws from, when not all of the compressor's equally often: ``[4, 4, 8]``."""

    muon: float | None = Field(default=None, gt=0)
    """Peak learning rate of Muon for the weights of linear layers (LoRA and projector); null trains them with
    ``trainer.optim`` like all else."""

    context_tokens: int | None = Field(default=None, ge=2)
    """Contexts are cut behind so many tokens; None reads them whole."""

    questions_per_context: int = Field(default=1, ge=1)
    """Most questions about a context that stand in one batch, where the context is compressed once for all of them. A
    batch size counts contexts."""

    evaluate: CompressEvaluateSection = CompressEvaluateSection()

    @field_validator("curriculum", mode="before")
    @classmethod
    def _null_is_no_curriculum(cls, value: Any) -> Any:
        return () if value is None else value

    @model_validator(mode="after")
    def _sections_agree(self) -> CompressRecipe:
        if self.decoder.config is not None and self.base is None:
            raise ValueError(
                "decoder.config gives random weights, and a frozen decoder has to answer: add base, how it is trained "
                "first, or take decoder.name_or_path"
            )
        if self.decoder.config is None and self.base is not None:
            raise ValueError("base trains a decoder of random weights; give decoder.config, or take base out")
        if self.base is not None:
            if not isinstance(self.data, FactsConfig):
                raise ValueError(f"base trains on generated facts; data.source is {self.data.source!r}")
            last = self.base.stages[-1].data(self.data)
            if last.facts != self.data.facts:
                raise ValueError(
                    f"base.stages end at {last.facts} facts and data.facts is {self.data.facts}: the decoder would be "
                    f"asked what it was not trained on; end with {{facts: {self.data.facts}, max_steps: …}}"
                )
        if isinstance(self.compressor, PoolConfig) and self.decoder_lora is None:
            raise ValueError("compressor: kind pool learns nothing and the decoder is frozen; add decoder_lora")
        trainers = {"trainer": self.trainer}
        if self.pretraining is not None:
            trainers["pretraining.trainer"] = self.pretraining.trainer
        for place, arguments in trainers.items():
            checkpointed = [k for k in ("gradient_checkpointing", "activation_checkpointing") if arguments.get(k)]
            if self.compressor.form == "kv" and checkpointed:
                raise ValueError(
                    f"form kv is lost under {checkpointed[0]}, in which transformers' blocks drop their cache; take it "
                    f"out of {place}, or use form: embeddings"
                )
            if self.muon is not None and "optim" in arguments:
                raise ValueError(f"muon trains what it does not with AdamW; take optim out of {place}, or muon out")
        asked = {"evaluate.ratios": self.evaluate.ratios or (), "train_ratios": self.train_ratios or ()}
        asked |= {f"curriculum.{number}.ratios": stage.ratios for number, stage in enumerate(self.curriculum)}
        for key, ratios in asked.items():
            if unknown := sorted(set(ratios) - set(self.compressor.ratios)):
                raise ValueError(f"{key}: {unknown} not among compressor.ratios {[*self.compressor.ratios]}")
        if self.compressor.slots is not None and (self.curriculum or self.train_ratios):
            raise ValueError("curriculum and train_ratios draw ratios, and compressor.slots fixes the slots; drop one")
        ends = [stage.until for stage in self.curriculum]
        if ends != sorted(set(ends)):
            raise ValueError(f"curriculum: stages end at {ends}; each ends later than the one before")
        return self

    @property
    def draws(self) -> tuple[int | None, ...]:
        """What a step draws its ratio from behind the curriculum; None alone where the compressor's slots are fixed."""
        return (None,) if self.compressor.slots is not None else self.train_ratios or self.compressor.ratios

    def draws_at(self, share: float) -> tuple[int | None, ...]:
        """What a step draws from when so much of the run is over, 0 to 1."""
        return next((stage.ratios for stage in self.curriculum if share < stage.until), self.draws)


def load_compress_recipe(path: str | Path, overrides: Sequence[str] = ()) -> CompressRecipe:
    """As :func:`read_recipe`."""
    return read_recipe(CompressRecipe, path, overrides)
