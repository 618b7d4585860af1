"""Kyutai's ``LMGen`` with the memory's commits taken out of its steps.

With Kyutai's own ``LMGen`` every step makes the product of a whole chunk and masks it, because a captured graph cannot
ask which rows are full. But the host can know: a row that runs gains one frame a step. :class:`MemoryLMGen` keeps that
count and commits between steps, in one step out of C and outside the graph, on the same buffers. The numbers are those
of ``LMGen``; the host never waits for the device within a step. Whoever else advances the stream, by ``forward_text``
or with a copy of its state, commits in its own steps, and the count is then taken anew.
"""

from __future__ import annotations

from typing import Any

import torch
from moshi.models.lm import LMGen, _LMGenState
from torch import Tensor

from inlay.fastweight.stepping import StepState
from inlay.moshi.streaming import MemoryStream, stream_of


class MemoryLMGen(LMGen):
    """``LMGen`` for a model with a memory; for one without, ``LMGen``. Arguments and methods are Kyutai's.

    Rows are paused and reset through its own ``set_exec_mask`` and ``reset_streaming``, best with masks on the host.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # In a tuple, since a module that is an attribute would be a child, and begin to stream a second time.
        self._streams: tuple[MemoryStream, ...] = ()
        self._phases: list[int] = []
        self._runs: list[int] = []
        self._known: tuple[StepState, int] | None = None

    @property
    def _steps(self) -> StepState | None:
        """The memory's state in the open stream; None without one."""
        return self._streams[0].steps if self._streams and self._streaming_state is not None else None

    def _init_streaming_state(self, batch_size: int) -> _LMGenState:
        state = super()._init_streaming_state(batch_size)
        stream = stream_of(self.lm_model)
        self._streams = () if stream is None else (stream,)
        self._known = None
        return state

    def set_exec_mask(self, exec_mask: Tensor) -> None:
        """Run only the rows where ``exec_mask`` ``[B]`` (bool) holds from the next step on."""
        super().set_exec_mask(exec_mask)
        if self._steps is not None:
            self._runs = exec_mask.tolist() * (self._steps.batch_size // exec_mask.shape[0])

    def reset_streaming(self, reset_mask: Tensor | None = None) -> None:
        """Begin anew in the rows where ``reset_mask`` ``[B]`` (bool) holds, or in all."""
        super().reset_streaming(reset_mask)
        self._read_rows()

    def set_streaming_state(self, state: dict[str, Any]) -> None:
        """Go on from what ``get_streaming_state`` gave."""
        super().set_streaming_state(state)
        self._known = None

    def _step(
        self, input_tokens: Tensor, depformer_replace_tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        steps = self._steps
        if steps is None:
            return super()._step(input_tokens, depformer_replace_tokens)
        if self._known != (steps, steps.version):  # new, or advanced, reset or replaced past this object
            self._read_rows()
        known, self._known = self._known, None  # after an error in the step it would not be known
        full = True  # for all that is known after an error, which may come when the frame has been read
        steps.commits = False
        try:
            out = super()._step(input_tokens, depformer_replace_tokens)
            self._phases = [phase + runs for phase, runs in zip(self._phases, self._runs, strict=True)]
            full = steps.chunk_size in self._phases
        finally:
            steps.commits = True
            if full:
                steps.commit()
        self._phases = [phase % steps.chunk_size for phase in self._phases]
        self._known = known
        return out

    def _read_rows(self) -> None:
        """Learn from the device where the rows stand: the one place that waits for it."""
        steps = self._steps
        if steps is not None:
            steps.commit()  # what another was kept from
            self._phases, self._runs = torch.stack([steps.phase, steps.exec_mask.long()]).tolist()
            self._known = (steps, steps.version)
