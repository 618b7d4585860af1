"""What the examinations of a compression recipe share: the task before its first step, its data, and how they report.

Every examination takes a :class:`CompressCase`. Whatever layout, compressor and objectives the task has are called as
training and answering call them, so that what is examined is what will run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from inlay.data import QAExample
from inlay.doctor.findings import Finding
from inlay.evaluate.scoring import choose, evaluating
from inlay.report import Table
from inlay.report.document import Verdict
from inlay.softtoken.compressors import Compressor
from inlay.softtoken.prompting import BoundLayout
from inlay.softtoken.tokens import SoftTokens
from inlay.train.base_lm import BaseOutcome
from inlay.train.compress_data import ContextCollator
from inlay.train.compress_recipe import CompressRecipe
from inlay.train.compress_trainer import CompressionTask

COUNTED = 500
"""Most questions of a split that are counted, evenly spaced: so many tell a share of 5 % to ±1.9 %."""

Steps = Callable[[int, int], None]
"""Called with the steps done and the most there can be."""


@dataclass(frozen=True)
class CompressCase:
    """A compression run before its first step.

    Attributes:
        task: Decoder, compressor, cues and layout.
        train: Questions to train on.
        eval: Questions to evaluate on.
        decoder_trained: The decoder is the one that will answer; else its weights are random, as those of a decoder
            from scratch are until it is trained.
        outcome: How a decoder out of the cache was trained; None for any other.
    """

    task: CompressionTask
    train: Sequence[QAExample]
    eval: Sequence[QAExample]
    decoder_trained: bool = True
    outcome: BaseOutcome | None = None

    @property
    def recipe(self) -> CompressRecipe:
        """What is to run."""
        return self.task.recipe

    @property
    def layout(self) -> BoundLayout:
        """The task's."""
        return self.task.layout

    @property
    def compressor(self) -> Compressor[Any]:
        """The task's."""
        return self.task.compressor

    @property
    def model(self) -> Any:
        """The decoder, out of PEFT's wrapper."""
        return self.task.compressor.lm.model

    @property
    def ratio(self) -> int | None:
        """The first ratio that a step may draw; None for a fixed number of slots."""
        return self.recipe.draws[0]

    @property
    def parameters(self) -> int:
        """Numbers in decoder and compressor."""
        counted: dict[int, nn.Parameter] = {id(p): p for p in self.task.parameters()}
        return sum(parameter.numel() for parameter in counted.values())

    @cached_property
    def counted(self) -> dict[str, list[QAExample]]:
        """The questions that are counted, by split: ``training`` and ``evaluation``."""
        splits = {"training": self.train, "evaluation": self.eval}
        return {name: [split[index] for index in choose(len(split), COUNTED)] for name, split in splits.items()}

    @cached_property
    def answers(self) -> dict[str, list[list[int]]]:
        """Their answers as taught, end included."""
        return {name: [self.layout.answer_ids(one.answers) for one in split] for name, split in self.counted.items()}

    def questions(self, count: int) -> list[QAExample]:
        """Up to ``count`` training questions about as many different contexts, evenly spaced."""
        first: dict[str, QAExample] = {}
        for index in choose(len(self.train), 4 * count):
            example = self.train[index]
            first.setdefault(example.context, example)
        examples = [*first.values()]
        return [examples[index] for index in choose(len(examples), count)]

    def batch(self, examples: Sequence[QAExample]) -> dict[str, Any]:
        """These questions as a training step gets them, on the decoder's device."""
        batch = ContextCollator(self.layout, self.recipe.context_tokens)([[example] for example in examples])
        device = self.compressor.lm.device
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def memory(self, batch: dict[str, Any]) -> SoftTokens:
        """The slots of a batch, one row a question, in eval mode and without gradient."""
        with evaluating(self.task), torch.no_grad():
            memory = self.compressor.compress(batch["contexts"], batch["mask"], ratio=self.ratio)
            return memory.select(batch["index"])


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        title: What should hold.
        result: What was found, in a clause.
        fault: What is wrong; None where it holds.
    """

    title: str
    result: str
    fault: Finding | None = None


def faults(checks: Sequence[Check]) -> list[Finding]:
    """What is wrong, the worst first."""
    found = [check.fault for check in checks if check.fault is not None]
    return sorted(found, key=lambda fault: -fault.severity)


def checks_table(checks: Sequence[Check]) -> Table:
    """A row per check, marked."""
    rows = [[check.title, check.result] for check in checks]
    verdicts: list[Verdict] = [
        "good" if check.fault is None else check.fault.severity.verdict if check.fault.severity else "neutral"
        for check in checks
    ]
    return Table(["what should hold", "what was found"], rows, align=["left", "left"], verdicts=verdicts)


def percent(share: float) -> str:
    """``12 %``, with a decimal below ten."""
    return f"{100 * share:.2g} %" if 0 < share < 0.1 else f"{100 * share:.0f} %"


def squeezed(text: str) -> str:
    """``text`` without spaces and case, to be compared."""
    return "".join(text.split()).casefold()


class ReadBack:
    """Says which token an embedding belongs to, from the embedding alone: nothing that made it is asked.

    Args:
        embedding: The decoder's input embedding module, whatever scaling it does included.
    """

    def __init__(self, embedding: Any) -> None:
        self._embedding = embedding
        ids = torch.arange(embedding.num_embeddings, device=embedding.weight.device)
        with torch.no_grad():
            self._first = torch.cat([embedding(part)[:, 0] for part in torch.split(ids, 4096)])

    def __call__(self, row: Tensor) -> list[int | None]:
        """The ids of `[T, D]`; None where no token has that embedding. Of equal embeddings the first counts."""
        found: list[int | None] = []
        for vector in row.to(self._first.dtype):
            like = (self._first == vector[0]).nonzero().squeeze(1)
            with torch.no_grad():
                same = like[(self._embedding(like) == vector).all(dim=1)]
            found.append(int(same[0]) if len(same) else None)
        return found
