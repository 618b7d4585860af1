"""Reading in pieces: the memory's state between calls, and how it rides in a KV cache.

A whole forward, chunked prefill, token-by-token decoding and streaming must give the same logits. The state of all
memory layers is a ``MemoryState``. It rides in the transformers ``Cache`` of the call, so that whatever ``generate``
does to the cache (beam reorder, batch selection, repetition, rollback, reset) happens to the state as well.

A chunk that is full is committed when the next token arrives, not before: until then the last tokens can still be taken
back, which assisted decoding and an early stop of ``generate`` do.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from inlay.fastweight.errors import InlayError
from inlay.fastweight.state import FastWeightState


class StateError(InlayError, RuntimeError):
    """The memory's state cannot do what was asked of it; the message says what to do instead."""


class MemoryState:
    """What the memory layers of a model have read, for each row of a batch.

    Attributes:
        layers: The state of each memory layer by block index; empty before the first call.
        length: Tokens per row that were passed, padding included: what the KV cache calls its length.
        counts: ``[B, 2]`` int64 on the host, real tokens read and chunks committed since the row was empty; None
            before the first call.
        rows: The number of rows it was made for (by a session); None: what the first call brings.
        interrupted: Whether a forward that went on from it has not ended well.
        last_ids: ``[B, T]`` tokens of the last call, if it came without a KV cache.
    """

    def __init__(self, rows: int | None = None) -> None:
        self.layers: dict[int, FastWeightState] = {}
        self.length = 0
        self.counts: Tensor | None = None
        self.rows = rows
        self.interrupted = False
        self.last_ids: Tensor | None = None
        self._phases: list[int] | None = None

    @property
    def batch_size(self) -> int | None:
        """Rows; None before the first call."""
        return next((layer.batch_size for layer in self.layers.values()), None)

    @property
    def chunk_size(self) -> int | None:
        """Tokens per chunk C; None before the first call."""
        return next((layer.chunk_size for layer in self.layers.values()), None)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; constant from the first call on."""
        return sum(layer.nbytes for layer in self.layers.values())

    @property
    def phases(self) -> list[int]:
        """Tokens in each row's open chunk, 0 to C, known without asking the device."""
        if self._phases is None:
            first = next(iter(self.layers.values()), None)
            self._phases = [] if first is None else [int(phase) for phase in first.phase.tolist()]
        return self._phases

    @property
    def document(self) -> Tensor | None:
        """``[B]`` ids of the documents the rows are in; None before the first call."""
        return next((layer.document for layer in self.layers.values()), None)

    def advance(self, tokens: int, phases: list[int], counts: Tensor) -> None:
        """Note that a call has ended.

        Args:
            tokens: Per row, padding included.
            phases: Tokens in each row's open chunk.
            counts: ``[B, 2]`` int64 on the host, real tokens read and chunks committed in the call.
        """
        self.length += tokens
        self.counts = counts if self.counts is None else self.counts + counts
        self._phases = phases
        self.interrupted = False

    def select(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` ``[K]``, repeats allowed (beam search, batch selection)."""
        rows, phases = indices.cpu(), self._phases
        if self.counts is not None:
            self.counts = self.counts.index_select(0, rows)
        self.rows = None if self.rows is None else len(indices)
        indices = self._beside_layers(indices)
        self._replace({index: layer.select(indices) for index, layer in self.layers.items()})
        self._phases = None if phases is None else [phases[row] for row in rows.tolist()]

    def repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, copies side by side."""
        if self.batch_size is not None:
            self.select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget everything, or what the rows where ``rows`` ``[B]`` (bool) holds have read."""
        if rows is None:
            self.length, self.counts, self.interrupted = 0, None, False
            self._replace({})
        else:
            here, phases = rows.cpu(), self._phases
            if self.counts is not None:
                self.counts = self.counts.masked_fill(here.unsqueeze(1), 0)
            rows = self._beside_layers(rows)
            self._replace({index: layer.reset(rows) for index, layer in self.layers.items()})
            if phases is not None:
                self._phases = [0 if gone else phase for phase, gone in zip(phases, here.tolist(), strict=True)]

    def detach(self) -> None:
        """Let go of the autograd history."""
        phases = self._phases
        self._replace({index: layer.detach() for index, layer in self.layers.items()})
        self._phases = phases

    def to(self, device: torch.device | str) -> None:
        """Move to another device."""
        phases = self._phases
        self._replace({index: layer.to(device) for index, layer in self.layers.items()})
        self._phases = phases

    def crop(self, tokens: int) -> None:
        """Take the last ``tokens`` tokens of every row back.

        Raises:
            StateError: Some of them have been committed with their chunk.
        """
        if tokens <= 0 or not self.layers:
            return
        if min(self.phases) < tokens:
            raise StateError(
                f"cannot take {tokens} tokens back: a chunk was committed {min(self.phases)} tokens ago, and what is "
                "in the sum cannot be told apart again. Draft fewer tokens at a time, or keep a copy of the cache from "
                "before (copy.deepcopy) and go on from that"
            )
        self.length -= tokens
        if self.counts is not None:
            self.counts = self.counts - torch.tensor([tokens, 0])
        phases = [phase - tokens for phase in self.phases]
        for layer in self.layers.values():
            layer.phase = layer.phase - tokens
            gone = torch.arange(layer.chunk_size, device=layer.phase.device) >= layer.phase.unsqueeze(1)
            layer.z = layer.z.masked_fill(gone.unsqueeze(-1), 0)
            layer.x = layer.x.masked_fill(gone.unsqueeze(-1), 0)
        self._phases = phases

    def _beside_layers(self, rows: Tensor) -> Tensor:
        """Moved once to where the layers are, rather than once for each of their tensors."""
        first = next(iter(self.layers.values()), None)
        return rows if first is None else rows.to(first.phase.device)

    def _replace(self, layers: dict[int, FastWeightState]) -> None:
        self.layers = layers
        self._phases = None
        self.last_ids = None


def state_of(cache: Cache | None) -> MemoryState | None:
    """The memory's state that rides in ``cache``, if one does."""
    return None if cache is None else cache.__dict__.get("inlay_state")


def ride(cache: Cache, state: MemoryState) -> None:
    """Let ``state`` ride in ``cache``: whatever is done to the cache's rows and length is done to it."""
    cache.__dict__["inlay_state"] = state
    if not isinstance(cache, _WithMemory):
        kind: Any = type(cache)
        cache.__class__ = _with_memory(kind)


@functools.cache
def _with_memory(base: Any) -> Any:
    return type(f"{base.__name__}WithMemory", (_WithMemory, base), {})


class _WithMemory:
    """What a cache does to itself, done to the memory's state too."""

    inlay_state: MemoryState

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.inlay_state.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.inlay_state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.inlay_state.repeat_interleave(repeats)

    def crop(self, tokens: int) -> None:
        # Below zero: so many tokens less. Above (transformers < 5.20): the length to keep.
        self.inlay_state.crop(-tokens if tokens <= 0 else int(self.get_seq_length()) - tokens)  # type: ignore[attr-defined]
        super().crop(tokens)  # type: ignore[misc]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.inlay_state.reset()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy as the plain cache with a state in it."""
        plain = type(self).__mro__[2]
        return _revive, (plain, self.__dict__.copy())


def _revive(plain: Any, content: dict[str, Any]) -> Cache:
    cache = plain.__new__(plain)
    cache.__dict__.update(content)
    ride(cache, content["inlay_state"])
    return cache
