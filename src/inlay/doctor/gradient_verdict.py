"""The verdict on a memory's gradient: what is wrong with it, and which setting is to blame.

- **Never read**: no document of the batch is longer than a chunk. Nothing else matters then.
- **Zero** or **vanishing**: the gradient is exactly zero, or its RMS per element, of convolution and projection alike,
  is at most AdamW's ε (1e-8), below which a step is no longer the gradient's. The memory will not learn.
- **Weak**: less than 1e-4 of the base down projection's, per element. A warning, for AdamW steps by sign and not by
  size. (Memories that learn were seen between 0.17 and 1,700.)
- **Clip**: it shortens nine updates in ten, and switching it off raises the gradient more than tenfold. Once clipped, Δ
  does not depend on the scale of the parameters behind it: their gradient falls as 1/‖θ‖ while they grow, and whatever
  they learn, K updates sum to at most K τ. Fatal where no more than AdamW's ε is left; and, if a larger init is seen to
  lower the gradient, where less than a thousandth is left, or where η K τ is under 1e-4 of ‖W0‖ (an output follows the
  directions of few tokens, so it may feel a sum some √D times as much; that is still nothing). A fresh memory of
  ``init: zero`` has Δ = 0, on which no clip bites yet; the clip is then judged on the target that training grows
  towards, the next token's embedding.

The dominant cause of zero, vanishing or weak is the remedy that raises the memory's gradient most, and more than
twofold. A larger η or init raises any gradient in proportion, so each counts for no more than it lies below its usual
value (η 3e-4, std 1e-2), and only if its trial did raise it. So does a target of RMS 1, where embeddings are smaller:
it is advised if nothing else is. Exposure is measured and never advised: it leaks labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from inlay.doctor.findings import Finding, Severity
from inlay.doctor.gradients import GradientNorms
from inlay.doctor.trials import BOUNDARY, CLIP, ETA, EXPOSURE, INIT, SEQUENCE, TARGET, Trial, ratio, times
from inlay.fastweight import FastWeightConfig
from inlay.report.numbers import short

ADAM_EPSILON = 1e-8
WEAK = 1e-4
"""Gradient per element, as a share of the base down projection's, under which it is called weak."""
CLIPS_NEARLY_ALL = 0.9
CLIP_COSTS = 10.0
CLIP_KILLS = 1000.0
LEAST_SHARE = 1e-4
"""Largest η K τ / ‖W0‖ that a clip may leave and count as having left nothing."""
RAISES = 2.0


@dataclass(frozen=True)
class Clipping:
    """What the clip does to the gradient.

    Attributes:
        on: With the recipe's clip.
        off: Without it.
        larger: With it, convolution and projection 100 times as large.
        share: η K τ / ‖W0‖, the most that the sum a document's last chunk reads can be of the base weight, in the layer
            where that is most; None where W0 is quantized.
        grown: Whether this was measured on the next token's embedding as target, in place of a fresh memory's zero.
    """

    on: GradientNorms
    off: GradientNorms
    larger: GradientNorms
    share: float | None
    grown: bool

    @property
    def bites(self) -> bool:
        """Whether it shortens nearly every update and costs most of the gradient."""
        return (self.on.clip_rate or 0.0) >= CLIPS_NEARLY_ALL and self.off.memory > CLIP_COSTS * self.on.memory

    @property
    def kills(self) -> bool:
        """Whether the memory cannot learn for it."""
        scale_free = self.larger.memory < self.on.memory
        little = self.off.memory > CLIP_KILLS * self.on.memory
        powerless = self.share is not None and self.share < LEAST_SHARE
        return vanishes(self.on) or (scale_free and (little or powerless))


def vanishes(norms: GradientNorms) -> bool:
    """Whether neither convolution nor projection gets a gradient that AdamW can step by."""
    return norms.memory_rms <= ADAM_EPSILON


def is_weak(norms: GradientNorms) -> bool:
    """Whether the memory's gradient is nothing beside that of the down projections it sits on."""
    return norms.base_rms is not None and norms.memory_rms < WEAK * norms.base_rms


def size_of(norms: GradientNorms) -> str:
    """The memory's gradient per element, in words."""
    beside = f", {short(norms.memory_rms / norms.base_rms, 2)} of the base down projection's" if norms.base_rms else ""
    return f"RMS {short(norms.memory_rms, 2)} per element{beside}"


def dominant_cause(trials: Sequence[Trial]) -> Trial | None:
    """The remedy that raises the memory's gradient most, if any does more than twofold; the target's scale last."""
    raising = [trial for trial in trials if trial.norms and trial.gain > RAISES]
    return max(raising, key=_rank) if raising else None


def _rank(trial: Trial) -> tuple[bool, float, float]:
    return trial.factor != TARGET, trial.gain, trial.norms.memory if trial.norms else 0.0


def judge(
    config: FastWeightConfig, own: GradientNorms, trials: Sequence[Trial], clipping: Clipping | None
) -> list[Finding]:
    """What keeps the memory from a gradient, the worst first; empty where it gets one.

    Args:
        config: The recipe's memory.
        own: Measured at it.
        trials: With one factor changed each.
        clipping: What the clip does; None where there is none, or it could not be measured.
    """
    if own.reading.reading == 0:
        return [_never_read(config, own, trials)]
    if not math.isfinite(own.memory):
        return [_not_finite(config, own)]
    found = []
    cause = dominant_cause(trials)
    if clipping is not None and clipping.bites:
        found.append(_clip(clipping, trials))
        if cause is not None and cause.factor == CLIP:
            return found
    starved: tuple[str, Severity, str] | None = None
    if own.memory == 0:
        starved = "zero", Severity.FATAL, "the memory's gradient is exactly zero"
    elif vanishes(own):
        says = f"the memory's gradient vanishes: {size_of(own)}, no more than AdamW's ε of 1e−8"
        starved = "vanishing", Severity.FATAL, says
    elif is_weak(own):
        starved = "weak", Severity.WARNING, f"the memory's gradient is weak: {size_of(own)}"
    if starved is not None:
        what, severity, says = starved
        why, fix = _why(own, cause, trials)
        found.append(Finding(f"gradient.{what}", severity, f"{says}; {why}", fix))
    return sorted(found, key=lambda finding: -finding.severity)


def _why(own: GradientNorms, cause: Trial | None, trials: Sequence[Trial]) -> tuple[str, str]:
    """The dominant cause of a gradient that is too small, and the fix."""
    if cause is None:
        return f"nothing that was tried{_not_advised(trials)} makes it more than twice as large", ""
    if cause.shortfall is not None:
        below = f"{times(cause.shortfall)} below the usual"
        return f"the dominant cause is {cause.factor}, which it is in proportion to and which is {below}", cause.fix
    raised = "it gets one" if own.memory == 0 else f"it is {times(cause.ratio)} as large"
    return f"the dominant cause is {cause.factor}: with {cause.setting} {raised}", cause.fix


def _not_advised(trials: Sequence[Trial]) -> str:
    """What makes the gradient more than twice as large and is no remedy, within a sentence; empty for nothing."""
    raising = {trial.factor for trial in trials if (trial.ratio or 0) > RAISES}
    larger = sorted(raising & {ETA, INIT})
    but = [f"a larger {' or '.join(larger)}, to which it is in proportion,"] if larger else []
    but += [f"{factor}{', which reads ahead,' * (factor == EXPOSURE)}" for factor in sorted(raising - {ETA, INIT})]
    return f" but {' and '.join(but)}" if but else ""


def _never_read(config: FastWeightConfig, own: GradientNorms, trials: Sequence[Trial]) -> Finding:
    longest = own.reading.longest
    what = "document" if config.boundary == "reset" else "row"
    carried = any(t.factor == BOUNDARY and t.norms is not None and t.norms.reading.reading > 0 for t in trials)
    carry = ", or memory.boundary: carry if neighbours in a sequence belong together" if carried else ""
    outcome = "its gradient is exactly zero"
    if config.exposure and own.memory:
        outcome = "what gradient it gets comes from exposure alone, that is from reading ahead"
    return Finding(
        "gradient.never_read",
        Severity.FATAL,
        f"what the memory writes is never read: no {what} of the batch is longer than a chunk (the longest has "
        f"{longest:,} tokens, chunk_size is {config.chunk_size:,}), so {outcome}",
        f"set memory.chunk_size: {max(1, longest // 4)} or less, or train on longer documents{carry}",
    )


def _not_finite(config: FastWeightConfig, own: GradientNorms) -> Finding:
    return Finding(
        "gradient.not_finite",
        Severity.FATAL,
        f"the memory's gradient is not finite (the loss is {own.loss:.3g})",
        f"set memory.eta: {config.eta / 10:g} or less; if the base model alone gives it too (memory: null), the fault "
        "is there",
    )


def _clip(clip: Clipping, trials: Sequence[Trial]) -> Finding:
    on = clip.on
    when = "once the target has grown, " if clip.grown else ""
    does = "keeps the memory from learning" if clip.kills else "holds the memory's gradient down"
    total = "" if clip.share is None else f", to {short(clip.share, 2)} of the base weight all told"
    says = (
        f"{when}the clip {does}: it shortens {on.clip_rate:.0%} of the updates{total}, and without it the memory's "
        f"gradient is {times(ratio(clip.off.memory, on.memory))} as large"
    )
    larger = ratio(clip.larger.memory, on.memory)
    if larger is not None and 0 < larger < 1:
        says += f"; an init 100 times as large divides it by {short(1 / larger, 2)}"
    lengths = {t.setting: t.ratio for t in trials if t.factor == SEQUENCE and t.ratio is not None}
    if lengths and not clip.grown:
        listed = ", ".join(f"{setting}: {times(value)}" for setting, value in lengths.items())
        says += f"; length alone {'does little' if max(lengths.values()) < CLIP_COSTS else 'raises it'} ({listed})"
    fix = next(trial.fix for trial in trials if trial.factor == CLIP)
    return Finding("gradient.clip", Severity.FATAL if clip.kills else Severity.WARNING, says, fix)
