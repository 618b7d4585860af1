"""Do the slots say anything about their context: judged by information, and only then by diversity.

A collapsed compressor writes the same slots for every context. The reverse fails: slots may all differ and tell the
decoder nothing, or look alike (trained embeddings share a large common part) and tell it everything. So the judgement
is the decoder's, by the likelihood of the right answer:

- **gain over a wrong context**: −ln p behind another context's slots minus −ln p behind the right one's. At 0 the
  decoder cannot tell them apart, whatever the slots look like.
- **retrieval**: of B contexts, is the right one's the memory behind which the right answer is likeliest? By chance in
  1/B; several that are equally likely share the point, so that a constant memory is at chance and no better.
- **gain over no context**: slots may still be worse than none.

Wrong contexts are those that follow the right one in one random circle of all contexts, so every question has equally
many and never its own. Cosines and effective ranks, beside those of mean-pooled embeddings, then say what kind of
collapse it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from inlay.data import QAExample
from inlay.evaluate.collapse_geometry import geometry
from inlay.evaluate.collapse_results import Collapse
from inlay.evaluate.compress_measuring import answer_losses
from inlay.evaluate.compress_methods import (
    Ids,
    Write,
    budgets_of,
    circle,
    compressing_writer,
    context_ids,
    pooling,
    text_writer,
)
from inlay.evaluate.intervals import Interval, mean_interval, paired_interval
from inlay.evaluate.scoring import EvaluationError, Floats, Integers, Progress, choose, evaluating
from inlay.softtoken.compressors import Compressor
from inlay.softtoken.compressors.pool import PoolCompressor
from inlay.softtoken.prompting import BoundLayout
from inlay.softtoken.tokens import SoftTokens

_MEASURED = 32
"""Most contexts whose slots are compared: as keys and values they are large."""
_TIED = 1e-5  # of a likelihood in nats: what rounding makes of one and the same memory in two batches


def examine_collapse(
    model: Any,
    compressor: Compressor[Any],
    layout: BoundLayout,
    examples: Sequence[QAExample],
    *,
    ratio: int | None = None,
    context_tokens: int | None = None,
    candidates: int = 8,
    questions: int | None = 64,
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> Collapse:
    """Measure what the slots say about their contexts. The model is left as it was.

    Args:
        model: The decoder, a Hugging Face causal LM; the compressor's.
        compressor: The compressor.
        layout: As in training.
        examples: Questions.
        ratio: One of the compressor's; None for what it is configured for.
        context_tokens: Contexts are cut behind so many tokens, as in training; None for whole ones.
        candidates: Contexts that each question is asked of; fewer where there are fewer.
        questions: Ask so many of them, evenly spaced; None for all. Each costs ``candidates`` forwards of a row.
        batch_size: Rows a forward.
        seed: Of the order of the contexts.
        progress: Called with forwards of a row done and in all.

    Raises:
        EvaluationError: The questions are about fewer than two different contexts, ``candidates`` is below 2, a context
            has no token, or the ratio is none of the compressor's.
    """
    asked = [examples[index] for index in choose(len(examples), questions)]
    contexts = context_ids(layout, asked, context_tokens)
    order = circle(contexts, seed)
    if len(order) < 2 or candidates < 2:
        raise EvaluationError(
            f"{len(order)} different contexts and {candidates} candidates: collapse shows only between two or more"
        )
    budget = budgets_of(compressor.config, None if ratio is None else [ratio])[0]
    width = min(candidates, len(order))
    with evaluating(model), evaluating(compressor):
        memory = _written(compressing_writer(compressor, budget), order, batch_size)
        pool = PoolCompressor(pooling(compressor.config, [budget]), model).to(compressor.lm.device)
        pooled = _written(compressing_writer(pool, budget), order[:_MEASURED], batch_size)
        nothing = text_writer(model, lambda _: ())(order)
        places = {context: place for place, context in enumerate(order)}
        own = [(question, places[context]) for question, context in enumerate(contexts)]
        pairs = [(question, (place + step) % len(order)) for question, place in own for step in range(width)]
        total = len(pairs) + len(own)

        def scored(memory: SoftTokens, pairs: Sequence[tuple[int, int]], before: int) -> tuple[Floats, Integers]:
            return _score(model, layout, asked, memory, pairs, batch_size, lambda done: report(before + done))

        def report(done: int) -> None:
            if progress is not None:
                progress(done, total)

        nats = scored(memory, pairs, 0)[0].reshape(len(asked), width)
        bare, tokens = scored(nothing, own, len(pairs))

    groups = np.array([place for _, place in own])
    counts = np.bincount(groups, tokens).astype(np.int64)

    def per_token(values: Floats) -> Interval:
        return paired_interval(np.bincount(groups, values).astype(np.float64), counts)

    right, wrong = nats[:, 0], nats[:, 1:].mean(1)
    return Collapse(
        budget=budget.label,
        questions=len(asked),
        contexts=len(order),
        candidates=width,
        right=per_token(right),
        wrong=per_token(wrong),
        none=per_token(bare),
        over_wrong=per_token(wrong - right),
        over_none=per_token(bare - right),
        retrieval=mean_interval(found(nats), groups),
        slots=geometry(memory.select(range(min(_MEASURED, len(order))))),
        pooled=geometry(pooled),
    )


def found(nats: Floats) -> Floats:
    """Whether the first candidate's loss is the lowest of its row; of several that are, each has an equal share.

    Args:
        nats: `[questions, B]` losses of the right answer, the right context's first.

    Returns:
        `[questions]`, 0 to 1.
    """
    lowest = nats.min(1, keepdims=True)
    tied = nats <= lowest + _TIED * (1 + lowest)
    shares: Floats = tied[:, 0] / tied.sum(1)
    return shares


def _written(write: Write, contexts: Sequence[Ids], batch_size: int) -> SoftTokens:
    starts = range(0, len(contexts), batch_size)
    return SoftTokens.cat([write(contexts[start : start + batch_size]) for start in starts])


def _score(
    model: Any,
    layout: BoundLayout,
    asked: Sequence[QAExample],
    memory: SoftTokens,
    pairs: Sequence[tuple[int, int]],
    batch_size: int,
    report: Callable[[int], None],
) -> tuple[Floats, Integers]:
    """Nats and tokens of the right answer of each (question, row of ``memory``)."""
    nats: list[float] = []
    tokens: list[int] = []
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        chosen = [asked[question] for question, _ in part]
        losses = answer_losses(
            model,
            layout,
            memory.select([row for _, row in part]),
            [example.question for example in chosen],
            [example.answers for example in chosen],
        )
        nats += losses.nats
        tokens += losses.tokens
        report(len(nats))
    return np.array(nats), np.array(tokens)
