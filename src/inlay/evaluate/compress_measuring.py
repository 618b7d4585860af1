"""What is measured of one method on one batch of questions: its answers, their likelihood, its size and its time.

Likelihood is of the right answer, teacher-forced through ``layout.training``: the first reference and its end token,
just what training supervises. Answers are generated through ``layout.answer``. The two share nothing but the slots and
the layout, so that a fault in one of them shows.

Time is of one and the same ``generate``: *prefill* lasts until the first token of the answers is there, *decode* until
the last. Writing the slots is a time of its own, for what has been written can be kept and read again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from inlay.data import QAExample
from inlay.evaluate.compress_methods import Ids, Method
from inlay.evaluate.scoring import device_of
from inlay.fastweight.causal_lm import cache_among, forward_arguments
from inlay.softtoken.batches import NO_LABEL, TrainingBatch
from inlay.softtoken.prompting import BoundLayout
from inlay.softtoken.tokens import SoftTokens


@dataclass
class Record:
    """What was measured of a method so far: a value for each question, or for each batch.

    Attributes:
        predictions: Generated answers.
        nats: Negative log-likelihood of the right answer and its end.
        tokens: How many tokens that are.
        first_right: Whether the most likely first token is the answer's.
        slots: Slots M of the question's context.
        slot_bytes: Bytes of all slots.
        write: Seconds a question from context to slots, by batch.
        prefill: Seconds a question until the first token is there, by batch.
        decode: Seconds a question for the tokens behind it, by batch.
        steps: Tokens that were generated, by batch: those of its longest answer.
    """

    predictions: list[str] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    first_right: list[bool] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    slot_bytes: int = 0
    write: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def measure(
        self, method: Method, model: Any, layout: BoundLayout, examples: Sequence[QAExample], contexts: Sequence[Ids]
    ) -> None:
        """Add what ``method`` does for one batch of questions about ``contexts``."""
        device, questions = device_of(model), [example.question for example in examples]
        begun = now(device)
        memory = method.write(contexts)
        written = now(device)
        watch = _Watch(device)
        answers = layout.answer(model, memory, questions, stopping_criteria=StoppingCriteriaList([watch]))
        ended = now(device)

        self.predictions += answers
        self.write.append((written - begun) / len(examples))
        self.prefill.append((watch.first - written) / len(examples))
        self.decode.append((ended - watch.first) / len(examples))
        self.steps.append(watch.steps)
        self.slots += memory.lengths.tolist()
        self.slot_bytes += memory.nbytes
        losses = answer_losses(model, layout, memory, questions, [example.answers for example in examples])
        self.nats += losses.nats
        self.tokens += losses.tokens
        self.first_right += losses.first_right


@dataclass(frozen=True)
class AnswerLosses:
    """How likely the right answers of a batch are, row by row.

    Attributes:
        nats: Σ −ln p over the answer's tokens and its end token.
        tokens: How many these are.
        first_right: Whether the most likely first token is the answer's.
    """

    nats: list[float]
    tokens: list[int]
    first_right: list[bool]


def answer_losses(
    model: Any, layout: BoundLayout, memory: SoftTokens, questions: Sequence[str], answers: Sequence[Sequence[str]]
) -> AnswerLosses:
    """The losses of B answers behind their memories, in float32, without gradients.

    Args:
        model: A Hugging Face causal LM.
        layout: What training and answering go through.
        memory: B rows.
        questions: B questions.
        answers: B times the references, of which the first counts.
    """
    batch = layout.training(model, memory, questions, answers)
    with torch.no_grad():
        logits, targets = _scored(model, batch)
    flat = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NO_LABEL, reduction="none")
    scored = targets != NO_LABEL
    first = scored.int().argmax(dim=1, keepdim=True)
    right = logits.argmax(-1).gather(1, first) == targets.gather(1, first)
    return AnswerLosses(
        flat.view(targets.shape).double().sum(1).tolist(), scored.sum(1).tolist(), right.squeeze(1).tolist()
    )


def cache_bytes_per_slot(model: Any) -> int:
    """Bytes that one position takes in the decoder's cache: keys and values of all layers, counted in a cache."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=device_of(model))
    with torch.no_grad():
        cache = cache_among(model(input_ids=ids, use_cache=True))
    layers = () if cache is None else cache.layers
    kept = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in kept if isinstance(tensor, Tensor)) // 2


def now(device: torch.device) -> float:
    """Seconds on a clock that runs once all work given to ``device`` is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _scored(model: Any, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
    """Logits `[B, A, vocabulary]` float32 and targets `[B, A]` at the places where some row's answer is scored.

    Those alone are computed where the model lets itself be asked for them: behind a long context a row of logits for
    every position would be larger than the model.
    """
    places = batch.scored_mask.any(0).nonzero().squeeze(1)
    targets = F.pad(batch.labels[:, 1:], (0, 1), value=NO_LABEL)[:, places]
    inputs = {name: value for name, value in batch.inputs().items() if name != "labels"}
    if "logits_to_keep" in forward_arguments(model):
        return model(**inputs, logits_to_keep=places).logits.float(), targets
    return model(**inputs).logits[:, places].float(), targets


class _Watch(StoppingCriteria):
    """Stops nothing; notes when the first token was there, and counts tokens."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first = 0.0
        self.steps = 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.steps += 1
        if self.steps == 1:
            self.first = now(self.device)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
