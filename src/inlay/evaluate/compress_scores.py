"""What was measured of one method of putting a context before the decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from inlay.evaluate.intervals import Interval
from inlay.evaluate.squad import SquadScores


@dataclass(frozen=True)
class MethodScores:
    """What was measured of one method.

    Attributes:
        name: Method, as ``inlay.evaluate.compress_methods`` names it.
        budget: ``4×`` or ``16 slots``; empty for methods without one.
        scores: Exact match and F1.
        first_token: Share of the questions whose most likely first token is that of the first reference.
        nll: Negative log-likelihood of the right answer with its end, in nats per token.
        slots: Mean slots M of a question's context.
        ratio: Mean tokens of a context over mean slots; infinite without slots.
        state_bytes: Mean bytes of the slots as the decoder reads them: embeddings, or keys and values.
        cache_bytes: Mean bytes that the slots take in the decoder's cache while it answers.
        write_seconds: From context to slots, per question, the median over batches (so are the other times).
        prefill_seconds: From slots to the answer's first token, per question.
        decode_seconds: From the first token to the last of the batch's longest answer, per question.
        decode_steps: Tokens of the batch's longest answer.
        nats: Negative log-likelihood of each question's answer.
        tokens: Tokens of each question's answer with its end.
    """

    name: str
    budget: str
    scores: SquadScores
    first_token: Interval
    nll: Interval
    slots: float
    ratio: float
    state_bytes: float
    cache_bytes: float
    write_seconds: float
    prefill_seconds: float
    decode_seconds: float
    decode_steps: float
    nats: tuple[float, ...] = field(repr=False)
    tokens: tuple[int, ...] = field(repr=False)

    @property
    def label(self) -> str:
        """Name and budget."""
        return f"{self.name} {self.budget}".strip()

    def to_json(self) -> dict[str, Any]:
        """Plain types; without the single questions."""
        return {
            "method": self.name,
            "budget": self.budget or None,
            **self.scores.to_json(),
            "first_token": self.first_token.to_json(),
            "nats_per_token": self.nll.to_json(),
            "bits_per_token": {name: value / math.log(2) for name, value in self.nll.to_json().items()},
            "slots": self.slots,
            "ratio": self.ratio,
            "state_bytes": self.state_bytes,
            "cache_bytes": self.cache_bytes,
            "write_seconds": self.write_seconds,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "decode_steps": self.decode_steps,
        }
