"""Does a compressor earn its keep: its answers beside those of every cheap way to spend as many slots.

A score means little by itself. *Full text* is what the decoder could do, *no context* and *another context* what it
does without having read; text cut to as many slots is what a compressor has to beat, mean-pooled embeddings and the
same compressor without its training say what training bought. All go through one layout and one greedy decoding.

Methods take turns batch by batch, and another one begins each time, so that what else the machine does falls on all
alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

import numpy as np

from inlay.data import QAExample
from inlay.evaluate.compress_measuring import Record, cache_bytes_per_slot
from inlay.evaluate.compress_methods import (
    FULL_TEXT,
    OTHER_CONTEXT,
    SOFT_TOKENS,
    UNTRAINED,
    Ids,
    Method,
    budgets_of,
    compressing_writer,
    context_ids,
    cut_methods,
    text_methods,
    untaught,
)
from inlay.evaluate.compress_results import CompressEvaluation
from inlay.evaluate.compress_scores import MethodScores
from inlay.evaluate.intervals import mean_interval, paired_interval
from inlay.evaluate.scoring import EvaluationError, Progress, evaluating
from inlay.evaluate.squad import squad_scores, with_silence
from inlay.softtoken.compressors import Compressor
from inlay.softtoken.prompting import BoundLayout


def evaluate_compression(
    model: Any,
    compressor: Compressor[Any],
    layout: BoundLayout,
    examples: Sequence[QAExample],
    *,
    ratios: Sequence[int] | None = None,
    context_tokens: int | None = None,
    batch_size: int = 16,
    baselines: bool = True,
    untrained: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> CompressEvaluation:
    """Answer ``examples`` from soft tokens and from every baseline.

    The model is left as it was: weights, adapters, gradient flags, modes, and torch's random numbers.

    Args:
        model: The decoder, a Hugging Face causal LM; the compressor's.
        compressor: The trained compressor.
        layout: As in training.
        examples: Questions; neighbours are answered together.
        ratios: Ratios of the compressor's to evaluate at; None for what it is configured for (fixed slots, if any).
        context_tokens: Contexts are cut behind so many tokens for every method, as in training; None for whole ones.
        batch_size: Questions answered at a time, and the batch that times are measured at.
        baselines: Measure the baselines as well.
        untrained: Among them the compressor without its training; off where that is what ``compressor`` is.
        seed: Of random spans, of who gets whose context, and of the untrained compressor.
        progress: Called with answers given and answers in all, of all methods together.

    Raises:
        EvaluationError: There is no question, a context has no token, or a ratio is none of the compressor's.
    """
    examples = list(examples)
    if not examples or batch_size < 1:
        raise EvaluationError(f"nothing to evaluate: {len(examples)} questions in batches of {batch_size}")
    contexts = context_ids(layout, examples, context_tokens)
    budgets = budgets_of(compressor.config, ratios)
    plain, notes = _fitting(text_methods(model, contexts, seed), compressor, layout, examples, contexts)
    soft = [Method(SOFT_TOKENS, budget, compressing_writer(compressor, budget)) for budget in budgets]
    with untaught(model, compressor, budgets if baselines else [], seed) as learned_nothing:
        methods = [*soft]
        if baselines:
            learned_nothing = [method for method in learned_nothing if untrained or method.name != UNTRAINED]
            methods = [*plain, *soft, *learned_nothing, *cut_methods(model, compressor, budgets, seed)]
        with evaluating(model), evaluating(compressor):
            records = _take_turns(methods, model, layout, examples, contexts, batch_size, progress)
            per_slot = cache_bytes_per_slot(model)
    return CompressEvaluation(
        questions=len(examples),
        contexts=len(set(contexts)),
        context_tokens=fmean(map(len, contexts)),
        batch_size=batch_size,
        methods=tuple(
            _scores(method, record, examples, contexts, layout, per_slot)
            for method, record in zip(methods, records, strict=True)
        ),
        notes=tuple(notes if baselines else ()),
    )


def _take_turns(
    methods: Sequence[Method],
    model: Any,
    layout: BoundLayout,
    examples: Sequence[QAExample],
    contexts: Sequence[Ids],
    batch_size: int,
    progress: Progress | None,
) -> list[Record]:
    for method in methods:  # what a first call costs is no method's time
        Record().measure(method, model, layout, examples[:1], contexts[:1])
    records = [Record() for _ in methods]
    done, total = 0, len(methods) * len(examples)
    for number, start in enumerate(range(0, len(examples), batch_size)):
        part = slice(start, start + batch_size)
        for turn in range(len(methods)):
            index = (number + turn) % len(methods)
            records[index].measure(methods[index], model, layout, examples[part], contexts[part])
            done += len(examples[part])
            if progress is not None:
                progress(done, total)
    return records


def _scores(
    method: Method,
    record: Record,
    examples: Sequence[QAExample],
    contexts: Sequence[Ids],
    layout: BoundLayout,
    bytes_per_slot: int,
) -> MethodScores:
    references = [example.answers for example in examples]
    predictions = with_silence(record.predictions, references, layout.layout.unanswerable)
    scores = squad_scores(predictions, references, contexts=contexts)
    groups = np.array(scores.contexts)
    counts = np.bincount(groups, np.array(record.tokens)).astype(np.int64)
    slots = fmean(record.slots)
    return MethodScores(
        name=method.name,
        budget=method.budget.label if method.budget else "",
        scores=scores,
        first_token=mean_interval(np.array(record.first_right, dtype=np.float64), groups),
        nll=paired_interval(np.bincount(groups, np.array(record.nats)).astype(np.float64), counts),
        slots=slots,
        ratio=fmean(map(len, contexts)) / slots if slots else float("inf"),
        state_bytes=record.slot_bytes / len(examples),
        cache_bytes=slots * bytes_per_slot,
        write_seconds=median(record.write),
        prefill_seconds=median(record.prefill),
        decode_seconds=median(record.decode),
        decode_steps=median(record.steps),
        nats=tuple(record.nats),
        tokens=tuple(record.tokens),
    )


def _fitting(
    methods: list[Method],
    compressor: Compressor[Any],
    layout: BoundLayout,
    examples: Sequence[QAExample],
    contexts: Sequence[Ids],
) -> tuple[list[Method], list[str]]:
    """Without the methods that read a whole context, where one is too long for the decoder; and notes on that."""
    notes = []
    prompts = [layout.prompt(example.question) for example in examples]
    around = max(len(prompt.before) + len(prompt.after) for prompt in prompts)
    answers = max(layout.max_new_tokens, *(len(layout.answer_ids(example.answers)) for example in examples))
    needed, limit = max(map(len, contexts)) + around + answers, compressor.lm.max_positions
    if limit is not None and needed > limit:
        methods = [method for method in methods if method.name not in (FULL_TEXT, OTHER_CONTEXT)]
        notes.append(
            f"Full text was not measured: with question and answer the longest context takes {needed:,} positions and "
            f"the decoder has {limit:,}."
        )
    elif len(set(contexts)) == 1:
        notes.append("Another context was not measured: all questions are about the same one.")
    return methods, notes
