"""Packing loses no token, moves none, and lets nothing cross from one document into the next."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from inlay.data import collate, pack_documents
from inlay.data.packing import NO_LABEL, TOKEN_COLUMNS, Row, fill_row, pack_pieces
from inlay.data.statistics import packing_statistics, whole_row_statistics

PAD = 0
LENGTHS = st.lists(st.integers(0, 40), max_size=12)


def documents(lengths: list[int]) -> list[tuple[str, np.ndarray]]:
    """Documents in which every token of all of them is another number, from 1 on."""
    starts = np.cumsum([1, *lengths])
    return [(f"d{i}", np.arange(starts[i], starts[i + 1], dtype=np.int32)) for i in range(len(lengths))]


def pack(lengths: list[int], sequence_length: int, packing: str, min_tokens: int = 2) -> list[Row]:
    return list(
        pack_pieces(documents(lengths), sequence_length=sequence_length, packing=packing, min_tokens=min_tokens)
    )


def fill(rows: list[Row], sequence_length: int) -> list[dict[str, np.ndarray]]:
    return [fill_row(row, sequence_length=sequence_length, pad_token_id=PAD) for row in rows]


@given(lengths=LENGTHS, sequence_length=st.integers(2, 17))
def test_concatenating_keeps_every_token_once_in_order_and_pads_the_last_row_alone(
    lengths: list[int], sequence_length: int
) -> None:
    filled = fill(pack(lengths, sequence_length, "concatenate"), sequence_length)
    tokens = [token for row in filled for token in row["input_ids"][row["attention_mask"] == 1]]
    assert tokens == list(range(1, sum(lengths) + 1))
    assert all(row["attention_mask"].all() for row in filled[:-1])
    assert len(filled) == -(-sum(lengths) // sequence_length)


@given(lengths=LENGTHS, sequence_length=st.integers(2, 17), min_tokens=st.integers(2, 9))
def test_cutting_gives_rows_of_one_document_and_drops_short_ends_alone(
    lengths: list[int], sequence_length: int, min_tokens: int
) -> None:
    min_tokens = min(min_tokens, sequence_length)
    kept = {token for row in pack(lengths, sequence_length, "cut", min_tokens) for token in row[0].tokens}
    for row in pack(lengths, sequence_length, "cut", min_tokens):
        assert len(row) == 1
        assert min_tokens <= len(row[0].tokens) <= sequence_length
    for _, tokens in documents(lengths):
        end = len(tokens) % sequence_length
        whole = len(tokens) - (end if end < min_tokens else 0)
        assert [token in kept for token in tokens] == [True] * whole + [False] * (len(tokens) - whole)


@given(lengths=LENGTHS, sequence_length=st.integers(2, 17), packing=st.sampled_from(["cut", "concatenate"]))
def test_every_label_is_the_next_token_of_the_same_document(
    lengths: list[int], sequence_length: int, packing: str
) -> None:
    owner = {token: name for name, tokens in documents(lengths) for token in tokens}
    rows = pack(lengths, sequence_length, packing)
    predicted = 0
    for row in fill(rows, sequence_length):
        for place in range(1, sequence_length):
            if row["labels"][place] != NO_LABEL:
                predicted += 1
                before, label = row["input_ids"][place - 1], row["labels"][place]
                assert label == row["input_ids"][place] == before + 1
                assert owner[label] == owner[before]
    assert predicted == sum(len(piece.tokens) - 1 for row in rows for piece in row)


@given(lengths=LENGTHS, sequence_length=st.integers(2, 17), packing=st.sampled_from(["cut", "concatenate"]))
def test_the_columns_agree_on_where_documents_begin_and_padding_starts(
    lengths: list[int], sequence_length: int, packing: str
) -> None:
    rows = pack(lengths, sequence_length, packing)
    for row, columns in zip(rows, fill(rows, sequence_length), strict=True):
        ids, positions, mask = (columns[name] for name in ("document_ids", "position_ids", "attention_mask"))
        sizes = [len(piece.tokens) for piece in row]
        padding = sequence_length - sum(sizes)
        assert list(ids) == [index for index, size in enumerate(sizes) for _ in range(size)] + [-1] * padding
        assert list(positions) == [place for size in sizes for place in range(size)] + [0] * padding
        assert list(mask) == [1] * sum(sizes) + [0] * padding
        assert (columns["input_ids"][ids == -1] == PAD).all()
        assert (columns["labels"][ids == -1] == NO_LABEL).all()


def test_a_packed_data_set_holds_what_its_rows_hold() -> None:
    names, ids = zip(*documents([5, 9, 3]), strict=True)
    dataset = pack_documents(
        [list(tokens) for tokens in ids], names, sequence_length=8, packing="concatenate", pad_token_id=99
    )
    assert len(dataset) == 3
    np.testing.assert_array_equal(dataset[0]["input_ids"], [1, 2, 3, 4, 5, 6, 7, 8])
    np.testing.assert_array_equal(dataset[0]["labels"], [1, 2, 3, 4, 5, -100, 7, 8])
    np.testing.assert_array_equal(dataset[0]["document_ids"], [0, 0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(dataset[0]["position_ids"], [0, 1, 2, 3, 4, 0, 1, 2])
    np.testing.assert_array_equal(dataset[2]["input_ids"], [17, *[99] * 7])
    assert [list(row["document_names"]) for row in dataset] == [["d0", "d1"], ["d1", "d2"], ["d2"]]
    with pytest.raises(ValueError, match="zip"):
        pack_documents(ids, names[:2], sequence_length=8, packing="cut", pad_token_id=0)


def test_a_batch_is_stacked_as_int64_and_keeps_other_columns_out() -> None:
    names, ids = zip(*documents([8, 6]), strict=True)
    dataset = pack_documents(ids, names, sequence_length=8, packing="cut", pad_token_id=PAD)
    batch = collate([dataset[0], dataset[1]])
    assert set(batch) == set(TOKEN_COLUMNS)
    assert all(column.shape == (2, 8) and column.dtype == torch.int64 for column in batch.values())
    assert batch["attention_mask"].sum().item() == 14
    assert set(collate([dataset[0]], columns=("labels",))) == {"labels"}


def test_a_model_reads_a_packed_row_as_it_reads_its_documents_alone() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, pad_token_id=PAD)).eval()
    names, ids = zip(*documents([11, 7, 9]), strict=True)
    dataset = pack_documents(ids, names, sequence_length=32, packing="concatenate", pad_token_id=PAD)
    batch = collate([dataset[0]])
    with torch.no_grad():
        inputs = {name: batch[name] for name in batch if name in ("input_ids", "position_ids", "attention_mask")}
        packed = model(**inputs, use_cache=False).logits[0]
        alone = [model(input_ids=torch.from_numpy(tokens).long()[None], use_cache=False).logits[0] for tokens in ids]
    torch.testing.assert_close(packed[:27], torch.cat(alone))


@given(lengths=LENGTHS, sequence_length=st.integers(2, 17), packing=st.sampled_from(["cut", "concatenate"]))
def test_statistics_count_what_is_in_the_rows(lengths: list[int], sequence_length: int, packing: str) -> None:
    rows = pack(lengths, sequence_length, packing)
    counted = packing_statistics(lengths, rows, sequence_length=sequence_length)
    masks = [row["attention_mask"] for row in fill(rows, sequence_length)]
    real = int(sum(mask.sum() for mask in masks))
    assert counted.documents == len(lengths)
    assert counted.tokens == real
    assert counted.tokens + counted.left_out_tokens == sum(lengths)
    assert counted.sequences == len(rows)
    if rows:
        assert counted.padding_share == pytest.approx(1 - real / (len(rows) * sequence_length))


@settings(max_examples=50)
@given(lengths=LENGTHS, chunk_size=st.integers(1, 9), boundary=st.sampled_from(["reset", "carry"]))
def test_the_reading_share_is_that_of_a_memory_walked_token_by_token(
    lengths: list[int], chunk_size: int, boundary: str
) -> None:
    rows = pack(lengths, 17, "concatenate")
    memory = packing_statistics(lengths, rows, sequence_length=17).memory(chunk_size, boundary)
    reading = chunks = never = real = 0
    for row in fill(rows, 17):
        documents = row["document_ids"] if boundary == "reset" else np.minimum(row["document_ids"], 0)
        for document in range(len(set(documents) - {-1})):
            written = 0
            for place in range(int((documents == document).sum())):
                if place % chunk_size == 0:
                    written = place // chunk_size
                    chunks += 1
                reading += written > 0
                real += 1
            never += written == 0
    assert (memory.chunks, memory.single_chunk_pieces) == (chunks, never)
    assert memory.reading_share == pytest.approx(reading / real if real else 0)


def test_statistics_of_a_known_corpus() -> None:
    counted = packing_statistics([10, 2, 6], pack([10, 2, 6], 8, "cut"), sequence_length=8)
    assert (counted.mean_document_tokens, counted.median_document_tokens) == (6, 6)
    assert (counted.sequences, counted.tokens, counted.padding_share) == (4, 18, 14 / 32)
    assert counted.memory(4).reading_share == (4 + 2) / 18
    assert counted.memory(4).single_chunk_pieces == 2
    assert whole_row_statistics(3, 8).memory(4).reading_share == 0.5
    assert whole_row_statistics(3, 8).memory(4, "carry") == whole_row_statistics(3, 8).memory(4)
    with pytest.raises(ValueError, match="at least 1"):
        counted.memory(0)
