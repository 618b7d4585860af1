"""The vital signs are what turning the memory off, counting on the fingers and adding up outer products give."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import inlay
from inlay.doctor.vitals import LayerVitals, fetch, layer_vitals
from inlay.fastweight.layer import FastWeightProjection
from tests.closeness import assert_close
from tests.fastweight.families import BY_NAME

LLAMA = BY_NAME["llama"]
CHUNK = 4
ETA = 0.05

# Rows of document ids: −1 is padding, and a new number starts a document.
WHOLE = [[0] * 14, [0] * 14]
FULL = [[0] * 12, [0] * 12]
PACKED = [
    [0] * 9 + [1] * 4 + [2],  # 3 chunks, 1 chunk, 1 chunk
    [-1] * 2 + [0] * 3 + [1] * 8 + [-1],  # padding on both sides; 1 chunk, 2 chunks
    [0] * 4 + [1] * 10,
]


@dataclass
class Forward:
    """What the memory layer took and gave in one forward, and its vital signs."""

    z: Tensor
    output: Tensor
    vitals: LayerVitals | None


def forward(memory: inlay.Memory, ids: Tensor, documents: list[list[int]]) -> Forward:
    layer: FastWeightProjection = memory.layers[0]
    taken: list[Tensor] = []
    vitals: list[LayerVitals] = []
    handle = layer.register_forward_hook(lambda module, args, output: taken.extend([args[0], output]))
    layer.observer = lambda seen: vitals.append(layer_vitals(layer, seen))
    with torch.no_grad():
        memory.model(input_ids=ids, document_ids=torch.tensor(documents), use_cache=False)
    layer.observer = None
    handle.remove()
    return Forward(*taken, vitals[0] if vitals else None)


def attached(**changes: Any) -> tuple[inlay.Memory, Tensor]:
    model = LLAMA.make()
    torch.manual_seed(1)
    memory = inlay.attach(model, LLAMA.config(layers=[0], chunk_size=CHUNK, eta=ETA, **changes))
    return memory, LLAMA.tokens(3, 14)


def spans(row: list[int]) -> list[list[int]]:
    """Where the tokens of each document of a row stand."""
    return [[t for t, name in enumerate(row) if name == document] for document in sorted(set(row) - {-1})]


@pytest.mark.parametrize("documents", [WHOLE, FULL, PACKED], ids=["whole rows", "full chunks", "packed"])
@pytest.mark.parametrize("changes", [{}, {"max_update_norm": 1.0}, {"exposure": 0.5}], ids=["plain", "clip", "exposed"])
def test_the_output_share_is_what_goes_when_the_memory_is_off(
    documents: list[list[int]], changes: dict[str, Any]
) -> None:
    memory, ids = attached(**changes)
    memory.model.train()  # for exposure acts in training only
    ids = ids[: len(documents), : len(documents[0])]
    on = forward(memory, ids, documents)
    with memory.disabled():
        off = forward(memory, ids, documents)
    assert torch.equal(on.z, off.z)

    reads = torch.zeros(ids.shape, dtype=torch.bool)
    for b, row in enumerate(documents):
        for places in spans(row):
            reads[b, places[CHUNK:]] = True
    part, whole = (on.output - off.output)[reads].norm(), on.output[reads].norm()
    assert on.vitals is not None
    assert_close(on.vitals.output_share, part / whole, 1e-5, "share")
    assert 0.01 < float(part / whole) < 2  # a share of nothing would prove nothing


@pytest.mark.parametrize("documents", [WHOLE, FULL, PACKED], ids=["whole rows", "full chunks", "packed"])
@pytest.mark.parametrize("boundary", ["reset", "carry"])
def test_the_sum_norm_is_that_of_the_updates_of_the_last_documents_full_chunks(
    documents: list[list[int]], boundary: str
) -> None:
    memory, ids = attached(boundary=boundary)
    ids = ids[: len(documents), : len(documents[0])]
    seen = forward(memory, ids, documents)
    layer = memory.layers[0]
    x0 = memory.model.get_input_embeddings()(ids)
    squares = []
    for b, row in enumerate(documents):
        last = spans(row)[-1] if boundary == "reset" else [t for t, name in enumerate(row) if name >= 0]
        total = torch.zeros(layer.out_features, layer.in_features)
        for start in range(0, len(last) - CHUNK + 1, CHUNK):
            chunk = last[start : start + CHUNK]
            total += layer.target(x0[b : b + 1, chunk])[0].detach().T @ seen.z[b, chunk]
        squares.append(total.norm() ** 2)
    expected = ETA * torch.stack(squares).mean().sqrt() / layer.weight.norm()
    assert seen.vitals is not None
    assert_close(seen.vitals.sum_norm, expected, 1e-5, "‖S‖")


@pytest.mark.parametrize("documents", [WHOLE, FULL, PACKED], ids=["whole rows", "full chunks", "packed"])
def test_dead_chunks_are_the_last_of_each_document(documents: list[list[int]]) -> None:
    memory, ids = attached()
    seen = forward(memory, ids[: len(documents), : len(documents[0])], documents)
    lengths = [len(places) for row in documents for places in spans(row)]
    chunks = sum(math.ceil(length / CHUNK) for length in lengths)
    assert seen.vitals is not None
    assert float(seen.vitals.dead_chunks) == pytest.approx(len(lengths) / chunks)


def test_where_no_token_can_read_there_is_no_share_and_every_chunk_is_dead() -> None:
    memory, ids = attached()
    seen = forward(memory, ids[:1, :5], [[0, 0, 1, 1, 1]])
    assert seen.vitals is not None
    assert math.isnan(seen.vitals.output_share)
    assert float(seen.vitals.dead_chunks) == 1.0
    assert float(seen.vitals.sum_norm) == 0.0


def test_a_share_below_the_resolution_of_bf16_is_still_seen() -> None:
    shares = []
    for dtype in (torch.float32, torch.bfloat16):
        memory, ids = attached()
        memory.model.to(dtype)
        for parameter in memory.parameters():
            parameter.data = parameter.data.float()
        with memory.using(eta=1e-6):
            vitals = forward(memory, ids, PACKED).vitals
        assert vitals is not None
        shares.append(float(vitals.output_share))
    assert shares[0] < 2**-9
    assert shares[1] == pytest.approx(shares[0], rel=0.03)


def test_fetched_values_keep_their_names() -> None:
    assert fetch({}) == {}
    fetched = fetch({"a": torch.tensor(3), ("b", 1): torch.tensor(0.5, dtype=torch.bfloat16)})
    assert fetched == {"a": 3.0, ("b", 1): 0.5}
