"""The scan is the reference: outputs, final state and every gradient, at odd lengths, documents and paddings."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from inlay.fastweight import FastWeightState, fast_weight_linear, fast_weight_linear_reference
from tests.closeness import assert_close, relative_error

B, D, F = 2, 6, 10
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

# Documents of both rows, as (id, length); −1 is padding.
LAYOUTS: dict[str, list[list[tuple[int, int]]] | None] = {
    "one document": None,
    "documents": [[(0, 20), (1, 1), (2, 42)], [(5, 63)]],
    "padding left": [[(-1, 13), (0, 50)], [(0, 63)]],
    "padding right": [[(0, 50), (-1, 13)], [(-1, 63)]],
    "both, and inside": [[(-1, 3), (0, 15), (-1, 4), (0, 15), (1, 20), (-1, 6)], [(2, 30), (-1, 2), (3, 31)]],
}


def ids_of(rows: list[list[tuple[int, int]]] | None) -> Tensor | None:
    if rows is None:
        return None
    return torch.tensor([list(itertools.chain.from_iterable([i] * n for i, n in row)) for row in rows])


def operands(tokens: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return leaf(B, tokens, F), leaf(B, tokens, D), leaf(D, F)


def run(function, tokens, dtype, *, state_gradient: bool = False, state=None, **options):
    """Output, final state and the gradients of z, v and the weight for a fixed random cotangent."""
    z, v, weight = operands(tokens, dtype)
    out, after = function(z, v, weight, eta=0.1, state=state, **options)
    generator = torch.Generator().manual_seed(1)
    loss = (out * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)).sum()
    if state_gradient:
        for part in (after.sum, after.z, after.x):
            loss = (
                loss + (part * torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part.dtype)).sum()
            )
    leaves = [z, v, weight] + ([state.sum] if state is not None and state.sum.requires_grad else [])
    return out, after, torch.autograd.grad(loss, leaves, materialize_grads=True)


def assert_same(fast, slow, tolerance: float) -> None:
    assert_close(fast[0], slow[0], tolerance, "output")
    for name in ("sum", "z", "x"):
        assert_close(getattr(fast[1], name), getattr(slow[1], name), tolerance, f"state.{name}")
    assert torch.equal(fast[1].phase, slow[1].phase)
    assert torch.equal(fast[1].document, slow[1].document)
    for name, a, b in zip(("dz", "dv", "dweight", "dsum"), fast[2], slow[2], strict=False):
        assert_close(a, b, tolerance, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("exposure", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scan_equals_reference(layout: str, chunk_size: int, exposure: float, dtype: torch.dtype) -> None:
    options = {"chunk_size": chunk_size, "exposure": exposure, "documents": ids_of(LAYOUTS[layout])}
    fast = run(fast_weight_linear, 63, dtype, **options)
    slow = run(fast_weight_linear_reference, 63, dtype, **options)
    assert_same(fast, slow, TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [1, 6, 7, 8, 63, 64, 100, 257])
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_any_length_and_gradients_through_the_state(tokens: int, chunk_size: int) -> None:
    options = {"chunk_size": chunk_size, "state_gradient": True}
    fast = run(fast_weight_linear, tokens, torch.float64, **options)
    slow = run(fast_weight_linear_reference, tokens, torch.float64, **options)
    assert_same(fast, slow, 1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("exposure", [0.0, 0.5])
def test_continuing_from_a_state(layout: str, exposure: float) -> None:
    """Rows that stand at different phases, one of which has read nothing, go on as the reference does."""

    def begin() -> FastWeightState:
        z, v, weight = operands(25, torch.float64, seed=3)
        documents = torch.zeros(B, 25, dtype=torch.long)
        documents[0, :6] = -1
        with torch.no_grad():
            _, state = fast_weight_linear_reference(z, v, weight, eta=0.1, chunk_size=7, documents=documents)
        state.sum.requires_grad_()
        return state

    options = {"chunk_size": 7, "exposure": exposure, "documents": ids_of(LAYOUTS[layout]), "state_gradient": True}
    fast = run(fast_weight_linear, 63, torch.float64, state=begin(), **options)
    slow = run(fast_weight_linear_reference, 63, torch.float64, state=begin(), **options)
    assert_same(fast, slow, 1e-10)


@pytest.mark.parametrize("cuts", [[100], [7, 93], [50, 50], [1] * 100, [3, 30, 1, 1, 65]])
def test_pieces_agree_with_the_whole(cuts: list[int]) -> None:
    z, v, weight = operands(100, torch.float64)
    documents = torch.zeros(B, 100, dtype=torch.long)
    documents[0, 40:] = 1
    documents[1, :11] = -1
    whole, end = fast_weight_linear(z, v, weight, eta=0.1, chunk_size=7, documents=documents)
    state, outs = None, []
    for z_piece, v_piece, ids in zip(z.split(cuts, 1), v.split(cuts, 1), documents.split(cuts, 1), strict=True):
        out, state = fast_weight_linear(z_piece, v_piece, weight, eta=0.1, chunk_size=7, documents=ids, state=state)
        outs.append(out)
    assert_close(torch.cat(outs, 1), whole, 1e-12)
    assert state is not None
    assert_close(state.sum, end.sum, 1e-12)
    assert torch.equal(state.phase, end.phase)


@pytest.mark.parametrize("exposure", [0.0, 0.5])
@pytest.mark.parametrize("documents", [None, [[0, 0, 0, 1, 1, 1, 1], [-1, 0, 0, 0, 0, 0, -1]]])
def test_gradcheck(exposure: float, documents: list[list[int]] | None) -> None:
    """Against finite differences, the independent truth."""
    generator = torch.Generator().manual_seed(0)
    z, v, w, s = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in [(2, 7, 4), (2, 7, 3), (3, 4), (2, 3, 4)]
    )
    ids = None if documents is None else torch.tensor(documents)

    def function(z: Tensor, v: Tensor, w: Tensor, s: Tensor):
        state = FastWeightState.empty(2, 3, 4, 3, dtype=torch.float64)
        state.sum = s
        state.document = torch.tensor([0, 0])
        out, after = fast_weight_linear(z, v, w, eta=0.3, chunk_size=3, exposure=exposure, documents=ids, state=state)
        return out, after.sum

    assert torch.autograd.gradcheck(function, (z, v, w, s))


def test_a_case_worked_by_hand() -> None:
    """D = F = 1, C = 2, η = 1: outputs z(w + S), and S grows by the sum of v·z over each chunk."""
    z = torch.tensor([[[1.0], [2.0], [3.0], [4.0], [5.0]]])
    v = torch.tensor([[[1.0], [1.0], [2.0], [0.5], [9.0]]])
    out, state = fast_weight_linear(z, v, torch.tensor([[10.0]]), eta=1.0, chunk_size=2)
    # chunk 1 reads 10; Δ = 1·1 + 1·2 = 3; chunk 2 reads 13; Δ = 2·3 + 0.5·4 = 8; the fifth token reads 21.
    assert out.flatten().tolist() == [10.0, 20.0, 39.0, 52.0, 105.0]
    assert state.sum.item() == 11.0
    assert state.phase.tolist() == [1]
    assert state.z.flatten().tolist() == [5.0, 0.0]


def test_500_chunks_lose_no_accuracy() -> None:
    """Float32 gradients of 500 chunks against float64, as good at the first chunk as at the last."""
    fast = run(fast_weight_linear, 4000, torch.float32, chunk_size=8)
    exact = run(fast_weight_linear, 4000, torch.float64, chunk_size=8)
    slow = run(fast_weight_linear_reference, 4000, torch.float64, chunk_size=8)
    assert_close(exact[2][0], slow[2][0], 1e-10, "float64 dz")
    for name, a, b in zip(("dz", "dv", "dweight"), fast[2], slow[2], strict=True):
        assert_close(a, b, 1e-5, name)
    for part in (slice(0, 80), slice(2000, 2080), slice(3920, 4000)):
        assert_close(fast[2][0][:, part], slow[2][0][:, part], 1e-5, f"dz of tokens {part}")


def test_a_small_sum_beside_a_bf16_weight_acts_by_the_right_amount() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 512, 256, generator=generator).bfloat16()
    v = torch.randn(1, 512, 64, generator=generator).bfloat16()
    weight = torch.randn(64, 256, generator=generator).bfloat16()
    # √C per entry of Δ, so the sum is about 1e-4 of the weight.
    eta = 1e-4 / 16
    out, state = fast_weight_linear(z, v, weight, eta=eta, chunk_size=256)
    without, _ = fast_weight_linear(z, v, weight, eta=0.0, chunk_size=256)
    ratio = float(eta * state.sum.norm() / weight.float().norm())
    assert 0.5e-4 < ratio < 2e-4
    exact, _ = fast_weight_linear_reference(z.double(), v.double(), weight.double(), eta=eta, chunk_size=256)
    plain = z.double() @ weight.double().mT
    assert relative_error((out - without)[:, 256:], (exact - plain)[:, 256:]) < 0.02


def test_autocast_gives_float32_sums_and_close_outputs() -> None:
    z, v, weight = operands(100, torch.float32)
    exact, _ = fast_weight_linear(z, v, weight, eta=0.01, chunk_size=7)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = fast_weight_linear(z, v, weight, eta=0.01, chunk_size=7)
    assert state.sum.dtype == torch.float32
    assert relative_error(out, exact) < 0.01
    grads = torch.autograd.grad(out.sum(), [z, v, weight])
    for a, b in zip(grads, torch.autograd.grad(exact.sum(), [z, v, weight]), strict=True):
        assert relative_error(a, b) < 0.01


def test_under_checkpointing_gradients_are_those_of_the_plain_run() -> None:
    def loss(checkpoint: bool):
        z, v, weight = operands(30, torch.float64)

        def block(z, v, weight):
            return fast_weight_linear(z.tanh(), v, weight, eta=0.1, chunk_size=7)[0]

        if checkpoint:
            out = torch.utils.checkpoint.checkpoint(block, z, v, weight, use_reentrant=False)
        else:
            out = block(z, v, weight)
        return torch.autograd.grad(out.square().sum(), [z, v, weight])

    for a, b in zip(loss(True), loss(False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it where the graph breaks
def test_under_compile_the_result_is_the_same() -> None:
    z, v, weight = operands(30, torch.float32)

    def block(z, v, weight):
        return fast_weight_linear(z * 2, v + 1, weight, eta=0.1, chunk_size=7)[0].relu()

    compiled = torch.compile(block, backend="aot_eager")
    for out, expected in zip(
        torch.autograd.grad(compiled(z, v, weight).sum(), [z, v, weight]),
        torch.autograd.grad(block(z, v, weight).sum(), [z, v, weight]),
        strict=True,
    ):
        assert_close(out, expected, 1e-6)
    assert_close(compiled(z, v, weight), block(z, v, weight), 1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_it_equals_the_reference(dtype: torch.dtype) -> None:
    z, v, weight = (t.detach().to("cuda", dtype) for t in operands(257, torch.float32))
    documents = torch.zeros(B, 257, dtype=torch.long, device="cuda")
    documents[0, 100:] = 1
    out, state = fast_weight_linear(z, v, weight, eta=0.1, chunk_size=64, documents=documents)
    exact, end = fast_weight_linear_reference(
        z.double().cpu(), v.double().cpu(), weight.double().cpu(), eta=0.1, chunk_size=64, documents=documents.cpu()
    )
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    assert_close(out.cpu(), exact, tolerance)
    assert_close(state.sum.cpu(), end.sum, tolerance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be a whole number of at least 1"),
        ({"chunk_size": 7.0}, r"chunk_size must be a whole number of at least 1; got 7\.0"),
        ({"z": torch.zeros(2, 30, F, dtype=torch.long)}, "z must be of a floating-point dtype; got torch.int64"),
        ({"exposure": 1.5}, r"exposure must lie in \[0, 1\]"),
        ({"documents": torch.zeros(2, 3).long()}, r"documents must be a tensor \[B, T\] = \[2, 30\] of integers"),
        ({"documents": torch.zeros(2, 30)}, r"of integers; got torch\.float32 \[2, 30\]"),
        ({"documents": [[0] * 30] * 2}, "of integers; got list"),
        ({"state": FastWeightState.empty(2, D, F, 5)}, "the state is of another memory"),
        ({"z": torch.zeros(2, 29, F)}, r"z must be \[B, T, F\] and v \[B, T, D\] of the same B and T"),
        ({"weight": torch.zeros(F, D)}, r"weight must be \[D, F\]"),
        ({"weight": torch.zeros(D, F, dtype=torch.bfloat16)}, "z and weight must have one dtype outside autocast"),
    ],
)
@pytest.mark.parametrize("form", [fast_weight_linear, fast_weight_linear_reference])
def test_what_does_not_fit_is_refused(form: Callable[..., Any], change: dict, message: str) -> None:
    z, v, weight = operands(30, torch.float32)
    with pytest.raises(ValueError, match=message):
        form(**{"z": z, "v": v, "weight": weight, "eta": 0.1, "chunk_size": 7, **change})


@pytest.mark.parametrize("form", [fast_weight_linear, fast_weight_linear_reference])
def test_an_infinite_target_in_an_open_chunk_stays_out_of_the_sum(form: Callable[..., Any]) -> None:
    z, v, weight = operands(14, torch.float64)
    documents = torch.zeros(B, 14, dtype=torch.long)
    documents[1, 9:] = -1  # its second chunk of 7 stays open
    v = v.detach().clone()
    v[1, 8] = float("inf")
    with torch.no_grad():
        out, state = form(z, v, weight, eta=0.1, chunk_size=7, documents=documents)
    assert torch.isfinite(out).all()
    assert torch.isfinite(state.sum).all()
