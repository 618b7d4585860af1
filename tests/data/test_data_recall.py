"""Recall sequences ask exactly what they told, at a distance that is stated, and nothing but the pair gives it away."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlay.data import RecallConfig, RecallDataset, collate
from inlay.data.packing import NO_LABEL, TOKEN_COLUMNS


@st.composite
def configs(draw: st.DrawFn) -> RecallConfig:
    pairs = draw(st.integers(1, 9))
    length = draw(st.integers(4 * pairs, 80))
    return RecallConfig(
        task="recall",
        sequence_length=length,
        pairs=pairs,
        keys=draw(st.integers(pairs, 20)),
        values=draw(st.integers(2, 20)),
        min_distance=draw(st.integers(1, length - length // 2 - 1)),
        eval_examples=5,
        seed=draw(st.integers(0, 1000)),
    )


@given(config=configs(), index=st.integers(0, 4))
def test_each_pair_is_told_once_and_asked_once_with_its_distance(config: RecallConfig, index: int) -> None:
    row = RecallDataset(config, "eval")[index]
    ids, labels, distances = row["input_ids"], row["labels"], row["distances"]
    half = config.sequence_length // 2
    is_key = (ids >= 1) & (ids <= config.keys)
    told = {ids[place]: place for place in np.flatnonzero(is_key[:half])}
    asked = {ids[place]: place for place in half + np.flatnonzero(is_key[half:])}
    assert told.keys() == asked.keys()
    assert len(told) == config.pairs
    assert is_key.sum() == 2 * config.pairs
    for key, place in told.items():
        question = asked[key]
        assert place + 1 < half
        assert ids[question + 1] == ids[place + 1] == labels[question + 1] > config.keys
        assert distances[question + 1] == question - (place + 1) >= config.min_distance
    assert (labels != NO_LABEL).sum() == (distances != 0).sum() == config.pairs
    assert (ids == 0).sum() == config.sequence_length - 4 * config.pairs


@given(config=configs())
def test_a_row_is_one_document_without_padding(config: RecallConfig) -> None:
    dataset = RecallDataset(config, "train")
    row = dataset[0]
    assert row["input_ids"].max() < dataset.vocab_size
    assert not row["document_ids"].any()
    assert row["attention_mask"].all()
    np.testing.assert_array_equal(row["position_ids"], np.arange(config.sequence_length))


def test_an_index_is_always_the_same_sequence_and_no_two_are_alike() -> None:
    config = RecallConfig(task="recall", train_examples=1000, eval_examples=1000)
    train, held = RecallDataset(config, "train"), RecallDataset(config, "eval")
    rows = {split[index]["input_ids"].tobytes() for split in (train, held) for index in range(1000)}
    assert len(rows) == 2000
    np.testing.assert_array_equal(train[-1]["input_ids"], RecallDataset(config, "train")[999]["input_ids"])
    other = RecallDataset(config.model_copy(update={"seed": 1}), "train")
    assert (other[0]["input_ids"] != train[0]["input_ids"]).any()
    assert len(train) == 1000
    with pytest.raises(IndexError, match="1000 of 1000"):
        train[1000]


def test_neither_the_key_nor_the_order_of_the_pairs_tells_the_answer() -> None:
    config = RecallConfig(task="recall", sequence_length=64, pairs=4, keys=4, values=4, eval_examples=3000)
    dataset = RecallDataset(config, "eval")
    by_key = np.zeros((4, 4))
    by_order = np.zeros((4, 4))
    for index in range(len(dataset)):
        row = dataset[index]
        ids = row["input_ids"]
        places = np.flatnonzero((ids >= 1) & (ids <= 4))
        order = {ids[place]: rank for rank, place in enumerate(places[:4])}
        for rank, place in enumerate(places[4:]):
            by_key[ids[place] - 1, ids[place + 1] - 5] += 1
            by_order[rank, order[ids[place]]] += 1
    # 3,000 draws of a quarter each: 750 with a standard deviation of 24, so 120 is five of them.
    assert np.abs(by_key - 750).max() < 120
    assert np.abs(by_order - 750).max() < 120


def test_questions_come_at_many_distances() -> None:
    config = RecallConfig(task="recall", sequence_length=256, pairs=16, min_distance=64, eval_examples=200)
    dataset = RecallDataset(config, "eval")
    distances = np.concatenate([dataset[index]["distances"] for index in range(200)])
    distances = distances[distances > 0]
    assert distances.min() >= 64
    counts, _ = np.histogram(distances, bins=[64, 96, 128, 160, 192, 256])
    assert (counts > 100).all()


def test_a_batch_is_what_a_model_takes_and_distances_on_request() -> None:
    dataset = RecallDataset(RecallConfig(task="recall"), "train")
    rows = [dataset[index] for index in range(3)]
    assert set(collate(rows)) == set(TOKEN_COLUMNS)
    assert collate(rows, columns=("labels", "distances"))["distances"].shape == (3, 256)


@pytest.mark.parametrize("min_distance", [1, 20, 31])
def test_aligned_pairs_and_questions_start_at_even_places(min_distance: int) -> None:
    config = RecallConfig(
        task="recall", sequence_length=64, pairs=8, alignment=2, min_distance=min_distance, train_examples=200
    )
    for row in RecallDataset(config, "train"):
        keys = np.flatnonzero((row["input_ids"] > 0) & (row["input_ids"] <= config.keys))
        assert len(keys) == 16
        assert (keys % 2 == 0).all()
        answers = row["distances"][row["labels"] != -100]
        assert len(answers) == 8
        assert (answers >= min_distance).all()


def test_alignment_needs_halves_of_even_length() -> None:
    with pytest.raises(ValueError, match="multiple of 4; got 66"):
        RecallConfig(task="recall", sequence_length=66, alignment=2)
