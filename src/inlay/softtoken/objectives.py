"""What a compressor can be trained on: each objective a small function, a number from one batch.

    answer         −log p of the answer's tokens and its end token
    first_token    the same of its first token alone, which no token before it gives away
    first_k        the same of its first k tokens
    distillation   KL(full text ‖ slots) over the first k tokens: what the same model would say, had it read everything
    reconstruction −log p of the context, continuation that of its second half (``cues.py``)
    diversity      how alike slots are, within a context and between contexts

A loss is their weighted sum. The label at a position is the token *at* that position, and transformers' models shift
labels inside their loss; :func:`predictions` is the one place here that aligns logits with labels, and does the same.

What several objectives need (the memory, the student's and the teacher's predictions) is computed when the first of
them asks for it, and once.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.softtoken.batches import NO_LABEL, TrainingBatch
from inlay.softtoken.compressors import Compressor
from inlay.softtoken.compressors.adapter import adapters, tuner_layers
from inlay.softtoken.cues import CONTINUATION, RECONSTRUCTION, Cues, cued
from inlay.softtoken.diversity import likeness
from inlay.softtoken.errors import SoftTokenError
from inlay.softtoken.prompting import BoundLayout
from inlay.softtoken.tokens import SoftTokens, embed_text


@dataclass(frozen=True, eq=False)
class Predictions:
    """What is predicted of each supervised token, row after row; N tokens in all.

    Attributes:
        logits: `[N, vocabulary]` float32.
        labels: `[N]` int64, the tokens themselves.
        places: `[N]` int64, the token's number within its row's answer, from 0.
    """

    logits: Tensor
    labels: Tensor
    places: Tensor

    def first(self, k: int) -> Predictions:
        """Those of each row's first ``k`` tokens."""
        near = self.places < k
        return Predictions(self.logits[near], self.labels[near], self.places[near])

    @property
    def cross_entropy(self) -> Tensor:
        """Mean over the tokens, in nats; 0 without a token."""
        return F.cross_entropy(self.logits, self.labels, reduction="sum") / max(1, len(self.labels))


def predictions(logits: Tensor, labels: Tensor) -> Predictions:
    """The logits that predict each label: those one position before it.

    Args:
        logits: `[B, T, vocabulary]`.
        labels: `[B, T]`, -100 where nothing is supervised. Not shifted. A label in the first column has nothing before
            it and is left out, as in transformers' loss.
    """
    supervised = labels != NO_LABEL
    places = supervised.cumsum(dim=1) - 1
    taken = supervised[:, 1:]
    return Predictions(logits[:, :-1][taken].float(), labels[:, 1:][taken], places[:, 1:][taken])


@dataclass(frozen=True, eq=False)
class ObjectiveInputs:
    """One batch, and what it is read with. C contexts, B questions about them.

    Attributes:
        model: The decoder, a Hugging Face causal LM out of PEFT's wrapper.
        compressor: A compressor for it.
        layout: What stands around the memory.
        cues: The learned cues that ``reconstruction`` and ``continuation`` need; None without them.
        contexts: `[C, S]` token ids, padding on the right.
        mask: `[C, S]` bool, True at tokens.
        index: `[B]` int64, the context that each question is about.
        questions: B questions.
        answers: B answers, each with its references, of which the first is taught.
        ratio: Tokens per slot; None for what the compressor's configuration says.
        k: Tokens of ``first_k`` and ``distillation``.
        temperature: Of both distributions in ``distillation``.
        sampling: Share of the answers' input tokens that are the model's own guesses.
    """

    model: Any
    compressor: Compressor[Any]
    layout: BoundLayout
    cues: Cues | None
    contexts: Tensor
    mask: Tensor
    index: Tensor
    questions: Sequence[str]
    answers: Sequence[str | Sequence[str]]
    ratio: int | None = None
    k: int = 4
    temperature: float = 1.0
    sampling: float = 0.0

    @cached_property
    def memory(self) -> SoftTokens:
        """The slots of the C contexts."""
        return self.compressor.compress(self.contexts, self.mask, ratio=self.ratio)

    @cached_property
    def student(self) -> Predictions:
        """The answers' tokens as read from the slots."""
        batch = self.layout.training(self.model, self.memory.select(self.index), self.questions, self.answers)
        if self.sampling:
            batch = with_guesses(self.model, batch, self.sampling)
        return read(self.model, batch, "the prompt")

    @cached_property
    def teacher(self) -> Predictions:
        """The answers' tokens as the model without any adapter reads them from the full text; no gradient."""
        with torch.no_grad(), adapters(tuner_layers(self.model), []):
            text = embed_text(self.model, self.contexts, self.mask).select(self.index)
            batch = self.layout.training(self.model, text, self.questions, self.answers)
            return read(self.model, batch, "distillation from the full text")

    def cued(self, name: str, memory: SoftTokens, mask: Tensor) -> Predictions:
        """The tokens of the contexts at ``mask`` `[C, S]`, as read from ``memory`` behind the cue of this name."""
        assert self.cues is not None
        before = self.layout.prompt("?").before  # what stands before the memory is the same for every question
        batch = cued(self.model, before, memory, self.cues[name], self.contexts, mask)
        return read(self.model, batch, name)


def answer(inputs: ObjectiveInputs) -> Tensor:
    """Cross-entropy of the answers' tokens and end tokens."""
    return inputs.student.cross_entropy


def first_token(inputs: ObjectiveInputs) -> Tensor:
    """Cross-entropy of the answers' first tokens."""
    return inputs.student.first(1).cross_entropy


def first_k(inputs: ObjectiveInputs) -> Tensor:
    """Cross-entropy of the answers' first k tokens."""
    return inputs.student.first(inputs.k).cross_entropy


def distillation(inputs: ObjectiveInputs) -> Tensor:
    """KL(teacher ‖ student) in nats a token over the answers' first k tokens, at the temperature τ, times τ².

    The factor keeps the size of the gradient when τ is changed (Hinton, Vinyals and Dean, 2015).
    """
    tau = inputs.temperature
    teacher, student = (
        F.log_softmax(side.first(inputs.k).logits / tau, dim=-1) for side in (inputs.teacher, inputs.student)
    )
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * tau**2


def reconstruction(inputs: ObjectiveInputs) -> Tensor:
    """Cross-entropy of the contexts' tokens behind their own slots."""
    return inputs.cued(RECONSTRUCTION, inputs.memory, inputs.mask).cross_entropy


def continuation(inputs: ObjectiveInputs) -> Tensor:
    """Cross-entropy of the second half of each context, behind the slots of the first."""
    half = (inputs.mask.sum(dim=1, keepdim=True) // 2).clamp(min=1)
    first = inputs.mask & (torch.arange(inputs.mask.shape[1], device=half.device) < half)
    memory = inputs.compressor.compress(inputs.contexts, first, ratio=inputs.ratio)
    return inputs.cued(CONTINUATION, memory, inputs.mask & ~first).cross_entropy


def diversity(inputs: ObjectiveInputs) -> Tensor:
    """How alike the slots of the batch are, 0 to about 2.5; see :func:`inlay.softtoken.diversity.likeness`."""
    return likeness(inputs.memory)


Objective: TypeAlias = Callable[[ObjectiveInputs], Tensor]

OBJECTIVES: Mapping[str, Objective] = {
    "answer": answer,
    "first_token": first_token,
    "first_k": first_k,
    "distillation": distillation,
    RECONSTRUCTION: reconstruction,
    CONTINUATION: continuation,
    "diversity": diversity,
}
"""Every objective by the name it has in a recipe. A new one is a function and a line here."""


def weighted_sum(
    inputs: ObjectiveInputs, weights: Mapping[str, float], objectives: Mapping[str, Objective] = OBJECTIVES
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and each objective by itself (unweighted, detached) for the log.

    Args:
        inputs: A batch.
        weights: By name; what is not named is not computed.
        objectives: Where the names are looked up.
    """
    values = {name: objectives[name](inputs) for name in weights}
    total = torch.stack([weight * values[name] for name, weight in weights.items()]).sum()
    return total, {name: value.detach() for name, value in values.items()}


def read(model: Any, batch: TrainingBatch, what: str) -> Predictions:
    """What ``model`` predicts of the batch's supervised tokens.

    Logits are computed from the first position on that any row needs: behind a full text, or with a large vocabulary,
    those of every position would be most of the memory a step takes.

    Args:
        model: A Hugging Face causal LM.
        batch: Sequences and labels.
        what: Names the sequence in an error.

    Raises:
        SoftTokenError: It is longer than the model has positions.
    """
    length, limit = (
        int(batch.position_ids.max()) + 1,
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
    )
    if limit is not None and length > limit:
        raise SoftTokenError(
            f"{what} takes {length:,} positions and {type(model).__name__} has {limit:,}; cut the contexts "
            "(context_tokens), or give the objective weight 0"
        )
    kept = _columns_from_first_scored(batch)
    inputs = {name: value for name, value in batch.inputs().items() if name != "labels"}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = kept
    logits = model(**inputs).logits
    return predictions(logits[:, -kept:], batch.labels[:, -kept:])


def with_guesses(model: Any, batch: TrainingBatch, share: float) -> TrainingBatch:
    """Scheduled sampling in two parallel passes (Mihaylova and Martins, 2019).

    A first pass, without gradient, guesses every token of the answers from the right tokens before it. In the batch
    that is returned each input token of an answer is that guess with probability ``share``; the labels stay.
    """
    kept = _columns_from_first_scored(batch)
    with torch.no_grad():
        inputs = {name: value for name, value in batch.inputs().items() if name != "labels"}
        guesses = F.pad(model(**inputs).logits[:, -kept:-1].argmax(-1), (batch.labels.shape[1] - kept + 1, 0))
        replaced = batch.answer_mask & (torch.rand(batch.labels.shape, device=guesses.device) < share)
        table = model.get_input_embeddings()
        guessed = table(guesses).to(batch.inputs_embeds.dtype)
    return dataclasses.replace(batch, inputs_embeds=torch.where(replaced.unsqueeze(-1), guessed, batch.inputs_embeds))


def _columns_from_first_scored(batch: TrainingBatch) -> int:
    """How many of the last columns hold every supervised token and what predicts it."""
    first = int(batch.scored_mask.any(dim=0).int().argmax())
    return batch.labels.shape[1] - first
