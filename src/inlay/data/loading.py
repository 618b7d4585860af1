"""From a configuration to data sets: the one call a run makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from inlay.data.config import RecallConfig, TextConfig
from inlay.data.packing import NAMES_COLUMN, TOKEN_COLUMNS, Row, collate, fill_row, pack_pieces, rows_to_dataset
from inlay.data.problems import DataError, Problems
from inlay.data.recall import RecallDataset
from inlay.data.sources import Document, iterate_documents, read_documents
from inlay.data.statistics import DataStatistics, PackingStatistics, packing_statistics, whole_row_statistics
from inlay.data.tokenizer import encode_documents, load_tokenizer, padding_id

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Data:
    """A run's data, ready for a data loader. The rows' columns are told at `pack_documents` and `RecallDataset`."""

    train: Dataset | PackedStream | RecallDataset
    """Training sequences. A `PackedStream` has no length: the run must be given its steps."""

    eval: Dataset | RecallDataset
    """Evaluation sequences."""

    tokenizer: PreTrainedTokenizerFast | None
    """Made the tokens; None for recall."""

    vocab_size: int
    """Token ids are below this."""

    statistics: DataStatistics
    """What was read and packed."""

    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]]
    """Stacks rows into a batch, `[B, T]` each."""

    def sample(self, rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """A batch of at most `rows` training sequences drawn at random (of a stream: its first ones), `[B, T]` each."""
        if isinstance(self.train, PackedStream):
            return self.collate(list(islice(self.train, rows)))
        size, items = len(self.train), cast(Any, self.train)
        indices = np.random.default_rng(seed).choice(size, min(rows, size), replace=False, shuffle=False)
        return self.collate([items[int(index)] for index in indices])


class PackedStream(IterableDataset[dict[str, Any]]):
    """Training sequences packed while they are read; each pass reads the source from its start.

    Rows are those of `pack_documents`. Each of n workers of a data loader reads everything and packs every n-th
    document. With `on_error: raise` the first problem raises, for a stream may have no end at which to list them.

    Args:
        config: a text source; need not be a streaming one.
        tokenizer: makes the tokens.
    """

    def __init__(self, config: TextConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        self.config = config
        self.tokenizer = tokenizer

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        documents = iterate_documents(self.config, "train", Problems(self.config.on_error, limit=1))
        rows = _pack(self.config, self.tokenizer, islice(documents, start, None, step))
        for row in rows:
            columns: dict[str, Any] = dict(
                fill_row(row, sequence_length=self.config.sequence_length, pad_token_id=padding_id(self.tokenizer))
            )
            columns[NAMES_COLUMN] = [piece.name for piece in row]
            yield columns


def load_data(config: TextConfig | RecallConfig, *, cache_dir: Path | str | None = None) -> Data:
    """Read, tokenise and pack what `config` asks for.

    Args:
        config: a `DataConfig`.
        cache_dir: where learnt tokenizers are kept; `default_cache_dir()` when not given.

    Raises:
        DataError: data that is missing, unreadable, or too short to give a sequence; the message names the fix.
    """
    if isinstance(config, RecallConfig):
        return _load_recall(config)
    problems = Problems(config.on_error)
    if config.streaming:
        return _load_stream(config, problems, cache_dir)
    train_documents, eval_documents = read_documents(config, problems)
    _require_documents(config, len(train_documents), len(eval_documents))
    tokenizer = load_tokenizer(config.tokenizer, train_documents, cache_dir)
    train, train_statistics = _load_split(config, tokenizer, train_documents, "training", None)
    held, eval_statistics = _load_split(config, tokenizer, eval_documents, "evaluation", config.max_eval_sequences)
    statistics = DataStatistics(train_statistics, eval_statistics, problems.skipped)
    return Data(train, held, tokenizer, len(tokenizer), statistics, _collator(config))


def _load_recall(config: RecallConfig) -> Data:
    train, held = RecallDataset(config, "train"), RecallDataset(config, "eval")
    statistics = DataStatistics(
        whole_row_statistics(len(train), config.sequence_length),
        whole_row_statistics(len(held), config.sequence_length),
        skipped=0,
    )
    return Data(train, held, None, train.vocab_size, statistics, collate)


def _load_stream(config: TextConfig, problems: Problems, cache_dir: Path | str | None) -> Data:
    documents = iterate_documents(config, "train", Problems(config.on_error, limit=1))
    tokenizer = load_tokenizer(config.tokenizer, documents, cache_dir)
    train = PackedStream(config, tokenizer)
    if next(iter(train), None) is None:
        raise DataError(_no_sequence(config, "training"))
    lengths: list[int] = []
    held_documents = iterate_documents(config, "eval", problems)
    rows = list(islice(_pack(config, tokenizer, held_documents, lengths), config.max_eval_sequences))
    problems.check()  # the documents were not read to the end, where they check themselves
    if not lengths:
        _require_documents(config, 1, 0)
    held, eval_statistics = _dataset(config, tokenizer, rows, lengths, "evaluation")
    statistics = DataStatistics(None, eval_statistics, problems.skipped)
    return Data(train, held, tokenizer, len(tokenizer), statistics, _collator(config))


def _collator(config: TextConfig) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]]:
    """The same columns for every batch of a data set: processes that share out a stream put their batches together."""
    if config.packing == "concatenate":
        return partial(collate, columns=[column for column in TOKEN_COLUMNS if column != "attention_mask"])
    return collate


def _load_split(
    config: TextConfig, tokenizer: PreTrainedTokenizerFast, documents: list[Document], split: str, most: int | None
) -> tuple[Dataset, PackingStatistics]:
    lengths: list[int] = []
    rows = list(_pack(config, tokenizer, documents, lengths, len(documents)))
    if most is not None and len(rows) > most:
        rows = [rows[index] for index in np.linspace(0, len(rows) - 1, most).round().astype(int)]
    return _dataset(config, tokenizer, rows, lengths, split)


def _pack(
    config: TextConfig,
    tokenizer: PreTrainedTokenizerFast,
    documents: Iterable[Document],
    lengths: list[int] | None = None,
    total: int | None = None,
) -> Iterator[Row]:
    """Tokenise and pack as they are read; `lengths` takes the tokens of every document on its way."""

    def encoded() -> Iterator[tuple[str, np.ndarray]]:
        for name, tokens in encode_documents(tokenizer, documents, add_eos=config.add_eos, total=total):
            if lengths is not None:
                lengths.append(len(tokens))
            yield name, tokens

    return pack_pieces(
        encoded(), sequence_length=config.sequence_length, packing=config.packing, min_tokens=config.min_piece_tokens
    )


def _dataset(
    config: TextConfig, tokenizer: PreTrainedTokenizerFast, rows: list[Row], lengths: list[int], split: str
) -> tuple[Dataset, PackingStatistics]:
    if not rows:
        raise DataError(_no_sequence(config, split))
    length = config.sequence_length
    dataset = rows_to_dataset(rows, sequence_length=length, pad_token_id=padding_id(tokenizer))
    return dataset, packing_statistics(lengths, rows, sequence_length=length)


def _no_sequence(config: TextConfig, split: str) -> str:
    if config.packing == "concatenate":
        return f"no {split} document in {config.path or config.source}"
    return (
        f"no {split} document is as long as {config.min_piece_tokens} tokens, so no sequence can be cut: "
        f"lower min_tokens or sequence_length, or set packing: concatenate"
    )


def _require_documents(config: TextConfig, train: int, held: int) -> None:
    if not train and not held:
        raise DataError(f"no document in {config.path or config.source}: nothing to train on")
    if not train:
        raise DataError("no training document: all were held out; lower eval_fraction or give more documents")
    if held:
        return
    if config.has_eval_data:
        raise DataError(f"no document in the evaluation data ({config.eval_path or config.eval_split})")
    fixes = ["raise eval_fraction"] if train > 1 else []
    if config.source != "python-stdlib":
        fixes.append("give eval_path" + (" or eval_split" if config.source == "dataset" else ""))
    if config.source == "files" and ".jsonl" in str(config.path):
        fixes.append("say source: jsonl, if its lines are the documents")
    raise DataError(
        f"no evaluation document: none of {train} was held out (eval_fraction {config.eval_fraction}); "
        + ", or ".join(fixes)
    )
