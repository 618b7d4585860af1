"""What a stream's memory wrote, chunk by chunk: read off its buffers, whoever commits and wherever."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel

from inlay.fastweight.memory import find_memory
from inlay.files import write_whole
from inlay.moshi.streaming import steps_of
from inlay.report.jsonfile import plain


@dataclass(frozen=True)
class Commit:
    """One chunk of one row in one memory layer.

    Attributes:
        row: Of the stream.
        block: The layer's index.
        chunk: Counted from 1 since the row was empty.
        tokens: Frames that the row has read by then.
        seconds: The same in seconds of audio.
        delta_norm: ‖Δ‖ (Frobenius), after clipping.
        pre_norm: ‖S‖ of the sum before it.
        post_norm: ‖S‖ after it.
        relative_delta: η‖Δ‖ / ‖W0‖.
        relative_sum: η‖S‖ / ‖W0‖ after it: how large the memory is beside what it is added to.
        clip_scale: What clipping multiplied Δ with; 1 leaves it as it is.
        milliseconds: Wall-clock time of the frame in which it was seen.
        frame_milliseconds: Mean over the frames since the commit before.
    """

    row: int
    block: int
    chunk: int
    tokens: int
    seconds: float
    delta_norm: float
    pre_norm: float
    post_norm: float
    relative_delta: float
    relative_sum: float
    clip_scale: float
    milliseconds: float
    frame_milliseconds: float

    @property
    def clipped(self) -> bool:
        """Whether clipping shortened it."""
        return self.clip_scale < 1

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self) | {"clipped": self.clipped}


class CommitLog:
    """Watches the open stream of a language model from outside: call :meth:`observe` after each step.

    Asking how many chunks there are waits for the device, which whoever reads the step's tokens does anyway.

    Attributes:
        commits: All that were seen.
    """

    def __init__(self, lm: LMModel, *, frame_rate: float = 12.5) -> None:
        """Begin to watch.

        Args:
            lm: Within a stream, its memory on.
            frame_rate: Frames per second of audio.

        Raises:
            StateError: No stream with a memory is open.
        """
        memory = find_memory(lm)
        self._steps = steps_of(lm)
        assert memory is not None
        self._eta = memory.config.eta
        self._frame_rate = frame_rate
        self._weights = {i: float(memory.layers[i].base_norm()) for i in self._steps.layers}
        self.commits: list[Commit] = []
        self._chunks: list[int] = self._steps.chunks.tolist()
        self._norms = {index: [row[2] for row in rows] for index, rows in self._fetch().items()}
        self._times: list[list[float]] = [[] for _ in self._chunks]

    def relative_sum(self) -> float:
        """The largest η‖S‖ / ‖W0‖ of any layer and row, as last seen."""
        return max(self._eta * max(norms) / self._weights[index] for index, norms in self._norms.items())

    def observe(self, milliseconds: float = float("nan")) -> list[Commit]:
        """The chunks committed since the last call.

        Args:
            milliseconds: What the step took.
        """
        chunks, tokens = torch.stack([self._steps.chunks, self._steps.tokens]).tolist()
        for times in self._times:
            times.append(milliseconds)
        rows = [row for row, (now, before) in enumerate(zip(chunks, self._chunks, strict=True)) if now > before]
        for row, (now, before) in enumerate(zip(chunks, self._chunks, strict=True)):
            if now < before:  # the row began anew
                for norms in self._norms.values():
                    norms[row] = 0.0
                self._times[row] = [milliseconds]
        self._chunks = chunks
        if not rows:
            return []
        found: list[Commit] = []
        for index, measured in self._fetch().items():
            relative = self._eta / self._weights[index]
            for row in rows:
                delta, scale, after = measured[row]
                found.append(
                    Commit(
                        row=row,
                        block=index,
                        chunk=chunks[row],
                        tokens=tokens[row],
                        seconds=tokens[row] / self._frame_rate,
                        delta_norm=delta,
                        pre_norm=self._norms[index][row],
                        post_norm=after,
                        relative_delta=delta * relative,
                        relative_sum=after * relative,
                        clip_scale=scale,
                        milliseconds=milliseconds,
                        frame_milliseconds=_mean(self._times[row]),
                    )
                )
                self._norms[index][row] = after
        for row in rows:
            self._times[row] = []
        self.commits += found
        return found

    def _fetch(self) -> dict[int, list[list[float]]]:
        """‖Δ‖ and clip scale of each row's newest chunk and ‖S‖, by block, in one transfer to the host."""
        device, norms = self._steps.phase.device, self._steps.sum_norms()
        measured = [
            torch.cat([layer.last, norms[index].unsqueeze(1)], dim=1).to(device, torch.float64)
            for index, layer in self._steps.layers.items()
        ]
        return dict(zip(self._steps.layers, torch.stack(measured).tolist(), strict=True))


def write_commits(commits: Sequence[Commit], path: Path) -> Path:
    """One JSON object a commit and line, whole or not at all."""
    lines = [json.dumps(plain(commit.as_dict()), allow_nan=False) + "\n" for commit in commits]
    return write_whole(path, "".join(lines))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
