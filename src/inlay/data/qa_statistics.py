"""How long answers and contexts are, counted before a run.

A budget of new tokens below an answer's length makes the answer wrong whatever the model has learnt, and a context cut
at a limit may have lost what is asked. Neither shows in a loss.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from inlay.data.qa_sources import QAExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHOWN_LIMITS = (12, 32, 64)
"""Answer lengths, in tokens, beyond which shares are given."""

_BATCH = 256


@dataclass(frozen=True)
class TokenLengths:
    """Lengths of texts in tokens, each length with how often it comes."""

    counts: tuple[tuple[int, int], ...]
    """(length, texts of that length), ascending."""

    @property
    def texts(self) -> int:
        """Texts in all."""
        return sum(count for _, count in self.counts)

    @property
    def mean(self) -> float:
        """Mean length; NaN without a text."""
        return sum(length * count for length, count in self.counts) / self.texts if self.counts else math.nan

    @property
    def longest(self) -> int:
        """Greatest length; 0 without a text."""
        return self.counts[-1][0] if self.counts else 0

    def quantile(self, share: float) -> int:
        """The smallest length that at least `share` (0..1) of the texts do not exceed; 0 without a text."""
        wanted, reached = share * self.texts - 1e-9, 0
        for length, count in self.counts:
            reached += count
            if reached >= wanted:
                return length
        return 0

    def beyond(self, limit: int) -> float:
        """Share of the texts, 0..1, that are longer than `limit` tokens."""
        return sum(count for length, count in self.counts if length > limit) / self.texts if self.counts else 0.0


@dataclass(frozen=True)
class QAStatistics:
    """Counts over a set of questions. Token counts are without special tokens unless said otherwise."""

    questions: int
    """Questions in all."""

    unanswerable: int
    """Questions without an answer."""

    answer_lengths: TokenLengths
    """First answers, the ones to be trained; unanswerable questions have none."""

    question_lengths: TokenLengths
    """Questions."""

    context_lengths: TokenLengths
    """Contexts, each counted once however many questions it has."""

    beyond: tuple[tuple[int, float], ...]
    """(limit, share of the answers that are longer) for limits of 12, 32 and 64 tokens."""

    answer_tokens: int | None
    """The budget looked at: new tokens that an answer may take with its EOS; None if none was given."""

    answers_cut: int
    """Answers that do not fit the budget with their EOS; 0 without a budget."""

    answer_tokens_for_95: int
    """Smallest budget, EOS included, that holds at least 95 % of the answers."""

    answer_tokens_for_99: int
    """Smallest budget, EOS included, that holds at least 99 % of the answers."""

    context_limit: int | None
    """Tokens that a context may have; None if no limit was given."""

    contexts_cut: int
    """Contexts longer than the limit; 0 without one."""

    @property
    def share_of_answers_cut(self) -> float:
        """Share of the answers, 0..1, that do not fit the budget."""
        return self.answers_cut / self.answer_lengths.texts if self.answer_lengths.texts else 0.0

    @property
    def share_of_contexts_cut(self) -> float:
        """Share of the contexts, 0..1, that are longer than the limit."""
        return self.contexts_cut / self.context_lengths.texts if self.context_lengths.texts else 0.0


def qa_statistics(
    examples: Sequence[QAExample],
    tokenizer: PreTrainedTokenizerFast,
    *,
    answer_tokens: int | None = None,
    context_limit: int | None = None,
) -> QAStatistics:
    """Count the tokens of questions, contexts and first answers.

    Args:
        examples: all are tokenised; of a generated set take a slice.
        tokenizer: the model's.
        answer_tokens: budget of new tokens, EOS included, to count cut answers by.
        context_limit: tokens that a context is cut at, to count cut contexts by.
    """
    answers = _lengths((example.answers[0] for example in examples if example.answers), tokenizer)
    contexts = _lengths(dict.fromkeys(example.context for example in examples), tokenizer)
    return QAStatistics(
        questions=len(examples),
        unanswerable=len(examples) - answers.texts,
        answer_lengths=answers,
        question_lengths=_lengths((example.question for example in examples), tokenizer),
        context_lengths=contexts,
        beyond=tuple((limit, answers.beyond(limit)) for limit in SHOWN_LIMITS),
        answer_tokens=answer_tokens,
        answers_cut=0 if answer_tokens is None else _longer(answers, answer_tokens - 1),
        answer_tokens_for_95=answers.quantile(0.95) + 1,
        answer_tokens_for_99=answers.quantile(0.99) + 1,
        context_limit=context_limit,
        contexts_cut=0 if context_limit is None else _longer(contexts, context_limit),
    )


def _longer(lengths: TokenLengths, limit: int) -> int:
    return sum(count for length, count in lengths.counts if length > limit)


def _lengths(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> TokenLengths:
    counts: Counter[int] = Counter()
    for batch in _batches(texts):
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        counts.update(map(len, encoded["input_ids"]))
    return TokenLengths(tuple(sorted(counts.items())))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, _BATCH)):
        yield batch
