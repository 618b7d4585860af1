"""Who holds how many bytes at every moment of a step whose floating-point numbers do not exist.

A tensor under PyTorch's ``FakeTensorMode`` has a shape, a dtype and a storage of the right size, but no memory.
Autograd, hooks, checkpointing and Python's own reference counts treat it like any other, so its storage is freed
exactly when the real one would be. :class:`Allocations` stands above that mode, sees what every operator returns, and
follows each storage from there to its end: the sum over the living is the memory of the step, its maximum the peak.

What a kernel allocates for itself while it runs is not returned by any operator; where that matters, ``hidden`` says
how much it is.
"""

from __future__ import annotations

import functools
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from inlay.doctor.plan_operators import Operators, tensors_in

Kind = Literal["weights", "gradients", "optimizer", "blocks", "attention", "memory", "head"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Phase = Literal["forward", "backward", "optimizer"]

_KEEPS_STORAGE = frozenset({"resize_", "set_", "resize_as_"})
_AFTER_ALL_NODES = 2**63
"""Gradients are accumulated by nodes that belong to no forward operator: their number is 2⁶⁴ − 1."""


@dataclass(frozen=True)
class Scope:
    """Where in the model an operator runs.

    Attributes:
        block: Index of the decoder block; −1 outside all of them.
        kind: What its results are booked as.
    """

    block: int
    kind: Kind


OUTSIDE = Scope(-1, "head")


@dataclass(frozen=True)
class Moment:
    """What is held at one moment.

    Attributes:
        phase: Part of the step that runs.
        scope: Where in the model.
        held: Bytes of each of ``KINDS``.
    """

    phase: Phase
    scope: Scope
    held: tuple[int, ...]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.held)


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage made while it is the topmost mode, above a ``FakeTensorMode``.

    Args:
        hidden: Bytes that a call of an operator needs while it runs beyond what it returns: ``hidden(operator,
            arguments, scope)``.

    Attributes:
        phase: Which part of the step runs; set by whoever runs it.
        peak: The moment at which most was held; None before anything was made.
    """

    def __init__(self, hidden: Callable[[Any, tuple[Any, ...], Scope], int] = lambda *_: 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase: Phase = "forward"
        self.peak: Moment | None = None
        self._hidden = hidden
        self._operators = Operators()
        self._held = [0] * len(KINDS)
        self._storages: dict[int, tuple[weakref.ref[Any], int, int]] = {}
        self._scopes: list[Scope] = [OUTSIDE]
        self._booked_as: Kind | None = None
        # From which autograd node on, by number, a scope's operators made the graph.
        self._first_nodes: list[int] = [0]
        self._node_scopes: list[Scope] = [OUTSIDE]

    @contextmanager
    def booked_as(self, kind: Kind) -> Iterator[None]:
        """Within the block every result is booked as ``kind``, wherever it is made."""
        before, self._booked_as = self._booked_as, kind
        try:
            yield
        finally:
            self._booked_as = before

    def book(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Book tensors that were made as something else as ``kind`` from now on."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._storages:
                reference, size, was = self._storages[key]
                now = KINDS.index(kind)
                self._held[was] -= size
                self._held[now] += size
                self._storages[key] = (reference, size, now)
            else:
                self._follow(tensor, kind)

    def watch(self, module: nn.Module, scope: Scope) -> None:
        """Book what is made within ``module``, and later in the backward of it, under ``scope``."""
        module.register_forward_pre_hook(lambda *_: self._enter(scope))
        module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _enter(self, scope: Scope) -> None:
        self._scopes.append(scope)
        self._note_nodes(scope)

    def _leave(self) -> None:
        self._scopes.pop()
        self._note_nodes(self._scopes[-1])

    def _note_nodes(self, scope: Scope) -> None:
        self._first_nodes.append(torch._C._autograd._get_sequence_nr())
        self._node_scopes.append(scope)

    def _scope(self) -> Scope:
        """Of the module that runs, or, in its backward, ran."""
        scope = self._scopes[-1]
        if scope is OUTSIDE and (node := torch._C._current_autograd_node()) is not None:
            number = node._sequence_nr()
            if number < _AFTER_ALL_NODES:
                return self._node_scopes[bisect_right(self._first_nodes, number) - 1]
        return scope

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        kwargs = kwargs or {}
        scope = self._scope()
        if _writes_only(func) and any(isinstance(x, FakeTensor) for x in tensors_in((*args, *kwargs.values()))):
            result = args[0] if func._schema.returns else None
        else:
            result = self._operators(func, args, kwargs)
        new = [self._follow(tensor, self._booked_as or _kind_of(tensor, scope)) for tensor in tensors_in((result,))]
        hidden = self._hidden(func, args, scope)
        if hidden or any(new):
            self._note(scope, hidden)
        return result

    def _follow(self, tensor: Tensor, kind: Kind) -> bool:
        """Count the tensor's storage until it is freed; whether it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return False

        def freed(_: Any) -> None:
            _, size, was = self._storages.pop(key)
            self._held[was] -= size

        size, index = storage.nbytes(), KINDS.index(kind)
        self._storages[key] = (weakref.ref(storage, freed), size, index)
        self._held[index] += size
        return True

    def _note(self, scope: Scope, hidden: int) -> None:
        held = list(self._held)
        held[KINDS.index(self._booked_as or scope.kind)] += hidden
        if self.peak is None or self.peak.total < sum(held):
            self.peak = Moment(self.phase, scope, tuple(held))


def _kind_of(tensor: Tensor, scope: Scope) -> Kind:
    """What a new tensor is booked as; integers outside the blocks are the masks that attention reads."""
    return "attention" if scope is OUTSIDE and not tensor.is_floating_point() else scope.kind


@functools.cache
def _writes_only(func: Any) -> bool:
    """Whether an operator does nothing but write into its first argument: then there is nothing to run."""
    schema = func._schema
    name = schema.name.rsplit("::", 1)[-1]
    first = schema.arguments[0] if schema.arguments else None
    written = first is not None and first.alias_info is not None and first.alias_info.is_write
    if not written or name in _KEEPS_STORAGE or any(argument.is_out for argument in schema.arguments):
        return False
    in_place = name.endswith("_") and torch.Tag.inplace_view not in func.tags
    return in_place and len(schema.returns) <= 1
