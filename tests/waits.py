"""Where the host waits for a device, counted without one: on the other device of :mod:`tests.other_device`.

On CUDA a kernel is only put in line when Python calls it, so that the device is kept busy as long as nobody asks for a
number. Who does, waits for all that is in line: ``bool(tensor)``, ``tolist``, ``.cpu()``, ``torch.equal``, an index by
a mask, and also an upload, ``torch.tensor(values, device=...)``, unless it is ``non_blocking``.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.other_device import ELSEWHERE, Elsewhere, aten

_ASKING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
}
_BY_INDEX = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
_LIBRARIES = ("/src/inlay/", "/transformers/", "/moshi/", "/accelerate/")


class _Waits(TorchDispatchMode):
    """Notes who waits, by file and function, where that is a function of Inlay's."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def note(self) -> None:
        frames = [f for f in traceback.extract_stack() if any(part in f.filename for part in _LIBRARIES)]
        if frames and _LIBRARIES[0] in frames[-1].filename:
            self.seen.append(f"{frames[-1].filename.partition(_LIBRARIES[0])[2]} {frames[-1].name}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if _waits(func, args, kwargs, [isinstance(operand, Elsewhere) for operand in operands]):
            self.note()
        return func(*args, **kwargs)


def _waits(func: Any, args: Any, kwargs: dict[str, Any], there: list[bool]) -> bool:
    if func in _ASKING:
        return any(there)
    if func is aten._to_copy.default and kwargs.get("device") is not None:
        to_there = torch.device(kwargs["device"]).type == ELSEWHERE
        return to_there != there[0] and not (to_there and kwargs.get("non_blocking"))
    if func is aten.copy_.default:
        return there[0] != there[1]
    if func in _BY_INDEX and there[0]:
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        of_one = func is not aten.index.Tensor and args[2].numel() == 1  # is a masked_fill
        masked = any(index.dtype == torch.bool for index in indices) and not of_one
        return masked or not all(isinstance(index, Elsewhere) for index in indices)
    return False


@contextmanager
def waits() -> Iterator[list[str]]:
    """Within the block, who waits comes to the list: ``file function``. For tests with ``other_device``."""
    mode = _Waits()

    def asked(method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            mode.note()
            return method(tensor, *args, **kwargs)

        return noted

    def uploads(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(data: Any, **options: Any) -> Any:
            device = options.get("device")
            if device is not None and torch.device(device).type == ELSEWHERE and not isinstance(data, Elsewhere):
                mode.note()
            return make(data, **options)

        return made

    with pytest.MonkeyPatch.context() as patch, mode:
        for name in ("tolist", "new_tensor"):  # these come to no dispatcher there
            patch.setattr(Elsewhere, name, asked(getattr(Elsewhere, name)))
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, uploads(getattr(torch, name)))
        yield mode.seen
