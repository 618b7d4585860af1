"""How large is what the memory writes, beside the weight it is added to?

One forward in evaluation mode at the recipe's own settings. For each layer, along the sequence: the sum η‖S‖ against
‖W0‖, the memory's share of the output, how the sum grows, how often the clip bites.

Growth. Updates of one size that point everywhere add up like a random walk, ‖S_n‖ ~ √n; those that share a direction,
like n. A part they always share comes from the mean of Z (and of V), the common mode: ‖mean Z‖² / mean ‖Z‖² is 0 for
inputs of every direction and 1 for inputs that are all the same. It is read back by every token alike, so it carries no
memory. The sum diverges where updates themselves grow, as when one memory's output is the next one's input.

Resolution. A bf16 weight w keeps steps of 2⁻⁸|w| to 2⁻⁷|w|. An update below that would vanish if it were added to the
weight itself; Inlay keeps the sum in float32 beside it, so the figure is there to compare with code that does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from inlay.doctor.findings import Finding, Severity
from inlay.doctor.measuring import chunk_table, observe, trace_layer
from inlay.doctor.step_size import plain
from inlay.fastweight import Memory
from inlay.fastweight.layer import FastWeightProjection, Observation
from inlay.report import Section, Series, Table, line_plot

_BF16_STEP = 2.0**-8
_CLIPPED = 0.9  # clip rate from which the clip, not the target, sets the size of updates
_GROWN = 3.0  # growth of a single update along the sequence, beyond what the text itself makes of it
_SHARED = 0.05  # product of the common modes from which they, not chance, make the sum


@dataclass(frozen=True)
class LayerScale:
    """One layer in one forward. Tuples run over k, the updates in the sum that a chunk reads.

    Attributes:
        block: The block it belongs to.
        base_norm: ‖W0‖ (Frobenius); NaN where it is held quantized.
        sum_ratio: η‖S‖ / ‖W0‖.
        share: RMS of the memory's part over RMS of the layer's output.
        mean_share: The same over all tokens that read at least one update; 0 if none does.
        clip_rate: Share of complete chunks whose update was clipped; None without clipping.
        resolution: RMS of an entry of the smallest η Δ over 2⁻⁸ of RMS of an entry of W0: below 1, a bf16 W0 would
            swallow it. NaN without complete chunks.
        growth: Exponent p of the fit ‖S_k‖ ~ kᵖ; None with fewer than three lengths or where S is zero.
        update_growth: ‖Δ‖ in the last quarter of the chunks over that in the first; 1 where there is none.
        common_mode: ‖mean Z‖² / mean ‖Z‖².
        target_common_mode: The same of V; 0 where V is zero.
        finite: Whether every figure is a number.
    """

    block: int
    base_norm: float
    sum_ratio: tuple[float, ...]
    share: tuple[float, ...]
    mean_share: float
    clip_rate: float | None
    resolution: float
    growth: float | None
    update_growth: float
    common_mode: float
    target_common_mode: float
    finite: bool

    @property
    def diverging(self) -> bool:
        """Whether updates themselves grow along the sequence, as where one memory feeds another, or are no numbers."""
        return not self.finite or self.update_growth > _GROWN


@dataclass(frozen=True)
class Scale:
    """The result of :func:`examine_scale`.

    Attributes:
        eta: Step size it ran with.
        chunk_size: Tokens per chunk C.
        layers: One for each memory layer.
    """

    eta: float
    chunk_size: int
    layers: tuple[LayerScale, ...]

    def findings(self) -> list[Finding]:
        """``scale.diverging``, ``scale.clip``, and for information ``scale.common_mode``."""
        found = []
        for layer in self.layers:
            where = f"the memory of block {layer.block}"
            if not layer.finite:
                found.append(
                    Finding(
                        "scale.diverging",
                        Severity.FATAL,
                        f"{where} gives NaN or infinity at eta {plain(self.eta)}",
                        f"memory.eta: {plain(self.eta / 100)}, or check that the base model alone is finite",
                    )
                )
            elif layer.diverging:
                found.append(
                    Finding(
                        "scale.diverging",
                        Severity.WARNING,
                        f"{where} diverges: its updates grow {layer.update_growth:.2g}-fold along the sequence, and "
                        f"their sum reaches {layer.sum_ratio[-1]:.2g} times the base weight",
                        f"memory.eta: {plain(self.eta / 10)}",
                    )
                )
            if layer.clip_rate is not None and layer.clip_rate > _CLIPPED:
                found.append(
                    Finding(
                        "scale.clip",
                        Severity.WARNING,
                        f"{where} has {layer.clip_rate:.0%} of its updates clipped: their size is the clip's, whatever "
                        "the target's, and the target's gradient falls as one over its scale",
                        "memory.max_update_norm: null and memory.max_update_ratio: null, and set memory.eta instead",
                    )
                )
            if layer.common_mode * layer.target_common_mode > _SHARED and not layer.diverging:
                found.append(
                    Finding(
                        "scale.common_mode",
                        Severity.HEALTHY,
                        f"{where} adds much the same with every chunk: {layer.common_mode:.0%} of Z and "
                        f"{layer.target_common_mode:.0%} of V point in one direction, so its sum grows in proportion "
                        "to the sequence, mostly by what every token reads alike",
                    )
                )
        return sorted(found, key=lambda finding: -finding.severity)

    def section(self) -> Section:
        """A table with a row for each layer, and the share along the sequence."""
        rows = [
            [
                f"block {layer.block}",
                f"{layer.sum_ratio[-1]:.3g}",
                f"{layer.mean_share:.1%}",
                f"{layer.share[-1]:.1%}",
                "off" if layer.clip_rate is None else f"{layer.clip_rate:.0%}",
                f"{layer.resolution:.2g}",
                None if layer.growth is None else f"{layer.growth:.2f}",
                f"{layer.common_mode:.0%}",
                f"{layer.target_common_mode:.0%}",
            ]
            for layer in self.layers
        ]
        table = Table(
            [
                "layer",
                "η‖S‖/‖W0‖ at end",
                "share of output",
                "share at end",
                "clipped",
                "smallest update, bf16 steps of W0",
                "growth exponent",
                "common mode Z",
                "common mode V",
            ],
            rows,
            verdicts=["bad" if layer.diverging else "neutral" for layer in self.layers],
        )
        lines = [
            Series(f"block {layer.block}", [k * self.chunk_size for k in range(len(layer.share))], layer.share)
            for layer in self.layers
        ]
        plot = line_plot(
            lines,
            xlabel="tokens in the memory",
            ylabel="share of the layer's output",
            title=f"The memory's share at eta {plain(self.eta)}",
        )
        return Section(
            "Scale",
            "What the memory writes beside the weight it is added to, in one forward at the recipe's settings. A "
            "growth exponent of 0.5 is a random walk; 1 means that updates share a direction.",
            [table, plot.figure()],
        )


def examine_scale(memory: Memory, model: nn.Module, batch: Mapping[str, Tensor]) -> Scale:
    """Measure every memory layer in one forward of ``batch``, in evaluation mode and without gradients.

    Costs 4·T·D·F flops per layer beside the forward, and one ``[B, D, F]`` sum.

    Args:
        memory: The memory of ``model``.
        model: Takes ``batch``.
        batch: ``input_ids`` ``[B, T]`` and what else :func:`inlay.data.collate` gives.
    """
    eta = memory.config.eta
    layers = observe(memory, model, batch, lambda layer, seen: _layer_scale(layer, seen, eta))
    return Scale(eta, memory.config.chunk_size, tuple(layers.values()))


def _layer_scale(layer: FastWeightProjection, seen: Observation, eta: float) -> LayerScale:
    walked = trace_layer(seen, eta)
    base_norm = float(layer.base_norm())
    finite = bool(torch.isfinite(seen.output).all()) and all(map(math.isfinite, walked.sum_norm))
    return LayerScale(
        block=layer.index,
        base_norm=base_norm,
        sum_ratio=tuple(eta * norm / base_norm for norm in walked.sum_norm),
        share=tuple(walked.share(eta)),
        mean_share=walked.mean_share(eta),
        clip_rate=_clip_rate(seen),
        resolution=eta * walked.smallest_update / (_BF16_STEP * base_norm),  # norms of D·F entries each
        growth=growth_exponent(walked.sum_norm),
        update_growth=_update_growth(walked.update_norm),
        common_mode=walked.common_mode,
        target_common_mode=walked.target_common_mode,
        finite=finite,
    )


def growth_exponent(norms: Sequence[float]) -> float | None:
    """Slope of log ‖S_k‖ against log k over k = 1, 2, …; None with fewer than three norms above zero.

    Args:
        norms: ‖S_k‖ by k from 0 on; the first is that of the empty sum.
    """
    known = [(math.log(k), math.log(norm)) for k, norm in enumerate(norms) if k and 0 < norm < math.inf]
    if len(known) < 3:
        return None
    x, y = np.array(known).T
    return float(np.polyfit(x, y, 1)[0])


def _update_growth(norms: Sequence[float]) -> float:
    quarter = max(1, len(norms) // 4)
    first, last = sum(norms[:quarter]), sum(norms[-quarter:])
    return last / first if first > 0 else 1.0


def _clip_rate(seen: Observation) -> float | None:
    if seen.scale is None:
        return None
    _, _, written = chunk_table(seen.layout, seen.scale.shape[0], seen.scale.device)
    return float((seen.scale[written] < 1).float().mean()) if written.any() else 0.0
