"""What one training step needs at its peak, and the longest sequence that a budget allows.

Every figure is a dry run of the step (:mod:`inlay.doctor.dry_run`). Over the length T the bytes held at any one moment
are linear (where attention makes a T × T mask: quadratic), and the peak is the largest of them, hence convex. So a
length read off the chord between one that fits and one that does not always fits, one read off the line through two
that fit never falls short, and few dry runs find the longest.

What PyTorch allocates for tensors is what is counted. CUDA's own context and libraries (0.5 to 1 GB) and what
fragmentation wastes come on top.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from inlay.doctor.dry_run import Model, Trace, TrainingStep, dry_run
from inlay.doctor.plan_allocations import KINDS, Kind, Moment
from inlay.doctor.reach_plan import chunks_in
from inlay.fastweight import FastWeightConfig

PORT_COPIES = 5
"""Copies of all chunks' updates that the Moshi port held at once: Δ, their cumulative sum, it shifted, its sum with Δ,
and the effective weights."""

MOST_TOKENS = 2**20
"""Longer sequences are not asked about."""

_PRECISION = 0.01


@dataclass(frozen=True)
class MemoryPlan:
    """The peak of one training step.

    Attributes:
        step: What runs.
        chunks: Chunks n of a row that is one document.
        peak_bytes: Most bytes held at once.
        parts: Bytes at that moment: ``weights``, ``gradients``, ``optimizer`` (its states), and what is made on the way
            forward and back in ``attention`` (with its masks), in the rest of the ``blocks``, in the ``memory`` layers,
            and in the ``head`` (embeddings, logits, loss).
        when: The moment in words: ``backward, memory of block 30``.
        plain_bytes: Peak of the same step without the memory, the same parameters of the base trained. In mode
            ``memory``, which then trains nothing, the backward still goes as far down.
        materialised_bytes: One copy of all chunks' updates of all memory layers, n·B·D·F·4 each, as the formula says
            it; none of it is held here.
    """

    step: TrainingStep
    chunks: int
    peak_bytes: int
    parts: Mapping[Kind, int]
    when: str
    plain_bytes: int
    materialised_bytes: int

    @property
    def memory_bytes(self) -> int:
        """What the memory adds to the peak."""
        return self.peak_bytes - self.plain_bytes


@dataclass(frozen=True)
class LongestFit:
    """The longest sequences that fit a budget.

    Attributes:
        budget_bytes: The budget.
        tokens: Tokens per row, a multiple of the chunk size; 0 if not even two chunks fit.
        chunks: Chunks of such a row.
        seconds: ``duration_sec`` at the frame rate that was given.
        peak_bytes: Peak at that length (of two chunks, if nothing fits).
        tried: Tokens and peak of every dry run on the way.
    """

    budget_bytes: int
    tokens: int
    chunks: int
    seconds: float | None
    peak_bytes: int
    tried: tuple[tuple[int, int], ...]


def plan_memory(model: Model, memory: FastWeightConfig, step: TrainingStep) -> MemoryPlan:
    """Predict what a training step needs at its peak.

    Args:
        model: A causal LM of transformers, its config, or another subject. Nothing of it is allocated or touched.
        memory: The memory to attach.
        step: Tokens, rows, dtype, train mode, checkpointing, optimizer.

    Raises:
        PlanError: The model cannot be run without its numbers.
        AttachError: The memory does not fit the model.
    """
    trace = dry_run(model, memory, step)
    return MemoryPlan(
        step=step,
        chunks=chunks_in(step.tokens, memory.chunk_size),
        peak_bytes=trace.peak.total,
        parts=dict(zip(KINDS, trace.peak.held, strict=True)),
        when=_in_words(trace.peak),
        plain_bytes=dry_run(model, memory, step, plain=True).peak.total,
        materialised_bytes=materialised_bytes(trace, memory, step),
    )


def longest_tokens(
    budget_bytes: int,
    model: Model,
    memory: FastWeightConfig,
    step: TrainingStep,
    *,
    frame_rate: float | None = None,
    peak: Callable[[int], int] | None = None,
    most_tokens: int = MOST_TOKENS,
) -> LongestFit:
    """The longest sequence whose training step fits a budget, to one chunk or 1 %.

    Args:
        budget_bytes: Bytes that the step may hold.
        model: As :func:`plan_memory`.
        memory: As :func:`plan_memory`.
        step: What runs; its ``tokens`` do not count.
        frame_rate: Tokens per second of audio (Moshi: 12.5), to tell the length in seconds too.
        peak: Bytes at a number of tokens, where the caller keeps them; dry runs by default.
        most_tokens: The longest sequence that can be asked for.
    """
    find = peak or (lambda tokens: dry_run(model, memory, replace(step, tokens=tokens)).peak.total)
    size = memory.chunk_size
    tried: dict[int, int] = {}

    def fits(chunks: int) -> bool:
        tried[chunks * size] = find(chunks * size)
        return tried[chunks * size] <= budget_bytes

    def crossing(a: int, b: int) -> int:
        """Where the line through two lengths meets the budget, in chunks."""
        at_a, at_b = tried[a * size], tried[b * size]
        most = 8 * max(a, b)  # no further in one stride: near the first lengths the weights hide the slope
        return most if at_b <= at_a else min(most, a + int((budget_bytes - at_a) / (at_b - at_a) * (b - a)))

    low, high, before = 2, max(3, most_tokens // size), None
    found, stuck = fits(low), False
    if found and most_tokens < MOST_TOKENS and fits(high):
        low = high
    while found and high - low > max(1, _PRECISION * low):
        width = high - low
        guess = 8 * low if before is None else crossing(before, low)
        if high * size in tried:
            guess = (low + high) // 2 if stuck else guess if guess < high else crossing(low, high)
        guess = min(max(guess, low + 1), high - 1)
        if fits(guess):
            before, low = low, guess
        else:
            high = guess
        stuck = not stuck and high - low > width / 2  # where neither line helps, every other step halves
    chunks = low if found else 0
    return LongestFit(
        budget_bytes=budget_bytes,
        tokens=chunks * size,
        chunks=chunks,
        seconds=None if frame_rate is None else chunks * size / frame_rate,
        peak_bytes=tried[low * size],
        tried=tuple(sorted(tried.items())),
    )


def materialised_bytes(trace: Trace, memory: FastWeightConfig, step: TrainingStep) -> int:
    """One copy of all chunks' updates of all memory layers in float32, had they been made: Σ n·B·D·F·4."""
    chunks = chunks_in(step.tokens, memory.chunk_size)
    return sum(4 * chunks * step.batch_size * width * inner for width, inner in trace.shapes)


def _in_words(moment: Moment) -> str:
    if moment.phase == "optimizer":
        return "optimizer step"
    block, kind = moment.scope.block, moment.scope.kind
    where = "logits and loss" if block < 0 else f"memory of block {block}" if kind == "memory" else f"block {block}"
    return f"{moment.phase}, {where}"
