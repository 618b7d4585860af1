"""What is remembered of an operator is what ``FakeTensorMode`` says of it, storages included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from inlay.doctor import plan_operators
from inlay.doctor.dry_run import dry_run
from inlay.doctor.plan_operators import Operators, tensors_in
from tests.doctor.test_plan import CASES

aten: Any = torch.ops.aten


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[Operators]:
    """With nothing remembered, within the mode."""
    monkeypatch.setattr(Operators, "_answers", {})
    monkeypatch.setattr(Operators, "_real", {})
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield Operators()


CALLS: dict[str, tuple[Any, Callable[[Tensor], tuple[Any, ...]], dict[str, Any]]] = {
    "a new tensor": (aten.mul.Tensor, lambda x: (x, x), {}),
    "a product that broadcasts and promotes": (aten.add.Tensor, lambda x: (x, x[0].double()), {}),
    "a number": (aten.add.Tensor, lambda x: (x, 1), {}),
    "another dtype": (aten._to_copy.default, lambda x: (x,), {"dtype": torch.bfloat16}),
    "a view": (aten.view.default, lambda x: (x, [-1, 2]), {}),
    "a view with an offset": (aten.slice.Tensor, lambda x: (x, 1, 1, 3), {}),
    "a view of a view": (aten.transpose.int, lambda x: (x[:, 1:], 0, 1), {}),
    "several views": (aten.split.Tensor, lambda x: (x, 2, 1), {}),
    "several tensors": (aten.native_layer_norm.default, lambda x: (x, [x.shape[1]], None, None, 1e-5), {}),
    "real integers beside it": (aten.embedding.default, lambda x: (x, torch.zeros(3, 5, dtype=torch.long)), {}),
    "a list of tensors": (aten.cat.default, lambda x: ([x, x],), {}),
    "its own argument": (aten.add_.Tensor, lambda x: (x, x), {}),
    "nothing new": (aten._unsafe_view.default, lambda x: (x.clone(), [-1]), {}),
}


def described(returned: Any, args: tuple[Any, ...]) -> list[Any]:
    storages = [x.untyped_storage()._cdata for x in tensors_in(args)]
    return [
        (
            type(x),
            x.shape,
            x.stride(),
            x.storage_offset(),
            x.dtype,
            x.device,
            x.untyped_storage().nbytes(),
            [storage == x.untyped_storage()._cdata for storage in storages],
        )
        for x in tensors_in((returned,))
    ]


@pytest.mark.parametrize("call", CALLS)
def test_an_answer_that_is_remembered_is_the_modes_own(call: str, operators: Operators) -> None:
    operator, arguments, options = CALLS[call]
    for width in (6, 6, 4):
        args = arguments(torch.empty(4, width))
        wanted, kept = operator(*args, **options), operators(operator, args, options)
        assert described(kept, args) == described(wanted, args)
        assert type(kept) is type(wanted)


def test_only_the_first_of_equal_calls_is_worked_out(operators: Operators, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    dispatch = FakeTensorMode.dispatch

    def counted(self: FakeTensorMode, func: Any, *rest: Any) -> Any:
        calls.append(func)
        return dispatch(self, func, *rest)

    monkeypatch.setattr(FakeTensorMode, "dispatch", counted)
    first, second, longer = (torch.empty(size) for size in (4, 4, 5))
    for x in (first, second, longer, longer):
        operators(aten.mul.Tensor, (x, x), {})
    assert calls.count(aten.mul.Tensor) == 2


def test_numbers_of_another_type_are_another_call(operators: Operators) -> None:
    x = torch.empty_like(torch.empty(3), dtype=torch.long)  # fake
    assert operators(aten.add.Tensor, (x, 1), {}).dtype == torch.long
    assert operators(aten.add.Tensor, (x, 1.0), {}).dtype == torch.float32
    assert operators(aten.add.Tensor, (x, True), {}).dtype == torch.long


def test_small_integers_are_real_and_large_ones_are_not(operators: Operators, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_operators, "_REAL_ELEMENTS", 100)
    for _ in range(2):
        small = operators(aten.arange.default, (5,), {"device": torch.device("cpu")})
        assert small.tolist() == [0, 1, 2, 3, 4]
        assert isinstance(operators(aten.arange.default, (101,), {"device": torch.device("cpu")}), FakeTensor)
        two = operators(aten.select.int, (small, 0, 2), {})
        assert operators(aten._local_scalar_dense.default, (two,), {}) == 2


@pytest.mark.parametrize("case", ["packed documents", "clipped, exposed, hidden target", "gpt2, bf16, memory alone"])
def test_a_dry_run_that_remembers_nothing_says_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered = dry_run(*(CASES[case][i] for i in (0, 2, 1)))
    monkeypatch.setattr(plan_operators, "_key", lambda *_: None)
    assert dry_run(*(CASES[case][i] for i in (0, 2, 1))) == remembered
