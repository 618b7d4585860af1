"""Questions about contexts: from a configuration to a training and an evaluation set that share no context.

A model that saw an evaluation context in training may answer from its weights, and a memory then looks better than it
is. So contexts are held out, never questions, and all of one title together; a context that stands under two titles
goes where it was first met.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from inlay.data.facts import FactsDataset
from inlay.data.problems import DataError, Problems
from inlay.data.qa_config import DatasetQAConfig, FactsConfig, JsonlConfig, QAConfig, ReadQAConfig
from inlay.data.qa_sources import QAExample, Record, read_qa_dataset, read_qa_jsonl, read_squad
from inlay.data.sources import Split, is_held_out

__all__ = ["QAConfig", "QAData", "QAExample", "load_qa"]


@dataclass(frozen=True)
class QAData:
    """The questions of a run."""

    train: Sequence[QAExample]
    """To train on."""

    eval: Sequence[QAExample]
    """To evaluate on; no context of `train` is here."""

    skipped: int
    """Records left out with `on_error: skip`; each was logged as a warning."""


def load_qa(config: QAConfig) -> QAData:
    """Read, or for `facts` prepare, what `config` asks for.

    Raises:
        DataError: data that is missing or cannot be used, or a set without a question; the message names the fix.
    """
    if isinstance(config, FactsConfig):
        return QAData(FactsDataset(config, "train"), FactsDataset(config, "eval"), skipped=0)
    problems = Problems(config.on_error)
    if config.has_eval_data:
        held = _unique(_read(config, "eval", problems), problems)
        train = _without(held, _unique(_read(config, "train", problems), problems), problems)
    else:
        train, held = _hold_out(_unique(_read(config, "train", problems), problems), config.eval_fraction)
    problems.check()
    _require(config, train, held)
    if config.max_eval_examples is not None and len(held) > config.max_eval_examples:
        held = [held[index] for index in np.linspace(0, len(held) - 1, config.max_eval_examples).round().astype(int)]
    return QAData([record.example for record in train], [record.example for record in held], problems.skipped)


def _read(config: ReadQAConfig, split: Split, problems: Problems) -> Iterator[Record]:
    evaluation = split == "eval"
    records: Iterator[Record]
    if isinstance(config, DatasetQAConfig):
        name = config.eval_split if evaluation and config.eval_split else config.split
        records = read_qa_dataset(name, config, problems)
    else:
        path = config.eval_path if evaluation and config.eval_path else config.path
        if isinstance(config, JsonlConfig):
            records = read_qa_jsonl(path, config, problems)
        else:
            records = read_squad(path, problems)
    return islice(records, config.max_examples)


def _unique(records: Iterable[Record], problems: Problems) -> list[Record]:
    """Those whose id was not there before: predictions are kept by id."""
    first: dict[str, Record] = {}
    for record in records:
        before = first.setdefault(record.example.id, record)
        if before is not record:
            problems.report(record.where, f"has the id {record.example.id!r} of {before.where}; ids should be unique")
    return list(first.values())


def _hold_out(records: list[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    train: list[Record] = []
    held: list[Record] = []
    group_of: dict[str, str] = {}
    for record in records:
        group = group_of.setdefault(record.example.context, record.group)
        (held if is_held_out(group, fraction) else train).append(record)
    return train, held


def _without(held: list[Record], records: list[Record], problems: Problems) -> list[Record]:
    """Those of which no context is held."""
    at = {record.example.context: record.where for record in held}
    left = []
    for record in records:
        if (where := at.get(record.example.context)) is None:
            left.append(record)
        else:
            problems.report(record.where, f"asks about a context of the evaluation data ({where}); remove one of them")
    return left


def _require(config: ReadQAConfig, train: list[Record], held: list[Record]) -> None:
    if not train and not held:
        raise DataError(f"no question in {config.path}: nothing to train on")
    if not train:
        raise DataError("no training question: all were held out; lower eval_fraction or give more contexts")
    if held:
        return
    if config.has_eval_data:
        raise DataError("no question in the evaluation data")
    name = "eval_split" if isinstance(config, DatasetQAConfig) else "eval_path"
    raise DataError(
        f"no evaluation question: none of {len(train)} was held out (eval_fraction {config.eval_fraction}); "
        f"raise eval_fraction, or give {name}"
    )
