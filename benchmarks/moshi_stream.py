"""What the memory costs a stream of Moshi, frame by frame, and whether an hour fits.

One model streams in turns: with its memory detached, so that Kyutai's own kernels run; with Kyutai's own ``LMGen``
(commits masked within its steps); and with ``MemoryLMGen`` (commits between them). On CUDA the sizes are those of Moshi
7B with random weights and six memory layers, by Kyutai's CUDA graphs; on the CPU a toy. Mimi is not in it. The hour is
45,000 frames of a two-layer model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from moshi.models import loaders
from moshi.models.lm import LMGen, LMModel
from rich.table import Table
from torch import Tensor

import inlay
from benchmarks.entry import Aim, Entry, Progress
from benchmarks.measure import NotTheSameError, require_same
from inlay.moshi.lm_gen import MemoryLMGen
from inlay.moshi.loss import uncompiled
from inlay.moshi.streaming import steps_of

FRAME_RATE = 12.5
VARIANTS: dict[str, type[LMGen]] = {"no memory": LMGen, "LMGen": LMGen, "MemoryLMGen": MemoryLMGen}


@dataclass(frozen=True)
class Sizes:
    """What replaces Moshi 7B's own settings, the memory, and how much is timed.

    Attributes:
        model: Arguments of ``LMModel``.
        layers: Blocks that hold a memory.
        chunk_size: Frames per chunk C.
        frames: Timed in each turn; a whole number of chunks, so that each turn has its share of commits.
        rounds: Turns of each variant.
        hour: Frames of the long stream; 0 leaves it out.
    """

    model: dict[str, Any] = field(default_factory=dict)
    layers: list[int] = field(default_factory=lambda: [0, 6, 12, 18, 24, 30])
    chunk_size: int = 256
    frames: int = 512
    rounds: int = 3
    hour: int = 0


_TOY = {"dim": 256, "num_layers": 4, "num_heads": 4, "context": 256, "card": 64, "text_card": 256}
_TOY |= {"depformer_dim": 64, "depformer_dim_feedforward": 264, "depformer_num_heads": 2, "depformer_num_layers": 2}
_TINY = {"dim": 32, "num_layers": 2, "num_heads": 2, "context": 32, "card": 16, "text_card": 32, "n_q": 2, "dep_q": 0}
CPU = Sizes(_TOY, [0, 2], chunk_size=64, frames=128, rounds=3, hour=45_000)
QUICK = Sizes(_TOY | {"dim": 32, "context": 16}, [0, 2], chunk_size=8, frames=8, rounds=1, hour=40)


def run(quick: bool, device: torch.device, progress: Progress) -> Entry:
    """Time a frame by each variant, and stream for an hour.

    Raises:
        NotTheSameError: The two ways to commit differ in what they give, or a chunk was not committed; nothing is
            timed.
    """
    sizes = QUICK if quick else Sizes() if device.type == "cuda" else CPU
    with uncompiled(device):
        return _run(sizes, device, progress)


def _run(sizes: Sizes, device: torch.device, progress: Progress) -> Entry:
    lm = _model(sizes, device)
    total = 3 + sizes.rounds * len(VARIANTS) * sizes.frames + sizes.hour
    done = 0

    def tick(what: str, frames: int = 1) -> None:
        nonlocal done
        done += frames
        progress(min(done, total), total, what)

    _check(lm, sizes)
    tick("checked", 3)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(sizes.rounds):
        for name, generator in VARIANTS.items():
            with _detached(lm) if name == "no memory" else nullcontext():
                seconds[name] += _frames(generator(lm), sizes, lambda name=name: tick(f"streaming, {name}"))
    means = {name: statistics.mean(values) for name, values in seconds.items()}
    table = Table(title="A frame of the language model (80 ms of audio)", title_justify="left")
    for heading in ("", "median", "slowest", "mean", "real-time factor", "over no memory"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, values in seconds.items():
        shown = [f"{1000 * value:.2f} ms" for value in (statistics.median(values), max(values), means[name])]
        over = means[name] / means["no memory"]
        table.add_row(name, *shown, f"{means[name] * FRAME_RATE:.3f}", f"{over:.3f}x")
    state = _state_bytes(lm)
    table.caption = f"The memory's state holds {state / 2**20:,.2f} MiB a row."
    data: dict[str, Any] = {"sizes": vars(sizes), "seconds": seconds, "state_bytes": state}
    aims = [
        Aim("real-time factor, MemoryLMGen", means["MemoryLMGen"] * FRAME_RATE, 1.0, False),
        Aim("real-time factor, LMGen", means["LMGen"] * FRAME_RATE, 1.0, False),
    ]
    tables = [table]
    if sizes.hour:
        hour = _hour(sizes, lambda: tick("streaming for an hour"))
        data["hour"] = hour
        tables.append(_hour_table(hour))
        aims.append(Aim("resident memory at the hour's end over at its tenth", hour["growth"], 1.02, False))
    title = f"Streaming Moshi: D={lm.dim}, {len(lm.transformer.layers)} layers, memory in {len(sizes.layers)} of them"
    return Entry(f"{title}, C={sizes.chunk_size}", tables, aims, data)


def _model(sizes: Sizes, device: torch.device, chunk_size: int | None = None) -> LMModel:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = dict(loaders._lm_kwargs) | sizes.model
    model["delays"] = [0] * (model["n_q"] + 1) if model["dep_q"] == 0 else model["delays"]
    lm = LMModel(**model, device=device, dtype=dtype).eval().requires_grad_(False)
    layers = [index for index in sizes.layers if index < len(lm.transformer.layers)]
    config = inlay.FastWeightConfig(
        layers=layers, chunk_size=chunk_size or sizes.chunk_size, eta=1e-3, init={"normal": 1e-2}
    )
    inlay.attach(lm, config)
    return lm


@contextmanager
def _detached(lm: LMModel) -> Iterator[None]:
    """Within the block, Kyutai's model as it is: a disabled memory keeps a gating that CUDA runs kernel by kernel."""
    memory = inlay.find_memory(lm)
    assert memory is not None
    memory.detach()
    try:
        yield
    finally:
        inlay.attach(lm, memory.config)


def _codes(lm: LMModel, frames: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(lm.card, (1, lm.n_q - lm.dep_q, frames), generator=generator).to(lm.device)


def _check(lm: LMModel, sizes: Sizes) -> None:
    """Both ways to commit give the same logits for the same codes, and as many chunks as frames allow."""
    frames = 2 * sizes.chunk_size + 1
    given: dict[str, Tensor] = {}
    for name, generator in VARIANTS.items():
        if name == "no memory":
            continue
        logits: list[Tensor] = []
        gen = generator(lm, use_sampling=False, on_text_logits_hook=lambda x, logits=logits: logits.append(x.clone()))
        codes = _codes(lm, frames)
        with gen.streaming(1):
            for t in range(frames):
                gen.step(codes[:, :, t : t + 1])
            chunks = steps_of(gen).chunks.tolist()
        if chunks != [frames // sizes.chunk_size]:
            raise NotTheSameError(f"{name}: {chunks} chunks committed in {frames} frames of C={sizes.chunk_size}")
        given[name] = torch.cat(logits, dim=2)
    require_same({"text logits": given["MemoryLMGen"]}, {"text logits": given["LMGen"]}, 1e-4, "MemoryLMGen")


def _frames(gen: LMGen, sizes: Sizes, tick: Callable[[], None]) -> list[float]:
    """Seconds of each frame, waiting for the device after each, as whoever plays the answer does."""
    lm = gen.lm_model
    codes = _codes(lm, sizes.frames + 4)
    seconds = []
    with gen.streaming(1):
        for t in range(codes.shape[2]):
            started = time.perf_counter()
            gen.step(codes[:, :, t : t + 1])
            if lm.device.type == "cuda":
                torch.cuda.synchronize(lm.device)
            if t >= 4:  # warm-up and capture
                seconds.append(time.perf_counter() - started)
                tick()
    return seconds


def _state_bytes(lm: LMModel) -> int:
    with lm.streaming(1):
        return steps_of(lm).nbytes


def _hour(sizes: Sizes, tick: Callable[[], None]) -> dict[str, Any]:
    """A tiny model streams on the CPU; bytes of its state and of the process, at a tenth and at the end."""
    lm = _model(Sizes(_TINY, [0, 1]), torch.device("cpu"), chunk_size=256 if sizes.hour > 1000 else sizes.chunk_size)
    memory = inlay.find_memory(lm)
    assert memory is not None
    gen = LMGen(lm)
    codes = _codes(lm, 64)
    marks: list[tuple[int, int]] = []
    started = time.perf_counter()
    with gen.streaming(1):
        for t in range(sizes.hour):
            gen.step(codes[:, :, t % 64 : t % 64 + 1])
            tick()
            if t + 1 in (sizes.hour // 10, sizes.hour):
                marks.append((steps_of(gen).nbytes, _resident()))
        steps = steps_of(gen)
        chunks = int(steps.chunks[0])
        if chunks != sizes.hour // memory.config.chunk_size or marks[0][0] != marks[1][0]:
            raise NotTheSameError(f"the hour: {chunks} chunks in {sizes.hour} frames, state of {marks} bytes")
        norms = {index: float(norm[0]) for index, norm in steps.sum_norms().items()}
    return {
        "frames": sizes.hour,
        "chunks": chunks,
        "state_bytes": marks[1][0],
        "resident_bytes": [mark[1] for mark in marks],
        "growth": marks[1][1] / marks[0][1],
        "sum_norms": norms,
        "seconds": time.perf_counter() - started,
    }


def _hour_table(hour: dict[str, Any]) -> Table:
    table = Table(title="An hour on the CPU, two layers", title_justify="left")
    for heading in ("frames", "chunks", "state", "process at a tenth", "at the end", "a frame"):
        table.add_column(heading, justify="right")
    resident = [f"{size / 2**20:,.1f} MiB" for size in hour["resident_bytes"]]
    frame = f"{1000 * hour['seconds'] / hour['frames']:.2f} ms"
    state = f"{hour['state_bytes'] / 2**10:,.1f} KiB"
    table.add_row(f"{hour['frames']:,}", f"{hour['chunks']:,}", state, *resident, frame)
    return table


def _resident() -> int:
    """Bytes of this process in memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
