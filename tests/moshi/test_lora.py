"""Adapters in half the memory are Kyutai's own in everything else."""

from __future__ import annotations

import pytest
import torch
from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from inlay.doctor.plan_allocations import Allocations
from inlay.moshi.lora import LeanLoRALinear, LoraConfig, add_lora, lora_layers
from tests.closeness import assert_close
from tests.moshi.models import make_codes, make_lm, outputs

ADAPTERS = LoraConfig(enable=True, rank=3, scaling=1.7)


def test_the_same_layers_are_wrapped_under_the_same_names() -> None:
    ours, theirs = make_lm(), make_lm()
    add_lora(ours, ADAPTERS)
    replace_all_linear_with_lora(theirs, rank=3, scaling=1.7)
    shapes = [{name: p.shape for name, p in lm.named_parameters()} for lm in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert [*map(type, lora_layers(ours))] == [LeanLoRALinear for _ in lora_layers(theirs)]


def test_output_and_gradients_are_upstreams() -> None:
    ours, theirs = make_lm(), make_lm()
    add_lora(ours, ADAPTERS)
    replace_all_linear_with_lora(theirs, rank=3, scaling=1.7)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in ours.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    theirs.load_state_dict(ours.state_dict())
    results = []
    for lm in (ours, theirs):
        logits = outputs(lm, make_codes())[0]
        logits.square().mean().backward()
        results.append(logits)
    assert_close(results[0], results[1], 1e-5)
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None and parameter.grad.norm() > 0:
            other = ours.get_parameter(name).grad
            assert other is not None, name
            assert_close(other, parameter.grad, 1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_of_what_upstreams_layer_holds(autocast: bool) -> None:
    """Results of the layer's width, at most, in a forward and its backward: two against four."""

    def most(kind: type[LoRALinear]) -> float:
        with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            layer = kind(8, 4096, rank=2, scaling=2.0, dtype=torch.float32)
            x = torch.empty(1000, 8, requires_grad=True)
            allocations = Allocations()
            with allocations:
                out: Tensor = layer(x)
                out.backward(torch.empty_like(out))
            assert allocations.peak is not None
            return allocations.peak.total / out.nbytes

    assert most(LoRALinear) > 3.9
    assert most(LeanLoRALinear) < 2.6


def test_the_layer_is_its_merged_weight() -> None:
    layer = LeanLoRALinear(4, 6, rank=2, scaling=2.0, dtype=torch.float64)
    layer.frozen_W = nn.Linear(4, 6, bias=False, dtype=torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64)
    weight = layer.frozen_W.weight + 2.0 * layer.lora_B.weight @ layer.lora_A.weight
    torch.testing.assert_close(layer(x), x @ weight.T)
    torch.testing.assert_close(layer.merge_weight(), weight.detach())
