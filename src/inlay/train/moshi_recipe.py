"""A recipe for Kyutai's Moshi: moshi-finetune's settings under their names, with a memory.

    moshi_paths: {hf_repo_id: kyutai/moshiko-pytorch-bf16}          # or a folder with the same files
    memory:      {layers: every:6, chunk_size: 256, eta: 3.0e-4}    # or null, for the same run without a memory
    mode:        memory+lora
    data:        {train_data: "codes/daily:3,codes/calls:1"}        # folders that `inlay moshi encode` wrote
    duration_sec: 2560
    lora:        {enable: true, rank: 128, scaling: 2.0}

What makes a YAML file a recipe of this kind is its ``moshi_paths`` section.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from inlay.fastweight import FastWeightConfig
from inlay.moshi.interleave import FRAME_RATE
from inlay.moshi.lora import LoraConfig
from inlay.moshi.loss import LossConfig
from inlay.moshi.sequences import MoshiData, SequenceConfig, frames_of, load_sequences
from inlay.moshi.yarn import YarnConfig
from inlay.train.kinds import RecipeKind
from inlay.train.recipe import DoctorSection
from inlay.train.yaml_recipe import RunRecipe, Section, check_trainer, read_recipe

MoshiMode = Literal["memory", "memory+layers", "memory+lora", "lora", "all"]

_KNOBS = {
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "num_microbatches",
    "max_steps": "max_steps",
    "num_train_epochs": "max_steps",
    "max_grad_norm": "max_norm",
    "learning_rate": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "lr_scheduler_type": "optim.pct_start",
    "lr_scheduler_kwargs": "optim.pct_start",
    "warmup_steps": "optim.pct_start",
    "logging_steps": "log_freq",
    "eval_steps": "eval_freq",
    "eval_strategy": "do_eval",
    "save_steps": "ckpt_freq",
    "save_strategy": "do_ckpt",
    "save_total_limit": "num_ckpt_keep",
    "gradient_checkpointing": "gradient_checkpointing",
    "bf16": "param_dtype",
    "fp16": "param_dtype",
}

_ONE_FOLDER = "put a checkpoint's files into one folder, as the hub has them, and give it as moshi_paths.hf_repo_id"
_MOSHI_FINETUNES = {
    "full_finetuning": "mode says what is trained; false is mode: lora (or memory+lora), true is mode: all",
    "save_adapters": "adapters are always saved as adapters; take it out",
    "overwrite_run_dir": "a run is never written over; take it out, and delete the old run or give another name",
    "wandb": "the Trainer logs there with trainer: {report_to: wandb}",
    **{f"moshi_paths.{name}_path": _ONE_FOLDER for name in ("moshi", "mimi", "tokenizer", "config")},
}


class MoshiPaths(Section):
    """Where the model comes from."""

    hf_repo_id: str = "kyutai/moshiko-pytorch-bf16"
    """A repository of the hub, or a folder with the same files."""


class OptimSection(Section):
    """AdamW and its one-cycle schedule."""

    lr: float = Field(default=1e-4, gt=0)
    """The highest learning rate."""

    memory_lr: float | None = Field(default=None, gt=0)
    """That of the memory's own parameters; ``lr`` when not given."""

    muon: float | None = Field(default=None, gt=0)
    """Highest learning rate of Muon for the weights of linear layers and for the memory's convolution and
    projection; null trains them with AdamW like all else."""

    weight_decay: float = Field(default=0.1, ge=0)
    """Decay, of everything but norms; with Muon, of what it trains."""

    pct_start: float = Field(default=0.05, ge=0, le=1)
    """Share of the steps in which the rate rises; it falls along a cosine afterwards."""

    @model_validator(mode="after")
    def _one_rate_for_each_weight(self) -> OptimSection:
        if self.muon is not None and self.memory_lr is not None:
            raise ValueError("muon trains the memory's projection at its own rate; take memory_lr out, or muon")
        return self


class MoshiEvaluateSection(Section):
    """What ``inlay evaluate`` measures."""

    batch_size: int = Field(default=1, ge=1)
    """Sequences per forward."""

    max_sequences: int | None = Field(default=None, ge=1)
    """Take no more than so many, evenly spaced; all when not given."""

    returned_after: int | None = Field(default=None, ge=0)
    """A phrase counts as returned when it was first said more than so many frames ago; when not given, more than the
    attention window of one layer."""


def _check_moshi_trainer(arguments: dict[str, Any]) -> dict[str, Any]:
    for key in arguments:
        if key in _KNOBS:
            raise ValueError(f"{key!r} has a setting of its own: {_KNOBS[key]}")
    return check_trainer(arguments)


class MoshiRecipe(RunRecipe):
    """One training run of Moshi. Its ``trainer`` has what no setting of its own is for."""

    kind: ClassVar[RecipeKind] = "moshi"
    trainer_check = _check_moshi_trainer
    elsewhere: ClassVar[Mapping[str, str]] = _MOSHI_FINETUNES
    free_when_resumed: ClassVar[frozenset[str]] = frozenset(
        {"trainer", "optim", "max_norm", "max_steps", "log_freq", "do_eval", "eval_freq"}
        | {"do_ckpt", "ckpt_freq", "num_ckpt_keep"}
    )

    moshi_paths: MoshiPaths
    memory: FastWeightConfig | None = None
    mode: MoshiMode = "memory"
    """What is trained: ``memory``, ``memory+layers`` (also the blocks that hold one), ``memory+lora``, ``lora`` (alone,
    without a memory) or ``all``."""

    yarn: YarnConfig | None = None
    """A longer attention window than the model was trained with."""

    data: SequenceConfig

    duration_sec: float = Field(default=100.0, gt=0, le=2560)
    """Seconds of a training sequence; 2,560 are 32,000 frames."""

    batch_size: int = Field(default=1, ge=1)
    """Sequences in a batch, on each device."""

    num_microbatches: int = Field(default=1, ge=1)
    """Batches whose gradients are averaged before a step."""

    first_codebook_weight_multiplier: float = Field(default=1.0, ge=0)
    """Weight of Moshi's first codebook among its eight."""

    text_padding_weight: float = Field(default=0.5, ge=0)
    """Weight of padding in the text stream."""

    lora: LoraConfig = LoraConfig()
    optim: OptimSection = OptimSection()

    max_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""

    max_steps: int = Field(default=100, ge=1)
    """Optimizer steps."""

    log_freq: int = Field(default=1, ge=1)
    """Steps between logs."""

    do_eval: bool = False
    """Whether the evaluation loss is measured while training."""

    eval_freq: int = Field(default=0, ge=0)
    """Steps between evaluations; 0: at the end alone."""

    do_ckpt: bool = True
    """Whether checkpoints to resume from are written."""

    ckpt_freq: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0: none to resume from, the trained weights at the end alone."""

    num_ckpt_keep: int | None = Field(default=3, ge=1)
    """Checkpoints that are kept; null: all."""

    gradient_checkpointing: bool = True
    """Make activations again in the backward rather than keep them."""

    param_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the base model. What is trained is float32 and, with bfloat16, computed with in bfloat16."""

    run_dir: Path | None = None
    """The run's directory; RUNS/NAME when not given."""

    evaluate: MoshiEvaluateSection = MoshiEvaluateSection()
    doctor: DoctorSection = DoctorSection(frame_rate=FRAME_RATE)

    @model_validator(mode="after")
    def _sections_agree(self) -> MoshiRecipe:
        if self.optim.muon is not None and "optim" in self.trainer:
            raise ValueError("optim.muon trains what it does not with AdamW; take optim out of trainer, or muon out")
        if self.data.min_sec is not None and self.data.min_sec > self.duration_sec:
            raise ValueError(f"data.min_sec {self.data.min_sec} is longer than duration_sec {self.duration_sec}")
        if self.memory is None and self.mode not in ("lora", "all"):
            raise ValueError(f"mode is {self.mode!r} but there is no memory; without one use mode: lora or all")
        if self.memory is not None and self.mode == "lora":
            raise ValueError("mode is 'lora' but there is a memory; use memory+lora, or memory: null")
        if self.lora.enable != ("lora" in self.mode):
            raise ValueError(
                f"mode is {self.mode!r} and lora.enable is {str(self.lora.enable).lower()}; mode memory+lora (or lora) "
                "and lora.enable: true go together"
            )
        return self

    def kept_when_resumed(self) -> dict[str, Any]:
        """What must be as it was: which optimizer trains what, too, as its state would not fit."""
        groups = {f"optim.{name}": getattr(self.optim, name) is None for name in ("muon", "memory_lr")}
        return super().kept_when_resumed() | groups

    @property
    def frames(self) -> int:
        """T, frames of a full sequence."""
        return frames_of(self.duration_sec)

    def load_data(self, *, needs_eval: bool | None = None) -> MoshiData:
        """The run's sequences, as :func:`~inlay.moshi.sequences.load_sequences` opens them; those for evaluation may be
        none without ``do_eval``, unless ``needs_eval`` says otherwise."""
        needs = self.do_eval if needs_eval is None else needs_eval
        return load_sequences(self.data, duration_sec=self.duration_sec, seed=self.seed, needs_eval=needs)

    @property
    def loss(self) -> LossConfig:
        """The weights of the loss."""
        return LossConfig(
            first_codebook_weight_multiplier=self.first_codebook_weight_multiplier,
            text_padding_weight=self.text_padding_weight,
        )

    def trainer_arguments(self) -> dict[str, Any]:
        """The settings as transformers' ``TrainingArguments`` names them."""
        arguments: dict[str, Any] = {
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": self.evaluate.batch_size,
            "gradient_accumulation_steps": self.num_microbatches,
            "max_steps": self.max_steps,
            "max_grad_norm": self.max_norm,
            "learning_rate": self.optim.lr,
            "weight_decay": self.optim.weight_decay,
            "adam_beta2": 0.95,
            "logging_steps": self.log_freq,
            "save_total_limit": self.num_ckpt_keep,
            "bf16": self.param_dtype == "bfloat16",
            "save_strategy": "no",
            "train_sampling_strategy": "random" if self.data.shuffle else "sequential",
        }
        if self.do_ckpt and self.ckpt_freq:
            arguments |= {"save_strategy": "steps", "save_steps": self.ckpt_freq}
        if self.do_eval:
            arguments |= {"eval_strategy": "steps", "eval_steps": self.eval_freq or self.max_steps}
        return arguments | self.trainer


def load_moshi_recipe(path: str | Path, overrides: Sequence[str] = ()) -> MoshiRecipe:
    """As :func:`read_recipe`."""
    return read_recipe(MoshiRecipe, path, overrides)
