"""Vital signs of a memory, cheap enough to be taken from a training step that runs anyway.

Of one memory layer in one forward, with O_i = Z_i W0ᵀ + η Z_i S_iᵀ:

    sum norm       η‖S‖ / ‖W0‖                  S as it stands at the sequence's end
    output share   RMS(η Z_i S_iᵀ) / RMS(O_i)   over the tokens that can read something: chunks after a document's first
    dead chunks    documents / chunks           a document's last chunk is written and never read

One more scan over the Z and V that the forward used gives both S and the fast term, at 4·T·D·F flops where training the
layer took 14. It is the layer's own term: nothing is taken from a difference of two rounded outputs, and the base is
not called again (its dropout or adapters would answer differently). Everything stays on the device, as tensors of no
dimension, until the caller fetches it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from inlay.fastweight.chunks import ChunkLayout
from inlay.fastweight.layer import FastWeightProjection, Observation
from inlay.fastweight.scan import ScanPlan, scan

Name = TypeVar("Name")


@dataclass(frozen=True)
class LayerVitals:
    """Of one layer in one forward; tensors of no dimension on its device.

    Attributes:
        sum_norm: η‖S‖ / ‖W0‖ at the end of the sequence, RMS over the rows; NaN where W0 is quantized.
        output_share: RMS of the memory's part over RMS of the whole output, over the tokens of chunks after a
            document's first; NaN if there are none.
        dead_chunks: Share of the chunks whose update no token reads.
    """

    sum_norm: Tensor
    output_share: Tensor
    dead_chunks: Tensor


@torch.no_grad()
def layer_vitals(layer: FastWeightProjection, seen: Observation) -> LayerVitals:
    """Measure ``layer`` by what was observed of a forward without a state, without waiting for the device.

    Args:
        layer: In the mode (training or not) and with the configuration that the forward had.
        seen: What its observer was given.
    """
    eta, layout = layer.config.eta, seen.layout
    plan = ScanPlan(layout, eta, layer.config.exposure if layer.training else 0.0, final_sum=True)
    fast, total = scan(seen.z_packed, seen.v_packed, None, plan)
    assert total is not None
    rows = total.shape[0]
    used, first = _chunk_flags(layout, rows, total.device)

    reads = (used & ~first).repeat_interleave(layout.chunk_size, dim=1)[:, : fast.shape[1]]
    output = layout.pack(seen.output)
    part, whole = (torch.linalg.vector_norm(x, dim=-1, dtype=fast.dtype) * reads for x in (fast, output))
    return LayerVitals(
        sum_norm=eta * torch.linalg.vector_norm(total) / rows**0.5 / layer.base_norm(),
        output_share=torch.linalg.vector_norm(part) / torch.linalg.vector_norm(whole),
        dead_chunks=first.sum() / used.sum(),
    )


def fetch(measured: Mapping[Name, Tensor]) -> dict[Name, float]:
    """The values of tensors of no dimension, in one transfer to the host."""
    if not measured:
        return {}
    device = next(iter(measured.values())).device
    values = torch.stack([value.detach().to(device, torch.float32) for value in measured.values()]).tolist()
    return dict(zip(measured, values, strict=True))


def _chunk_flags(layout: ChunkLayout, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which chunks ``[B, N]`` hold a token, and which of them are the first of their document."""
    if layout.source is None:
        used = torch.ones(rows, layout.chunks, dtype=torch.bool, device=device)
    else:
        opening = layout.source.view(rows, layout.chunks, layout.chunk_size)[..., 0]
        used = opening < layout.chunk_size + layout.tokens
    first, _ = layout.flags(rows, device)
    first[:, 0] = True
    return used, first & used
