"""Which η fits: the step size that decides whether a memory is heard, or drowns what it is added to.

A memory answers by likeness. A token that was read once gives back, when the same z comes again, its *echo*:

    η ‖z_t‖² v_t          from  η Z_i Δᵀ  with  Δ = v_t z_tᵀ

While the target's gain is still to be learnt, or the base learns along, η is how fast the memory grows. The rule then:
at unit gain an echo is about five times what the base puts out there, give or take a decade. Unit gain means that V is
the next token's embedding, as ``init: next_token`` makes it. Training finds the gain that it wants (0.01 to 0.2 of unit
gain in the runs that went well); below the band it does not get there, above it even a small gain drowns a frozen base.

With a target that has its gain already and a base that is frozen, nothing can adapt. The rule then: at the sequence's
end the memory is about as large as the base's output, give or take a decade. At the end a memory is mostly crosstalk of
everything read, which is why this is no rule for the first case: there the target learns to cancel it, and the η that
trained best had shares above 99 % at unit gain.

Both figures are linear in η: one pass at η → 0, where every layer sees what the base alone would give it, tells them
for every η. With a normalised target the echo at η = 1 stayed between 30 and 260 however far the models were trained.

Five, one and the decade come from training (``docs/log.md``, ``docs/studies/eta_rule.py``): small models, up to 512
tokens, 150 to 500 steps. Longer runs bear a smaller η.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from inlay.doctor.findings import Finding, Severity
from inlay.doctor.measuring import LayerTrace, next_token_target, observe, trace_layer
from inlay.fastweight import Memory
from inlay.report import Section, Series, Table, Text, line_plot

ECHO = 5.0
"""The echo over the base's output, at unit gain, that is recommended where the gain is learnt."""

END = 1.0
"""The memory over the base's output, at the sequence's end, that is recommended where nothing can adapt."""

BAND = 10.0
"""Factor either side of either within which training was seen to work."""

_GROWN = 0.5  # gain from which a target counts as having its gain already
_NO_EFFECT = 1e-4  # share of the output below which a memory changes nothing that a loss would show


_RULES = {
    "echo": "A token's echo is what it gives back, read once, when its z comes again. While the target's gain or the "
    "base can still be learnt, an echo of about five times the base's output at unit gain trains well.",
    "end": "The base is frozen and the target has its gain, so nothing will adapt: at the sequence's end the memory "
    "should be about as large as the base's output.",
}


@dataclass(frozen=True)
class LayerStepSize:
    """One layer at η → 0.

    Attributes:
        block: The block it belongs to.
        unit: With the next token's embedding for a target and no clipping: what the advice rests on.
        own: With its own target and clipping; the same as ``unit`` but for the clipping while its own target is zero.
        fresh: Whether its own target is zero.
    """

    block: int
    unit: LayerTrace
    own: LayerTrace
    fresh: bool

    @property
    def echo(self) -> float:
        """RMS of a token's echo over RMS of the base's output, at η = 1: unit gain, or its own where that is more."""
        return max(map(_echo, (self.unit, self.own)))

    @property
    def end(self) -> float:
        """RMS of the memory's part over RMS of the base's output at the sequence's end, at η = 1, by its own target."""
        base, fast = self.own.base_power[-1], self.own.fast_power[-1]
        return math.sqrt(fast / base) if base else 0.0

    @property
    def gain(self) -> float:
        """RMS of its own target over that of unit gain; 0 while it is zero."""
        return self.own.target_rms / self.unit.target_rms if self.unit.target_rms and not self.fresh else 0.0


@dataclass(frozen=True)
class StepSize:
    """The result of :func:`recommend_step_size`.

    Attributes:
        eta: The recipe's η.
        rule: ``echo``, where the gain is learnt or the base learns along; ``end``, where the base is frozen and the
            target has its gain, or outweighs the base by more than the band already.
        figure: What the rule goes by, at the recipe's η: the echo, or the memory's part at the sequence's end, over the
            base's output; the geometric mean of the layers.
        recommended: The η at which that is :data:`ECHO` or :data:`END`, as 1 or 3 × 10ᵏ. NaN where the base or its
            inputs are all zero.
        low: Least η of the band.
        high: Largest η of the band.
        chunk_size: Tokens per chunk C.
        clips: Whether the recipe clips updates.
        layers: One for each memory layer.
    """

    eta: float
    rule: Literal["echo", "end"]
    figure: float
    recommended: float
    low: float
    high: float
    chunk_size: int
    clips: bool
    layers: tuple[LayerStepSize, ...]

    def findings(self) -> list[Finding]:
        """``scale.no_effect``, ``scale.too_small`` or ``scale.too_large``; none where η lies in the band."""
        fix = f"memory.eta: {plain(self.recommended)} (the band is {plain(self.low)} to {plain(self.high)})"
        if self.eta == 0:
            return [Finding("scale.no_effect", Severity.FATAL, "eta is 0: the memory is written and never read", fix)]
        reading = [layer for layer in self.layers if len(layer.own.tokens) > 1]
        largest = max((max(layer.own.share(self.eta)) for layer in reading), default=math.nan)
        if largest < _NO_EFFECT:
            return [self._no_effect(largest, reading, fix)]
        if self.low <= self.eta <= self.high or math.isnan(self.recommended):
            return []
        small = self.eta < self.low
        if self.rule == "end":
            says = (
                f"eta {plain(self.eta)} is {'small' if small else 'large'}: at the sequence's end the memory is "
                f"{self.figure:.3g} times the output of a base that is frozen and cannot adapt"
            )
        elif small:
            says = (
                f"eta {plain(self.eta)} is small: even at unit gain, what one token gives back is {self.figure:.2g} of "
                "the base's output, so a run may well end before the memory is heard"
            )
        else:
            says = (
                f"eta {plain(self.eta)} is large: at unit gain, what one token gives back is {self.figure:.3g} times "
                "the base's output, which even a small gain drowns"
            )
        return [Finding("scale.too_small" if small else "scale.too_large", Severity.WARNING, says, fix)]

    def _no_effect(self, largest: float, reading: list[LayerStepSize], fix: str) -> Finding:
        raised = max(100 * self.eta, self.recommended)
        there = max(max(layer.own.share(raised)) for layer in reading)
        says = f"at eta {plain(self.eta)} the memory is {largest:.1g} of a layer's output at most: it changes nothing"
        if self.clips:
            fix = f"memory.max_update_norm: null and memory.max_update_ratio: null, then {fix}"
        if there >= _NO_EFFECT:
            return Finding("scale.no_effect", Severity.WARNING, says, fix)
        says += f", and at {plain(raised)} it is {there:.1g}: "
        if self.clips:
            return Finding("scale.no_effect", Severity.FATAL, f"{says}clipping holds it there", fix)
        return Finding(
            "scale.no_effect", Severity.FATAL, f"{says}the target is next to nothing", f"memory.init: zero, then {fix}"
        )

    def section(self) -> Section:
        """A table with a row for each layer, and the share along the sequence for the recipe's η and the band."""
        rows = [
            [
                f"block {layer.block}",
                f"{self.eta * layer.echo:.3g}",
                "target is zero" if layer.fresh else f"{layer.gain:.2g}",
                "0%" if layer.fresh else f"{layer.own.share(self.eta)[-1]:.1%}",
                f"{layer.unit.share(self.eta)[-1]:.1%}",
                f"{layer.unit.share(self.recommended)[-1]:.1%}",
            ]
            for layer in self.layers
        ]
        table = Table(
            [
                "layer",
                "echo / base output",
                "target's gain",
                "share at end",
                "at unit gain",
                f"at unit gain, eta {plain(self.recommended)}",
            ],
            rows,
        )
        shown = max(self.layers, key=lambda layer: layer.echo)
        etas = {"recipe": self.eta, "lower end": self.low, "recommended": self.recommended}
        curves = [
            Series(f"{name}, {plain(eta)}", [k * self.chunk_size for k in range(len(shown.unit.tokens))], share)
            for name, eta in etas.items()
            if math.isfinite(eta) and (share := shown.unit.share(eta))
        ]
        plot = line_plot(
            curves,
            xlabel="tokens in the memory",
            ylabel="share of the layer's output at unit gain",
            title=f"What an eta would give, block {shown.block}",
        )
        advice = (
            f"Recommended: memory.eta {plain(self.recommended)}, band {plain(self.low)} to {plain(self.high)}; the "
            f"recipe has {plain(self.eta)}."
        )
        return Section(
            "Step size",
            f"{_RULES[self.rule]} Unit gain means the next token's embedding for a target. Measured at eta 0; the "
            "memory's part is linear in eta.",
            [table, Text(advice, tone="note"), plot.figure()],
        )


def recommend_step_size(memory: Memory, model: nn.Module, batch: Mapping[str, Tensor]) -> StepSize:
    """Recommend η for ``memory`` by what its layers read of ``batch``.

    Costs two or three forwards with the memory at η = 0.

    Args:
        memory: The memory of ``model``, fresh or trained.
        model: Takes ``batch``.
        batch: ``input_ids`` ``[B, T]`` and what else :func:`inlay.data.collate` gives.
    """
    config = memory.config

    def measure() -> dict[int, LayerTrace]:
        return observe(memory, model, batch, lambda layer, seen: trace_layer(seen, eta=0.0))

    with memory.using(eta=0.0):
        own = measure()
        with next_token_target(memory):
            clipped = measure() if config.clips else None
            with memory.using(max_update_norm=None, max_update_ratio=None):
                unit = measure()
    layers = []
    for block, mine in own.items():
        fresh = mine.target_rms == 0
        layers.append(LayerStepSize(block, unit[block], (clipped or unit)[block] if fresh else mine, fresh))
    echo, end = (
        _geometric_mean(figures) for figures in zip(*((layer.echo, layer.end) for layer in layers), strict=True)
    )
    grown = all(layer.gain >= _GROWN for layer in layers) or config.eta * end > END * BAND
    by_end = grown and not any(layer.fresh for layer in layers) and _is_frozen(memory, model)
    figure, aim = (end, END) if by_end else (echo, ECHO)
    return StepSize(
        eta=config.eta,
        rule="end" if by_end else "echo",
        figure=config.eta * figure,
        recommended=nice(aim / figure) if figure else math.nan,
        low=aim / figure / BAND if figure else math.nan,
        high=aim / figure * BAND if figure else math.nan,
        chunk_size=config.chunk_size,
        clips=config.clips,
        layers=tuple(layers),
    )


def nice(value: float) -> float:
    """The number of the form 1 or 3 × 10ᵏ nearest to ``value`` on a logarithmic scale; NaN for NaN."""
    if not 0 < value < math.inf:
        return math.nan
    power = math.floor(math.log10(value))
    return min((float(f"{m}e{k}") for k in (power, power + 1) for m in (1, 3)), key=lambda x: abs(math.log(x / value)))


def plain(value: float) -> str:
    """A step size as one writes it in a recipe: ``3e-4``, ``0.03``."""
    if value == 0 or not math.isfinite(value) or 0.01 <= value < 1000:
        return f"{value:.2g}" if value < 100 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _is_frozen(memory: Memory, model: nn.Module) -> bool:
    """Whether nothing but the memory requires a gradient."""
    own = {id(parameter) for parameter in memory.parameters()}
    return not any(parameter.requires_grad for parameter in model.parameters() if id(parameter) not in own)


def _echo(measured: LayerTrace) -> float:
    base = measured.base_rms
    return math.sqrt(measured.echo_power) / base if base else 0.0


def _geometric_mean(figures: Sequence[float]) -> float:
    """0 where any is."""
    return math.exp(sum(map(math.log, figures)) / len(figures)) if all(figures) else 0.0
