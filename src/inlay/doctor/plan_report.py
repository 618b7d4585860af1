"""The memory plan of a recipe as an examination: what it finds and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass

from inlay.doctor.findings import Finding, Severity
from inlay.doctor.plan_allocations import Kind
from inlay.doctor.plan_step import PORT_COPIES, LongestFit, MemoryPlan
from inlay.doctor.reach_plan import set_length
from inlay.report import Section, Series, Table, Text, line_plot
from inlay.report.document import Item, Verdict
from inlay.report.numbers import Cell

GB = 10**9
TIGHT = 0.9
"""Share of the budget above which there is a warning."""

_NAMES: dict[Kind, str] = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "blocks": "blocks: MLP, norms, residuals",
    "attention": "attention and its masks",
    "memory": "memory layers",
    "head": "embeddings, logits and loss",
}


@dataclass(frozen=True)
class LengthCost:
    """Peaks at one length, the rest as in the recipe.

    Attributes:
        tokens: Tokens per row T.
        chunks: Chunks n of such a row.
        seconds: ``duration_sec``; None for text.
        checkpointed_bytes: Peak with gradient checkpointing.
        kept_bytes: Peak without.
        materialised_bytes: One copy of the updates in the materialised formula.
    """

    tokens: int
    chunks: int
    seconds: float | None
    checkpointed_bytes: int
    kept_bytes: int
    materialised_bytes: int


@dataclass(frozen=True)
class Alternative:
    """One change to the recipe and the peak after it."""

    change: str
    peak_bytes: int


@dataclass(frozen=True)
class RecipePlan:
    """What the recipe's training step needs, and what fits.

    Attributes:
        plan: The recipe's own step.
        budget_bytes: What it may take; None where nobody said and there is no GPU.
        lengths: The same step at other lengths.
        longest: The longest rows that fit the budget.
        alternatives: What one change would make of it, where it does not fit or nearly not.
        assumptions: What the recipe leaves open.
        frame_rate: Tokens per second of audio; None for text.
        length_key: The recipe's key for a length.
    """

    plan: MemoryPlan
    budget_bytes: int | None
    lengths: tuple[LengthCost, ...]
    longest: LongestFit | None
    alternatives: tuple[Alternative, ...]
    assumptions: tuple[str, ...]
    frame_rate: float | None
    length_key: str = "data.sequence_length"

    def findings(self) -> list[Finding]:
        """``memory.out_of_memory`` (fatal) over the budget, ``memory.tight`` (warning) within 10 % below it."""
        peak, budget = self.plan.peak_bytes, self.budget_bytes
        if budget is None or peak <= TIGHT * budget:
            return []
        says = (
            f"a training step on {self.plan.step.batch_size} × {self.plan.step.tokens:,} tokens needs "
            f"{amount(peak)} at its peak ({self.plan.when}) of the {amount(budget)} that there are"
        )
        if peak > budget:
            return [Finding("memory.out_of_memory", Severity.FATAL, says, self._fix(budget))]
        return [Finding("memory.tight", Severity.WARNING, says, self._fix(budget))]

    def section(self) -> Section:
        """What holds the bytes at the peak, the peak by length, and what would fit."""
        step, peak = self.plan.step, self.plan.peak_bytes
        autocast = f", {step.autocast} autocast" if step.autocast else ""
        text = (
            f"Predicted by a dry run of one step: {step.batch_size} × {step.tokens:,} tokens, {step.dtype} weights"
            f"{autocast}, mode: {step.mode}, {'with' if step.gradient_checkpointing else 'without'} gradient "
            f"checkpointing. The peak is {amount(peak)} ({self.plan.when}), of which the memory adds "
            f"{amount(self.plan.memory_bytes)}. Counted is what PyTorch allocates for tensors, in units of 10⁹ bytes "
            "(GB); CUDA's own context and libraries, and what fragmentation wastes, come on top: 0.5 to 1 GB."
        )
        rows: list[list[Cell]] = [
            [_NAMES[kind], amount(held), f"{100 * held / peak:.1f} %"] for kind, held in self.plan.parts.items()
        ]
        rows.append(["together", amount(peak), "100.0 %"])
        items: list[Item] = [Table(["at the peak", "held", "share"], rows), self._lengths_table(), self._plot()]
        if self.longest is not None:
            items.append(Text(self._longest_in_words(self.longest)))
        if self.alternatives:
            changed: list[list[Cell]] = [[one.change, amount(one.peak_bytes)] for one in self.alternatives]
            marks = [self._mark(one.peak_bytes) for one in self.alternatives]
            items.append(Table(["one change to the recipe", "peak"], changed, verdicts=marks))
        items += [Text(assumption) for assumption in self.assumptions]
        return Section("Memory of a training step", text, items)

    def _fix(self, budget: int) -> str:
        """Every one change that is enough, or what comes nearest."""
        ways = [f"{one.change} needs {amount(one.peak_bytes)}" for one in self.alternatives if one.peak_bytes <= budget]
        longest = self.longest
        if longest is not None and 0 < longest.tokens < self.plan.step.tokens:
            setting = set_length(self.length_key, longest.tokens, self.frame_rate)
            chunks = _length(longest) if self.length_key == "data.sequence_length" else f"{longest.chunks:,} chunks"
            ways.append(f"{setting} ({chunks}) needs {amount(longest.peak_bytes)}")
        if ways:
            return "; or ".join(ways)
        least = min(self.alternatives, key=lambda one: one.peak_bytes, default=None)
        if self.plan.peak_bytes <= budget or least is None:
            return ""
        return (
            f"no one change is enough, not even two chunks a row; the most is gained by {least.change}, which needs "
            + (amount(least.peak_bytes))
        )

    def _lengths_table(self) -> Table:
        audio = self.frame_rate is not None
        rows: list[list[Cell]] = []
        for cost in self.lengths:
            seconds: list[Cell] = [f"{cost.seconds:,.1f}"] if cost.seconds is not None else []
            copy, port = cost.materialised_bytes, PORT_COPIES * cost.materialised_bytes
            peaks = amount(cost.checkpointed_bytes), amount(cost.kept_bytes)
            rows.append([f"{cost.tokens:,}", cost.chunks, *seconds, *peaks, amount(copy), amount(port)])
        columns = ["tokens", "chunks", *(["duration_sec"] * audio), "peak, checkpointing", "peak, without"]
        columns += ["materialised: one copy", f"materialised: {PORT_COPIES} copies"]
        own = [c.checkpointed_bytes if self.plan.step.gradient_checkpointing else c.kept_bytes for c in self.lengths]
        return Table(
            columns,
            rows,
            "The step at other lengths. Beside it, and not part of it: the updates of all chunks and layers as the "
            f"materialised formula holds them, n·B·D·F·4 bytes a layer and copy; one port held {PORT_COPIES}.",
            align=["right"] * len(columns),
            verdicts=None if self.budget_bytes is None else [self._mark(peak) for peak in own],
        )

    def _plot(self) -> Item:
        tokens = [cost.tokens for cost in self.lengths]
        lines = [
            Series("checkpointing", tokens, [cost.checkpointed_bytes / GB for cost in self.lengths]),
            Series("without", tokens, [cost.kept_bytes / GB for cost in self.lengths]),
        ]
        if self.budget_bytes is not None:
            lines.append(Series("budget", tokens, [self.budget_bytes / GB] * len(tokens), muted=True))
        marks = {float(self.plan.step.tokens): "recipe"}
        return line_plot(
            lines, xlabel="tokens per row", ylabel="peak, GB", title="Peak by length", marks=marks
        ).figure()

    def _longest_in_words(self, longest: LongestFit) -> str:
        step = self.plan.step
        setting = f"{step.batch_size} {'row' if step.batch_size == 1 else 'rows'}, mode: {step.mode}"
        if not longest.tokens:
            return (
                f"No length fits {amount(longest.budget_bytes)} ({setting}): rows of two chunks need "
                f"{amount(longest.peak_bytes)} already."
            )
        return (
            f"The longest rows that fit {amount(longest.budget_bytes)} ({setting}): **{longest.tokens:,} tokens**, "
            f"{_length(longest)}, with {amount(longest.peak_bytes)}."
        )

    def _mark(self, peak: int) -> Verdict:
        return "neutral" if self.budget_bytes is None else "good" if peak <= self.budget_bytes else "bad"


def amount(size: int) -> str:
    """Bytes as they are read: GB from 1 GB on, else MB."""
    return f"{size / GB:,.1f} GB" if abs(size) >= GB else f"{size / 10**6:,.1f} MB"


def _length(longest: LongestFit) -> str:
    seconds = "" if longest.seconds is None else f", duration_sec: {longest.seconds:g}"
    return f"{longest.chunks:,} chunks{seconds}"
