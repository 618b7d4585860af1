"""The layer against the equation, worked by hand from taps, clip and reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import find_packed_sequence_indices

import inlay
from inlay.fastweight import fast_weight_linear_reference
from inlay.fastweight.layer import Statistics
from tests.closeness import assert_close, relative_error
from tests.fastweight.families import (
    BY_NAME,
)
from tests.fastweight.test_attach import IDS, LLAMA, logits


def targets_by_hand(x: Tensor, conv: Tensor, projection: Tensor, chunk_size: int, normalize: bool) -> Tensor:
    """V of one document ``[T, D]``: taps, edges and projection written out."""
    if normalize:
        x = x / x.pow(2).mean(-1, keepdim=True).sqrt()
    half = conv.shape[1] // 2
    rows = []
    for t in range(len(x)):
        chunk = t // chunk_size
        mixed = torch.zeros_like(x[0])
        for tap in range(conv.shape[1]):
            s = t + tap - half
            if 0 <= s < len(x) and s // chunk_size == chunk:
                mixed = mixed + conv[:, tap] * x[s]
        rows.append(projection @ mixed)
    return torch.stack(rows)


def clipped_by_hand(z: Tensor, v: Tensor, chunk_size: int, limit: float) -> Tensor:
    """V with every chunk's ‖Vᵀ Z‖ at most ``limit``."""
    pieces = []
    for zc, vc in zip(z.split(chunk_size), v.split(chunk_size), strict=True):
        norm = (vc.T @ zc).norm()
        pieces.append(vc * min(1.0, limit / float(norm)))
    return torch.cat(pieces)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target": "hidden"},
        {"normalize_target": True, "conv_kernel": 3},
        {"init": "next_token", "exposure": 0.5},
        {"max_update_norm": 1.0},
        {"max_update_ratio": 0.1, "conv_kernel": 7},
        {"boundary": "carry"},
        {"chunk_size": 1},
        {"chunk_size": 21},
    ],
    ids=lambda changes: ",".join(changes) or "default",
)
@pytest.mark.parametrize("name", ["gpt-neox", "gpt2", "home-made"])  # exact in float64, unlike those with an RMSNorm
def test_a_whole_forward_is_the_equation_written_by_hand(name: str, changes: dict[str, Any]) -> None:
    family = BY_NAME[name]
    model = family.make().double()
    memory = inlay.attach(model, family.config(**changes)).train_only("all")
    model.train()
    documents = [9, 13]
    document_ids = torch.tensor([[0] * 9 + [1] * 13, [5] * 22])
    entering: list[Tensor] = []
    records: dict[int, tuple[Tensor, Tensor]] = {}
    mlp_inputs: dict[int, Tensor] = {}
    blocks = model.get_submodule(family.blocks)
    handles = [
        blocks[0].register_forward_pre_hook(lambda m, a, k: entering.append((*a, *k.values())[0]), with_kwargs=True)
    ]
    for index, layer in memory.layers.items():

        def note(module: nn.Module, args: Any, out: Tensor, index: int = index) -> None:
            records[index] = (args[0].detach(), out.detach())

        def note_input(module: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
            mlp_inputs[index] = (*args, *kwargs.values())[0].detach()

        mlp = blocks[index].get_submodule(family.projection.rpartition(".")[0])
        handles += [layer.register_forward_hook(note), mlp.register_forward_pre_hook(note_input, with_kwargs=True)]
    ids = family.tokens(2, 22)
    ids[1] = family.tokens(2, 22, seed=3)[1]
    family.logits(model, ids, document_ids=document_ids)
    for handle in handles:
        handle.remove()

    config = memory.config
    for index, layer in memory.layers.items():
        z, out = records[index]
        weight = layer.weight.detach().T if name == "gpt2" else layer.weight.detach()
        bias = layer.bias.detach()
        x = mlp_inputs[index] if config.target == "hidden" else entering[0].detach()
        limit = config.max_update_norm
        if config.max_update_ratio is not None:
            limit = config.max_update_ratio * float(weight.norm())
        for row, lengths in ((0, [22] if config.boundary == "carry" else documents), (1, [22])):
            at = 0
            for length in lengths:
                span = slice(at, at + length)
                v = targets_by_hand(
                    x[row, span],
                    layer.target.conv.detach(),
                    layer.target.projection.detach(),
                    config.chunk_size,
                    config.normalize_target,
                )
                if limit is not None:
                    assert any(
                        (vc.T @ zc).norm() > limit for zc, vc in zip(z[row, span].split(4), v.split(4), strict=True)
                    )
                    v = clipped_by_hand(z[row, span], v, config.chunk_size, limit)
                expected, _ = fast_weight_linear_reference(
                    z[row : row + 1, span],
                    v.unsqueeze(0),
                    weight,
                    eta=config.eta,
                    chunk_size=config.chunk_size,
                    exposure=config.exposure,
                )
                assert_close(out[row : row + 1, span], expected + bias, 1e-6, f"block {index}, row {row}, at {at}")
                plain = z[row, span] @ weight.T + bias
                if length > config.chunk_size:
                    assert relative_error(out[row, span], plain) > 1e-3
                at += length


def test_normalized_targets_survive_an_embedding_that_is_zero() -> None:
    model = LLAMA.make().train()
    memory = inlay.attach(model, LLAMA.config(normalize_target=True)).train_only("all")
    embedding = model.model.embed_tokens.weight
    with torch.no_grad():
        embedding[IDS[0, 3]] = 0
    LLAMA.loss(model, IDS).backward()
    memory.raise_if_not_finite()
    assert torch.isfinite(embedding.grad).all()
    assert embedding.grad.abs().max() < 1e3
    assert all(torch.isfinite(p.grad).all() for p in memory.parameters())


def test_documents_are_read_off_the_positions_as_transformers_reads_them() -> None:
    """A position that does not follow the one before it starts a document, wherever it jumps to."""
    rows = [[0, 1, 2, 3, 4, 5, 6, 7], [3, 4, 0, 1, 2, 0, 0, 1], [0, 1, 7, 8, 9, 3, 4, 5]]
    positions = torch.tensor(rows)
    model = LLAMA.make()
    inlay.attach(model, LLAMA.config(chunk_size=1))
    expected = find_packed_sequence_indices(positions)
    ids = LLAMA.tokens(3, 8)
    by_ids = logits(model, ids, position_ids=positions, document_ids=expected)
    assert torch.equal(logits(model, ids, position_ids=positions), by_ids)
    assert relative_error(logits(model, ids, position_ids=positions, document_ids=torch.zeros_like(ids)), by_ids) > 0.01


def test_carry_reads_across_documents_and_reset_does_not() -> None:
    document_ids = torch.tensor([0] * 10 + [1] * 12).expand(2, -1)
    outputs = {}
    for boundary in ("reset", "carry"):
        model = LLAMA.make()
        torch.manual_seed(5)
        inlay.attach(model, LLAMA.config(boundary=boundary))
        outputs[boundary] = logits(model, document_ids=document_ids)
        outputs[f"{boundary}, one"] = logits(model)
    assert torch.equal(outputs["carry"], outputs["carry, one"])
    assert relative_error(outputs["reset"], outputs["reset, one"]) > 0.01
    assert torch.equal(outputs["reset, one"], outputs["carry, one"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 40_000, -1])
def test_a_number_that_is_none_is_seen_wherever_it_stands(value: float, place: int, dtype: torch.dtype) -> None:
    statistics, output = Statistics(), torch.randn(2, 400, 60).to(dtype)
    statistics.watch(output)
    statistics.watch(output[:, :0])
    assert not statistics.nonfinite
    output.view(-1)[place] = value
    statistics.watch(output)
    statistics.watch(torch.zeros(2, 3, 4))
    assert statistics.nonfinite


class Copies(TorchDispatchMode):
    """Notes operators that make a new tensor of one of some sizes."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() in self.sizes and func._schema.returns[0].alias_info is None:
            self.seen.append(str(func))
        return out


def test_norm_and_watch_make_no_copy_of_a_weight_or_an_output() -> None:
    """At 32,000 frames of Moshi 7B: 180 MB in float32 of W0 at each forward, 650 MB of masks and magnitudes."""
    layer = inlay.attach(BY_NAME["llama"].make().bfloat16(), BY_NAME["llama"].config()).layers[0]
    output = torch.randn(2, 30, layer.out_features).bfloat16()
    with Copies(layer.weight.numel(), output.numel()) as copies:
        layer.base_norm()
        layer.statistics.watch(output)
    assert not copies.seen
