"""Does the training step of a Moshi recipe fit? Kyutai's own model, run without its numbers, from the recipe alone.

What runs is what ``inlay train`` runs: ``LMModel`` with its depformer and all embeddings, attention in blocks, the loss
in slices, checkpointed blocks, the recipe's adapters and memory. Weights are not needed, only their shapes: a folder's
``config.json``, the hub's if it can be asked, or the sizes of Moshi 7B, which Kyutai's own loader has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from moshi.models import loaders
from moshi.models.lm import LMModel
from torch import Tensor, nn

from inlay.doctor.dry_run import PlanError, Skipped, TrainingStep
from inlay.doctor.plan import OPTIMIZERS, Progress, plan_step
from inlay.doctor.plan_report import RecipePlan
from inlay.fastweight import FastWeightConfig, Memory
from inlay.moshi.loss import SliceNats, recomputed_nats
from inlay.moshi.model import MoshiForTraining
from inlay.moshi.weights import CONFIG_NAME
from inlay.train.moshi import equip_moshi
from inlay.train.moshi_recipe import MoshiRecipe
from inlay.train.yaml_recipe import RecipeError

LENGTH_KEY = "duration_sec"
MOST_FRAMES = 32_000
"""``duration_sec`` is 2,560 at most."""
_BLOCKS = 2
"""Blocks of each attention that a dry run walks: the last, and the one before, which is full."""
_SLICES = 2
"""Slices of frames whose logits a dry run makes: two, as the gradient of trained heads is summed over them."""
_SEVEN_B = "kyutai/moshi"
"""How the names of Kyutai's 7B models begin: moshiko and moshika, and the same in other formats."""
_FILES = {"moshi_name", "mimi_name", "tokenizer_name", "mimi_config_name", "lora_name"}
_NOT_SIZES = {*_FILES, "mimi_config", "lm_gen_config", "model_type", "stt_config", "tts_config", "model_id"}


def plan_moshi_recipe(
    recipe: MoshiRecipe,
    *,
    lm_config: Mapping[str, Any] | None = None,
    budget_gb: float | None = None,
    progress: Progress | None = None,
) -> RecipePlan:
    """Plan the memory of the recipe's training step.

    Args:
        recipe: A recipe with a memory.
        lm_config: Arguments of ``LMModel``; those of the recipe's model when not given.
        budget_gb: Memory that the step may take, in GB (10⁹ bytes); the recipe's ``doctor.budget_gb``, else all of the
            CUDA device's, when not given.
        progress: Called with what is about to be run.

    Raises:
        RecipeError: The recipe has no memory.
        PlanError: The model's sizes are not to be had, or it cannot be run without its numbers.
    """
    if recipe.memory is None:
        raise RecipeError(f"{recipe.name} has no memory to plan (memory: null)")
    assumptions: list[str] = []
    if lm_config is None:
        lm_config, assumed = model_sizes(recipe.moshi_paths.hf_repo_id)
        assumptions += assumed
    step, more = training_step(recipe)
    return plan_step(
        MoshiSubject(recipe, lm_config),
        recipe.memory,
        step,
        budget_gb=budget_gb or recipe.doctor.budget_gb,
        frame_rate=recipe.doctor.frame_rate,
        changes=_changes(step),
        assumptions=(*assumptions, *more),
        length_key=LENGTH_KEY,
        most_tokens=MOST_FRAMES,
        progress=progress,
    )


def model_sizes(source: str) -> tuple[dict[str, Any], list[str]]:
    """The arguments of ``LMModel`` that a checkpoint has, without its weights, and what was assumed of them.

    Raises:
        PlanError: The checkpoint is neither here nor on the hub, and none of Kyutai's 7B models.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        path = folder / CONFIG_NAME
        return (_sizes_in(path) if path.is_file() else dict(loaders._lm_kwargs)), []
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise PlanError(f"moshi_paths.hf_repo_id: {source}: no such folder")
    try:
        return _sizes_in(Path(hf_hub_download(source, CONFIG_NAME))), []
    except EntryNotFoundError:  # a repository without one is the 7B of the first release
        return dict(loaders._lm_kwargs), []
    except (OSError, ValueError) as error:  # what the hub's client raises derives from these
        if source.startswith(_SEVEN_B):
            said = f"The hub does not answer, so {source} is planned with the sizes of Moshi 7B in Kyutai's loader."
            return dict(loaders._lm_kwargs), [said]
        raise PlanError(
            f"moshi_paths.hf_repo_id: the sizes of {source} are not to be had ({type(error).__name__}: {error}); "
            f"give a folder with its {CONFIG_NAME}"
        ) from error


def _sizes_in(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlanError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise PlanError(f"{path}: holds {type(config).__name__}, not an object")
    return {key: value for key, value in config.items() if key not in _NOT_SIZES}


def training_step(recipe: MoshiRecipe) -> tuple[TrainingStep, tuple[str, ...]]:
    """The training step that a recipe runs, and what had to be assumed for it."""
    assumptions = []
    optimizer = str(recipe.trainer.get("optim", "adamw_torch_fused"))
    if recipe.optim.muon is not None or optimizer not in OPTIMIZERS:
        named = "optim.muon" if recipe.optim.muon is not None else f"optim: {optimizer}"
        assumptions.append(f"{named} is planned as AdamW with states in the parameters' dtype.")
    frames = recipe.frames
    document_tokens = None
    if recipe.data.packing == "concatenate":
        document_tokens = max(1, frames // 2)
        assumptions.append("Rows of several conversations are planned as rows of two.")
    half = recipe.param_dtype == "bfloat16"
    step = TrainingStep(
        tokens=frames,
        batch_size=recipe.batch_size,
        dtype=recipe.param_dtype,
        autocast="bfloat16" if half else None,
        mode="all" if recipe.mode == "lora" else recipe.mode,
        gradient_checkpointing=recipe.gradient_checkpointing,
        lora=recipe.lora.model_dump() if recipe.lora.enable else None,
        optimizer=OPTIMIZERS.get(optimizer, "adamw"),
        accumulate=recipe.num_microbatches > 1,
        document_tokens=document_tokens,
    )
    return step, tuple(assumptions)


def _changes(step: TrainingStep) -> dict[str, TrainingStep]:
    """What one change to the recipe would make of the step, by the change."""
    changes = {}
    if not step.gradient_checkpointing:
        changes["gradient_checkpointing: true"] = replace(step, gradient_checkpointing=True)
    for rows in sorted({step.batch_size // 2, 1} - {0, step.batch_size}, reverse=True):
        changes[f"batch_size: {rows}"] = replace(step, batch_size=rows)
    if step.dtype == "float32":
        changes["param_dtype: bfloat16"] = replace(step, dtype="bfloat16", autocast="bfloat16")
    if step.mode != "memory":
        changes["mode: memory, lora.enable: false"] = replace(step, mode="memory", lora=None)
    return changes


@dataclass(frozen=True)
class MoshiSubject:
    """Kyutai's language model as :class:`~inlay.doctor.dry_run.Subject`.

    Attributes:
        recipe: What the step does not say: YaRN, adapters, the weights of the loss.
        lm_config: Arguments of ``LMModel``.
    """

    recipe: MoshiRecipe
    lm_config: Mapping[str, Any]

    def skeleton(self, step: TrainingStep) -> nn.Module:
        """A :class:`MoshiForTraining` around the language model, as the recipe trains it."""
        lm = loaders.get_moshi_lm(
            None,
            dict(self.lm_config),
            device="meta",
            dtype=getattr(torch, step.dtype),
            lm_kwargs_overrides={"gradient_checkpointing": step.gradient_checkpointing, "lora": False},
        )
        return MoshiForTraining(lm.train(), self.recipe.loss, most_blocks=_BLOCKS, slice_nats=_few_slices())

    def equip(self, model: nn.Module, memory: FastWeightConfig, step: TrainingStep) -> Memory:
        """As :func:`inlay.train.moshi.equip_moshi` does it."""
        assert isinstance(model, MoshiForTraining)
        model.to_empty(device="cpu")
        lora = self.recipe.lora.model_copy(update={"enable": step.lora is not None})
        recipe = self.recipe.model_copy(update={"memory": memory, "mode": step.mode, "lora": lora})
        attached = equip_moshi(recipe, model.lm)
        assert attached is not None
        return attached

    def batch(self, step: TrainingStep) -> dict[str, Tensor]:
        """Codes ``[B, K, T]`` of one conversation a row, or of several."""
        place = torch.arange(step.tokens).repeat(step.batch_size, 1)
        streams = 1 + int(self.lm_config["n_q"])
        return {
            "codes": torch.zeros(step.batch_size, streams, step.tokens, dtype=torch.long),
            "documents": place // (step.document_tokens or step.tokens),
        }

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Text and audio together."""
        loss: Tensor = model(batch["codes"], batch["documents"]).loss
        return loss


def _few_slices() -> SliceNats:
    """Makes the logits of the first slices alone: the others need the same memory and leave the same behind.

    The backward comes to the first ones last, when most is held.
    """
    made = 0

    def slice_nats(lm: LMModel, hidden: Tensor, said: Tensor, targets: Tensor) -> Tensor:
        nonlocal made
        made += 1
        if made <= _SLICES:
            return recomputed_nats(lm, hidden, said, targets)
        nats: Tensor = Skipped.apply(hidden, targets)  # type: ignore[no-untyped-call]
        return nats

    return slice_nats
