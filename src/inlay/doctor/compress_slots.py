"""Slots that an untrained compressor writes: their scale, whether contexts differ in them, and whether padding does.

An experiment of this kind (seed 003) added sinusoids of RMS 0.71 to embeddings of RMS 0.011 and left its slots at 95
times the embeddings' scale. Both show before any training: every context is then written as nearly the same slots, in
vectors of a size that the decoder has never read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.doctor.compress_case import Check, CompressCase, checks_table, faults, percent
from inlay.doctor.findings import Finding, Severity
from inlay.evaluate.collapse_geometry import geometry
from inlay.evaluate.collapse_results import ALIKE
from inlay.evaluate.compress_methods import Budget, pooling
from inlay.evaluate.scoring import evaluating
from inlay.report import Section, heatmap
from inlay.softtoken.compressors import CrossAttentionCompressor
from inlay.softtoken.compressors.crossattention import sinusoids
from inlay.softtoken.compressors.pool import PoolCompressor
from inlay.softtoken.tokens import SoftTokens

_CONTEXTS = 8
_NEAR, _FAR = 2.0, 10.0
"""A scale that is off by so many times is odd, and one that the decoder has never read."""

_ONE = 0.995
"""Cosine across contexts above which they are one: beyond any that a fresh encoder gave in any form (0.989)."""


@dataclass(frozen=True)
class Slots:
    """What a fresh compressor writes.

    Attributes:
        form: ``embeddings`` or ``kv``.
        embedding_rms: Of the decoder's token embeddings.
        slot_rms: Of the slots; None in form ``kv``.
        source_rms: Of what positions are added to; None where none are added.
        position_rms: Of the positions; likewise.
        cosine_across: Mean cosine of the slots of different contexts.
        pooled_cosine_across: The same of their mean-pooled embeddings.
        cosines: `[C][C]`, each context with each.
        padding_error: RMS difference of a context's slots alone and among others, over their RMS; by how the others
            and the padding stood.
        checks: What should hold.
    """

    form: str
    embedding_rms: float
    slot_rms: float | None
    source_rms: float | None
    position_rms: float | None
    cosine_across: float
    pooled_cosine_across: float
    cosines: tuple[tuple[float, ...], ...]
    padding_error: dict[str, float]
    checks: tuple[Check, ...]

    def findings(self) -> list[Finding]:
        """What does not hold."""
        return faults(self.checks)

    def section(self) -> Section:
        """The checks, and how alike contexts are written."""
        plot = heatmap(
            self.cosines, unit="cosine of each context's slots with those of each other", title="Before any training"
        )
        told = f"What the untrained compressor makes of {len(self.cosines)} contexts, in form `{self.form}`."
        return Section("Slots", told, [checks_table(self.checks), plot.figure()])


def examine_slots(case: CompressCase) -> Slots:
    """Write a few contexts with the compressor as it is."""
    batch = case.batch(case.questions(_CONTEXTS))
    contexts, mask = batch["contexts"], batch["mask"]
    compressor = case.compressor
    with evaluating(case.task), torch.no_grad():
        memory = compressor.compress(contexts, mask, ratio=case.ratio)
        budget = Budget(case.ratio, compressor.config.slots if case.ratio is None else None)
        pool = PoolCompressor(pooling(compressor.config, [budget]), case.model).to(compressor.lm.device)
        pooled = pool.compress(contexts, mask, ratio=budget.ratio, slots=budget.slots)
        errors = _padding_errors(case, contexts, mask, memory)
        source, positions = _added_positions(compressor, contexts, mask)
    found, plain = geometry(memory), geometry(pooled)
    slot_rms = None if memory.embeddings is None else _rms(memory.embeddings[memory.mask])
    embedding_rms = compressor.embedding_rms
    checks = (
        _scale(slot_rms, embedding_rms),
        _positions(source, positions),
        _collapse(found.cosine_across, plain.cosine_across),
        _padding(errors, memory),
    )
    return Slots(
        form=memory.form,
        embedding_rms=embedding_rms,
        slot_rms=slot_rms,
        source_rms=source,
        position_rms=positions,
        cosine_across=found.cosine_across,
        pooled_cosine_across=plain.cosine_across,
        cosines=found.map,
        padding_error=errors,
        checks=checks,
    )


def _padding_errors(case: CompressCase, contexts: Tensor, mask: Tensor, memory: SoftTokens) -> dict[str, float]:
    """The slots of the shortest context alone, against those it gets among others and behind padding of either side."""
    lengths = mask.sum(dim=1)
    row = int(lengths.argmin())
    ids = contexts[row, mask[row]].unsqueeze(0)
    alone = case.compressor.compress(ids, torch.ones_like(ids, dtype=torch.bool), ratio=case.ratio).row(0)
    width = max(int(lengths.max()), ids.shape[1] + 7)
    space = width - ids.shape[1]
    junk = contexts[int(lengths.argmax())].new_full((1, space), int(contexts.max()))
    off = torch.zeros(1, space, dtype=torch.bool, device=ids.device)
    on = torch.ones_like(ids, dtype=torch.bool)
    others = {
        "among longer contexts": memory.row(row),
        "padding on the right": case.compressor.compress(
            torch.cat([ids, junk], 1), torch.cat([on, off], 1), ratio=case.ratio
        ).row(0),
        "padding on the left": case.compressor.compress(
            torch.cat([junk, ids], 1), torch.cat([off, on], 1), ratio=case.ratio
        ).row(0),
    }
    return {name: _difference(alone, other) for name, other in others.items()}


def _difference(one: SoftTokens, other: SoftTokens) -> float:
    """RMS(other − one) / RMS(one); infinite where they differ in number."""
    if one.slots != other.slots:
        return math.inf
    first, second = _flat(one), _flat(other)
    return _rms(second - first) / max(_rms(first), 1e-30)


def _flat(memory: SoftTokens) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in _tensors(memory)])


def _tensors(memory: SoftTokens) -> list[Tensor]:
    return [memory.embeddings] if memory.embeddings is not None else [t for pair in memory.kv or () for t in pair]


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _added_positions(compressor: Any, contexts: Tensor, mask: Tensor) -> tuple[float | None, float | None]:
    """RMS of what a cross-attention reads and of the positions that it adds; None for other kinds."""
    if not isinstance(compressor, CrossAttentionCompressor):
        return None, None
    config = compressor.config
    content = compressor.source(compressor.lm.embed(contexts), mask)[mask]
    waves = sinusoids(torch.arange(contexts.shape[1], device=contexts.device), compressor.lm.width)
    # Calibrated, the source is normalised to RMS 1 and so are the waves.
    return (_rms(content), _rms(waves)) if config.positions == "raw" else (1.0, math.sqrt(2) * _rms(waves))


def _scale(slots: float | None, embeddings: float) -> Check:
    title = "slots have the embeddings' scale"
    if slots is None:
        return Check(title, "form kv: slots are keys and values, which the decoder's own projections made")
    ratio = slots / embeddings if embeddings else math.inf
    figures = f"RMS {slots:.3g} over {embeddings:.3g}, {ratio:.3g} times"
    off = max(ratio, 1 / ratio if ratio else math.inf)
    if off < _NEAR:
        return Check(title, figures)
    says = f"slots have {ratio:.3g} times the RMS of the decoder's embeddings ({slots:.3g} over {embeddings:.3g})"
    if off >= _FAR:
        says += ": it has never read vectors of this size, and they drown what else it reads"
    severity = Severity.FATAL if off >= _FAR else Severity.WARNING
    return Check(title, figures, Finding("slots.scale", severity, says, "compressor.calibrate: true"))


def _positions(source: float | None, positions: float | None) -> Check:
    title = "positions do not drown what they are added to"
    if source is None or positions is None:
        return Check(title, "no positions are added to what this compressor reads")
    ratio = positions / source if source else math.inf
    figures = f"RMS {positions:.3g} on {source:.3g}, {ratio:.3g} times"
    if ratio < _NEAR:
        return Check(title, figures)
    says = (
        f"positions of RMS {positions:.3g} are added to a source of RMS {source:.3g}, {ratio:.3g} times as much: what "
        "the compressor reads is where a token stands, not which it is"
    )
    severity = Severity.FATAL if ratio >= _FAR else Severity.WARNING
    return Check(title, figures, Finding("slots.positions", severity, says, "compressor.positions: calibrated"))


def _collapse(across: float, pooled: float) -> Check:
    title = "different contexts are written as different slots"
    figures = f"cosine across contexts {across:.4f}; mean-pooled embeddings {pooled:.4f}"
    if not across > ALIKE or across <= pooled:
        return Check(title, figures)
    says = (
        f"before any training all contexts are written as nearly the same slots (cosine {across:.4f}; their "
        f"mean-pooled embeddings have {pooled:.4f})"
    )
    fix = "compressor.positions: calibrated and compressor.calibrate: true; or compressor.kind: encoder-pool"
    severity = Severity.FATAL if across > _ONE else Severity.WARNING
    return Check(title, figures, Finding("slots.collapse", severity, says, fix))


def _padding(errors: dict[str, float], memory: SoftTokens) -> Check:
    title = "a context has the same slots whatever stands beside it"
    # Rounding, of other shapes of the same products: a few thousand steps of the dtype.
    dtype = _tensors(memory)[0].dtype
    allowed = 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2
    worst = max(errors, key=lambda name: errors[name])
    figures = "; ".join(f"{name} {error:.1e}" for name, error in errors.items())
    if errors[worst] <= allowed:
        return Check(title, f"RMS difference over RMS: {figures}")
    change = f"change by {percent(errors[worst])} of their RMS" if errors[worst] < math.inf else "are more or fewer"
    says = (
        f"a context's slots {change} with {worst}: the compressor attends to padding, so that a text reads "
        "otherwise in another batch, and in evaluation than in training"
    )
    fix = "mask padding wherever the compressor attends or averages, and count positions from a row's own first token"
    return Check(title, says, Finding("slots.padding", Severity.FATAL, says, fix))
