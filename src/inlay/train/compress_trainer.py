"""transformers' ``Trainer`` for a compressor in front of a frozen decoder."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from inlay.softtoken.compressors import Compressor
from inlay.softtoken.compressors.adapter import tuner_layers
from inlay.softtoken.compressors.storage import load_tensors, read
from inlay.softtoken.cues import CUED, Cues
from inlay.softtoken.objectives import OBJECTIVES, Objective, ObjectiveInputs, weighted_sum
from inlay.softtoken.prompting import BoundLayout
from inlay.train.compress_recipe import CompressRecipe
from inlay.train.loss_parts import LossPartsTrainer
from inlay.train.muon import MuonAdamW

COMPRESSOR = "compressor"
DECODER_ADAPTER = "decoder_adapter"
PRETRAINING = "pretraining"
_DECODER_ADAPTER_NAME = "default"  # PEFT's own


@dataclass(frozen=True)
class Stage:
    """What the steps of one stage are trained on.

    Attributes:
        name: Sets its random draws apart from another stage's.
        weights: Objectives by name.
        drawn: Each step draws one of them, in proportion to the weights; else it takes their weighted sum.
    """

    name: str
    weights: Mapping[str, float]
    drawn: bool = False

    def step(self, rng: random.Random) -> Mapping[str, float]:
        """The weights of one step."""
        if not self.drawn:
            return self.weights
        return {rng.choices([*self.weights], [*self.weights.values()])[0]: 1.0}


def stages(recipe: CompressRecipe) -> list[Stage]:
    """The stages that a run has: ``pretraining``, if the recipe has it, then ``training``."""
    before = recipe.pretraining
    first = [] if before is None else [Stage(PRETRAINING, before.shares, drawn=True)]
    return [*first, Stage("training", recipe.objectives.weights)]


class CompressionTask(nn.Module):
    """Decoder, compressor and cues as one module, whose forward is a loss.

    Attributes:
        decoder: The frozen decoder, in PEFT's wrapper where it has LoRA of its own.
        compressor: What is trained.
        cues: Learned embeddings of the objectives that have one, in any stage.
        layout: What stands around a memory.
    """

    def __init__(
        self,
        recipe: CompressRecipe,
        decoder: PreTrainedModel | PeftModel,
        compressor: Compressor[Any],
        layout: BoundLayout,
    ) -> None:
        super().__init__()
        used = {name for stage in stages(recipe) for name in stage.weights}
        self.recipe = recipe
        self.decoder = decoder
        self.compressor = compressor
        self.layout = compressor.layout = layout
        names = [name for name in CUED if name in used]
        self.cues = Cues(names, compressor.lm.width, compressor.embedding_rms).to(compressor.lm.device)

    def forward(
        self,
        contexts: Tensor,
        mask: Tensor,
        index: Tensor,
        questions: Sequence[str],
        answers: Sequence[Sequence[str]],
        *,
        weights: Mapping[str, float],
        objectives: Mapping[str, Objective] = OBJECTIVES,
        ratio: int | None = None,
        sampling: float = 0.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of a batch and each objective by itself.

        Arguments are those of :class:`~inlay.softtoken.objectives.ObjectiveInputs`, and of
        :func:`~inlay.softtoken.objectives.weighted_sum`.
        """
        inputs = ObjectiveInputs(
            model=self.compressor.lm.model,
            compressor=self.compressor,
            layout=self.layout,
            cues=self.cues,
            contexts=contexts,
            mask=mask,
            index=index,
            questions=questions,
            answers=answers,
            ratio=ratio,
            k=self.recipe.objectives.k,
            temperature=self.recipe.objectives.temperature,
            sampling=sampling,
        )
        return weighted_sum(inputs, weights, objectives)

    def train(self, mode: bool = True) -> Self:
        """Training mode for what is trained.

        A frozen decoder answers without dropout, as it will later. Only its blocks under gradient checkpointing are
        told that they train, for else they keep everything.
        """
        super().train(mode)
        self.decoder.eval()
        for module in self.decoder.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = mode
        for layer in tuner_layers(self.decoder):
            for name, child in layer.named_children():
                if name != "base_layer":
                    child.train(mode)
        return self

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """The decoder's, as the Trainer calls it from transformers 5.23 on."""
        self.compressor.lm.model.activation_checkpointing_enable(**kwargs)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """The decoder's, as the Trainer calls it before that."""
        self.compressor.lm.model.gradient_checkpointing_enable(**kwargs)

    def save_trained(self, directory: Path) -> None:
        """Write what is trained: ``compressor/``, ``cues.safetensors`` and ``decoder_adapter/``, as far as there is.

        Raises:
            CompressorError: The compressor holds NaN or infinity.
        """
        self.compressor.save_pretrained(directory / COMPRESSOR)
        self.cues.save(directory)
        if isinstance(self.decoder, PeftModel):
            self.decoder.save_pretrained(
                str(directory / DECODER_ADAPTER),
                selected_adapters=[_DECODER_ADAPTER_NAME],
                save_embedding_layers=False,
            )

    def load_trained(self, directory: Path) -> None:
        """Load what :meth:`save_trained` wrote.

        Raises:
            InlayError: Files are missing, damaged or do not fit.
        """
        _, _, own, adapter = read(directory / COMPRESSOR)
        load_tensors(directory / COMPRESSOR, self.compressor, own, adapter)
        self.cues.load(directory)
        if isinstance(self.decoder, PeftModel):
            tensors = load_file(directory / DECODER_ADAPTER / "adapter_model.safetensors")
            set_peft_model_state_dict(self.decoder, tensors, _DECODER_ADAPTER_NAME)


class CompressTrainer(LossPartsTrainer):
    """A ``Trainer`` of a :class:`CompressionTask`.

    Every step draws a ratio, and where its stage says so an objective, from the recipe's seed and the step's number: a
    resumed run draws the same. Checkpoints hold what is trained, not the frozen decoder. Each objective is logged by
    itself (``loss/answer``), as the mean over the batches since the last log that had it.

    Attributes:
        objectives: Where the recipe's objectives are looked up; a subclass may have others.

    Args:
        recipe: The run's.
        stage: What its steps are trained on.
        kwargs: As ``transformers.Trainer`` takes them; ``model`` is the task.
    """

    objectives: ClassVar[Mapping[str, Objective]] = OBJECTIVES
    part = "objective"
    if_not_finite = (
        "lower trainer.learning_rate, or set trainer.max_grad_norm and start from the last checkpoint with --resume"
    )

    def __init__(self, *, recipe: CompressRecipe, stage: Stage, **kwargs: Any) -> None:
        self.recipe = recipe
        self.stage = stage
        super().__init__(**kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The stage's loss of one batch; evaluation takes all of its objectives and the first ratio."""
        if model.training:
            rng = random.Random(f"{self.recipe.seed} {self.stage.name} {self.state.global_step}")
            progress = self.state.global_step / max(1, self.state.max_steps)
            draws = self.recipe.draws if self.stage.name == PRETRAINING else self.recipe.draws_at(progress)
            ratio, weights = rng.choice(draws), self.stage.step(rng)
            sampling = self.recipe.objectives.scheduled_sampling * progress
        else:
            ratio, weights, sampling = self.recipe.draws[0], self.stage.weights, 0.0
        loss, parts = model(**inputs, weights=weights, objectives=self.objectives, ratio=ratio, sampling=sampling)
        self.note_parts(model.training, parts)
        return (loss, parts) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's, or with ``muon`` in the recipe Muon for weights of linear layers and AdamW for the rest."""
        if getattr(self, "optimizer", None) is None and self.recipe.muon is not None:
            self.optimizer: torch.optim.Optimizer | None = MuonAdamW.of([self.model], self.args, self.recipe.muon)
        return super().create_optimizer(model)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            self.model.save_trained(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.load_trained(Path(resume_from_checkpoint))
