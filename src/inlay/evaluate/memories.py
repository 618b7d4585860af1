"""One context, written into fast weights and into soft tokens, and questions answered from either.

Every way is given the same contexts and questions, one layout and greedy decoding, and attention never sees the context
while it answers: of a memory there is what it holds, and nothing else. *Full text* and *no context*, from the decoder
as it was before either memory was trained, say what could be reached and what needs no memory. A memory that was given
another question's context must fall back to that, or it did not answer from its context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from inlay.data import QAExample
from inlay.evaluate.compress_measuring import AnswerLosses, answer_losses
from inlay.evaluate.compress_methods import Ids, Write, circle, context_ids
from inlay.evaluate.intervals import Interval, paired_interval
from inlay.evaluate.scoring import EvaluationError, Progress
from inlay.evaluate.squad import SquadScores, squad_scores, with_silence
from inlay.fastweight import Session
from inlay.softtoken.prompting import BoundLayout
from inlay.softtoken.tokens import SoftTokens

FULL_TEXT = "full text"
NO_CONTEXT = "no context"
FAST_WEIGHTS = "fast weights"
SOFT_TOKENS = "soft tokens"


@dataclass(frozen=True)
class Answered:
    """What one way did with a batch.

    Attributes:
        predictions: Its answers.
        losses: How likely it held the right ones.
        state_bytes: Bytes of what it kept of the contexts, of all rows.
        slots: Positions that this takes in the decoder's cache, of all rows.
    """

    predictions: list[str]
    losses: AnswerLosses
    state_bytes: int
    slots: int


Answer: TypeAlias = Callable[[Sequence[Ids], Sequence[QAExample]], Answered]
"""B contexts in tokens and B questions to what is answered to them."""


@dataclass(frozen=True)
class Way:
    """One way to answer.

    Attributes:
        name: In the table.
        answer: Does it.
        trained: Parameters that were trained for it.
        control: Give each question another one's context.
    """

    name: str
    answer: Answer
    trained: int = 0
    control: bool = False

    @property
    def label(self) -> str:
        """Its name, and whether the context is another one."""
        return f"{self.name}, another context" if self.control else self.name


@dataclass(frozen=True)
class WayScores:
    """What was measured of one way.

    Attributes:
        name: Of the way.
        control: Whether the contexts were other questions'.
        trained: Parameters trained for it.
        scores: Exact match and F1.
        nll: Negative log-likelihood of the right answers and their ends, in nats per token.
        state_bytes: Kept of a context, on average over the questions.
        slots: Positions in the decoder's cache that stand for a context, likewise.
        cache_bytes: What these take there.
    """

    name: str
    control: bool
    trained: int
    scores: SquadScores
    nll: Interval
    state_bytes: float
    slots: float
    cache_bytes: float

    @property
    def label(self) -> str:
        """As in the table."""
        return f"{self.name}, another context" if self.control else self.name

    def to_json(self) -> dict[str, Any]:
        """Plain types; without the single questions."""
        return {
            "way": self.name,
            "another_context": self.control,
            "trained_parameters": self.trained,
            **self.scores.to_json(),
            "nats_per_token": self.nll.to_json(),
            "state_bytes": self.state_bytes,
            "slots": self.slots,
            "cache_bytes": self.cache_bytes,
        }


def from_slots(model: Any, layout: BoundLayout, write: Write, *, bytes_per_slot: int | None = None) -> Answer:
    """Answers from soft tokens, or from text as such.

    Args:
        model: The decoder.
        layout: What stands around the slots.
        write: Contexts to slots.
        bytes_per_slot: What is kept of a slot, if it is not the slot itself: 4, where it is a token's id.
    """

    def answer(contexts: Sequence[Ids], examples: Sequence[QAExample]) -> Answered:
        with torch.no_grad():
            memory: SoftTokens = write(contexts)
        questions = [one.question for one in examples]
        predictions = layout.answer(model, memory, questions)
        losses = answer_losses(model, layout, memory, questions, [one.answers for one in examples])
        slots = int(memory.lengths.sum())
        return Answered(predictions, losses, memory.nbytes if bytes_per_slot is None else slots * bytes_per_slot, slots)

    return answer


def from_session(
    model: Any, layout: BoundLayout, read: Callable[[Sequence[Ids]], Session], nothing: Callable[[int], SoftTokens]
) -> Answer:
    """Answers from fast weights.

    Args:
        model: The decoder with its memory.
        layout: What stands around the answers.
        read: Contexts to a session that has read them, a row each.
        nothing: Slots of so many rows without any.
    """

    def answer(contexts: Sequence[Ids], examples: Sequence[QAExample]) -> Answered:
        with torch.no_grad():
            session = read(contexts)
        questions, empty = [one.question for one in examples], nothing(len(examples))
        held = session.nbytes
        with session.copy():  # answering reads on: the right answers are scored from where the context ended
            predictions = layout.answer(model, empty, questions)
        with session:
            losses = answer_losses(model, layout, empty, questions, [one.answers for one in examples])
        return Answered(predictions, losses, held, 0)

    return answer


def measure_ways(
    ways: Sequence[Way],
    layout: BoundLayout,
    examples: Sequence[QAExample],
    *,
    cache_bytes_per_slot: int,
    context_tokens: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[WayScores]:
    """Ask every way the same questions.

    Args:
        ways: What is compared.
        layout: Has the tokenizer, and says how a decoder says that there is no answer.
        examples: The questions.
        cache_bytes_per_slot: Bytes that one position takes in the decoder's cache.
        context_tokens: Contexts are cut behind so many tokens; None for whole ones.
        batch_size: Questions at a time.
        seed: Of who is given whose context.
        progress: Called with answers given and answers in all.

    Raises:
        EvaluationError: There is no question, a context has no token, or a control has no other context to be given.
    """
    examples = list(examples)
    if not examples:
        raise EvaluationError("nothing to evaluate: there is no question")
    contexts = context_ids(layout, examples, context_tokens)
    order = circle(contexts, seed)
    if len(order) < 2 and any(way.control for way in ways):
        raise EvaluationError("all questions are about one context, so there is no other one; evaluate more examples")
    other = dict(zip(order, order[1:] + order[:1], strict=True))
    found, done = [], 0
    for way in ways:
        parts = []
        given = [other[context] for context in contexts] if way.control else contexts
        for start in range(0, len(examples), batch_size):
            part = slice(start, start + batch_size)
            parts.append(way.answer(given[part], examples[part]))
            done += len(examples[part])
            if progress is not None:
                progress(done, len(ways) * len(examples))
        found.append(_scores(way, parts, layout, examples, contexts, cache_bytes_per_slot))
    return found


def _scores(
    way: Way,
    parts: Sequence[Answered],
    layout: BoundLayout,
    examples: Sequence[QAExample],
    contexts: Sequence[Ids],
    per_slot: int,
) -> WayScores:
    references = [one.answers for one in examples]
    said = [text for part in parts for text in part.predictions]
    scores = squad_scores(with_silence(said, references, layout.layout.unanswerable), references, contexts=contexts)
    groups = np.array(scores.contexts)
    nats = np.array([value for part in parts for value in part.losses.nats])
    tokens = np.array([value for part in parts for value in part.losses.tokens])
    slots = sum(part.slots for part in parts) / len(examples)
    return WayScores(
        name=way.name,
        control=way.control,
        trained=way.trained,
        scores=scores,
        nll=paired_interval(np.bincount(groups, nats).astype(np.float64), np.bincount(groups, tokens).astype(np.int64)),
        state_bytes=sum(part.state_bytes for part in parts) / len(examples),
        slots=slots,
        cache_bytes=slots * per_slot,
    )
