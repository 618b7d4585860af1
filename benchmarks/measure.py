"""How things are measured here: the same numbers first, then time, then memory.

Time. Machines are noisy and drift, so the variants take turns (A B C A B C …) and are compared within one run, as the
ratio of their medians. The ratio of their minima stands beside it: where the two are far apart the machine was busy.

Memory. On CUDA the allocator keeps its own peak. On the CPU the resident size of the process tells little (the C
library keeps freed pages, and what ran before decides how many), and a dispatch mode sees only the tensors that
operators return, not what their kernels allocate inside. So the CPU figure adds up the events of PyTorch's own CPU
allocator, as ``torch.profiler`` records them: every allocation and release with its bytes, tensors that autograd saved
and temporaries of kernels included. What it cannot see is memory that does not come from that allocator, such as the
packing buffers of the BLAS library, which every variant has. Nothing is sampled: the figure is the same in every run.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], Sequence[Tensor]]
"""One thing to measure: does its work and returns the tensors it was asked for."""


class NotTheSameError(RuntimeError):
    """Two variants do not give the same numbers, so how fast they give them means nothing."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """RMS(actual − expected) / RMS(expected), in float64."""
    difference = (actual.detach().double() - expected.detach().double()).square().mean().sqrt()
    return float(difference / expected.detach().double().square().mean().sqrt())


def require_same(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, what: str
) -> dict[str, float]:
    """The RMS-relative error of each named tensor, all of them at most ``tolerance``.

    Raises:
        NotTheSameError: A shape differs, or an error is above ``tolerance`` or NaN; the message names the worst.
    """
    errors: dict[str, float] = {}
    for name, tensor in expected.items():
        if actual[name].shape != tensor.shape:
            raise NotTheSameError(f"{what}: {name} is {[*actual[name].shape]}, should be {[*tensor.shape]}")
        errors[name] = relative_error(actual[name], tensor)
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    if wrong:
        listed = ", ".join(f"{name} {error:.2g}" for name, error in wrong.items())
        raise NotTheSameError(
            f"{what}: RMS-relative error above {tolerance:g} in {listed}. No speed-up is printed for another result"
        )
    return errors


def take_turns(
    steps: Mapping[str, Step], rounds: int, device: torch.device, tick: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each step in each round, after one round to warm up; ``tick`` is called after every step."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            elapsed = _seconds(step, device)
            if turn:
                seconds[name].append(elapsed)
            tick()
    return seconds


def _seconds(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


@dataclass(frozen=True)
class Ratio:
    """How many times longer one list of seconds is than another.

    Attributes:
        medians: Ratio of the medians: the figure.
        minima: Ratio of the minima: what it would be if nothing else ran on the machine.
    """

    medians: float
    minima: float


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """The :class:`Ratio` of two variants' seconds."""
    return Ratio(
        statistics.median(numerator) / statistics.median(denominator),
        min(numerator) / min(denominator),
    )


def collect(device: torch.device) -> None:
    """Free what nothing refers to: a memory and its hooks refer to each other, so a dead model waits for this."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def extra_bytes(step: Step, device: torch.device) -> int:
    """Bytes that ``step`` needs at its peak beyond what was there before and beyond the tensors it returns.

    What was there before are its inputs; return outputs and gradients, and the rest is the extra memory. What is dead
    is freed first: freed within the step, it would be taken off CUDA's figure.
    """
    collect(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before - _bytes(results)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event["args"]["Ev Idx"]):
        held += change["args"]["Bytes"]
        peak = max(peak, held)
    if held < _bytes(results):
        raise RuntimeError(f"the profiler saw {held} bytes held at the end, but the results have {_bytes(results)}")
    return peak - _bytes(results)


def _bytes(tensors: Sequence[Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
