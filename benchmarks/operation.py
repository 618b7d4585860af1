"""The operation, forward and backward: the scan against the formula as it stands and against the plain linear layer.

The rival is the equation O_i = Z_i (W0 + η Σ_{j<i} V_jᵀ Z_j)ᵀ written down for all chunks at once: every update, every
sum and every weight exists at the same time, and autograd makes the backward. Counted in flops, the scan needs
14·T·D·F and the plain linear 6·T·D·F, which is 2.33 times as many.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from benchmarks.entry import Aim, Entry, Progress
from benchmarks.measure import Step, extra_bytes, ratio, require_same, take_turns
from inlay.fastweight import fast_weight_linear

Form = Callable[..., Tensor]
"""``form(z [B,T,F], v [B,T,D], weight [D,F], *, eta, chunk_size) -> out [B,T,D]``."""

TOLERANCE = 1e-4
MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """D, F, C and the lengths T (multiples of C, ascending) in tokens; rounds of timing."""

    width: int = 512
    inner: int = 1408
    chunk_size: int = 256
    lengths: tuple[int, ...] = (1792, 8192, 32000)
    rounds: int = 5


QUICK = Sizes(width=16, inner=24, chunk_size=8, lengths=(56, 256), rounds=1)


def scan(z: Tensor, v: Tensor, weight: Tensor, *, eta: float, chunk_size: int) -> Tensor:
    """The library's form."""
    return fast_weight_linear(z, v, weight, eta=eta, chunk_size=chunk_size)[0]


def materialised(z: Tensor, v: Tensor, weight: Tensor, *, eta: float, chunk_size: int) -> Tensor:
    """The equation for all n chunks at once; T is a multiple of C."""
    batch, tokens, _ = z.shape
    z_chunks = z.unflatten(1, (-1, chunk_size)).transpose(0, 1)  # [n, B, C, F]
    v_chunks = v.unflatten(1, (-1, chunk_size)).transpose(0, 1)  # [n, B, C, D]
    updates = v_chunks.mT @ z_chunks  # Δ [n, B, D, F]
    sums = F.pad(updates[:-1].cumsum(0), (0, 0, 0, 0, 0, 0, 1, 0))  # Σ_{j<i} Δ_j [n, B, D, F]
    out = z_chunks @ (weight + eta * sums).mT  # [n, B, C, D]
    return out.transpose(0, 1).reshape(batch, tokens, -1)


def linear(z: Tensor, v: Tensor, weight: Tensor, *, eta: float, chunk_size: int) -> Tensor:
    """No memory at all."""
    return F.linear(z, weight)


@dataclass(frozen=True)
class Inputs:
    """``z [1,T,F]``, ``v [1,T,D]``, ``weight [D,F]``, the output's gradient ``d_out [1,T,D]`` and η."""

    z: Tensor
    v: Tensor
    weight: Tensor
    d_out: Tensor
    eta: float

    @staticmethod
    def random(tokens: int, sizes: Sizes, device: torch.device) -> Inputs:
        """Normal operands; η such that by the end the memory weighs as much as W0."""
        generator = torch.Generator().manual_seed(tokens)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        z = normal(1, tokens, sizes.inner).requires_grad_()
        v = normal(1, tokens, sizes.width).requires_grad_()
        weight = (normal(sizes.width, sizes.inner) * sizes.inner**-0.5).requires_grad_()
        return Inputs(z, v, weight, normal(1, tokens, sizes.width), (tokens * sizes.inner) ** -0.5)


def run(quick: bool, device: torch.device, progress: Progress, *, fast: Form = scan) -> Entry:
    """Measure every length.

    Args:
        quick: Tiny sizes, to see that it works.
        device: Where to run.
        progress: Told about every step.
        fast: The form that stands for the scan.

    Raises:
        NotTheSameError: ``fast`` and the equation disagree in the output or a gradient; nothing is timed.
    """
    sizes = QUICK if quick else Sizes()
    forms: dict[str, Form] = {"scan": fast, "materialised": materialised, "linear": linear}
    steps_in_all = len(sizes.lengths) * (2 + len(forms) * (sizes.rounds + 2))
    done = 0

    def tick(what: str) -> None:
        nonlocal done
        done += 1
        progress(done, steps_in_all, what)

    rows = [_measure(tokens, sizes, forms, device, tick) for tokens in sizes.lengths]
    return Entry(
        "Fast-weight operation, forward + backward, float32, "
        f"D={sizes.width}, F={sizes.inner}, C={sizes.chunk_size}, B=1",
        [_table(rows)],
        _aims(rows),
        {
            "sizes": {"D": sizes.width, "F": sizes.inner, "C": sizes.chunk_size, "B": 1, "dtype": "float32"},
            "lengths": rows,
        },
    )


def _measure(
    tokens: int, sizes: Sizes, forms: Mapping[str, Form], device: torch.device, tick: Callable[[str], None]
) -> dict[str, Any]:
    chunks = tokens // sizes.chunk_size
    label = f"T={tokens:,}"
    inputs = Inputs.random(tokens, sizes, device)
    steps = {name: step_of(form, inputs, sizes.chunk_size) for name, form in forms.items()}

    named: dict[str, dict[str, Tensor]] = {}
    for name in ("scan", "materialised"):
        named[name] = dict(zip(("output", "dz", "dweight", "dv"), steps[name](), strict=True))
        tick(f"{label}: the same numbers?")
    errors = require_same(named["scan"], named["materialised"], TOLERANCE, f"scan at {label}")
    named.clear()

    seconds = take_turns(steps, sizes.rounds, device, lambda: tick(f"{label}: time"))
    extra: dict[str, int] = {}
    for name, step in steps.items():
        extra[name] = extra_bytes(step, device)
        tick(f"{label}: memory")
    return {"tokens": tokens, "chunks": chunks, "errors": errors, "seconds": seconds, "extra_bytes": extra}


def step_of(form: Form, inputs: Inputs, chunk_size: int) -> Step:
    """Forward and backward of ``form``; gives the output and the gradients of z, the weight and, if used, v."""

    def step() -> list[Tensor]:
        out = form(inputs.z, inputs.v, inputs.weight, eta=inputs.eta, chunk_size=chunk_size)
        leaves = (inputs.z, inputs.weight) if form is linear else (inputs.z, inputs.weight, inputs.v)
        return [out, *torch.autograd.grad(out, leaves, inputs.d_out)]

    return step


def _aims(rows: list[dict[str, Any]]) -> list[Aim]:
    last = rows[-1]
    seconds, extra = last["seconds"], last["extra_bytes"]
    label = f"T={last['tokens']:,}"
    faster = ratio(seconds["materialised"], seconds["scan"])
    slower = ratio(seconds["scan"], seconds["linear"])
    flat = [row["extra_bytes"]["scan"] for row in rows]
    chunks = " / ".join(str(row["chunks"]) for row in rows)
    return [
        Aim(f"{label}: scan faster than the materialised formula", faster.medians, 2.2, True, faster.minima),
        Aim(f"{label}: scan's time over the plain linear's", slower.medians, 2.3, False, slower.minima),
        Aim(f"{label}: extra memory, materialised over scan", _over(extra["materialised"], extra["scan"]), 10, True),
        Aim(f"scan's extra memory at {chunks} chunks, most over least", _over(max(flat), min(flat)), 1.1, False),
    ]


def _over(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else float("inf")


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title="Median time; extra memory: peak beyond inputs, outputs and their gradients",
        title_justify="left",
    )
    for heading in ("T", "chunks", "form", "time", "x linear", "extra MiB", "error"):
        table.add_column(heading, justify="left" if heading == "form" else "right", no_wrap=True)
    for row in rows:
        seconds = row["seconds"]
        for index, name in enumerate(seconds):
            table.add_row(
                "" if index else f"{row['tokens']:,}",
                "" if index else f"{row['chunks']}",
                name,
                f"{statistics.median(seconds[name]):.4f} s",
                f"{ratio(seconds[name], seconds['linear']).medians:.2f}x",
                f"{row['extra_bytes'][name] / MIB:,.2f}",
                f"{max(row['errors'].values()):.1e}" if name == "scan" else "",
                end_section=index == len(seconds) - 1,
            )
    return table
