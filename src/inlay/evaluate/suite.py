"""Everything that is measured of a trained model on its run's data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from inlay.data import Data, RecallDataset
from inlay.evaluate.position import NO_STEP, loss_by_position, with_and_without_memory
from inlay.evaluate.recall import recall_accuracy
from inlay.evaluate.results import Evaluation, Result
from inlay.evaluate.scoring import Progress
from inlay.evaluate.window import growing_context
from inlay.fastweight import find_memory

NO_MEMORY = "no memory"


def evaluate_model(
    model: nn.Module,
    data: Data,
    *,
    batch_size: int = 8,
    block: int | None = None,
    contexts: Sequence[int] | None = None,
    into: Evaluation | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure ``model`` on the evaluation data, with its memory on and with η = 0 if it has one.

    Recall data give the accuracy by distance; text gives the loss by position and, where it is long enough, the loss on
    a fixed final block under growing context; where it is not, the evaluation says so.

    Args:
        model: The trained model.
        data: Its run's data.
        batch_size: Sequences per forward.
        block: Tokens of the final block; an eighth of the sequence when not given.
        contexts: Tokens of context before it; doubling from one block when not given.
        into: Add to this evaluation (of another model on the same data) instead of beginning one.
        progress: Called with work done and work in all, for each measurement.
    """
    remembers = find_memory(model) is not None
    evaluation = into or Evaluation(
        baseline=NO_STEP if remembers else None, window=getattr(model.config, "sliding_window", None)
    )

    def add(measure: Callable[[], Result]) -> None:
        evaluation.add(with_and_without_memory(model, measure) if remembers else {NO_MEMORY: measure()})

    held = data.eval
    if isinstance(held, RecallDataset):
        add(lambda: recall_accuracy(model, held, batch_size=batch_size, progress=progress))
        return evaluation
    add(lambda: loss_by_position(model, held, collate=data.collate, batch_size=batch_size, progress=progress))
    length = data.statistics.eval.sequence_length
    block = block or max(1, length // 8)
    contexts = list(contexts or _doubling(block, length - block))
    longest, context = int(data.statistics.eval.piece_tokens.max()), max(contexts, default=1)
    if block + context > longest:
        evaluation.contexts_missing = (
            f"Not measured: a block of {block:,} tokens and a context of {context:,} before it need "
            f"{block + context:,} tokens of one document in a sequence; the longest piece has {longest:,}. Set "
            f"evaluate.block and the longest of evaluate.contexts to {longest:,} together, at most."
        )
        return evaluation
    add(lambda: growing_context(model, held, block=block, contexts=contexts, batch_size=batch_size, progress=progress))
    return evaluation


def _doubling(first: int, limit: int) -> list[int]:
    """first, 2·first, 4·first, … up to ``limit``, and ``limit`` itself."""
    values = []
    while first < limit:
        values.append(first)
        first *= 2
    return [*values, limit] if limit > 0 else []
