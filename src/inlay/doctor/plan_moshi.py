"""The requirement documents' question, with numbers: does Moshi train on 150, 300 or 400 s in 40 GB?

They count 15 GB for each memory layer at 150 s, hope for 22 GB in all in place of 40, and call the paper's 2,560 s
ideal but impractical. That was the materialised formula. Here every length is a dry run of transformers' own Moshi text
decoder (``MoshiConfig``: 32 blocks, D=4,096, F=11,264, 32 heads, vocabulary 32,000), bfloat16 weights, one row, with
three memory layers (10, 20, 30) of 256-token chunks whose parameters and sums are float32. Left out are Mimi, the audio
embeddings (0.3 GB) and the depth decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from transformers import MoshiConfig

from inlay.doctor.dry_run import TrainingStep, dry_run
from inlay.doctor.plan_report import GB, amount
from inlay.doctor.plan_step import PORT_COPIES, LongestFit, chunks_of, longest_tokens, materialised_bytes
from inlay.doctor.reach_plan import MOSHI_FRAME_RATE, frames_in
from inlay.fastweight import FastWeightConfig, TrainMode
from inlay.report import Section, Table
from inlay.report.document import Align
from inlay.report.numbers import Cell

MOSHI_SECONDS = (150.0, 300.0, 400.0, 2560.0)
MOSHI_MEMORY = FastWeightConfig(layers=[10, 20, 30], chunk_size=256)
_LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


@dataclass(frozen=True)
class MoshiCost:
    """One way to train Moshi.

    Attributes:
        mode: What is trained.
        gradient_checkpointing: Whether blocks are run again in the backward.
        peak_bytes: Peak at each length that was asked about.
        longest: The longest sequence that fits.
    """

    mode: TrainMode
    gradient_checkpointing: bool
    peak_bytes: tuple[int, ...]
    longest: LongestFit


@dataclass(frozen=True)
class MoshiAnswer:
    """What fits a budget.

    Attributes:
        budget_bytes: The budget.
        seconds: The lengths, ``duration_sec``.
        tokens: The same in frames.
        costs: Each way to train.
        materialised_bytes: One copy of the updates of all three layers in the materialised formula, at each length.
    """

    budget_bytes: int
    seconds: tuple[float, ...]
    tokens: tuple[int, ...]
    costs: tuple[MoshiCost, ...]
    materialised_bytes: tuple[int, ...]

    def section(self) -> Section:
        """The peaks by way and length, and the materialised formula's share of them."""
        lengths = [f"{seconds:g} s" for seconds in self.seconds]
        rows: list[list[Cell]] = []
        for cost in self.costs:
            peaks = [f"{amount(peak)}{'' if peak <= self.budget_bytes else ' ✗'}" for peak in cost.peak_bytes]
            longest = f"{cost.longest.seconds:,.0f} s" if cost.longest.tokens else "none"
            way = f"{cost.mode}, {'checkpointing' if cost.gradient_checkpointing else 'all kept'}"
            rows.append([way, *peaks, longest])
        for copies, name in ((1, "one copy"), (PORT_COPIES, f"{PORT_COPIES} copies, as the port")):
            held: list[Cell] = [amount(copies * size) for size in self.materialised_bytes]
            rows.append([f"the materialised formula's updates alone: {name}", *held, None])
        chunks = ", ".join(f"{t:,} tokens ({chunks_of(t, MOSHI_MEMORY)} chunks)" for t in self.tokens)
        caption = f"Peak of a training step on one row of {chunks}; ✗: over {amount(self.budget_bytes)}."
        columns = ["trained", *lengths, "longest that fits"]
        align: list[Align] = ["right"] * len(columns)
        align[0] = "left"
        return Section("Moshi", items=[Table(columns, rows, caption, align=align)])


def moshi_config() -> MoshiConfig:
    """Moshi 7B's text decoder."""
    return MoshiConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, ffn_dim=22528, vocab_size=32000)


def moshi_question(
    budget_gb: float = 40.0,
    *,
    seconds: Sequence[float] = MOSHI_SECONDS,
    modes: Sequence[TrainMode] = get_args(TrainMode),
    checkpointing: Sequence[bool] = (True, False),
) -> MoshiAnswer:
    """Plan every way to train Moshi at every length (some minutes in all).

    Args:
        budget_gb: Memory of the device, in GB (10⁹ bytes).
        seconds: Lengths of a sequence at 12.5 frames/s.
        modes: What is trained.
        checkpointing: With and without gradient checkpointing.
    """
    config = moshi_config()
    tokens = tuple(frames_in(length, MOSHI_FRAME_RATE) for length in seconds)
    costs = []
    copies: tuple[int, ...] = ()
    for mode in modes:
        for kept in checkpointing:
            step = TrainingStep(
                tokens[0], mode=mode, gradient_checkpointing=kept, lora=_LORA if mode == "memory+lora" else None
            )
            steps = [replace(step, tokens=t) for t in tokens]
            traces = [dry_run(config, MOSHI_MEMORY, step) for step in steps]
            peaks = tuple(trace.peak.total for trace in traces)
            longest = longest_tokens(int(budget_gb * GB), config, MOSHI_MEMORY, step, frame_rate=MOSHI_FRAME_RATE)
            costs.append(MoshiCost(mode, kept, peaks, longest))
            copies = tuple(
                materialised_bytes(trace, MOSHI_MEMORY, step) for trace, step in zip(traces, steps, strict=True)
            )
    return MoshiAnswer(int(budget_gb * GB), tuple(seconds), tokens, tuple(costs), copies)
