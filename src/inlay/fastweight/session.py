"""A session: what a memory has read, kept by the caller instead of a KV cache.

    session = memory.session(batch_size=2)
    with session:
        model(first_frames, use_cache=False)
        model(next_frames, use_cache=False)       # goes on from what the first call read
    session.save("alice.safetensors")             # later, in another process: memory.load_session(...)

Attention sees only the tokens of a call (and of a KV cache, if one is passed along); the memory has read everything
since the session began. Its size is bounded, however long that is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay.fastweight.checkpoint import describe_model
from inlay.fastweight.session_file import hash_tensors, read_session, write_session
from inlay.fastweight.streaming import MemoryState, StateError

if TYPE_CHECKING:
    from inlay.fastweight.memory import Memory


class Session:
    """What the rows of one batch have read. Made by :meth:`Memory.session` and :meth:`Memory.load_session`.

    While it is open (``with session:``), every forward of the model goes on from its state; a KV cache that is passed
    as well, by ``generate`` say, carries the same state. One session of a memory is open at a time.

    Attributes:
        memory: The memory it belongs to.
        state: The state itself.
    """

    def __init__(self, memory: Memory, state: MemoryState) -> None:
        self.memory = memory
        self.state = state

    def __enter__(self) -> Session:
        """Open the session.

        Raises:
            StateError: A session of this memory is open already, or the memory has been taken out of its model.
        """
        if self.memory.decoder.module.__dict__.get("inlay_memory") is not self.memory:
            raise StateError("the memory of this session has been detached from its model; attach it and load again")
        if self.memory.open_session is not None:
            which = "this session" if self.memory.open_session is self.state else "another session of this memory"
            raise StateError(
                f"{which} is open already: leave its 'with' block first. Several conversations at once are rows of one "
                "session: memory.session(batch_size=...)"
            )
        self.memory.open_session = self.state
        return self

    def __exit__(self, *error: object) -> None:
        self.memory.open_session = None

    def step(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Read the next tokens, opening the session if it is not open: the model's forward with ``use_cache=False``.

        Args:
            input_ids: ``[B, T]``.
            kwargs: Passed on to the model: ``attention_mask`` where rows are padded, ``position_ids``, …

        Returns:
            The model's output, its ``logits`` ``[B, T, vocabulary]``.

        Raises:
            StateError: The batch is of another size than the session, or another session is open.
        """
        with self._opened():
            return self.memory.model(input_ids=input_ids, use_cache=False, **kwargs)

    @property
    def batch_size(self) -> int:
        """Rows B."""
        assert self.state.rows is not None
        return self.state.rows

    @property
    def tokens_read(self) -> Tensor:
        """``[B]`` int64: real tokens (no padding) that each row has read since it began or was reset."""
        return self._counts[:, 0]

    @property
    def chunks_committed(self) -> Tensor:
        """``[B]`` int64: chunks that each row has written since it began or was reset, in all its documents."""
        return self._counts[:, 1]

    def sum_norms(self) -> dict[int, Tensor]:
        """Frobenius norm of each row's sum, ``[B]``, by block; zero before the first commit."""
        layers = self.state.layers
        return {
            index: torch.linalg.vector_norm(layers[index].total().detach(), dim=(1, 2))
            if index in layers
            else torch.zeros(self.batch_size, device=layer.weight.device)
            for index, layer in self.memory.layers.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the state: 0 before the first call, bounded from then on (constant once the sums are dense)."""
        return self.state.nbytes

    def reset(self, rows: Tensor | Sequence[int] | Sequence[bool] | None = None) -> None:
        """Forget what some rows, or all, have read.

        Args:
            rows: Indices, or a ``[B]`` bool mask; None: all. What they give then is, bit for bit, what rows of this
                session would give that had read nothing.

        Raises:
            IndexError: A row that the session does not have.
        """
        mask = torch.ones(self.batch_size, dtype=torch.bool) if rows is None else self._mask(rows)
        self.state.reset(None if mask.all() else mask)

    def select(self, indices: Tensor | Sequence[int]) -> None:
        """Keep the rows ``indices``, in that order, repeats allowed; the batch size becomes their number."""
        self.state.select(torch.as_tensor(indices, dtype=torch.long))

    def detach(self) -> None:
        """Let go of the autograd history (truncated backpropagation through time)."""
        self.state.detach()

    def to(self, device: torch.device | str) -> Session:
        """Move the state to where the model has gone. Returns the session."""
        self.state.to(device)
        return self

    def copy(self) -> Session:
        """A session of its own that has read the same, without autograd history."""
        state = copy.copy(self.state)
        state.detach()
        state.select(torch.arange(self.batch_size))
        return Session(self.memory, state)

    def save(self, path: str | Path) -> None:
        """Write the session to one safetensors file, atomically: a kill leaves the old file or the new one.

        Raises:
            StateError: The last forward ended in an error, so that the state may be half-written.
        """
        if self.state.interrupted and self.state.layers:
            raise StateError(
                "not saved: the last forward of this session ended in an error and may have left its state "
                "half-written. Begin anew with session.reset(), or go on from an earlier file"
            )
        write_session(Path(path), self.state, _identity(self.memory))

    @property
    def _counts(self) -> Tensor:
        if self.state.counts is None:
            return torch.zeros(self.batch_size, 2, dtype=torch.long)
        return self.state.counts.clone()

    def _mask(self, rows: Tensor | Sequence[int] | Sequence[bool]) -> Tensor:
        chosen = torch.as_tensor(rows).cpu()
        if chosen.dtype == torch.bool:
            if chosen.shape != (self.batch_size,):
                raise IndexError(f"a mask of rows must be [B] = [{self.batch_size}]; got {[*chosen.shape]}")
            return chosen
        mask = torch.zeros(self.batch_size, dtype=torch.bool)
        mask[chosen.long()] = True
        return mask

    @contextmanager
    def _opened(self) -> Iterator[None]:
        if self.memory.open_session is self.state:
            yield
        else:
            with self:
                yield

    def __repr__(self) -> str:
        return f"Session({self.batch_size} rows, tokens read {self.tokens_read.tolist()}, {self.nbytes:,} bytes)"


def load_session(memory: Memory, path: Path) -> Session:
    """The session that was saved to ``path``, on the devices of the memory's layers. See ``Memory.load_session``."""
    chunk = memory.config.chunk_size
    sizes = {index: (layer.out_features, layer.in_features, chunk) for index, layer in memory.layers.items()}
    state = read_session(path, _identity(memory), sizes)
    for index, layer in state.layers.items():
        state.layers[index] = layer.to(memory.layers[index].target.conv.device)
    return Session(memory, state)


def _identity(memory: Memory) -> dict[str, Any]:
    """What a saved session belongs to."""
    return {
        "model": describe_model(memory.model, memory.decoder)
        | {f"projection of block {i}": [layer.out_features, layer.in_features] for i, layer in memory.layers.items()},
        "config": memory.config.model_dump(mode="json"),
        "weights": hash_tensors(dict(memory.named_parameters())),
    }
