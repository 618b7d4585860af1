"""What operators return on tensors without numbers, worked out once and then remembered.

PyTorch's ``FakeTensorMode`` works every call out in Python, in a few hundred microseconds, and a training step has 10⁴
to 10⁵ calls. Nearly all have been made before: blocks are alike, and checkpointing runs them twice. What an operator
returns depends on its numbers and on the shapes, strides and dtypes of its tensors alone, unless it says that it looks
into them. So :class:`Operators` keeps that answer and makes its tensors anew, which halves the time of a dry run.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager, unset_fake_temporarily

_REAL_ELEMENTS = 2**22
"""Integer tensors of more elements (a mask over T × T) are not computed."""

_LOOKS_INTO_TENSORS = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results, which are tensors, lists of them, or something else."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))


@dataclass(frozen=True)
class _Result:
    """A tensor that an operator returned.

    Attributes:
        argument: Which positional argument's storage it shares; None: it has its own.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    argument: int | None

    def again(self, args: tuple[Any, ...]) -> Tensor:
        """The same, on the meta device."""
        if self.argument is None:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        view = torch.empty(0, dtype=self.dtype, device="meta")
        return view.set_(args[self.argument].untyped_storage(), self.offset, self.shape, self.stride)


@dataclass(frozen=True)
class _Answer:
    """What an operator returned: ``results`` as a ``list`` or a ``tuple``; the only one itself if ``kind`` is None."""

    results: tuple[_Result, ...]
    kind: type[list[Any]] | type[tuple[Any, ...]] | None


class Operators:
    """Calls operators within a ``FakeTensorMode``; in one process they share what they remember.

    Integers decide shapes (documents, chunk grids, masks), so where no argument is fake, small integer and boolean
    tensors are computed for real.
    """

    _answers: ClassVar[dict[Hashable, _Answer | None]] = {}
    _real: ClassVar[dict[Hashable, bool]] = {}

    def __call__(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``operator`` returns."""
        fake = next((x for x in tensors_in((*args, *kwargs.values())) if isinstance(x, FakeTensor)), None)
        if fake is None:
            return self._without_fake(operator, args, kwargs)
        key = _key(operator, args, kwargs)
        if key is None:
            return operator(*args, **kwargs)
        if key not in self._answers:
            returned = operator(*args, **kwargs)
            self._answers[key] = _answer(operator, returned, args)
            return returned
        answer = self._answers[key]
        if answer is None:
            return operator(*args, **kwargs)
        with in_kernel_invocation_manager(fake.fake_mode):
            described = [result.again(args) for result in answer.results]
        made = [
            FakeTensor(fake.fake_mode, tensor, result.device)
            for tensor, result in zip(described, answer.results, strict=True)
        ]
        return made[0] if answer.kind is None else answer.kind(made)

    def _without_fake(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not operator._schema.is_mutable and operator is not torch.ops.aten._local_scalar_dense.default:
            key = _key(operator, args, kwargs)
            if key is None or key not in self._real:
                returned = operator(*args, **kwargs)
                real = all(_is_small_integer(tensor) for tensor in tensors_in((returned,)))
                if key is not None:
                    self._real[key] = real
                if not real:
                    return returned
            elif not self._real[key]:
                return operator(*args, **kwargs)
        with unset_fake_temporarily():
            return operator(*args, **kwargs)


def _key(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable | None:
    """What a call's answer depends on; None if on more than that."""
    if operator._schema.is_mutable or not _LOOKS_INTO_TENSORS.isdisjoint(operator.tags):
        return None
    if any(isinstance(x, FakeTensor) and x.constant is not None for x in tensors_in((*args, *kwargs.values()))):
        return None
    return operator, _described(args), tuple(kwargs), _described(kwargs.values())


def _described(values: Iterable[Any]) -> tuple[Hashable, ...]:
    return tuple(
        (isinstance(x, FakeTensor), x.shape, x.stride(), x.storage_offset(), x.dtype, x.is_conj(), x.is_neg())
        if isinstance(x, Tensor)
        else _described(x)
        if isinstance(x, list | tuple)
        else (type(x), x)  # 1, 1.0 and True are equal and give different dtypes
        for x in values
    )


def _answer(operator: Any, returned: Any, args: tuple[Any, ...]) -> _Answer | None:
    """What to remember; None where the same could not be made again."""
    kind = None if isinstance(returned, Tensor) else type(returned)
    if kind not in (None, list, tuple):
        return None
    storages = {x.untyped_storage()._cdata: place for place, x in enumerate(args) if isinstance(x, FakeTensor)}
    results = []
    for tensor in (returned,) if kind is None else returned:
        if not isinstance(tensor, FakeTensor) or tensor.constant is not None or tensor.is_conj() or tensor.is_neg():
            return None
        if any(tensor is argument for argument in args):
            return None
        argument = storages.get(tensor.untyped_storage()._cdata)
        offset = int(tensor.storage_offset())
        result = _Result(tensor.shape, tensor.stride(), offset, tensor.dtype, tensor.fake_device, argument)
        if argument is None and (operator.is_view or not _fills_its_storage(tensor)):
            return None
        results.append(result)
    owned = [tensor.untyped_storage()._cdata for tensor in tensors_in((returned,))]
    if any(result.argument is None for result in results) and len(set(owned)) < len(owned):
        return None  # two results in one storage
    return _Answer(tuple(results), kind)


def _fills_its_storage(tensor: Tensor) -> bool:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (1 + last) * tensor.element_size() if tensor.numel() else 0
    return tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == needed


def _is_small_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() <= _REAL_ELEMENTS
