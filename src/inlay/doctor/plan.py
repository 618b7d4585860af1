"""Does the recipe's training step fit, and what would? Told from the recipe alone, before any model is built.

The recipe's own step is planned, the same with and without gradient checkpointing at several lengths, the longest that
fits the budget, and, where the step does not fit, what one change would make of it. What the materialised formula would
have held stands beside: n·B·D·F·4 bytes for one copy of a layer's updates, 0.172 GiB per chunk and row for Moshi.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from inlay.data import BpeTokenizer, RecallConfig, TextConfig
from inlay.data.recall import RecallDataset
from inlay.data.tokenizer import load_tokenizer
from inlay.doctor.dry_run import Model, Optimizer, PlanError, TrainingStep, dry_run
from inlay.doctor.plan_report import GB, TIGHT, Alternative, LengthCost, RecipePlan
from inlay.doctor.plan_step import MOST_TOKENS, LongestFit, MemoryPlan, longest_tokens, plan_memory
from inlay.doctor.reach_plan import chunks_in
from inlay.fastweight import FastWeightConfig
from inlay.train.pretrained import model_config
from inlay.train.recipe import Recipe, RecipeError

__all__ = [
    "Alternative",
    "LengthCost",
    "LongestFit",
    "MemoryPlan",
    "PlanError",
    "RecipePlan",
    "TrainingStep",
    "longest_tokens",
    "plan_memory",
    "plan_recipe",
    "plan_step",
    "training_step",
]

Progress = Callable[[str], None]

_LENGTHS = (0.5, 1, 2)
OPTIMIZERS: dict[str, Optimizer] = {"adamw_torch_fused": "adamw", "adamw_torch": "adamw_torch", "sgd": "sgd"}
"""How a dry run names the optimizers of transformers that it knows; others are planned as AdamW."""


def plan_recipe(
    recipe: Recipe,
    *,
    budget_gb: float | None = None,
    vocab_size: int | None = None,
    progress: Progress | None = None,
) -> RecipePlan:
    """Plan the memory of the recipe's training step.

    Args:
        recipe: A recipe with a memory.
        budget_gb: Memory that the step may take, in GB (10⁹ bytes); the recipe's ``doctor.budget_gb``, else all of the
            CUDA device's, when not given.
        vocab_size: Tokens that the data has; worked out from the recipe when neither it nor ``model.config`` says.
        progress: Called with what is about to be run.

    Raises:
        RecipeError: The recipe has no memory, or its model cannot be had.
        PlanError: The model cannot be run without its numbers.
    """
    if recipe.memory is None:
        raise RecipeError(f"{recipe.name} has no memory to plan (memory: null)")
    config = _model_config(recipe, vocab_size)
    step, assumptions = training_step(recipe, config)
    return plan_step(
        config,
        recipe.memory,
        step,
        budget_gb=budget_gb or recipe.doctor.budget_gb,
        frame_rate=recipe.doctor.frame_rate,
        changes=_changes(recipe, step),
        assumptions=assumptions,
        progress=progress,
    )


def plan_step(
    model: Model,
    memory: FastWeightConfig,
    step: TrainingStep,
    *,
    budget_gb: float | None,
    frame_rate: float | None,
    changes: Mapping[str, TrainingStep],
    assumptions: tuple[str, ...] = (),
    length_key: str = "data.sequence_length",
    most_tokens: int = MOST_TOKENS,
    progress: Progress | None = None,
) -> RecipePlan:
    """Plan a step, the same at other lengths, the longest that fits, and what each of ``changes`` would make of it.

    Args:
        model: As :func:`plan_memory`.
        memory: As :func:`plan_memory`.
        step: The recipe's own.
        budget_gb: Memory that the step may take, in GB (10⁹ bytes); all of the CUDA device's when not given.
        frame_rate: Tokens per second of audio; None for text.
        changes: Steps that differ from the recipe's in one setting, by that setting.
        assumptions: What the recipe leaves open.
        length_key: The recipe's key for a length.
        most_tokens: The longest sequence that a recipe may ask for.
        progress: Called with what is about to be run.
    """
    tell = progress or (lambda what: None)
    budget = _device_bytes() if budget_gb is None else int(budget_gb * GB)
    known: dict[str, int] = {}

    def peak(step: TrainingStep) -> int:
        if repr(step) not in known:
            tell(f"{step.tokens:,} tokens{'' if step.gradient_checkpointing else ', all kept'}")
            known[repr(step)] = dry_run(model, memory, step).peak.total
        return known[repr(step)]

    tell(f"the recipe's own step, with its memory and without: {step.tokens:,} tokens")
    plan = plan_memory(model, memory, step)
    known[repr(step)] = plan.peak_bytes
    longest: LongestFit | None = None
    alternatives: tuple[Alternative, ...] = ()
    if budget is not None:
        longest = longest_tokens(
            budget,
            model,
            memory,
            step,
            frame_rate=frame_rate,
            peak=lambda t: peak(_at(step, t)),
            most_tokens=most_tokens,
        )
        if plan.peak_bytes > TIGHT * budget:
            alternatives = tuple(Alternative(text, peak(changed)) for text, changed in changes.items())
    lengths = []
    for tokens in sorted({min(most_tokens, max(1, int(step.tokens * factor))) for factor in _LENGTHS}):
        chunks = chunks_in(tokens, memory.chunk_size)
        lengths.append(
            LengthCost(
                tokens=tokens,
                chunks=chunks,
                seconds=None if frame_rate is None else tokens / frame_rate,
                checkpointed_bytes=peak(replace(_at(step, tokens), gradient_checkpointing=True)),
                kept_bytes=peak(replace(_at(step, tokens), gradient_checkpointing=False)),
                materialised_bytes=plan.materialised_bytes // plan.chunks * chunks,
            )
        )
    return RecipePlan(plan, budget, tuple(lengths), longest, alternatives, assumptions, frame_rate, length_key)


def _model_config(recipe: Recipe, vocab_size: int | None) -> PreTrainedConfig:
    """The architecture alone; flash attention, which may not be installed here, stands in by SDPA's own."""
    section = recipe.model
    if "flash" in (section.attn_implementation or ""):
        section = section.model_copy(update={"attn_implementation": "sdpa"})
    if section.config is None or "vocab_size" in section.config:
        return model_config(section)
    return model_config(section, vocab_size=_vocab_size(recipe) if vocab_size is None else vocab_size)


def _vocab_size(recipe: Recipe) -> int:
    """Tokens that the data has, told without reading it."""
    data = recipe.data
    if isinstance(data, RecallConfig):
        return RecallDataset(data, "train").vocab_size
    if isinstance(data.tokenizer, BpeTokenizer):
        return data.tokenizer.vocab_size
    return len(load_tokenizer(data.tokenizer, []))


def training_step(recipe: Recipe, config: PreTrainedConfig) -> tuple[TrainingStep, tuple[str, ...]]:
    """The training step that a recipe runs on an architecture, and what had to be assumed for it."""
    trainer, data = recipe.trainer, recipe.data
    assumptions = []
    optimizer = str(trainer.get("optim", "adamw_torch_fused"))
    if optimizer not in OPTIMIZERS:
        assumptions.append(f"optim: {optimizer} is planned as AdamW with states in the parameters' dtype.")
    dtype: Any = recipe.model.dtype
    if dtype == "auto":
        dtype = str(getattr(config, "dtype", None) or torch.float32).removeprefix("torch.")
    padded, document_tokens = False, None
    masked = "flash" not in (recipe.model.attn_implementation or "")
    if isinstance(data, TextConfig) and masked:
        if data.packing == "concatenate":
            document_tokens = max(1, data.sequence_length // 2)
            assumptions.append("Rows of several documents are planned as rows of two, with the mask that they need.")
        elif data.min_piece_tokens < data.sequence_length:
            padded = True
            assumptions.append(
                "Some rows end in padding (data.min_tokens is below sequence_length). One such row in a batch makes "
                "attention hold T × T masks, and the step is planned for that batch."
            )
    step = TrainingStep(
        tokens=data.sequence_length,
        batch_size=int(trainer.get("per_device_train_batch_size", 8)),
        dtype=dtype,
        autocast="bfloat16" if trainer.get("bf16") else "float16" if trainer.get("fp16") else None,
        mode=recipe.mode,
        gradient_checkpointing=bool(trainer.get("gradient_checkpointing") or trainer.get("activation_checkpointing")),
        lora=None if recipe.lora is None else recipe.lora.model_dump(),
        optimizer=OPTIMIZERS.get(optimizer, "adamw"),
        accumulate=int(trainer.get("gradient_accumulation_steps", 1)) > 1,
        document_tokens=document_tokens,
        padded=padded,
    )
    return step, tuple(assumptions)


def _at(step: TrainingStep, tokens: int) -> TrainingStep:
    """The same step on rows of another length."""
    packed = None if step.document_tokens is None else max(1, step.document_tokens * tokens // step.tokens)
    return replace(step, tokens=tokens, document_tokens=packed)


def _changes(recipe: Recipe, step: TrainingStep) -> dict[str, TrainingStep]:
    """What one change to the recipe would make of the step, by the change."""
    changes = {}
    if not step.gradient_checkpointing:
        changes["trainer.gradient_checkpointing: true"] = replace(step, gradient_checkpointing=True)
    for rows in sorted({step.batch_size // 2, 1} - {0, step.batch_size}, reverse=True):
        changes[f"trainer.per_device_train_batch_size: {rows}"] = replace(step, batch_size=rows)
    if step.padded:
        whole = f"data.min_tokens: {step.tokens} (no padding, no mask)"
        changes[whole] = replace(step, padded=False)
    if step.document_tokens is not None:
        whole = f"data.packing: cut, data.min_tokens: {step.tokens} (one document a row, no mask)"
        changes[whole] = replace(step, document_tokens=None)
    if step.dtype == "float32":
        changes["model.dtype: bfloat16"] = replace(step, dtype="bfloat16", autocast=None)
    if step.mode != "memory":
        frozen = "" if recipe.model.name_or_path is not None else ", on a pretrained model (model.name_or_path)"
        changes[f"mode: memory{frozen}"] = replace(step, mode="memory", lora=None)
    return changes


def _device_bytes() -> int | None:
    """All memory of the CUDA device; None without one."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
