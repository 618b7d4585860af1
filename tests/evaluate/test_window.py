"""The final block is scored as if by hand, over the same documents for every context."""

from __future__ import annotations

import numpy as np
import pytest

import inlay
from inlay import FastWeightConfig
from inlay.evaluate import EvaluationError, growing_context, paired_interval, with_and_without_memory
from tests.evaluate.models import bits_by_hand, llama, sliding_window
from tests.evaluate.test_position import RANDOM, documents, packed


@pytest.mark.parametrize("memory", [False, True], ids=["base", "memory"])
def test_each_context_gives_the_loss_worked_out_by_hand(memory: bool) -> None:
    model, texts = llama(), documents(30, 20, 24, 19, 26)
    if memory:
        inlay.attach(model, FastWeightConfig(**RANDOM, eta=0.05))
    result = growing_context(model, texts, block=4, contexts=[16, 1, 5], batch_size=3)
    assert result.contexts.tolist() == [1, 5, 16]
    assert (result.pieces, result.documents, result.left_out) == (4, 4, 1)
    for column, context in enumerate([1, 5, 16]):
        for row, text in enumerate([texts[0], texts[1], texts[2], texts[4]]):
            by_hand = sum(bits_by_hand(model, text[-4 - context :])[-4:])
            assert result.piece_sums[row, column] == pytest.approx(by_hand, rel=1e-5)
    assert result.bits == pytest.approx(result.piece_sums.sum(0) / 16)
    assert result.perplexity == pytest.approx(2**result.bits)


def test_rows_of_a_packed_data_set_are_taken_apart_into_documents() -> None:
    model, texts = llama(), documents(14, 5, 12)
    rows = growing_context(model, packed(texts, 40, "concatenate"), block=4, contexts=[2, 8])
    alone = growing_context(model, texts, block=4, contexts=[2, 8])
    assert (rows.documents, rows.left_out) == (2, 1)
    np.testing.assert_array_equal(rows.piece_sums, alone.piece_sums)
    assert rows.fingerprint == alone.fingerprint


def test_pieces_of_one_document_are_no_independent_measurements() -> None:
    rows = packed(documents(36, 24, 12, 30), 12)
    one, other = (growing_context(llama(seed), rows, block=4, contexts=[2, 8]) for seed in (0, 1))
    assert (one.pieces, one.documents, one.left_out) == (8, 4, 1)
    assert one.piece_documents.tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    assert {name: one.to_json()[name] for name in ("pieces", "documents")} == {"pieces": 8, "documents": 4}
    gap = other.piece_sums - one.piece_sums
    by_document = np.array([gap[:3].sum(0), gap[3:5].sum(0), gap[5:6].sum(0), gap[6:].sum(0)])
    for column, gain in enumerate(one.gain(other)):
        assert gain == paired_interval(by_document[:, column], np.array([12, 8, 4, 8]))
    unnamed = growing_context(llama(), [dict(row, document_names=None) for row in rows], block=4, contexts=[2, 8])
    assert (unnamed.pieces, unnamed.documents) == (8, 8)
    some = growing_context(llama(), rows, block=4, contexts=[8], max_pieces=2)
    assert some.piece_documents.tolist() == [0, 1]


def test_a_model_sees_no_further_than_its_window_but_its_memory_does() -> None:
    windowed = sliding_window(4)
    inlay.attach(windowed, FastWeightConfig(**RANDOM | {"layers": [0]}, eta=0.05))
    both = with_and_without_memory(
        windowed, lambda: growing_context(windowed, documents(40, 40), block=3, contexts=[4, 8, 32])
    )
    flat = both["eta = 0"].bits
    assert flat == pytest.approx([flat[0]] * 3, rel=1e-5)
    assert abs(both["memory"].bits[2] - both["memory"].bits[0]) > 1e-3
    gain = both["memory"].gain(both["eta = 0"])
    assert [one.mean for one in gain] == pytest.approx(flat - both["memory"].bits)


def test_progress_runs_once_through_all_contexts() -> None:
    seen: list[tuple[int, int]] = []
    growing_context(
        llama(), documents(20, 20, 20), block=4, contexts=[2, 8], batch_size=2, progress=lambda *at: seen.append(at)
    )
    assert seen == [(2, 6), (3, 6), (5, 6), (6, 6)]


def test_what_cannot_be_measured_or_compared_is_refused() -> None:
    texts = documents(20, 18)
    with pytest.raises(EvaluationError, match="the longest of 2 has 20"):
        growing_context(llama(), texts, block=4, contexts=[2, 17])
    with pytest.raises(EvaluationError, match="at least 1 token"):
        growing_context(llama(), texts, block=4, contexts=[0, 8])
    a, b = (growing_context(llama(), texts, block=4, contexts=[2, longest]) for longest in (8, 9))
    with pytest.raises(EvaluationError, match="cannot be compared"):
        a.gain(b)
