"""Gradient attribution: which setting decides whether the memory's own parameters get a gradient.

People whose target generator got no gradient tried longer sequences, other initialisations and reading ahead, when a
clip of every update had killed it. Here each of these is measured: one forward and backward at the recipe's own
setting, then one with each factor changed alone (:mod:`inlay.doctor.trials`). What follows from the figures is decided
by the rules of :mod:`inlay.doctor.gradient_verdict`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from inlay.doctor.findings import Finding
from inlay.doctor.gradient_verdict import Clipping, judge, size_of
from inlay.doctor.gradients import GradientNorms, GroupNorm, gradient_norms
from inlay.doctor.measuring import next_token_target
from inlay.doctor.trials import (
    CLIP,
    LARGER_INIT,
    Batch,
    Trial,
    plan_trials,
    ratio,
    rounded,
    scaled,
    times,
)
from inlay.fastweight import FastWeightConfig, Memory, NormalInit
from inlay.report import Section, Table, Text
from inlay.report.document import Align
from inlay.report.numbers import MISSING


@dataclass(frozen=True)
class Attribution:
    """Gradient norms at the recipe's setting and with one factor changed at a time.

    Attributes:
        config: The recipe's memory.
        own: Measured at it.
        trials: One factor changed each, the largest effect on the memory's gradient first.
        clipping: What the clip does; None where there is none, or it could not be measured.
        fresh: Whether every convolution is zero, as ``init: zero`` makes it.
    """

    config: FastWeightConfig
    own: GradientNorms
    trials: tuple[Trial, ...]
    clipping: Clipping | None
    fresh: bool

    @property
    def sentence(self) -> str:
        """What decides the memory's gradient, in one sentence."""
        findings = self.findings()
        if findings:
            return findings[0].says
        most = next((trial for trial in self.trials if trial.ratio is not None), None)
        moved = "" if most is None else f"; what moves it most is {most.factor} {most.setting}: {times(most.ratio)}"
        return f"the memory gets a gradient ({size_of(self.own)}){moved}"

    @property
    def remedy(self) -> Trial | None:
        """The trial whose change is the fix of the first finding; None where nothing is wrong or nothing helps."""
        fix = next((finding.fix for finding in self.findings()), "")
        return next((trial for trial in self.trials if fix and trial.fix == fix), None)

    def findings(self) -> list[Finding]:
        """What keeps the memory from a gradient, the worst first; empty where it gets one."""
        return judge(self.config, self.own, self.trials, self.clipping)

    def section(self) -> Section:
        """The sentence and the table of every trial."""
        text = f"{self.sentence[0].upper()}{self.sentence[1:]}. Measured at {self._setting()}."
        note = self._note()
        return Section("Gradients", text, [self._table(), *([Text(note)] if note else [])])

    def _setting(self) -> str:
        config = self.config
        clip = "no clip"
        if config.max_update_norm is not None:
            clip = f"‖Δ‖ ≤ {config.max_update_norm:g}"
        if config.max_update_ratio is not None:
            clip = f"‖Δ‖ ≤ {config.max_update_ratio:g} ‖W0‖"
        init = f"normal {config.init.normal:g}" if isinstance(config.init, NormalInit) else config.init
        return (
            f"{clip}, init {init}, η {config.eta:g}, chunks of {config.chunk_size:,} tokens, longest document "
            f"{self.own.reading.longest:,}, boundary {config.boundary}, exposure {config.exposure:g}"
        )

    def _table(self) -> Table:
        own = self.own.groups
        right: list[Align] = ["right"] * len(own)
        rows = [["recipe", "as it is", *(rounded(group.norm) for group in own.values())]]
        for trial in self.trials:
            if trial.norms is None:
                rows.append([trial.factor, f"{trial.setting}: {trial.why_not}", *(MISSING for _ in own)])
            else:
                changed = trial.norms.groups
                rows.append([trial.factor, trial.setting, *(_cell(changed[name], own[name]) for name in own)])
        return Table(
            ["factor", "setting", *own],
            rows,
            caption="L2 norms of the gradient before `max_grad_norm`: the recipe's own, then what they are multiplied "
            "by with one factor changed",
            align=["left", "left", *right],
            verdicts=["neutral", *("good" if trial is self.remedy else "neutral" for trial in self.trials)],
        )

    def _note(self) -> str:
        """What a fresh memory's zeros mean; empty for another."""
        if not self.fresh or self.own.memory == 0:
            return ""
        begins = "The convolution is zero, as `init: zero` makes it"
        if self.clipping is None:
            healthy = "" if self.findings() else " That is as it should be."
            return (
                f"{begins}, so the projection's gradient is exactly 0 at the first step, a clip finds nothing to "
                f"shorten, and the convolution moves first.{healthy}"
            )
        return (
            f"{begins}, so there is no update to be clipped yet, and the table does not show what the clip will do. "
            "With the next token's embedding as target, which training grows towards, the memory's gradient is "
            f"{rounded(self.clipping.on.memory)} with the clip and {rounded(self.clipping.off.memory)} without."
        )


def attribute_gradients(
    memory: Memory,
    model: nn.Module,
    batch: Batch,
    *,
    longer_batch: Batch | None = None,
    lengths: Mapping[str, Batch] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Attribution:
    """Measure the memory's gradient at its own setting and with one factor changed at a time.

    About twelve forwards and backwards of ``batch``, in the autocast of the caller, each with the same random state.
    Model and memory are afterwards bit for bit what they were.

    Args:
        memory: The memory of ``model``.
        model: A causal LM of transformers, or a PEFT model around one.
        batch: ``input_ids`` and ``labels`` ``[B, T]`` and what else :func:`inlay.data.collate` gives.
        longer_batch: The same data in sequences of ``2 T`` tokens; without it that trial is left out.
        lengths: Batches of other lengths by name ("125 chunks"): what length alone would change.
        progress: Called with the trials made and the trials in all.

    Raises:
        GradientError: The model gives no loss for the batch, or the memory is switched off.
    """
    plans = plan_trials(memory.config, longer_batch=longer_batch, lengths=lengths)
    own = gradient_norms(memory, model, batch)
    trials = []
    for done, plan in enumerate(plans):
        if progress is not None:
            progress(done, len(plans))
        trials.append(plan.run(memory, model, batch, own))
    fresh = all(not bool(layer.target.conv.any()) for layer in memory.layers.values())
    clipping = _clipping(memory, model, batch, own, trials, fresh) if memory.config.clips else None
    if progress is not None:
        progress(len(plans), len(plans))
    by_effect = tuple(sorted(trials, key=lambda trial: -trial.effect))
    return Attribution(config=memory.config, own=own, trials=by_effect, clipping=clipping, fresh=fresh)


def _clipping(
    memory: Memory, model: nn.Module, batch: Batch, own: GradientNorms, trials: Sequence[Trial], fresh: bool
) -> Clipping | None:
    """What the clip does: read off the trials, or for a fresh memory measured on the next token's embedding."""
    share = _largest_share(memory, own.reading.longest)
    if not fresh:
        measured = {(trial.factor, trial.setting): trial.norms for trial in trials}
        off, larger = measured[CLIP, "off"], measured[LARGER_INIT]
        return None if off is None or larger is None else Clipping(own, off, larger, share, grown=False)
    with next_token_target(memory):
        on = gradient_norms(memory, model, batch)
        with memory.using(max_update_norm=None, max_update_ratio=None):
            off = gradient_norms(memory, model, batch)
        with scaled(memory, 100.0):
            larger = gradient_norms(memory, model, batch)
    return Clipping(on, off, larger, share, grown=True)


def _largest_share(memory: Memory, longest: int) -> float | None:
    """η K τ / ‖W0‖ with the K updates that the last chunk of ``longest`` tokens reads."""
    config = memory.config
    read = config.eta * (math.ceil(longest / config.chunk_size) - 1)
    if config.max_update_ratio is not None:
        return read * config.max_update_ratio
    norms = [float(layer.base_norm()) for layer in memory.layers.values() if layer.weight.is_floating_point()]
    return read * (config.max_update_norm or 0.0) / min(norms) if norms and min(norms) > 0 else None


def _cell(changed: GroupNorm, own: GroupNorm) -> str:
    """A group's norm as a multiple of the recipe's own, or itself where that is zero."""
    if own.norm == 0 and changed.norm > 0:
        return f"0 → {rounded(changed.norm)}"
    value = ratio(changed.norm, own.norm)
    return MISSING if value is None else f"{rounded(value)} ×"
