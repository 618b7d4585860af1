"""A stand-in on the CPU for Kyutai's ``CUDAGraphed``: what is replayed are tensor operations on fixed addresses.

The first call is a warm-up, as with the real one. The second is recorded: every operator that reaches the dispatcher,
with the very tensors that it was given. (Recording also carries it out, which stands for capture and first replay.)
From then on arguments are copied into the recorded ones and the operators run again, results into the recorded results.
No Python of the model is entered again. Whatever would wait for the device, or upload from the host, which a capture
refuses, is refused here as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from moshi.utils import compile as moshi_compile
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.lift_fresh.default,
}


class CaptureError(RuntimeError):
    """Something that cannot be in a CUDA graph."""


class _Asking(TorchFunctionMode):
    """Refuses what reads a CPU tensor without the dispatcher, as it could not read one on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            raise CaptureError(f"{func} in a graph: it waits for the device")
        return func(*args, **(kwargs or {}))


class Recording(TorchDispatchMode):
    """Every operator that ran within it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._asking = _Asking()

    def __enter__(self) -> Recording:
        self._asking.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._asking.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        by_mask = func in (aten.index.Tensor, aten.index_put_.default) and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if func in WAITING or by_mask:
            raise CaptureError(f"{func} in a graph: it waits for the device, or uploads from the host")
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            aliases = [result.alias_info for result in func._schema.returns]
            if any(alias is not None and not alias.is_write for alias in aliases):
                continue  # a view: the recorded one still shows the same memory
            fresh = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for old, new in zip(tree_leaves(out), tree_leaves(fresh), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)


class Graphed:
    """In the place of ``CUDAGraphed``, ``disable`` included: the CPU is not spared."""

    def __init__(self, func: Callable[..., Any], warmup_steps: int = 1, disable: bool = False) -> None:
        self.func = func
        self.warmup_steps = warmup_steps
        self.recording: Recording | None = None

    def __call__(self, *args: Any) -> Any:
        if moshi_compile.in_cuda_graph():
            return self.func(*args)
        with moshi_compile._set_in_cuda_graph():
            if self.recording is not None:
                for own, given in zip(self.args, args, strict=True):
                    if isinstance(own, Tensor):
                        own.copy_(given)
                self.recording.replay()
            elif self.warmup_steps > 0:
                self.warmup_steps -= 1
                return self.func(*args)
            else:
                self.args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
                recording = Recording()
                with recording:
                    self.output = self.func(*self.args)
                self.recording = recording
            return self.output


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stream begun in the test runs by graphs."""
    monkeypatch.setattr("moshi.models.lm.CUDAGraphed", Graphed)
    monkeypatch.setattr("moshi.modules.streaming.CUDAGraphed", Graphed)
