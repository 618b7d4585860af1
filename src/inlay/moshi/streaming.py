"""The memory inside Moshi's streaming state.

Kyutai's modules keep what a stream has read in a ``State`` each. ``with lm_gen.streaming(B)`` makes them all, resets
rows by a mask, pauses rows (``exec_mask``), and hands all states out and in again. :class:`MemoryStream` is one more
such module: ``attach`` puts it beside the blocks of the main transformer, so that ``LMGen`` carries the memory along
without knowing of it. Its state is a :class:`~inlay.fastweight.stepping.StepState`: one row per row of the stream (two
with classifier-free guidance), in fixed buffers that the CUDA graph of ``LMGen`` writes itself.

    memory = inlay.attach(lm, config)
    lm_gen = LMGen(lm)                    # Kyutai's own
    with lm_gen.streaming(batch_size):
        lm_gen.step(codes)                # reads with the memory; every C-th step of a row commits a chunk

Kyutai's graph holds whatever ran while it was captured. What is in Python (``disabled()``, ``using()``, ``detach()``)
could not take effect any more, so all of it is refused while a stream is open.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moshi.modules.streaming import State, StreamingModule
from moshi.utils.compile import in_cuda_graph
from torch import Tensor, nn

from inlay.fastweight.config import FastWeightConfig
from inlay.fastweight.stepping import StepState
from inlay.fastweight.streaming import StateError

if TYPE_CHECKING:
    from inlay.fastweight.memory import Memory

NAME = "inlay_stream"


@dataclass
class MemoryStreamState(State):
    """The memory's part of a streaming state.

    Attributes:
        config: What the memory ran by when the stream began.
        steps: The buffers; None in a stream that began with the memory disabled.
    """

    config: FastWeightConfig
    steps: StepState | None = field(default=None)

    def reset(self, reset_mask: Tensor) -> None:
        """Let the rows where ``reset_mask`` ``[B]`` holds have read nothing, and run again."""
        super().reset(reset_mask)
        if self.steps is not None:
            self.steps.reset(reset_mask)


class MemoryStream(StreamingModule[MemoryStreamState]):
    """Makes the memory's state when Kyutai's streaming begins, and tells the memory of it. Without parameters."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory

    @classmethod
    def install(cls, memory: Memory) -> MemoryStream:
        """Put one beside the blocks that ``memory`` is attached to. They must not be streaming."""
        stream = cls(memory)
        memory.decoder.module.add_module(NAME, stream)
        stream._forget_children()
        return stream

    def uninstall(self) -> None:
        """Take it out again."""
        self.memory.decoder.module._modules.pop(NAME, None)
        self._forget_children()

    @property
    def active(self) -> bool:
        """Whether a stream is open."""
        return self._streaming_state is not None

    @property
    def steps(self) -> StepState | None:
        """The state of the stream that is open; None when none is, or when it began with the memory disabled."""
        return None if self._streaming_state is None else self._streaming_state.steps

    def current(self) -> StepState | None:
        """The state that a forward goes on from; None for a forward outside a stream.

        Raises:
            StateError: The memory was switched or changed within the stream, or the stream began without it.
        """
        state = self._streaming_state
        if state is None:
            if is_streaming(self.memory.decoder.module):
                raise StateError(
                    "the model streams but the memory's part of its streaming state is missing: it was taken from "
                    "get_streaming_state() before the memory was attached, or a module around the model began to "
                    "stream once before. Attach to the LMModel itself, then begin the stream anew"
                )
            return None
        enabled = self._enabled()
        began = {} if state.steps is None else state.steps.layers
        if enabled.keys() != began.keys():
            raise StateError(
                "the memory was switched " + ("on" if len(enabled) > len(began) else "off") + " within a stream, so "
                "its state would miss frames. Enter memory.disabled() before lm_gen.streaming(...) and leave it after"
            )
        if state.config != self.memory.config:
            raise StateError(
                "the memory's settings changed within a stream. Enter memory.using(...) before lm_gen.streaming(...) "
                "and leave it after"
            )
        return state.steps

    def _init_streaming_state(self, batch_size: int) -> MemoryStreamState:
        device = next(self.memory.decoder.module.parameters()).device
        state = MemoryStreamState(batch_size, device, self.memory.config)
        enabled = self._enabled()
        if enabled:
            dtype = next(iter(enabled.values())).weight.dtype
            state.steps = StepState(enabled, state.exec_mask, dtype=dtype, capturing=in_cuda_graph)
        return state

    def _enabled(self) -> dict[int, Any]:
        return {index: layer for index, layer in self.memory.layers.items() if layer.enabled}

    def _forget_children(self) -> None:
        """Kyutai's modules note their streaming children at the first stream; let them look again."""
        model = self.memory.decoder.model or self.memory.model
        for module in model.modules():
            if isinstance(module, StreamingModule):
                module._cached_children = None


def is_streaming(module: nn.Module) -> bool:
    """Whether a module of Kyutai's is within ``streaming(...)``."""
    return isinstance(module, StreamingModule) and bool(module.is_streaming)


def stream_of(module: nn.Module) -> MemoryStream | None:
    """The :class:`MemoryStream` within an ``LMGen``, ``LMModel`` or transformer; None without a memory."""
    return next((m for m in module.modules() if isinstance(m, MemoryStream)), None)


def steps_of(module: nn.Module) -> StepState:
    """The memory's state in the stream that ``module`` (an ``LMGen``, ``LMModel`` or transformer) has open.

    Raises:
        StateError: No memory is attached, no stream is open, or it began with the memory disabled.
    """
    stream = stream_of(module)
    if stream is None:
        raise StateError("the model has no memory: attach one with inlay.attach(lm, config)")
    if stream.steps is None:
        raise StateError(
            "the stream began with the memory disabled"
            if stream.active
            else "no stream is open: enter 'with lm_gen.streaming(batch_size)' first"
        )
    return stream.steps
