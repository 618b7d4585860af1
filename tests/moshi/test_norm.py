"""Norms in slices are Kyutai's own, in less memory."""

from __future__ import annotations

import pytest
import torch
from moshi.modules.transformer import RMSNorm
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from inlay.doctor.plan_allocations import Allocations
from inlay.moshi.norm import use_sliced_norms
from tests.closeness import assert_close

FRAMES, WIDTH = 50, 24


def run(norm: RMSNorm, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, gradient of the input and of the weight."""
    x = x.clone().requires_grad_()
    norm.alpha.grad = None
    out = norm(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad, norm.alpha.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("frames", [1, 16, 25, 49])
def test_bit_for_bit_what_the_whole_gives(dtype: torch.dtype, frames: int) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(WIDTH, dtype=torch.float32)
    nn.init.uniform_(norm.alpha)
    x = torch.randn(2, FRAMES, WIDTH).to(dtype)
    whole = run(norm, x)
    undo = use_sliced_norms([nn.Linear(2, 2), norm], frames=frames)
    sliced = run(norm, x)
    assert torch.equal(sliced[0], whole[0])
    assert torch.equal(sliced[1], whole[1])
    assert sliced[2] is not None
    assert whole[2] is not None
    assert_close(sliced[2], whole[2], 1e-6)
    undo()
    assert "forward" not in norm.__dict__


def test_a_frozen_weight_gets_no_gradient_and_without_gradients_nothing_is_sliced() -> None:
    norm = RMSNorm(WIDTH, dtype=torch.float32).requires_grad_(False)
    use_sliced_norms([norm], frames=16)
    x = torch.randn(1, FRAMES, WIDTH)
    assert run(norm, x)[2] is None
    with torch.no_grad():
        assert norm(x).grad_fn is None


def test_nothing_of_the_whole_sequence_is_held_in_float32() -> None:
    """Bytes for each of the input's, at most, in a forward and its backward with the input's gradient."""

    def most(frames: int | None) -> float:
        with FakeTensorMode():
            norm = RMSNorm(64, dtype=torch.float32).requires_grad_(False)
            if frames is not None:
                use_sliced_norms([norm], frames=frames)
            x = torch.empty(1, 6400, 64, dtype=torch.bfloat16, requires_grad=True)
            allocations = Allocations()
            with allocations:
                norm(x).sum().backward()
        return allocations.peak.total / (x.numel() * x.element_size())

    assert most(None) > 8
    assert most(64) < 3.2
