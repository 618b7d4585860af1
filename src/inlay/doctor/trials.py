"""One factor at a time: the memory's gradient at the recipe's own setting and at settings that differ in one thing.

Every trial is one forward and backward on the real model, parameters and random state as they are. Only what is said to
change changes, so a difference in the gradient has one cause.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from inlay.doctor.gradients import GradientNorms, gradient_norms
from inlay.fastweight import FastWeightConfig, Memory, NormalInit
from inlay.report.numbers import MISSING, short

PORT_CLIP = 1e-5
"""The Frobenius norm to which the Moshi port clipped every update."""

USUAL_ETA = 3e-4
USUAL_STD = 1e-2
"""Of ``init: {normal: …}``."""

CLIP, INIT, ETA, CHUNK_SIZE = "clip", "init", "η", "chunk size"
SEQUENCE, EXPOSURE, BOUNDARY, TARGET = "sequence length", "exposure", "boundary", "target"
LARGER_INIT = INIT, "×100"

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Trial:
    """A setting that differs from the recipe's in one factor, and what became of the gradients.

    Attributes:
        factor: What was changed: ``clip``, ``init``, ``η``, ``chunk size``, ``sequence length``, ``exposure``,
            ``boundary``, ``target``.
        setting: What it was changed to.
        norms: What was measured; None where the change could not be made.
        ratio: The memory's gradient as a multiple of the recipe's own; infinite where that is zero and this is not,
            None where there is nothing to compare.
        fix: The recipe's key and value that makes the change, or brings a factor that the gradient is in proportion to
            up to its usual value; empty where it is no remedy.
        shortfall: How many times the recipe's value of such a factor lies below the usual; None for another.
        why_not: Why it could not be made.
    """

    factor: str
    setting: str
    norms: GradientNorms | None
    ratio: float | None
    fix: str = ""
    shortfall: float | None = None
    why_not: str = ""

    @property
    def gain(self) -> float:
        """What the fix is good for: the ratio, or the shortfall if the trial went the right way; 0 without a fix."""
        if not self.fix or self.ratio is None or self.ratio <= 1:
            return 0.0
        return self.ratio if self.shortfall is None else self.shortfall

    @property
    def effect(self) -> float:
        """|log ratio|; infinite where the gradient appears or vanishes, −1 where nothing was measured."""
        if self.ratio is None:
            return -1.0
        return abs(math.log(self.ratio)) if 0 < self.ratio < math.inf else math.inf


@dataclass(frozen=True)
class Plan:
    """A trial to be made.

    Attributes:
        factor, setting, fix, shortfall, why_not: As of :class:`Trial`; with ``why_not`` it is not made.
        changes: Fields of the memory's configuration.
        scale: What convolution and projection are multiplied with.
        batch: In place of the recipe's.
    """

    factor: str
    setting: str
    fix: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    batch: Batch | None = None
    shortfall: float | None = None
    why_not: str = ""

    def run(self, memory: Memory, model: nn.Module, batch: Batch, own: GradientNorms) -> Trial:
        """Make it; ``own`` is what the recipe's setting gave."""
        if self.why_not:
            return Trial(self.factor, self.setting, None, None, why_not=self.why_not)
        try:
            with memory.using(**self.changes), scaled(memory, self.scale):
                norms = gradient_norms(memory, model, batch if self.batch is None else self.batch)
        except torch.OutOfMemoryError:
            return Trial(self.factor, self.setting, None, None, why_not="it does not fit into the device's memory")
        return Trial(self.factor, self.setting, norms, ratio(norms.memory, own.memory), self.fix, self.shortfall)


def plan_trials(
    config: FastWeightConfig, *, longer_batch: Batch | None = None, lengths: Mapping[str, Batch] | None = None
) -> list[Plan]:
    """Everything that is worth trying from ``config`` on.

    Args:
        config: The recipe's.
        longer_batch: Sequences of twice the recipe's length.
        lengths: More batches of other lengths, by what they are to be called.
    """
    return [
        _clip(config),
        *_init(config),
        *_eta(config),
        *_chunk_size(config),
        _longer(longer_batch),
        *(Plan(SEQUENCE, name, batch=batch) for name, batch in (lengths or {}).items()),
        *(Plan(EXPOSURE, f"{a:g}", changes={"exposure": a}) for a in (0.0, 0.5, 1.0) if a != config.exposure),
        _boundary(config),
        _target(config),
    ]


@contextmanager
def scaled(memory: Memory, factor: float) -> Iterator[None]:
    """Within the block convolution and projection of every layer are ``factor`` times what they are."""
    parameters = list(memory.parameters())
    before = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = parameter.data * factor
        yield
    finally:
        for parameter, data in zip(parameters, before, strict=True):
            parameter.data = data


def ratio(changed: float, own: float) -> float | None:
    """``changed / own``; infinite where only ``own`` is zero, None where both are or one is not finite."""
    if not (math.isfinite(changed) and math.isfinite(own)) or changed == own == 0:
        return None
    return math.inf if own == 0 else changed / own


def times(value: float | None) -> str:
    """A ratio within a sentence."""
    return "infinitely many times" if value == math.inf else MISSING if value is None else f"{rounded(value)} times"


def rounded(value: float) -> str:
    """Three significant digits, and no more where rounding decides between 0.00999… and 0.01."""
    return short(float(f"{value:.2e}"))


def _clip(config: FastWeightConfig) -> Plan:
    if not config.clips:
        return Plan(CLIP, f"on (‖Δ‖ ≤ {PORT_CLIP:g})", changes={"max_update_norm": PORT_CLIP})
    key = "max_update_norm" if config.max_update_norm is not None else "max_update_ratio"
    return Plan(CLIP, "off", f"set memory.{key}: null", {key: None})


def _init(config: FastWeightConfig) -> list[Plan]:
    larger, smaller = Plan(*LARGER_INIT, scale=100.0), Plan(INIT, "÷100", scale=0.01)
    if not isinstance(config.init, NormalInit):  # scaled, it is none that a recipe can name
        return [larger, smaller]
    std = config.init.normal
    if std < USUAL_STD:
        larger = replace(larger, fix=f"set memory.init: {{normal: {USUAL_STD:g}}}", shortfall=USUAL_STD / std)
    if not config.clips:  # clipped, a smaller init only hides the clip
        smaller = replace(smaller, fix=f"set memory.init: {{normal: {std / 100:g}}}")
    return [larger, smaller]


def _eta(config: FastWeightConfig) -> list[Plan]:
    eta, usual = config.eta, f"set memory.eta: {USUAL_ETA:g}"
    if eta == 0:
        return [Plan(ETA, f"{USUAL_ETA:g}", usual, {"eta": USUAL_ETA})]
    more = Plan(ETA, "×10", changes={"eta": eta * 10})
    if eta < USUAL_ETA:
        more = replace(more, fix=usual, shortfall=USUAL_ETA / eta)
    return [more, Plan(ETA, "÷10", f"set memory.eta: {eta / 10:g}", {"eta": eta / 10})]


def _chunk_size(config: FastWeightConfig) -> list[Plan]:
    size = config.chunk_size
    half = Plan(CHUNK_SIZE, "halved", why_not="chunks of one token cannot be halved")
    if size > 1:
        half = Plan(CHUNK_SIZE, f"halved ({size // 2:,})", _chunk_fix(size // 2), {"chunk_size": size // 2})
    return [half, Plan(CHUNK_SIZE, f"doubled ({size * 2:,})", _chunk_fix(size * 2), {"chunk_size": size * 2})]


def _chunk_fix(size: int) -> str:
    return f"set memory.chunk_size: {size}"


def _longer(batch: Batch | None) -> Plan:
    if batch is None:
        return Plan(SEQUENCE, "×2", why_not="the data gave no batch of twice the length")
    tokens = batch["input_ids"].shape[1]
    return Plan(SEQUENCE, f"×2 ({tokens:,} tokens)", f"train on sequences of {tokens:,} tokens or more", batch=batch)


def _boundary(config: FastWeightConfig) -> Plan:
    if config.boundary == "carry":
        return Plan(BOUNDARY, "reset", changes={"boundary": "reset"})
    fix = "set memory.boundary: carry if neighbours in a sequence belong together"
    return Plan(BOUNDARY, "carry", fix, {"boundary": "carry"})


def _target(config: FastWeightConfig) -> Plan:
    """Embeddings are often far below an RMS of 1, and the update with them."""
    if config.normalize_target:
        return Plan(TARGET, "not normalized", changes={"normalize_target": False})
    return Plan(TARGET, "normalized", "set memory.normalize_target: true", {"normalize_target": True})
