"""Loss by position is the cross-entropy one would work out token by token, and packing or batching never changes it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

import inlay
from inlay import FastWeightConfig
from inlay.data import pack_documents
from inlay.evaluate import (
    EvaluationError,
    difference,
    loss_by_position,
    with_and_without_memory,
)
from tests.evaluate.models import VOCAB, bits_by_hand, llama

RANDOM = {"layers": "all", "chunk_size": 4, "init": {"normal": 0.5}}


def documents(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, size=length).tolist() for length in lengths]


def packed(texts: list[list[int]], length: int, packing: str = "cut"):
    names = [str(index) for index in range(len(texts))]
    return pack_documents(texts, names, sequence_length=length, packing=packing, pad_token_id=0)


@pytest.mark.parametrize("memory", [False, True], ids=["base", "memory"])
def test_every_position_has_the_loss_worked_out_by_hand(memory: bool) -> None:
    model, texts = llama(), documents(12, 12, 9)
    if memory:
        inlay.attach(model, FastWeightConfig(**RANDOM, eta=0.05))
    result = loss_by_position(model, packed(texts, 12), batch_size=2)
    by_hand = [bits_by_hand(model, text) for text in texts]
    for place in range(1, 12):
        expected = [bits[place - 1] for bits in by_hand if place <= len(bits)]
        assert result.counts[place] == len(expected)
        assert result.bits[place] == pytest.approx(np.mean(expected), rel=1e-5)
    assert result.counts[0] == 0
    assert np.isnan(result.bits[0])
    everything = np.concatenate(by_hand)
    assert result.tokens == len(everything)
    assert result.mean == pytest.approx(everything.mean(), rel=1e-5)
    for quarter, (low, high) in enumerate(pairwise([0, 3, 6, 9, 12])):
        inside = [bits[place - 1] for bits in by_hand for place in range(max(low, 1), min(high, len(bits) + 1))]
        assert result.quarters()[quarter] == pytest.approx(np.mean(inside), rel=1e-5)


@pytest.mark.parametrize("memory", [False, True], ids=["base", "memory"])
def test_documents_packed_into_a_row_cost_what_they_cost_alone(memory: bool) -> None:
    model, texts = llama(), documents(11, 6, 13)
    if memory:
        inlay.attach(model, FastWeightConfig(**RANDOM, eta=0.05))
    together = packed(texts, 32, "concatenate")
    assert len(together) == 1
    result = loss_by_position(model, together)
    by_hand = [bits_by_hand(model, text) for text in texts]
    assert result.sums[~np.isnan(result.bits)] == pytest.approx(np.concatenate(by_hand), rel=1e-4)

    within = loss_by_position(model, together, position="document")
    for place in range(1, 13):
        expected = [bits[place - 1] for bits in by_hand if place <= len(bits)]
        assert within.counts[place] == len(expected)
        assert within.bits[place] == pytest.approx(np.mean(expected), rel=1e-4)
    assert within.mean == pytest.approx(result.mean, rel=1e-9)


def test_a_model_that_cannot_keep_packed_documents_apart_is_refused() -> None:
    class Blind(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*input_ids.shape, VOCAB)

    with pytest.raises(EvaluationError, match="packing: cut"):
        loss_by_position(Blind(), packed(documents(6, 6), 12, "concatenate"))
    uniform = loss_by_position(Blind(), packed(documents(12, 12), 12))
    assert uniform.bits[1:] == pytest.approx(np.log2(VOCAB))


def test_batching_and_progress() -> None:
    model, data = llama(), packed(documents(16, 16, 16, 16, 16), 16)
    seen: list[tuple[int, int]] = []
    one = loss_by_position(model, data, batch_size=1)
    two = loss_by_position(model, data, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert one.sums == pytest.approx(two.sums, rel=1e-5)
    assert one.fingerprint == two.fingerprint
    some = loss_by_position(model, data, max_sequences=3)
    spaced = loss_by_position(model, data.select([0, 2, 4]))
    np.testing.assert_array_equal(some.sums, spaced.sums)
    assert some.sequences == 3


def test_evaluation_leaves_modes_parameters_and_gradients_as_they_were() -> None:
    model, data = llama(attention_dropout=0.5), packed(documents(16, 16), 16)
    inlay.attach(model, FastWeightConfig(**RANDOM, eta=0.05, exposure=1.0))
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = (loss_by_position(model, data) for _ in range(2))
    np.testing.assert_array_equal(first.sums, second.sums)  # neither dropout nor exposure
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_eta_zero_is_the_same_checkpoint_with_a_memory_of_no_step_bit_for_bit() -> None:
    data = packed(documents(24, 24, 17), 24)
    model = llama()
    inlay.attach(model, FastWeightConfig(**RANDOM, eta=0.05))
    both = with_and_without_memory(model, lambda: loss_by_position(model, data))
    assert list(both) == ["memory", "eta = 0"]

    still = llama()
    inlay.attach(still, FastWeightConfig(**RANDOM, eta=0.0))
    np.testing.assert_array_equal(both["eta = 0"].sums, loss_by_position(still, data).sums)
    # Within the first chunk there is nothing to read yet; after it the memory acts.
    np.testing.assert_array_equal(both["memory"].sums[:5], both["eta = 0"].sums[:5])
    assert (both["memory"].sums[5:] != both["eta = 0"].sums[5:]).all()
    np.testing.assert_array_equal(loss_by_position(model, data).sums, both["memory"].sums)  # on again


def test_without_a_memory_there_is_nothing_to_compare() -> None:
    with pytest.raises(EvaluationError, match="no memory to switch off"):
        with_and_without_memory(llama(), lambda: 0)


def test_the_difference_is_paired_and_refuses_other_sequences() -> None:
    data = packed(documents(*[16] * 6), 16)
    a, b = loss_by_position(llama(0), data), loss_by_position(llama(1), data)
    gap = difference(a, b)
    assert gap.mean.mean == pytest.approx(a.mean - b.mean)
    per_document = (a.document_sums - b.document_sums) / a.document_counts
    for quarter, interval in enumerate(gap.quarters):
        values = per_document[:, quarter]
        half = 2.5706 * values.std(ddof=1) / np.sqrt(6)  # Student's t, 5 degrees of freedom
        assert interval.mean == pytest.approx(values.mean())
        assert interval.half == pytest.approx(half, rel=1e-4)
        assert interval.mean == pytest.approx(a.quarters()[quarter] - b.quarters()[quarter])
    assert difference(a, a).mean.half == 0

    other = loss_by_position(llama(0), packed(documents(*[16] * 6, seed=1), 16))
    with pytest.raises(EvaluationError, match="different sequences"):
        difference(a, other)
    with pytest.raises(EvaluationError, match="different sequences"):
        difference(a, loss_by_position(llama(0), data, max_sequences=5))


@pytest.mark.parametrize("packing", ["cut", "concatenate"])
def test_intervals_are_from_the_spread_between_documents_whichever_sequences_they_fill(packing: str) -> None:
    texts = documents(40, 7, 25, 16)
    data = packed(texts, 16, packing)
    losses = [loss_by_position(llama(seed), data, batch_size=3) for seed in (0, 1)]
    by_hand: list[list[float]] = [[0.0] * len(texts) for _ in losses]
    tokens = [0] * len(texts)
    for row in data:
        for piece, name in enumerate(row["document_names"]):
            ids = row["input_ids"][row["document_ids"] == piece].tolist()
            tokens[int(name)] += len(ids) - 1
            if len(ids) > 1:
                for seed, sums in enumerate(by_hand):
                    sums[int(name)] += sum(bits_by_hand(llama(seed), ids))
    for loss, sums in zip(losses, by_hand, strict=True):
        assert loss.document_sums.sum(1) == pytest.approx(sums, rel=1e-4)
        assert loss.document_counts.sum(1).tolist() == tokens
        assert (loss.documents, loss.sequences) == (4, len(data))
    gap = np.subtract(*by_hand)
    mean = gap.sum() / sum(tokens)
    error = np.sqrt(4 / 3 * np.square(gap - mean * np.array(tokens)).sum()) / sum(tokens)
    assert difference(*losses).mean.half == pytest.approx(3.1824 * error, rel=1e-3)  # Student's t, 3 degrees of freedom


def test_rows_without_names_are_documents_of_their_own() -> None:
    data = packed(documents(20, 12), 16, "concatenate")
    unnamed = [{name: row[name] for name in row if name != "document_names"} for row in data]
    assert [len(row["document_names"]) for row in data] == [1, 2]
    assert loss_by_position(llama(), data).documents == 2
    assert loss_by_position(llama(), unnamed).documents == 3


def test_buckets_hold_every_label_once() -> None:
    result = loss_by_position(llama(), packed(documents(23, 23), 23))
    for n in (1, 4, 5, 23, 100):
        buckets = result.buckets(n)
        assert len(buckets.positions) == min(n, 23)
        assert buckets.counts.sum() == result.tokens
        assert np.nansum(buckets.bits * buckets.counts) == pytest.approx(result.sums.sum())


def test_nothing_to_evaluate_is_an_error() -> None:
    data = packed(documents(16), 16)
    with pytest.raises(EvaluationError, match="nothing to evaluate"):
        loss_by_position(llama(), data.select([]))
    with pytest.raises(EvaluationError, match="batch_size"):
        loss_by_position(llama(), data, batch_size=0)
