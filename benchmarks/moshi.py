"""Training Moshi on long sequences: attention's memory in T, and a whole step's peak memory and frames per second.

On CUDA the step is that of a randomly initialised Moshi 7B at T = 32,000 frames in bfloat16 with gradient
checkpointing, trained as a memory alone or as LoRA and memory, with 1, 3 and 6 memory layers:

    python -m benchmarks moshi --device cuda

The CPU takes the same path through a small model. A step is forward, backward, clipping and AdamW, as the Trainer makes
it. The first one warms up and makes the optimizer's states; frames per second come from the median of the three after
it (of one in quick mode), the peak from one more, with everything that is held.
"""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from moshi.models import loaders
from moshi.models.lm import LMModel
from moshi.modules.rope import RotaryEmbedding
from moshi.modules.transformer import StreamingMultiheadAttention
from rich.table import Table
from torch import Tensor, nn

from benchmarks.entry import Aim, Entry, Progress
from benchmarks.measure import collect, extra_bytes, require_same, take_turns
from inlay.fastweight import FastWeightConfig, attach
from inlay.moshi.attention import use_windowed_attention
from inlay.moshi.lora import LoraConfig, add_lora
from inlay.moshi.loss import uncompiled
from inlay.moshi.model import MoshiForTraining

GB = 10**9
BUDGET_GB = 40.0
"""In which the requirement documents fitted 1,875 frames."""

STEPS = 3
"""Timed, after one to warm up."""

_SMALL: dict[str, Any] = {
    "dim": 128,
    "num_heads": 4,
    "num_layers": 8,
    "card": 256,
    "text_card": 512,
    "context": 128,
    "depformer_dim": 32,
    "depformer_dim_feedforward": 132,
    "depformer_num_heads": 4,
    "depformer_num_layers": 2,
}
_LORA = LoraConfig(enable=True, rank=128)


@dataclass(frozen=True)
class Case:
    """A step to measure: layers that hold a memory, with adapters or without, and frames T."""

    layers: tuple[int, ...]
    lora: bool
    frames: int
    chunk_size: int

    @property
    def name(self) -> str:
        """Shown in the table."""
        return f"{'LoRA and memory' if self.lora else 'memory'}, {len(self.layers)} layers, T = {self.frames:,}"


def run(quick: bool, device: torch.device, progress: Progress) -> Entry:
    """Measure attention alone at growing T, then whole steps; ``quick``: tiny sizes."""
    full = device.type == "cuda" and not quick
    sizes = loaders._lm_kwargs if full else loaders._lm_kwargs | _SMALL
    attention = attention_rows(quick, device)
    cases = _cases(full, quick)
    rows = []
    for done, case in enumerate(cases):
        progress(done, len(cases), case.name)
        rows.append({"case": case.name} | step_of(case, sizes, device, 1 if quick else STEPS))
    growth = [row["windowed"] for row in attention]
    lengths = [row["frames"] for row in attention]
    aims = [
        Aim(
            "windowed attention's memory at the longest T over the shortest, by the ratio of the lengths",
            growth[-1] / growth[0] / (lengths[-1] / lengths[0]),
            1.25,
            False,
        )
    ]
    if full:
        most = max(row["peak_bytes"] for row in rows)
        aims.append(Aim(f"peak of the largest step over {BUDGET_GB:g} GB", most / GB / BUDGET_GB, 1.0, False))
    tables = [_attention_table(attention), _steps_table(rows)]
    return Entry("Training Moshi on long sequences", tables, aims, {"attention": attention, "steps": rows})


def attention_rows(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Bytes that one layer's attention needs, forward and backward, beyond inputs and gradients, at growing T.

    Raises:
        NotTheSameError: Blocks give another output or gradient than Kyutai's attention.
    """
    width, heads, context = (16, 2, 16) if quick else (64, 2, 64)
    frames = (128, 512) if quick else (1024, 2048, 4096, 8192)
    theirs = StreamingMultiheadAttention(
        width, heads, causal=True, context=context, rope=RotaryEmbedding(interleave=True), device=device
    )
    layer, transformer = nn.Module(), nn.Module()
    layer.self_attn = StreamingMultiheadAttention(
        width, heads, causal=True, context=context, rope=theirs.rope, device=device
    )
    layer.self_attn.load_state_dict(theirs.state_dict())
    transformer.layers = nn.ModuleList([layer])
    use_windowed_attention(transformer, block=context)  # type: ignore[arg-type]
    rows = []
    for length in frames:
        x = torch.randn(1, length, width, device=device, requires_grad=True)
        grad = torch.randn_like(x)

        def step(attention: Any, x: Tensor = x, grad: Tensor = grad) -> list[Tensor]:
            with uncompiled(device):
                out = attention(x, x, x)
            return [out, *torch.autograd.grad(out, [x, *attention.parameters()], grad)]

        names = ("output", "dx", "output projection's gradient", "input projection's gradient")
        ours, right = (dict(zip(names, step(one), strict=True)) for one in (layer.self_attn, theirs))
        require_same(ours, right, 1e-4, "windowed attention against Kyutai's")
        rows.append(
            {
                "frames": length,
                "windowed": extra_bytes(lambda: step(layer.self_attn), device),
                "kyutai": extra_bytes(lambda: step(theirs), device),
            }
        )
    return rows


def step_of(case: Case, sizes: dict[str, Any], device: torch.device, steps: int) -> dict[str, Any]:
    """Peak bytes of a training step of one case, and frames per second by the median of ``steps`` of them."""
    collect(device)  # the model of the case before
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = LMModel(**sizes, device=device, dtype=dtype, gradient_checkpointing=True).train()
    if case.lora:
        add_lora(lm, _LORA if sizes["dim"] > 512 else LoraConfig(enable=True, rank=4), dtype=torch.float32)
    memory = attach(lm, FastWeightConfig(layers=list(case.layers), chunk_size=case.chunk_size))
    memory.train_only("memory+lora" if case.lora else "memory")
    task = MoshiForTraining(lm)
    trained = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    codes = torch.randint(0, sizes["card"], (1, lm.num_codebooks, case.frames), device=device)
    losses: list[float] = []

    def update() -> list[Tensor]:
        with torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else nullcontext():
            loss = task(codes).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        return []

    seconds = statistics.median(take_turns({"step": update}, steps, device)["step"])
    held = sum(p.numel() * p.element_size() for p in lm.parameters())
    held += sum(s.numel() * s.element_size() for o in optimizer.state.values() for s in o.values() if s.dim())
    peak = held + codes.numel() * codes.element_size() + extra_bytes(update, device)
    return {
        "frames": case.frames,
        "trained_parameters": sum(p.numel() for p in trained),
        "peak_bytes": peak,
        "seconds": seconds,
        "frames_per_second": case.frames / seconds,
        "losses": losses,
    }


def _cases(full: bool, quick: bool) -> list[Case]:
    frames, chunk_size = (32_000, 256) if full else ((96, 16) if quick else (2048, 64))
    layers = [(20,), (10, 20, 30), (0, 6, 12, 18, 24, 30)] if full else [(4,), (2, 4, 6)]
    return [Case(some, lora, frames, chunk_size) for lora in (False, True) for some in layers]


def _attention_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Attention of one layer, forward and backward: extra MiB", title_justify="left")
    for heading in ("T", "windowed", "Kyutai's", "ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        sizes = (row["windowed"] / 2**20, row["kyutai"] / 2**20)
        table.add_row(f"{row['frames']:,}", *(f"{size:,.2f}" for size in sizes), f"{sizes[1] / sizes[0]:.1f}x")
    return table


def _steps_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="A training step, batch 1, gradient checkpointing", title_justify="left")
    for heading in ("trained", "parameters", "peak GB", "median s", "frames/s"):
        table.add_column(heading, justify="left" if heading == "trained" else "right")
    for row in rows:
        table.add_row(
            row["case"],
            f"{row['trained_parameters']:,}",
            f"{row['peak_bytes'] / GB:,.3g}",
            f"{row['seconds']:.2f}",
            f"{row['frames_per_second']:,.0f}",
        )
    return table
