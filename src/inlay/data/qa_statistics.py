"""How long answers and contexts are, counted before a run.

A budget of new tokens below an answer's length makes the answer wrong whatever the model has learnt, and a context cut
at a limit may have lost what is asked. Neither shows in a loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SHOWN_LIMITS = (12, 32, 64)
"""Answer lengths, in tokens, beyond which shares are given."""


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
