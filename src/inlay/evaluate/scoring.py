"""What every evaluation shares: the model called as in training, and the loss of each token in bits.

The model is called with the batch's ``document_ids``, ``position_ids`` and ``attention_mask`` (what of them a batch has
is told at :func:`inlay.data.collate`) and without a cache, in eval mode and without gradients. Its mode is given back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from inlay.data.packing import NO_LABEL
from inlay.fastweight import InlayError, find_memory
from inlay.fastweight.causal_lm import forward_arguments
from inlay.sliced_loss import label_nats, nats_of

Batch: TypeAlias = dict[str, Tensor]
Collate: TypeAlias = Callable[[Sequence[Mapping[str, Any]]], Batch]
Progress: TypeAlias = Callable[[int, int], None]
"""Called with the sequences done and the sequences in all."""

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]


class EvaluationError(InlayError, ValueError):
    """Something that cannot be evaluated or compared; the message says why and what to do."""


class Rows(Protocol):
    """A data set with a length whose items are rows."""

    def __len__(self) -> int:
        """Rows in all."""

    def __getitem__(self, index: int, /) -> Any:
        """Row ``index``."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in eval mode and no gradient is kept; after it every module is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:  # parents come before their children, whose own mode so wins
            module.train(mode)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is; the CPU for a model without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def batches(
    rows: Rows,
    indices: Sequence[int],
    *,
    collate: Collate,
    batch_size: int,
    device: torch.device,
    progress: Progress | None,
) -> Iterator[Batch]:
    """The chosen rows in batches on ``device``; reports progress when the next batch is asked for."""
    if batch_size < 1:
        raise EvaluationError(f"batch_size must be at least 1; got {batch_size}")
    for start in range(0, len(indices), batch_size):
        chosen = indices[start : start + batch_size]
        batch = collate([rows[index] for index in chosen])
        yield {name: tensor.to(device) for name, tensor in batch.items()}
        if progress is not None:
            progress(start + len(chosen), len(indices))


def choose(available: int, most: int | None) -> list[int]:
    """All indices below ``available``, or ``most`` of them, evenly spaced.

    Raises:
        EvaluationError: There is nothing to choose from.
    """
    if available == 0 or (most is not None and most < 1):
        raise EvaluationError(f"nothing to evaluate: {available} sequences, at most {most} of them asked for")
    if most is None or most >= available:
        return list(range(available))
    return [int(index) for index in np.linspace(0, available - 1, most).round()]


def logits_of(model: nn.Module, batch: Batch, *, last: int | None = None) -> Tensor:
    """The model's logits ``[B, T, vocabulary]``, or those of the ``last`` positions alone.

    Raises:
        EvaluationError: See :func:`forward_inputs`.
    """
    inputs = forward_inputs(model, batch)
    if last is not None and "logits_to_keep" in forward_arguments(model):
        inputs["logits_to_keep"] = last
    output = model(**inputs)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits if last is None else logits[:, -last:]


def forward_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What of a batch the model is called with to give logits.

    ``document_ids`` go to a model with a memory only, switched on or off: it is the memory that takes them out.

    Raises:
        EvaluationError: A row holds several documents and the model takes no ``position_ids``, so that its attention
            would cross their borders.
    """
    accepted = forward_arguments(model)
    names = ("input_ids", *(name for name in ("attention_mask", "position_ids") if name in accepted))
    inputs: dict[str, Any] = {name: batch[name] for name in names if name in batch}
    documents = batch.get("document_ids")
    if documents is not None:
        if "position_ids" not in accepted and bool((documents > 0).any()):
            raise EvaluationError(
                f"{type(model).__name__} takes no position_ids, so its attention cannot end at the borders of the "
                "documents in a row; evaluate with packing: cut"
            )
        if find_memory(model) is not None:
            inputs["document_ids"] = documents
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def label_bits(model: nn.Module, batch: Batch) -> tuple[Floats, NDArray[np.bool_]]:
    """:func:`token_bits` of a batch with labels, by a model that need not make all its logits at once."""
    return _in_bits(label_nats(model, forward_inputs(model, batch), batch["labels"]), batch["labels"])


def token_bits(logits: Tensor, labels: Tensor) -> tuple[Floats, NDArray[np.bool_]]:
    """The cross-entropy of each label given the logits one position before it.

    Args:
        logits: ``[B, T, vocabulary]``.
        labels: ``[B, T]`` in transformers' convention: not shifted, −100 where nothing is predicted.

    Returns:
        Bits ``[B, T − 1]`` of the labels at positions 1 … T − 1, computed in float32, zero where there is none; and
        where there is one.
    """
    return _in_bits(nats_of(logits, labels), labels)


def _in_bits(nats: Tensor, labels: Tensor) -> tuple[Floats, NDArray[np.bool_]]:
    bits: Floats = nats.cpu().double().numpy() / math.log(2)
    return bits, (labels[:, 1:] != NO_LABEL).cpu().numpy()


def divide(sums: NDArray[Any], counts: NDArray[Any]) -> Floats:
    """``sums / counts`` in float64, NaN where nothing was counted."""
    out: Floats = np.full(sums.shape, np.nan)
    np.divide(sums, counts, out=out, where=counts > 0)
    return out
