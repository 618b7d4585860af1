"""What a memory gains Moshi: loss by position and on returned phrases, text and audio apart, memory on and η = 0.

Measured are tokens that say something: word pieces of the text stream (padding, most of it, is left out) and Moshi's
own eight codebooks, all alike. A phrase has *returned* when Moshi said it before in the same document, longer ago than
attention sees; what else is said is the control. Figures are sums in float64 of a model in eval mode, so they are the
same each time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inlay.evaluate.by_document import DocumentSums
from inlay.evaluate.intervals import Interval, paired_interval
from inlay.evaluate.position import MEMORY, NO_STEP, QUARTERS, PositionLoss, with_and_without_memory
from inlay.evaluate.results import Evaluation
from inlay.evaluate.scoring import EvaluationError, Floats, Integers, Progress, batches, choose, evaluating
from inlay.evaluate.suite import NO_MEMORY
from inlay.fastweight import find_memory
from inlay.moshi.inputs import Steps, training_steps
from inlay.moshi.loss import perplexity, token_weights
from inlay.moshi.model import MoshiForTraining
from inlay.moshi.sequences import MoshiSequences, collate_sequences
from inlay.report import Section, Table, bars
from inlay.report.document import Align
from inlay.report.jsonfile import plain, write_json
from inlay.report.numbers import MINUS, MISSING

STREAMS = ("text", "audio")


@dataclass(frozen=True, eq=False)
class SpanLoss:
    """Cross-entropy on some of the tokens of each of D conversations.

    Attributes:
        sums: ``[D]`` bits.
        counts: ``[D]`` tokens.
    """

    sums: Floats
    counts: Integers

    @property
    def bits(self) -> float:
        """Bits per token; NaN if there is none."""
        return float(self.sums.sum() / self.counts.sum()) if self.counts.sum() else float("nan")

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return {"bits_per_token": self.bits, "tokens": int(self.counts.sum())}


@dataclass(frozen=True, eq=False)
class StreamLoss:
    """One stream's losses.

    Attributes:
        position: By position in the sequence.
        returned: On phrases that return.
        other: On everything else.
        nats: The training loss of this stream over all sequences: weighted, in nats.
    """

    position: PositionLoss
    returned: SpanLoss
    other: SpanLoss
    nats: float

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "training_loss_nats": self.nats,
            "perplexity": perplexity(self.nats),
            "returned_phrases": self.returned.to_json(),
            "everything_else": self.other.to_json(),
            "loss_by_position": self.position.to_json(),
        }


def measure_moshi(
    task: MoshiForTraining,
    data: MoshiSequences,
    *,
    batch_size: int = 1,
    max_sequences: int | None = None,
    returned_after: int | None = None,
    progress: Progress | None = None,
) -> dict[str, StreamLoss]:
    """The losses of both streams on sequences of codes.

    Args:
        task: The model with its loss.
        data: The sequences.
        batch_size: Sequences per forward.
        max_sequences: No more than so many, evenly spaced.
        returned_after: Frames; a phrase said longer ago has returned. The attention window when not given.
        progress: Called after each batch with the sequences done and in all.

    Raises:
        EvaluationError: There is no sequence.
    """
    lm, after = task.lm, _reach(task, returned_after)
    chosen = choose(len(data), max_sequences)
    length = max(sum(piece.frames for piece in data.rows[index]) for index in chosen)
    gathered = {name: _Gathered(length) for name in STREAMS}
    digest, done = hashlib.sha256(), 0
    where = next(lm.parameters()).device
    with evaluating(task):
        for batch in batches(
            data, chosen, collate=collate_sequences, batch_size=batch_size, device=where, progress=progress
        ):
            documents = task.told_apart(batch["documents"])
            result = task(batch["codes"], batch["documents"])
            steps = training_steps(lm, batch["codes"], documents)
            weights = token_weights(lm, steps, task.loss_config)
            returned = _at_steps(lm.delays, batch["return_distances"], steps) > after
            spoken = steps.mask.clone()
            for padding in (lm.text_padding_token_id, lm.end_of_text_padding_id):
                spoken[:, 0] &= steps.targets[:, 0] != padding
            for row, real in zip(batch["codes"], batch["documents"] >= 0, strict=True):  # whatever the batch pads
                digest.update(row[:, real].cpu().numpy().tobytes())
            rows = [data.rows[index] for index in chosen[done : done + len(batch["codes"])]]
            files = [[(piece.store, piece.entry) for piece in row] for row in rows]
            where_from = _WhereFrom(batch["documents"].cpu().numpy(), files)
            for name, at in zip(STREAMS, (slice(0, 1), slice(1, None)), strict=True):
                gathered[name].add(result.nats[:, at], spoken[:, at], returned[:, at], weights[:, at], where_from)
            done += len(rows)
    return {name: one.finish(done, digest.hexdigest()[:16]) for name, one in gathered.items()}


class _WhereFrom(NamedTuple):
    """Where a batch's frames are from.

    Attributes:
        documents: ``[B, T]`` the piece of its row; −1 on padding.
        files: For each row what tells the conversation of each piece.
    """

    documents: Integers
    files: list[list[tuple[int, int]]]


class _Gathered:
    """Sums of one stream, batch by batch."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.sums, self.counts = np.zeros(length), np.zeros(length, np.int64)
        self.quarters, self.spans = DocumentSums(QUARTERS), DocumentSums(2)
        self.weighted = self.weight = 0.0

    def add(self, nats: Tensor, spoken: Tensor, returned: Tensor, weights: Tensor, where_from: _WhereFrom) -> None:
        """All tensors ``[B, streams, T]``."""
        nats = nats.double()
        self.weighted += float((nats * weights).sum())
        self.weight += float(weights.double().sum())
        bits = ((nats / np.log(2)) * spoken).cpu().numpy()
        used = spoken.cpu().numpy()
        frames = bits.shape[2]
        self.sums[:frames] += bits.sum((0, 1))
        self.counts[:frames] += used.sum((0, 1))
        documents = _flat(where_from.documents[:, None], bits.shape)
        quarter = _flat(np.arange(frames) * QUARTERS // self.length, bits.shape)
        span = (~returned).long().cpu().numpy()
        for sums, part in ((self.quarters, quarter), (self.spans, _flat(span, bits.shape))):
            sums.add(_flat(bits, bits.shape), _flat(used, bits.shape), part, documents, where_from.files)

    def finish(self, sequences: int, fingerprint: str) -> StreamLoss:
        """The losses."""
        quarters, spans = self.quarters, self.spans
        position = PositionLoss(self.sums, self.counts, quarters.sums, quarters.counts, sequences, fingerprint)
        returned, other = (SpanLoss(spans.sums[:, i], spans.counts[:, i]) for i in (0, 1))
        return StreamLoss(position, returned, other, self.weighted / self.weight if self.weight else float("nan"))


def _flat(values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """``[B, streams * T]`` of what broadcasts to ``[B, streams, T]``."""
    return np.broadcast_to(values, shape).reshape(shape[0], -1)


def _at_steps(delays: list[int], frames: Tensor, steps: Steps) -> Tensor:
    """``[B, Q + 1, T]`` of each predicted token what ``frames`` ``[B, T]`` says of the frame it belongs to."""
    length = frames.shape[1]
    shifted = [torch.nn.functional.pad(frames, (delay, 0))[:, :length] for delay in delays[: steps.mask.shape[1]]]
    return torch.stack(shifted, 1)


@dataclass
class MoshiEvaluation:
    """What was measured of some variants, such as "memory" and "eta = 0".

    Attributes:
        window: Attention window in frames.
        returned_after: A phrase said longer ago, in frames, has returned.
        baseline: The variant that gains are counted from; None: no gains.
        variants: Losses by variant and stream.
    """

    window: int | None
    returned_after: int
    baseline: str | None = None
    variants: dict[str, dict[str, StreamLoss]] = field(default_factory=dict)

    def add(self, results: Mapping[str, Mapping[str, StreamLoss]]) -> MoshiEvaluation:
        """Add variants; gives itself back."""
        self.variants |= {name: dict(streams) for name, streams in results.items()}
        for stream in STREAMS:
            self._by_position(stream)  # refuses losses of other sequences
        return self

    def gain(self, variant: str, stream: str, part: str = "returned") -> Interval:
        """Bits per token that ``variant`` has less than the baseline, on ``returned`` phrases or the ``other`` tokens.

        Raises:
            EvaluationError: There is no baseline.
        """
        if self.baseline is None:
            raise EvaluationError("there is no baseline to gain over: one variant alone was measured")
        mine, theirs = (getattr(self.variants[name][stream], part) for name in (variant, self.baseline))
        return paired_interval(theirs.sums - mine.sums, mine.counts)

    def to_json(self) -> dict[str, Any]:
        """Everything in plain JSON types; what is not a finite number is None."""
        gains = {
            name: {s: {part: self.gain(name, s, part).to_json() for part in ("returned", "other")} for s in STREAMS}
            for name in self._compared
        }
        return plain(
            {
                "baseline": self.baseline,
                "attention_window_frames": self.window,
                "returned_after_frames": self.returned_after,
                "variants": {
                    name: {stream: loss.to_json() for stream, loss in streams.items()}
                    for name, streams in self.variants.items()
                },
                "gain_over_baseline": gains,
            }
        )

    def write(self, path: str | Path) -> Path:
        """Write :meth:`to_json` to ``path``, whole or not at all."""
        return write_json(self.to_json(), path)

    def sections(self) -> list[Section]:
        """Returned phrases, and the loss by position of text and of audio, as :meth:`Evaluation.sections`."""
        returned = {
            stream: {name: losses[stream].returned.bits for name, losses in self.variants.items()} for stream in STREAMS
        }
        plot = bars(returned, unit="bits per token", title="Loss on returned phrases", highlight=MEMORY)
        sections = [Section("Returned phrases", items=[plot.figure(), self._returned_table()])]
        for stream in STREAMS:
            found = self._by_position(stream).sections()
            sections += [replace(section, title=f"Loss by position, {stream}") for section in found]
        return sections

    @property
    def _compared(self) -> list[str]:
        return [name for name in self.variants if self.baseline in self.variants and name != self.baseline]

    def _by_position(self, stream: str) -> Evaluation:
        losses = {name: losses[stream].position for name, losses in self.variants.items()}
        return Evaluation(baseline=self.baseline, window=self.window).add(losses)

    def _returned_table(self) -> Table:
        rows: list[list[str]] = []
        for stream in STREAMS:
            for name, losses in self.variants.items():
                loss = losses[stream]
                cells = [f"{stream}, {name}", _bits(loss.returned), _bits(loss.other), f"{perplexity(loss.nats):,.1f}"]
                less = [_less(self, name, stream, part) for part in ("returned", "other")]
                rows.append([*cells, *(less if name in self._compared else [MISSING, MISSING])])
        tokens = ", ".join(
            f"{int(v.returned.counts.sum()):,} {s}" for s, v in next(iter(self.variants.values())).items()
        )
        caption = (
            f"Bits per token on phrases that Moshi said more than {self.returned_after:,} frames before ({tokens} "
            "tokens), on everything else, and the perplexity of the weighted loss."
        )
        columns = ["", "returned", "else", "perplexity", "returned: less", "else: less"]
        align: list[Align] = ["left", "right", "right", "right", "right", "right"]
        return Table(columns, rows, caption, align=align)


def evaluate_moshi(
    task: MoshiForTraining,
    data: MoshiSequences,
    *,
    batch_size: int = 1,
    max_sequences: int | None = None,
    returned_after: int | None = None,
    progress: Progress | None = None,
) -> MoshiEvaluation:
    """:func:`measure_moshi` with the memory on and with η = 0, or once for a model without one.

    Arguments are those of :func:`measure_moshi`.
    """
    lm, after = task.lm, _reach(task, returned_after)
    remembers = find_memory(lm) is not None

    def measure() -> dict[str, StreamLoss]:
        return measure_moshi(
            task, data, batch_size=batch_size, max_sequences=max_sequences, returned_after=after, progress=progress
        )

    evaluation = MoshiEvaluation(lm.context, after, NO_STEP if remembers else None)
    return evaluation.add(with_and_without_memory(lm, measure) if remembers else {NO_MEMORY: measure()})


def _reach(task: MoshiForTraining, returned_after: int | None) -> int:
    return (task.lm.context or 0) if returned_after is None else returned_after


def _bits(loss: SpanLoss) -> str:
    return f"{loss.bits:.3f}" if np.isfinite(loss.bits) else MISSING


def _less(evaluation: MoshiEvaluation, name: str, stream: str, part: str) -> str:
    """By how much less than the baseline, in percent of it, ± half the 95 % interval."""
    if evaluation.baseline is None or name == evaluation.baseline:
        return MISSING
    gain, base = evaluation.gain(name, stream, part), getattr(evaluation.variants[evaluation.baseline][stream], part)
    if not np.isfinite(gain.mean) or not base.bits:
        return MISSING
    spread = f" ± {100 * gain.half / base.bits:.1f}" if np.isfinite(gain.half) else ""
    return f"{100 * gain.mean / base.bits:.1f}{spread} %".replace("-", MINUS)
