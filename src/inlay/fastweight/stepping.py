"""Reading a token at a time without a host: the state as fixed buffers that a captured graph can write.

A CUDA graph replays kernels on fixed addresses; the Python that launched them ran once, when it was captured. Whatever
a memory keeps in Python (a list of buffered tokens, an ``if`` on the phase) stands still from then on: that is how a
memory comes to run for hours and to have written once. So here nothing that a step needs or changes is in Python:

* every tensor is allocated when the state is made and only ever written in place;
* rows stand at phases of their own, held on the device; a step writes each row's operands to the slot of its phase;
* rows that the step does not run (``exec_mask`` False) keep every bit of theirs;
* the step in which a row's chunk becomes full commits it, so between steps 0 ≤ phase < C. The product VᵀZ is made for
  every row in every step and masked: no question to the device, correct in a graph. Where asking costs nothing, on the
  CPU outside a graph, it is made only if a row is full. A caller that knows when rows are full can leave it out of its
  steps (``commits`` False while they last) and call :meth:`StepState.commit` between them.

What a masked commit costs in each step is one product of a whole chunk, B·C·D·(D + F) multiplications and a pass over
the sum, per layer: for Moshi 7B about 32 GFLOP and 0.4 GB of traffic a layer and row, in a frame of 80 ms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from inlay.fastweight.clip import update_norms
from inlay.fastweight.scan import add_product, in_rows, operand
from inlay.fastweight.state import FastWeightState
from inlay.fastweight.streaming import StateError

if TYPE_CHECKING:
    from inlay.fastweight.layer import FastWeightProjection


@dataclass
class LayerBuffers:
    """One layer's fixed buffers.

    Attributes:
        sum: ``[B, D, F]`` accumulated updates, float32 (float64 in a float64 model).
        z: ``[B, C, F]`` inputs of the down projection in the open chunk; zero from the row's phase on.
        x: ``[B, C, D]`` what the target of the open chunk is made from; zero from the row's phase on.
        last: ``[B, 2]`` float32, ‖Δ‖ and clip scale of each row's newest committed chunk; zero before the first.
    """

    sum: Tensor
    z: Tensor
    x: Tensor
    last: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Each buffer by its name."""
        return {"sum": self.sum, "z": self.z, "x": self.x, "last": self.last}


class StepState:
    """What the rows of a stream have read, in buffers of constant size and address.

    Attributes:
        layers: The buffers of each memory layer by block.
        phase: ``[B]`` int64, tokens in the open chunk.
        tokens: ``[B]`` int64, tokens read since the row was empty.
        chunks: ``[B]`` int64, chunks committed since the row was empty.
        exec_mask: ``[B]`` bool, rows that the next step runs. Whoever owns the state writes it in place.
        commits: Whether a step commits the chunks that it fills; else its caller does, by :meth:`commit`.
        version: Counts what was done to the rows other than by steps whose caller commits: whoever keeps a count of
            phases begins anew.
    """

    def __init__(
        self,
        modules: Mapping[int, FastWeightProjection],
        exec_mask: Tensor,
        *,
        dtype: torch.dtype,
        capturing: Callable[[], bool] = lambda: False,
    ) -> None:
        """Allocate the state of ``len(exec_mask)`` rows that have read nothing.

        Args:
            modules: The memory layers by block.
            exec_mask: ``[B]`` bool, kept and read in every step.
            dtype: Of the operands z and x: that of the model's activations.
            capturing: Says whether Python runs only to record a graph.
        """
        self.exec_mask = exec_mask
        self.commits = True
        self.version = 0
        self._modules = dict(modules)
        self._capturing = capturing
        rows, device = exec_mask.shape[0], exec_mask.device
        self.chunk_size = next(iter(modules.values())).config.chunk_size
        self.phase, self.tokens, self.chunks = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(3))
        self.layers: dict[int, LayerBuffers] = {}
        for index, module in modules.items():
            where = module.target.conv.device
            empty = FastWeightState.empty(
                rows, module.out_features, module.in_features, self.chunk_size, dtype=dtype, device=where
            )
            last = torch.zeros(rows, 2, device=where)
            self.layers[index] = LayerBuffers(empty.sum, empty.z, empty.x, last)

    @property
    def batch_size(self) -> int:
        """Rows B."""
        return self.phase.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers; constant."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Every buffer by its name; ``exec_mask`` is its owner's."""
        named = {"phase": self.phase, "tokens": self.tokens, "chunks": self.chunks}
        return named | {f"{i}.{name}": t for i, layer in self.layers.items() for name, t in layer.tensors().items()}

    def sum_norms(self) -> dict[int, Tensor]:
        """Frobenius norm of each row's sum, ``[B]``, by block."""
        return {index: torch.linalg.vector_norm(layer.sum, dim=(1, 2)) for index, layer in self.layers.items()}

    @torch.no_grad()
    def reset(self, rows: Tensor) -> None:
        """Let the rows where ``rows`` ``[B]`` (bool) holds have read nothing, bit for bit. In place."""
        self.version += 1
        for tensor in self.tensors().values():
            tensor.masked_fill_(_rows(rows, tensor), 0)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`tensors` of a state of the same sizes gave. In place.

        Raises:
            StateError: A buffer is missing or of another shape or dtype. Nothing is changed.
        """
        own = self.tensors()
        described = {name: (tuple(t.shape), t.dtype) for name, t in own.items()}
        given = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        if described != given:
            odd = sorted(n for n in described.keys() | given.keys() if described.get(n) != given.get(n))[0]
            raise StateError(
                f"a state of other rows or another memory: {odd} is {given.get(odd)}, not {described.get(odd)}"
            )
        self.version += 1
        for name, tensor in tensors.items():
            own[name].copy_(tensor)

    def __deepcopy__(self, memo: dict[int, object]) -> StepState:
        """Of the buffers alone: a copy reads with the same layers."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        names = ("exec_mask", "phase", "tokens", "chunks", "layers")
        twin.__dict__.update({name: copy.deepcopy(self.__dict__[name], memo) for name in names})
        return twin

    def read(self, module: FastWeightProjection, z: Tensor, x: Tensor) -> Tensor:
        """The layer's part of a step: its output for the new tokens, whose operands are written to the open chunk.

        Args:
            module: The layer.
            z: ``[B, T, F]`` inputs of the down projection. T is 1 in a stream; more tokens are read one after the
                other, rows whose chunk becomes full in between committing it (masked).
            x: ``[B, T, D]`` what its target is made from.

        Returns:
            ``[B, T, D]`` in the dtype that the original projection gives.
        """
        buffers = self.layers[module.index]
        slow = module.__dict__["base"](z)
        fast = []
        with torch.no_grad():
            ran, phase = self.exec_mask.to(z.device), self.phase.to(z.device)
        for t in range(z.shape[1]):
            if t:
                with torch.no_grad():
                    phase = phase + ran
                    full = phase == self.chunk_size
                    self._write(module, buffers, full)
                    phase = phase.masked_fill(full, 0)
            token = z[:, t : t + 1]
            with torch.autocast(z.device.type, enabled=False):
                fast.append(torch.bmm(token.to(buffers.sum.dtype), buffers.sum.mT))
            with torch.no_grad():
                _put(buffers.z, phase, token, ran)
                _put(buffers.x, phase, x[:, t : t + 1], ran)
        with torch.autocast(z.device.type, enabled=False):
            read = fast[0] if len(fast) == 1 else torch.cat(fast, dim=1)
            return torch.add(slow.to(read.dtype), read, alpha=module.config.eta).to(slow.dtype)

    @torch.no_grad()
    def advance(self, tokens: int) -> None:
        """After all layers have read the ``tokens`` tokens of a step: count them, and commit the chunks now full.

        Who steps by a graph must have the stream for itself: its replays do not raise ``version``.
        """
        ran = self.exec_mask.long() * tokens
        end = self.phase + ran
        between = (end - 1).clamp(min=0) // self.chunk_size * self.exec_mask  # what ``read`` has committed
        self.tokens.add_(ran)
        self.chunks.add_(between)
        self.phase.copy_(end - between * self.chunk_size)
        if self.commits:
            self.version += 1
            self.commit()

    @torch.no_grad()
    def commit(self) -> None:
        """Write the chunks that are full into their rows' sums, if any is; in place."""
        full = self.phase == self.chunk_size
        if self.phase.device.type == "cpu" and not self._capturing() and not bool(full.any()):
            return
        for index, buffers in self.layers.items():
            self._write(self._modules[index], buffers, full.to(buffers.sum.device))
        self.chunks.add_(full)
        self.phase.masked_fill_(full, 0)

    def _write(self, module: FastWeightProjection, buffers: LayerBuffers, full: Tensor) -> None:
        """Commit the layer's chunks in the rows ``full`` ``[B]``."""
        v, scale = module._targets(buffers.z, buffers.x)
        if scale is not None:
            module.statistics.count(scale, (full,))
        scales = torch.ones_like(buffers.last[:, :1]) if scale is None else scale
        norms = update_norms(buffers.z, v, self.chunk_size)
        buffers.last.copy_(torch.where(full.unsqueeze(1), torch.cat([norms, scales], 1).to(buffers.last), buffers.last))
        v = in_rows(v, full)
        with torch.autocast(v.device.type, enabled=False):
            add_product(buffers.sum, operand(v).mT, operand(buffers.z), 1.0)
        for buffer in (buffers.z, buffers.x):
            buffer.masked_fill_(full.view(-1, 1, 1), 0)


class StepSource(Protocol):
    """Where a memory finds the state of the stream that its model has open."""

    @property
    def active(self) -> bool:
        """Whether a stream is open."""

    def current(self) -> StepState | None:
        """The state that a forward goes on from; None for a forward outside a stream.

        Raises:
            StateError: The stream cannot go on; the message says why.
        """

    def uninstall(self) -> None:
        """Leave the model."""


def _rows(mask: Tensor, tensor: Tensor) -> Tensor:
    return mask.to(tensor.device).view(-1, *(1,) * (tensor.dim() - 1))


def _put(buffer: Tensor, slot: Tensor, token: Tensor, ran: Tensor) -> None:
    """Write ``token`` ``[B, 1, ·]`` to the ``slot`` ``[B]`` of each row of ``buffer`` ``[B, C, ·]`` that ``ran``."""
    index = slot.view(-1, 1, 1).expand(token.shape)
    held = buffer.gather(1, index)
    buffer.scatter_(1, index, torch.where(ran.view(-1, 1, 1), token.detach().to(buffer.dtype), held))
