"""One call gives a run its data, or says what is missing and how to mend it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from inlay.data import Data, DataError, PackedStream, RecallConfig, TextConfig, load_data

WORDS = ["the", "memory", "holds", "what", "the", "model", "has", "read", "and", "nothing", "more"]


def text(index: int, words: int) -> str:
    return " ".join(WORDS[(index + place) % len(WORDS)] for place in range(words))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(40):
        (folder / f"{index:02}.txt").write_text(text(index, 10 + 7 * index))
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("parquet")
    texts = [text(index, 10 + 7 * index) for index in range(40)]
    Dataset.from_dict({"text": texts}).to_parquet(folder / "train-00000.parquet")
    return folder


def config(**fields: object) -> TextConfig:
    defaults = {"task": "text", "source": "files", "sequence_length": 64, "tokenizer": {"kind": "bytes"}}
    return TextConfig.model_validate(defaults | {"eval_fraction": 0.2} | fields)


def document_bytes(data: Data, split: str) -> str:
    """The text of all rows of a split, EOS as a line's end."""
    rows = getattr(data, split)
    ids = np.concatenate([row["input_ids"][row["attention_mask"] == 1] for row in rows])
    return data.tokenizer.decode(ids).replace(data.tokenizer.eos_token, "\n")


def test_concatenated_data_decodes_to_the_documents_again(corpus: Path) -> None:
    data = load_data(config(path=str(corpus), packing="concatenate"))
    lines = (document_bytes(data, "train") + document_bytes(data, "eval")).splitlines()
    assert sorted(lines) == sorted(text(index, 10 + 7 * index) for index in range(40))
    assert data.statistics.train.documents + data.statistics.eval.documents == 40
    assert data.statistics.eval.documents > 0
    assert data.vocab_size == 258


def test_cut_data_is_a_learnt_tokenizer_and_full_columns(corpus: Path, tmp_path: Path) -> None:
    data = load_data(config(path=str(corpus), tokenizer={"kind": "bpe", "vocab_size": 300}), cache_dir=tmp_path)
    assert list(tmp_path.glob("tokenizers/*/tokenizer.json"))
    assert data.vocab_size <= 300
    batch = next(iter(DataLoader(data.train, batch_size=4, collate_fn=data.collate)))
    assert batch["input_ids"].shape == (4, 64)
    assert batch["input_ids"].max() < data.vocab_size
    assert data.statistics.train.sequences == len(data.train)


def test_few_evaluation_sequences_are_taken_from_all_over_the_data(corpus: Path) -> None:
    whole = load_data(config(path=str(corpus)))
    some = load_data(config(path=str(corpus), max_eval_sequences=5))
    assert len(some.eval) == some.statistics.eval.sequences == 5
    np.testing.assert_array_equal(some.eval[0]["input_ids"], whole.eval[0]["input_ids"])
    np.testing.assert_array_equal(some.eval[4]["input_ids"], whole.eval[len(whole.eval) - 1]["input_ids"])
    assert some.statistics.eval.left_out_tokens > whole.statistics.eval.left_out_tokens
    assert len(some.train) == len(whole.train)


@pytest.mark.parametrize("packing", ["cut", "concatenate"])
def test_a_stream_gives_the_rows_of_the_data_set_held_in_memory(parquet: Path, packing: str) -> None:
    same = {"source": "dataset", "path": str(parquet), "packing": packing}
    held = load_data(config(**same))
    stream = load_data(config(**same, streaming=True, max_eval_sequences=3))
    assert isinstance(stream.train, PackedStream)
    for _ in range(2):
        rows = list(stream.train)
        assert len(rows) == len(held.train)
        for row, expected in zip(rows, held.train, strict=True):
            for column in row:
                np.testing.assert_array_equal(row[column], expected[column])
    assert stream.statistics.train is None
    assert len(stream.eval) == 3
    np.testing.assert_array_equal(stream.eval[2]["input_ids"], held.eval[2]["input_ids"])


# Python 3.12 warns of any fork beside threads, and a loader's workers are forks.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_of_a_loader_share_a_stream_without_repeating_a_document(parquet: Path) -> None:
    stream = load_data(config(source="dataset", path=str(parquet), streaming=True, max_eval_sequences=1)).train

    def seen(workers: int) -> list[bytes]:
        loader = DataLoader(stream, batch_size=None, num_workers=workers)
        return sorted(torch.as_tensor(row["input_ids"]).numpy().tobytes() for row in loader)

    assert seen(2) == seen(0)


def test_a_stream_raises_its_first_problem_and_skips_where_told(tmp_path: Path) -> None:
    from datasets import Dataset

    texts = [text(index, 60) for index in range(40)]
    texts[5] = ""
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "train-00000.parquet")
    fields = {"source": "dataset", "path": str(tmp_path), "streaming": True, "max_eval_sequences": 2}
    with pytest.raises(DataError, match="column 'text' is empty"):
        list(PackedStream(config(**fields), load_data(config(**fields, on_error="skip")).tokenizer))
    assert load_data(config(**fields, on_error="skip")).statistics.skipped == 1


@pytest.mark.parametrize("splits", [True, False], ids=["splits", "one"])
def test_a_data_set_that_was_saved_to_disk_is_read(parquet: Path, tmp_path: Path, splits: bool) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_parquet(str(parquet / "train-00000.parquet"))
    (DatasetDict({"train": rows, "other": rows.select([0])}) if splits else rows).save_to_disk(tmp_path / "saved")
    saved = {"source": "dataset", "path": str(tmp_path / "saved")}
    theirs = load_data(config(source="dataset", path=str(parquet)))
    assert document_bytes(load_data(config(**saved)), "train") == document_bytes(theirs, "train")
    with pytest.raises(DataError, match=r"split new: it has train(, other)?\n"):
        load_data(config(**saved, split="new"))


def test_a_problem_in_the_part_of_a_stream_that_is_evaluated_is_not_passed_over(tmp_path: Path) -> None:
    from datasets import Dataset

    texts = [text(index, 60) for index in range(300)]
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "train-00000.parquet")
    Dataset.from_dict({"text": ["", *texts]}).to_parquet(tmp_path / "validation-00000.parquet")
    fields = {"source": "dataset", "path": str(tmp_path), "eval_split": "validation", "eval_fraction": 0.05}
    with pytest.raises(DataError, match=r"\(validation\):0: column 'text' is empty"):
        load_data(config(**fields, streaming=True, max_eval_sequences=2))


def test_every_batch_of_a_data_set_has_the_same_columns(corpus: Path) -> None:
    """Processes that share out a stream put their batches together by the first one's."""
    data = load_data(config(path=str(corpus), packing="concatenate"))
    batches = [data.collate([row]) for row in data.train]
    assert {bool((batch["document_ids"] > 0).any()) for batch in batches} == {True, False}
    assert {tuple(batch) for batch in batches} == {("input_ids", "document_ids", "labels", "position_ids")}


def test_recall_needs_no_tokenizer_and_states_its_vocabulary() -> None:
    data = load_data(RecallConfig(task="recall", train_examples=10, eval_examples=4))
    assert data.tokenizer is None
    assert (len(data.train), len(data.eval), data.vocab_size) == (10, 4, 129)
    assert data.statistics.train.tokens == 2560
    assert data.statistics.eval.memory(64).reading_share == 0.75
    batch = data.collate([data.train[0], data.train[1]])
    assert "attention_mask" in batch


def test_skipped_files_are_in_the_statistics(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    data = load_data(config(path=(str(corpus), str(tmp_path)), on_error="skip"))
    assert data.statistics.skipped == 1


def test_what_looks_like_one_document_is_told_as_lines_or_needs_another(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "' + text(1, 400) + '"}\n')
    with pytest.raises(DataError, match=r"none of 1 was held out .*; give eval_path, or say source: jsonl"):
        load_data(config(path=str(path)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eval_fraction": 1e-9}, r"none of 40 was held out .*raise eval_fraction, or give eval_path"),
        ({"eval_fraction": 0.999}, "lower eval_fraction"),
        ({"sequence_length": 40_000, "min_tokens": 30_000}, "lower min_tokens"),
    ],
)
def test_data_that_gives_no_sequence_is_an_error_with_the_fix(corpus: Path, fields: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(config(path=str(corpus), **fields))
