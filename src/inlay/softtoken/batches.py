"""What a layout makes: a batch to train on, a batch to generate from, and both token by token for a reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from inlay.fastweight.causal_lm import with_cache
from inlay.softtoken.tokens import SoftTokens, packing_order

NO_LABEL = -100
"""The label that transformers' losses leave out."""


def padded(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    """Lists of ids as one tensor `[B, longest]` int64, ``value`` behind the shorter ones."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.long, device=device)


@dataclass(frozen=True, eq=False)
class _Batch:
    """Rows of a layout in the decoder's embedding space; T is the longest row (in form ``kv`` without the memory).

    Attributes:
        inputs_embeds: `[B, T, D]`, 0 at padding.
        attention_mask: `[B, T]` int64, 1 at what counts; in form ``kv`` `[B, M + T]`, for the cache and the sequence.
        position_ids: `[B, T]` int64, counting each row's own tokens from 0 (in form ``kv`` from the row's slots m).
        memory: The memory where it is the cache (form ``kv``); None where it is in ``inputs_embeds``.
        model: The decoder, whose config says of what kind each layer's cache is.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    memory: SoftTokens | None
    model: Any = field(repr=False)

    @property
    def cache(self) -> DynamicCache | None:
        """Form ``kv``: the memory as a cache, a new one each time (a forward writes into the one it is given).

        Its padding stands on the left, so that a sliding window, which counts places and not positions, meets none
        between a row's slots and its sequence.
        """
        if self.memory is None or self.memory.kv is None:
            return None
        memory = self.memory.to(self.inputs_embeds.device, self.inputs_embeds.dtype)
        order = packing_order(memory.mask, "left")
        unread = ~memory.mask.gather(1, order)[:, None, :, None]

        def moved(tensor: Tensor) -> Tensor:
            return tensor.gather(2, order[:, None, :, None].expand_as(tensor)).masked_fill_(unread, 0)

        return DynamicCache(
            [(moved(keys), moved(values)) for keys, values in memory.kv or ()], config=self.model.config
        )


@dataclass(frozen=True, eq=False)
class TrainingBatch(_Batch):
    """Prompts and answers, padded on the right.

    Attributes:
        labels: `[B, T]` int64, the answer's and its end token's ids at their own places, -100 elsewhere. Not shifted:
            the model's loss does that.
    """

    labels: Tensor

    @property
    def answer_mask(self) -> Tensor:
        """`[B, T]` bool, True at the tokens of the answer and at its end token."""
        return self.labels != NO_LABEL

    @property
    def scored_mask(self) -> Tensor:
        """`[B, T]` bool, True where the logits are scored: one place before each token of ``answer_mask``."""
        return F.pad(self.answer_mask[:, 1:], (0, 1), value=False)

    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of a model's forward, labels among them."""
        inputs: dict[str, Any] = {
            "inputs_embeds": self.inputs_embeds,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "labels": self.labels,
        }
        cache = self.cache
        return inputs | ({"use_cache": False} if cache is None else with_cache(self.model, cache))


@dataclass(frozen=True, eq=False)
class GenerationBatch(_Batch):
    """Prompts, padded on the left.

    Attributes:
        stop_ids: The tokens that end an answer.
        max_new_tokens: Most tokens to generate, the end token among them.
    """

    stop_ids: tuple[int, ...]
    max_new_tokens: int

    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of ``generate``.

        With a cache it wants embeddings for what the cache holds as well, and cuts them off: here they are 0.
        """
        inputs: dict[str, Any] = {
            "inputs_embeds": self.inputs_embeds,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "eos_token_id": list(self.stop_ids),
            "pad_token_id": self.stop_ids[0],
            "max_new_tokens": self.max_new_tokens,
        }
        cache = self.cache
        if cache is None or self.memory is None:
            return inputs
        whole = F.pad(self.inputs_embeds, (0, 0, self.memory.slots, 0))
        return inputs | {"inputs_embeds": whole, **with_cache(self.model, cache)}


@dataclass(frozen=True)
class ShownToken:
    """One position of a row.

    Attributes:
        position: Its position id.
        piece: Where it is from: ``bos``, ``template``, ``memory``, ``bos after``, ``question``, ``anchor``, ``answer``
            or ``eos``.
        token: The token as the tokenizer spells it, spaces visible; ``slot 0``, ``slot 1``, … in the memory.
        id: Its id; None in the memory.
        label: Its label, None where it has none.
        supervised: The model is trained to predict it.
    """

    position: int
    piece: str
    token: str
    id: int | None
    label: int | None
    supervised: bool


@dataclass(frozen=True)
class ShownLayout:
    """One example token by token: the row that is trained on, and the row that generation starts from."""

    training: tuple[ShownToken, ...]
    generation: tuple[ShownToken, ...]
