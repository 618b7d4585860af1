"""Muon in stacks steps as torch's does, beside AdamW as each does alone, and goes on from a saved state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from inlay.fastweight import FastWeightConfig, attach
from inlay.train.muon import MuonAdamW, StackedMuon, orthogonalised, split_matrices
from tests.softtoken.local import llama


class Tied(nn.Module):
    """An embedding whose weight is the head's too, a matrix, a bias and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.inner(self.table(ids))))


def loss(model: Tied) -> torch.Tensor:
    ids = torch.arange(10)
    return nn.functional.cross_entropy(model(ids), ids + 1)


def optimizer(model: Tied) -> MuonAdamW:
    return MuonAdamW(*split_matrices([model]), matrix_lr=0.02, lr=0.01, betas=(0.9, 0.98))


def step(model: Tied, *optimizers: torch.optim.Optimizer) -> None:
    model.zero_grad()
    loss(model).backward()
    for one in optimizers:
        one.step()


def equal(a: Tied, b: Tied) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_matrices_are_the_weights_of_linear_layers_that_are_trained_and_not_tied_to_an_embedding() -> None:
    model = Tied()
    matrices, others = split_matrices([model, model.inner])
    assert [id(p) for p in matrices] == [id(model.inner.weight)]
    expected = {id(p) for p in model.parameters()} - {id(model.inner.weight)}
    assert {id(p) for p in others} == expected
    assert len(others) == len(expected)
    model.inner.weight.requires_grad_(False)
    assert split_matrices([model])[0] == []


def test_the_two_matrices_of_a_memory_are_trained_by_muon() -> None:
    """An AdamW step as large as the embeddings want would throw the memory's target about."""
    model = llama(32)
    model.requires_grad_(False)
    config = FastWeightConfig(layers=[0], chunk_size=4)
    memory = attach(model, config).train_only("memory")
    matrices, others = split_matrices([model])
    assert {id(p) for p in matrices} == {id(p) for p in memory.parameters()}
    assert others == []


def test_each_part_steps_as_its_optimizer_does_alone() -> None:
    ours, theirs = Tied(), Tied()
    both = optimizer(ours)
    muon = StackedMuon([theirs.inner.weight], lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    rest = [p for p in theirs.parameters() if p is not theirs.inner.weight]
    adamw = torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.98), weight_decay=0.0)
    for _ in range(5):
        step(ours, both)
        step(theirs, muon, adamw)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0},
        {"adjust_lr_fn": "match_rms_adamw", "nesterov": False},
        {"adjust_lr_fn": "original", "weight_decay": 0.5},
        {},
    ],
    ids=str,
)
def test_stacked_steps_are_torchs_to_the_precision_of_bfloat16(settings: dict[str, Any], monkeypatch: Any) -> None:
    """Five steps of wide, tall and square matrices, in stacks of two and one; torch computes in bfloat16."""
    monkeypatch.setattr("inlay.train.muon._STACK", 2 * 6 * 4)
    shapes = [(6, 4), (4, 6), (6, 4), (5, 5), (6, 4)]
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    pair = StackedMuon(ours, lr=0.01, **settings), torch.optim.Muon(theirs, lr=0.01, **settings)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for one in pair:
            one.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.02 * (b - before).norm()
    assert [*pair[0].state_dict()["state"][0]] == [*pair[1].state_dict()["state"][0]]


def test_orthogonalised_is_its_polynomial_of_the_singular_values() -> None:
    torch.manual_seed(0)
    a, b, c = 3.4445, -4.7750, 2.0315
    for shape in ((3, 7, 4), (3, 4, 7)):
        matrices = torch.randn(shape)
        u, s, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
        s = s / s.norm(dim=-1, keepdim=True)
        for _ in range(5):
            s = a * s + b * s**3 + c * s**5
        expected = (u * s.unsqueeze(-2)) @ vh
        torch.testing.assert_close(orthogonalised(matrices, (a, b, c), 5).double(), expected, rtol=0, atol=1e-4)


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    still, moved = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    moved.grad = torch.eye(3)
    one = StackedMuon([still, moved], lr=0.1)
    one.step()
    assert torch.equal(still, torch.ones(3, 3))
    assert not torch.equal(moved, torch.ones(3, 3))
    assert still not in one.state


def test_a_scheduler_moves_both_learning_rates() -> None:
    both = optimizer(Tied())
    schedule = torch.optim.lr_scheduler.LambdaLR(both, lambda epoch: 0.5**epoch)
    step(Tied(), both)
    schedule.step()
    assert [part.param_groups[0]["lr"] for part in both.parts] == [0.01, 0.005]


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    straight, resumed = Tied(), Tied()
    first, second = optimizer(straight), optimizer(resumed)
    for _ in range(3):
        step(straight, first)
        step(resumed, second)
    fresh = optimizer(resumed)
    fresh.load_state_dict(second.state_dict())
    for group in fresh.param_groups:
        group["lr"] *= 2
    for group in first.param_groups:
        group["lr"] *= 2
    step(straight, first)
    step(resumed, fresh)
    assert equal(straight, resumed)
