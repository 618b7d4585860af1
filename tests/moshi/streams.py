"""A tiny Moshi with a memory that matters, and what a stream of it read and gave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from moshi.models import LMGen, LMModel
from torch import Tensor

import inlay
from inlay.moshi.lm_gen import MemoryLMGen

CARD, TEXT_CARD, CONTEXT, CHUNK = 16, 32, 16, 8
DELAYS = [0, 1, 0, 1]
USER = 2
"""Streams of the user; one more is Moshi's own, and one is text."""

# Everything that decides how the memory runs, each with a value that is not its default.
CONFIGS: dict[str, dict[str, Any]] = {
    "embeddings": {},
    "hidden": {"target": "hidden"},
    "normalized": {"normalize_target": True, "eta": 0.02},
    "clipped": {"max_update_norm": 20.0},
    "ratio": {"max_update_ratio": 2.0, "chunk_size": 5},
    "single": {"chunk_size": 1, "conv_kernel": 1},
}
KINDS = {"LMGen": LMGen, "MemoryLMGen": MemoryLMGen}


def tiny_lm(memory: bool = True, dtype: torch.dtype = torch.float32, context: int = CONTEXT, **config: Any) -> LMModel:
    """Two blocks of width 32, gated as Moshi's, with a memory in both; an attention of 16 frames."""
    torch.manual_seed(0)
    lm = LMModel(
        delays=DELAYS,
        n_q=3,
        dep_q=1,
        card=CARD,
        text_card=TEXT_CARD,
        dim=32,
        num_heads=2,
        hidden_scale=4.125,
        norm="rms_norm_f32",
        context=context,
        num_layers=2,
        max_period=10000,
        gating="silu",
        positional_embedding="rope",
        depformer_dim=16,
        depformer_dim_feedforward=32,
        depformer_num_heads=2,
        depformer_num_layers=1,
        depformer_multi_linear=True,
        depformer_context=1,
        depformer_gating="silu",
        depformer_pos_emb="none",
        depformer_weights_per_step=True,
        device="cpu",
        dtype=dtype,
    ).eval()
    if memory:
        settings: dict[str, Any] = {"layers": "all", "chunk_size": CHUNK, "eta": 0.1, "init": {"normal": 0.5}}
        inlay.attach(lm, inlay.FastWeightConfig(**settings | config))
    return lm


def user_codes(rows: int, frames: int, seed: int = 0) -> Tensor:
    """``[B, 2, T]`` of what the user says."""
    return torch.randint(CARD, (rows, USER, frames), generator=torch.Generator().manual_seed(seed))


@dataclass
class Heard:
    """What the main transformer was given and gave in each step of a stream."""

    codes: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    runs: int = 0
    """Times that Python ran ``forward_text``."""

    def row(self, row: int, steps: list[int] | slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """Codes ``[1, K, T]``, outputs ``[1, T, D]`` and text logits ``[1, T, V]`` of one row in some of the steps."""
        picked = range(len(self.codes))[steps] if isinstance(steps, slice) else steps
        codes = torch.cat([self.codes[i][row : row + 1] for i in picked], dim=2)
        outputs = torch.cat([self.outputs[i][row : row + 1] for i in picked], dim=1)
        return codes, outputs, torch.cat([self.logits[i][row : row + 1, 0] for i in picked], dim=1)


@contextmanager
def listening(gen: LMGen) -> Iterator[Heard]:
    """Note what the graphed forward of an open stream is called with and returns: from outside the graph."""
    heard = Heard()
    state = gen._streaming_state
    assert state is not None
    graphed = state.graphed_main
    inner = graphed.func

    def counting(*args: Any) -> Any:
        heard.runs += 1
        return inner(*args)

    def call(codes: Tensor, *conditions: Any) -> tuple[Tensor, Tensor]:
        output, logits = graphed(codes, *conditions)
        heard.codes.append(codes.clone())
        heard.outputs.append(output.clone())
        heard.logits.append(logits.clone())
        return output, logits

    graphed.func = counting
    state.graphed_main = call  # type: ignore[assignment]
    try:
        yield heard
    finally:
        graphed.func = inner
        state.graphed_main = graphed


@torch.no_grad()
def whole(lm: LMModel, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and text logits of one forward over ``codes`` ``[B, K, T]`` as they enter the model."""
    output, logits = lm.forward_text(codes)
    return output, logits[:, 0]
