"""What the doctor's measurements share: a forward that leaves no trace on the model, and a walk through what it did.

A memory's part of the output is linear in η. With S_i = Σ_{j<i} Δ_j, all that one pass has to say about the scale of a
layer is therefore in three numbers for each chunk: the power of what the base gives, that of Z_i S_iᵀ (the memory at
η = 1), and their product. `LayerTrace` holds them by the number k of updates in the sum that a chunk reads, which is
where it stands in its document, whatever the packing. S is one ``[B, D, F]`` buffer, walked once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from inlay.evaluate.scoring import device_of, evaluating, logits_of
from inlay.fastweight import Memory
from inlay.fastweight.chunks import ChunkLayout
from inlay.fastweight.clip import update_norms
from inlay.fastweight.layer import FastWeightProjection, Observation
from inlay.fastweight.scan import accumulator_dtype

Measured = TypeVar("Measured")


@contextmanager
def undisturbed(model: nn.Module, memory: Memory | None, *, exposed: bool = False) -> Iterator[None]:
    """Within the block the model is in eval mode without gradients; what a forward counts or notes is undone after it.

    Args:
        model: Whose modes are given back.
        memory: Its memory, if any. An open session stands aside.
        exposed: Let ``exposure`` act, which it does in training only: the memory layers, and they alone, are in
            training mode, so that no dropout blurs what is measured.
    """
    layers = [] if memory is None else list(memory.layers.values())
    counters = [(buffer, buffer.clone()) for layer in layers for buffer in layer.statistics.counters()]
    session = None if memory is None else memory.open_session
    with evaluating(model):
        try:
            if memory is not None:
                memory.open_session = None
            for layer in layers:
                layer.training = exposed  # the flag alone: train() would switch the dropout of what is inside
            yield
        finally:
            if memory is not None:
                memory.open_session = session
            for buffer, before in counters:
                buffer.copy_(before)


@contextmanager
def next_token_target(memory: Memory) -> Iterator[None]:
    """Within the block every target is the embedding of the next token, as ``init: next_token`` would make it.

    It stands for what training grows towards where a fresh memory's own target is zero or next to it.
    """
    parameters = list(memory.parameters())
    before = [parameter.data for parameter in parameters]
    try:
        for layer in memory.layers.values():
            conv, projection = layer.target.conv, layer.target.projection
            conv.data = torch.zeros_like(conv)
            conv.data[:, min(conv.shape[1] // 2 + 1, conv.shape[1] - 1)] = 1.0
            projection.data = torch.eye(*projection.shape, dtype=projection.dtype, device=projection.device)
        yield
    finally:
        for parameter, data in zip(parameters, before, strict=True):
            parameter.data = data


def observe(
    memory: Memory,
    model: nn.Module,
    batch: Mapping[str, Tensor],
    measure: Callable[[FastWeightProjection, Observation], Measured],
) -> dict[int, Measured]:
    """What ``measure`` makes of each layer's part in one forward in eval mode, by block.

    It is called while the forward runs, so that the tensors of one layer alone are held.

    Args:
        memory: The memory of ``model``.
        model: Takes ``batch``.
        batch: ``input_ids`` ``[B, T]`` and what else :func:`inlay.data.collate` gives.
        measure: Takes a layer and what was observed of it.
    """
    measured: dict[int, Measured] = {}
    before = {index: layer.observer for index, layer in memory.layers.items()}

    def observer(layer: FastWeightProjection) -> Callable[[Observation], None]:
        def note(seen: Observation) -> None:
            measured[layer.index] = measure(layer, seen)

        return note

    try:
        for layer in memory.layers.values():
            layer.observer = observer(layer)
        with undisturbed(model, memory):
            logits_of(model, on_device_of(model, batch), last=1)
    finally:
        for index, layer in memory.layers.items():
            layer.observer = before[index]
    return measured


def on_device_of(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch where the model is."""
    return {name: tensor.to(device_of(model)) for name, tensor in batch.items()}


@dataclass(frozen=True)
class LayerTrace:
    """What one layer and its memory gave in one forward, by the number k = 0 … K of updates that a chunk reads.

    Attributes:
        tokens: Tokens that read k updates.
        base_power: Mean square of an entry of the base's output.
        cross_power: Mean product with the memory's entry at η = 1.
        fast_power: Mean square of the memory's entry at η = 1.
        sum_norm: ‖S‖ (Frobenius, without η), RMS over the rows.
        update_norm: ‖Δ‖ of the complete chunks that read k updates, RMS; as many as there are.
        smallest_update: The least ‖Δ‖ of any complete chunk; NaN without one.
        echo_power: Mean square of an entry of ‖z_t‖² v_t: what one token, read once, gives back at η = 1 to its own z.
        target_rms: RMS of an entry of V.
        common_mode: ‖mean Z‖² / mean ‖Z‖²; 0 where Z is zero.
        target_common_mode: The same of V.
    """

    tokens: tuple[int, ...]
    base_power: tuple[float, ...]
    cross_power: tuple[float, ...]
    fast_power: tuple[float, ...]
    sum_norm: tuple[float, ...]
    update_norm: tuple[float, ...]
    smallest_update: float
    echo_power: float
    target_rms: float
    common_mode: float
    target_common_mode: float

    def share(self, eta: float) -> list[float]:
        """RMS of the memory's part over RMS of the whole output at step size ``eta``, by k; 0 where both are zero."""
        powers = zip(self.base_power, self.cross_power, self.fast_power, strict=True)
        return [_share(base, cross, fast, eta) for base, cross, fast in powers]

    def mean_share(self, eta: float) -> float:
        """The same over all tokens that read at least one update; 0 if none does."""
        columns = (self.base_power, self.cross_power, self.fast_power)
        weights = self.tokens[1:]
        base, cross, fast = (sum(n * p for n, p in zip(weights, powers[1:], strict=True)) for powers in columns)
        return _share(base, cross, fast, eta)

    @property
    def base_rms(self) -> float:
        """RMS of an entry of the base's output over all tokens."""
        power = sum(n * p for n, p in zip(self.tokens, self.base_power, strict=True))
        return math.sqrt(power / max(1, sum(self.tokens)))


def _share(base: float, cross: float, fast: float, eta: float) -> float:
    total = base + 2 * eta * cross + eta**2 * fast
    return eta * math.sqrt(fast / total) if fast > 0 and total > 0 else 0.0


def trace_layer(seen: Observation, eta: float) -> LayerTrace:
    """Walk the chunks of one observed forward, which ran at step size ``eta``; in full precision, as the scan does."""
    with torch.autocast(seen.output.device.type, enabled=False):
        return _trace(seen, eta)


def _trace(seen: Observation, eta: float) -> LayerTrace:
    layout = seen.layout
    size, rows, width = layout.chunk_size, seen.v_packed.shape[0], seen.v_packed.shape[-1]
    output = layout.pack(seen.output)
    device, dtype = output.device, accumulator_dtype(seen.z_packed.dtype)
    reads, tokens, written = chunk_table(layout, rows, device)
    total = torch.zeros(rows, width, seen.z_packed.shape[-1], dtype=dtype, device=device)
    z_sum, v_sum = total.new_zeros(total.shape[-1]), total.new_zeros(width)
    columns = []
    for n in range(layout.chunks):
        span = slice(n * size, (n + 1) * size)
        z, v, out = (x[:, span].to(dtype) for x in (seen.z_packed, seen.v_packed, output))
        v = v * (torch.arange(v.shape[1], device=device) < tokens[:, n, None]).unsqueeze(-1)  # none in empty slots
        resets = layout.resets[n]
        if resets is not None:
            total.masked_fill_(resets.view(-1, 1, 1), 0.0)
        fast = z @ total.mT
        base = out - eta * fast
        powers = [_power(base), (base * fast).sum((1, 2)), _power(fast), _power(total)]
        powers += [_power(z), _power(v), _power(z.pow(2).sum(-1, keepdim=True) * v)]
        columns.append(torch.stack(powers, -1).double())
        z_sum += z.sum((0, 1))
        v_sum += v.sum((0, 1))
        total.baddbmm_((v * written[:, n].view(-1, 1, 1)).mT, z)

    sums = torch.stack(columns, 1)  # [B, N, 7]
    norms = update_norms(seen.z_packed, seen.v_packed, size)
    used = tokens > 0
    more = [tokens, torch.ones_like(tokens), norms.double().pow(2) * written, written]
    by_chunk = torch.cat([sums[..., :4], torch.stack(more, -1)], -1)
    by_reads = sums.new_zeros(int((reads * used).max()) + 1, 8)
    by_reads.index_add_(0, reads[used], by_chunk[used])
    base, cross, fast, norm, count, chunks, update, complete = by_reads.T.cpu()
    z_power, v_power, echo = sums[..., 4:].sum((0, 1)).tolist()
    real = max(1, int(tokens.sum()))
    return LayerTrace(
        tokens=tuple(count.int().tolist()),
        base_power=tuple((base / count / width).tolist()),
        cross_power=tuple((cross / count / width).tolist()),
        fast_power=tuple((fast / count / width).tolist()),
        sum_norm=tuple((norm / chunks).sqrt().tolist()),
        update_norm=tuple((update / complete).sqrt()[complete > 0].tolist()),
        smallest_update=float(norms[written].min()) if bool(written.any()) else math.nan,
        echo_power=echo / real / width,
        target_rms=math.sqrt(v_power / real / width),
        common_mode=float(_power(z_sum)) / (real * z_power) if z_power else 0.0,
        target_common_mode=float(_power(v_sum)) / (real * v_power) if v_power else 0.0,
    )


def _power(x: Tensor) -> Tensor:
    """Sum of squares; by row where there are rows."""
    return torch.linalg.vector_norm(x, dim=(1, 2) if x.dim() == 3 else None).square()


def chunk_table(layout: ChunkLayout, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of every chunk ``[B, N]``: the updates in the sum that it reads, its tokens, and whether it is complete."""
    resets, written = layout.flags(rows, device)
    reads = []
    held = torch.zeros(rows, dtype=torch.long, device=device)
    for emptied, writes in zip(resets.unbind(1), written.unbind(1), strict=True):
        held = held.masked_fill(emptied, 0)
        reads.append(held)
        held = held + writes
    if layout.source is not None:
        slots = layout.source.view(rows, layout.chunks, layout.chunk_size)
        tokens = (slots < layout.chunk_size + layout.tokens).sum(-1)
    else:
        starts = torch.arange(layout.chunks, device=device) * layout.chunk_size
        tokens = (layout.tokens - starts).clamp(max=layout.chunk_size).expand(rows, -1)
    return torch.stack(reads, 1), tokens, written
