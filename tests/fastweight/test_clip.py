"""Clipping: the norm without the update, the scale, the count, and what it does to the gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.fastweight import FastWeightProjection, clip_targets, fast_weight_linear, update_norms
from tests.closeness import assert_close, relative_error
from tests.fastweight.families import BY_NAME, enable_checkpointing

LLAMA = BY_NAME["llama"]
B, D, F = 2, 6, 10


def operands(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(B, tokens, F, generator=generator, dtype=torch.float64)
    v = torch.randn(B, tokens, D, generator=generator, dtype=torch.float64)
    return z.to(dtype), v.to(dtype)


def norms_by_hand(z: Tensor, v: Tensor, chunk_size: int) -> Tensor:
    """‖Vᵀ Z‖ of every chunk, from the updates themselves."""
    return torch.stack(
        [
            torch.stack([(vc.T @ zc).norm() for zc, vc in zip(zr.split(chunk_size), vr.split(chunk_size), strict=True)])
            for zr, vr in zip(z.double(), v.double(), strict=True)
        ]
    )


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
@pytest.mark.parametrize("tokens", [1, 63, 64, 100])
def test_the_norms_are_those_of_the_updates(tokens: int, chunk_size: int) -> None:
    z, v = operands(tokens)
    assert_close(update_norms(z, v, chunk_size), norms_by_hand(z, v, chunk_size), 1e-12)
    z, v = operands(tokens, torch.float32)
    assert_close(update_norms(z, v, chunk_size), norms_by_hand(z, v, chunk_size), 1e-5)


def test_the_norms_do_not_lose_accuracy_under_autocast_or_in_bf16() -> None:
    z, v = operands(100, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(update_norms(z, v, 7), norms_by_hand(z, v, 7), 1e-5)
    z, v = operands(100, torch.bfloat16)
    assert_close(update_norms(z, v, 7), norms_by_hand(z, v, 7), 1e-5)


@pytest.mark.parametrize("limit", [11.0, 20.0])
def test_clipped_updates_have_the_limit_and_the_others_are_untouched(limit: float) -> None:
    z, v = operands(30)
    before = norms_by_hand(z, v, 7)
    assert bool((before > limit).any()), "nothing to clip"
    assert bool((before < limit).any()), "nothing to leave alone"
    clipped, scale = clip_targets(z, v, 7, limit)
    assert_close(norms_by_hand(z, clipped, 7), before.clamp(max=limit), 1e-12)
    assert torch.equal(scale < 1, before > limit)
    untouched = (before < limit).repeat_interleave(7, 1)[:, :30]
    assert torch.equal(clipped[untouched], v[untouched])


@pytest.mark.parametrize("limit", [4.0, 100.0])
def test_gradcheck(limit: float) -> None:
    """Through the scale too, where the limit bites and where it does not."""
    z, v = (x[:1, :8, :3].clone().requires_grad_() for x in operands(8))
    norms = norms_by_hand(z, v, 3)
    assert bool((norms > limit).any()) == (limit < 100)

    def function(z: Tensor, v: Tensor) -> Tensor:
        clipped, _ = clip_targets(z, v, 3, limit)
        weight = torch.zeros(3, 3, dtype=torch.float64)
        return fast_weight_linear(z, clipped, weight, eta=0.3, chunk_size=3)[0]

    assert torch.autograd.gradcheck(function, (z, v))


@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e3])
def test_a_fresh_zero_target_gets_a_finite_gradient_as_if_unclipped(limit: float) -> None:
    z, v = operands(14, torch.float32)
    z, v = z.requires_grad_(), torch.zeros_like(v).requires_grad_()
    clipped, scale = clip_targets(z, v, 7, limit)
    assert torch.equal(scale, torch.ones_like(scale))
    cotangent = torch.randn(v.shape, generator=torch.Generator().manual_seed(1))
    dz, dv = torch.autograd.grad((clipped * cotangent).sum(), [z, v])
    assert torch.equal(dv, cotangent)
    assert torch.equal(dz, torch.zeros_like(dz))


def operands_of(layer: FastWeightProjection, model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Z and the unclipped V of a layer in a forward of unpadded ``ids``."""
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, args, out: seen.append(args[0])),
        layer.target.register_forward_hook(lambda module, args, out: seen.append(out)),
    ]
    with torch.no_grad():
        LLAMA.logits(model, ids)
    for handle in handles:
        handle.remove()
    v, z = seen
    return z, v


def test_the_ratio_is_relative_to_the_norm_of_the_slow_weight() -> None:
    ids = LLAMA.tokens(2, 22)
    limits = {}
    for key in ("norm", "ratio"):
        model = LLAMA.make()
        norm = float(model.model.layers[2].mlp.down_proj.weight.detach().norm())
        torch.manual_seed(1)
        changes = {"max_update_norm": 0.01 * norm} if key == "norm" else {"max_update_ratio": 0.01}
        memory = inlay.attach(model, LLAMA.config(layers=[2], **changes))
        with torch.no_grad():
            limits[key] = LLAMA.logits(model, ids)
            with memory.disabled():
                base = LLAMA.logits(model, ids)
    assert_close(limits["ratio"], limits["norm"], 1e-6)
    assert relative_error(limits["norm"], base) > 1e-6


def test_updates_are_clipped_where_either_limit_is_set() -> None:
    assert not LLAMA.config().clips
    assert LLAMA.config(max_update_norm=1.0).clips
    assert LLAMA.config(max_update_ratio=0.1).clips


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_base_norm_is_that_of_the_slow_weight_and_unknown_where_it_is_quantized(dtype: torch.dtype) -> None:
    memory = inlay.attach(LLAMA.make().to(dtype), LLAMA.config())
    layer = memory.layers[2]
    expected = layer.weight.detach().double().square().sum().sqrt()
    assert_close(layer.base_norm(), expected, 1e-12 if dtype == torch.float64 else 1e-6)
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    assert torch.isnan(layer.base_norm())


def test_how_often_it_bit_is_counted_over_complete_chunks() -> None:
    """22 tokens in chunks of 4: five complete chunks a row, and a rest that is never written."""
    model, ids = LLAMA.make(), LLAMA.tokens(2, 22)
    memory = inlay.attach(model, LLAMA.config(layers=[1], max_update_norm=1e9))
    z, v = operands_of(memory.layers[1], model, ids)
    norms = norms_by_hand(z, v, 4)
    limit = float(norms[:, :5].median())
    expected = int((norms[:, :5] > limit).sum())
    assert 0 < expected < 10
    assert memory.clip_rate() == {1: 0.0}
    assert int(memory.layers[1].statistics.updates) == 10
    state = model.state_dict()
    memory.detach()
    memory = inlay.attach(model, LLAMA.config(layers=[1], max_update_norm=limit))
    model.load_state_dict(state)
    with torch.no_grad():
        LLAMA.logits(model, ids)
    assert int(memory.layers[1].statistics.clipped) == expected
    assert memory.clip_rate() == {1: expected / 10}
    memory.clear_statistics()
    assert memory.clip_rate() == {1: 0.0}


def test_the_count_knows_padding_and_documents() -> None:
    model, ids = LLAMA.make(), LLAMA.tokens(2, 22)
    memory = inlay.attach(model, LLAMA.config(layers=[1], max_update_norm=1e-6))
    mask = torch.ones(2, 22, dtype=torch.long)
    mask[1, :9] = 0  # 13 tokens are left: three chunks
    documents = torch.tensor([[0] * 6 + [1] * 16, [0] * 22])  # one chunk and a rest, then four chunks
    with torch.no_grad():
        LLAMA.logits(model, ids, attention_mask=mask, document_ids=documents)
    assert int(memory.layers[1].statistics.updates) == 8
    assert int(memory.layers[1].statistics.clipped) == 8


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_chunk_that_checkpointing_computes_twice_is_counted_once(reentrant: bool) -> None:
    model, ids = LLAMA.make().train(), LLAMA.tokens(2, 22)
    memory = inlay.attach(model, LLAMA.config(max_update_norm=1e-6))
    enable_checkpointing(model, reentrant=reentrant)
    LLAMA.loss(model, ids).backward()
    assert [int(layer.statistics.updates) for layer in memory.layers.values()] == [10, 10]


@pytest.mark.parametrize("name", ["conv", "projection"])
def test_the_gradient_of_a_clipped_memory_falls_as_one_over_its_parameters(name: str) -> None:
    """DESIGN, section 7: once clipped, Δ does not depend on the scale of θ. Unclipped, the gradient does not fall."""

    def gradient(scale: float, limit: float | None) -> Tensor:
        model = LLAMA.make().train()
        torch.manual_seed(1)
        memory = inlay.attach(model, LLAMA.config(layers=[1], max_update_norm=limit)).train_only("memory")
        parameter = getattr(memory.layers[1].target, name)
        with torch.no_grad():
            parameter.mul_(scale)
        LLAMA.loss(model, LLAMA.tokens(2, 22)).backward()
        if limit is not None:
            assert memory.clip_rate() == {1: 1.0}
        return parameter.grad

    small, large = gradient(1.0, 1e-3), gradient(100.0, 1e-3)
    assert_close(large * 100, small, 1e-3)
    assert float(gradient(0.02, None).norm()) < 3 * float(gradient(0.01, None).norm())
    assert relative_error(gradient(0.02, None) * 2, gradient(0.01, None)) > 0.5
