"""Questions read from SQuAD files, JSON lines and data sets, always in the same order.

A record that cannot be used is never dropped silently: it goes to `Problems` with its file, its place in there (line,
row, or the path through the JSON and the question's id) and what would mend it.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

from inlay.data.config import Paths
from inlay.data.json_lines import (
    JSONL,
    READ_ERRORS,
    UnusableError,
    get_field,
    get_identifier,
    open_binary,
    parse_json,
    read_json_lines,
    sound_text,
)
from inlay.data.problems import DataError, Problems
from inlay.data.qa_config import DatasetQAConfig, FlatConfig, JsonlConfig
from inlay.data.sources import find_files, open_dataset

_UNANSWERABLE = "an unanswerable question has an empty list"


@dataclass(frozen=True, slots=True)
class QAExample:
    """A question about a context."""

    id: str
    """Unique in its set."""

    context: str
    """The text that is asked about, as it was found."""

    question: str
    """Without white space around it."""

    answers: tuple[str, ...]
    """Right answers, the one to be trained first, without white space around them; none if unanswerable."""


class Record(NamedTuple):
    """An example, where it was read, and what it is held out by: its title, or its context if it has none."""

    where: str
    example: QAExample
    group: str


def read_squad(paths: Paths, problems: Problems) -> Iterator[Record]:
    """Yield the questions of files in the format of SQuAD v1.1 or v2.0.

    Where `is_impossible` is true a question has no answer; its `plausible_answers` are wrong ones, and not read.
    """
    for path, _ in find_files(paths, suffixes=(".json", ".json.gz")):
        try:
            with open_binary(path) as file:
                content = parse_json(file.read())
        except UnusableError as error:
            hint = "; for one question per line, set source: jsonl" if "Extra data" in str(error) else ""
            problems.report(str(path), f"{error}{hint}")
        except READ_ERRORS as error:
            problems.report(str(path), f"cannot be read ({error})")
        else:
            yield from _squad_records(path, content, problems)


def read_qa_jsonl(paths: Paths, config: JsonlConfig, problems: Problems) -> Iterator[Record]:
    """Yield one question per line of `.jsonl` and `.jsonl.gz` files; lines of white space are no lines."""
    for path, name in find_files(paths, suffixes=JSONL):
        for number, row in read_json_lines(path, problems):
            where = f"{path}:{number}"
            try:
                yield _flat_record(where, row, f"{name}:{number}", config)
            except UnusableError as error:
                problems.report(where, str(error))


def read_qa_dataset(split: str, config: DatasetQAConfig, problems: Problems) -> Iterator[Record]:
    """Yield one question per row of a data set on the hub or in a local folder, read as a stream.

    Raises `DataError` when it cannot be opened, or breaks off.
    """
    name = f"{config.path} ({split})"
    index, iterator = 0, iter(open_dataset(config.path, config.dataset_config, split))
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise DataError(f"{name} breaks off at row {index}: {error}") from error
        where = f"{name}:{index}"
        try:
            yield _flat_record(where, row, f"{split}:{index}", config)
        except UnusableError as error:
            problems.report(where, str(error))
        index += 1


def _squad_records(path: Path, content: object, problems: Problems) -> Iterator[Record]:
    def children(where: str, parent: object, key: str, hint: str = "") -> list[object]:
        try:
            return _list(get_field(parent, key, hint), key)
        except UnusableError as error:
            problems.report(where, str(error))
            return []

    flat = ": it is no SQuAD file; for one question per line, set source: jsonl"
    for i, article in enumerate(children(str(path), content, "data", flat)):
        for j, paragraph in enumerate(children(f"{path}:data[{i}]", article, "paragraphs")):
            where = f"{path}:data[{i}].paragraphs[{j}]"
            try:
                context = _text(paragraph, "context")
            except UnusableError as error:
                problems.report(where, str(error))
                continue
            title = cast(Mapping[str, object], article).get("title")
            group = title if isinstance(title, str) and title.strip() else context
            for k, question in enumerate(children(where, paragraph, "qas")):
                place = f"{where}.qas[{k}]"
                try:
                    yield Record(place, _squad_example(question, context), group)
                except UnusableError as error:
                    problems.report(place, str(error))


def _squad_example(question: object, context: str) -> QAExample:
    name = get_identifier(question, "id")
    try:
        asked = _text(question, "question").strip()
        answers = _answers(get_field(question, "answers", ": " + _UNANSWERABLE), "answers")
    except UnusableError as error:
        raise UnusableError(f"(id {name}) {error}") from error
    impossible = cast(Mapping[str, object], question).get("is_impossible", False)
    if not isinstance(impossible, bool) or impossible == bool(answers):
        raise UnusableError(
            f"(id {name}) has {len(answers)} answers and is_impossible {impossible!r}: "
            "a question without answers has is_impossible true, one with answers false"
        )
    return QAExample(name, context, asked, answers)


def _flat_record(where: str, row: object, default_id: str, config: FlatConfig) -> Record:
    context = _text(row, config.context_field, ": set context_field")
    question = _text(row, config.question_field, ": set question_field").strip()
    answers = _answers(get_field(row, config.answers_field, ": set answers_field"), config.answers_field)
    name = default_id if config.id_field is None else get_identifier(row, config.id_field)
    title = context if config.title_field is None else _text(row, config.title_field)
    return Record(where, QAExample(name, context, question, answers), title)


def _answers(value: object, what: str) -> tuple[str, ...]:
    """A string, a list of strings or of `{"text": string}`, or `{"text": list}`, as a tuple of strings."""
    if isinstance(value, str):
        return (_checked(value, what).strip(),)
    if isinstance(value, Mapping):
        value, what = get_field(value, "text", f" in {what}"), f"{what}.text"
        if isinstance(value, str):
            return (_checked(value, what).strip(),)
    texts = []
    for index, answer in enumerate(_list(value, what, f"; {_UNANSWERABLE}")):
        place = f"{what}[{index}]"
        if isinstance(answer, Mapping):
            answer, place = get_field(answer, "text", f" in {place}"), f"{place}.text"
        texts.append(_checked(answer, place).strip())
    return tuple(texts)


def _text(record: object, key: str, hint: str = "") -> str:
    return _checked(get_field(record, key, hint), key)


def _list(value: object, what: str, hint: str = "") -> list[object]:
    if not isinstance(value, list):
        raise UnusableError(f"field {what!r} should be a list; got {reprlib.repr(value)}{hint}")
    return value


def _checked(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise UnusableError(f"field {what!r} should be a string; got {reprlib.repr(value)}")
    if not value.strip():
        hint = f"; {_UNANSWERABLE}" if "answer" in what else ""
        raise UnusableError(f"field {what!r} is empty{hint}")
    return sound_text(value, f"field {what!r}")
