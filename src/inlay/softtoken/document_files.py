"""Documents to be encoded, from text files and JSON lines, under the ids that they get in a store."""

from __future__ import annotations

import gzip
import json
import reprlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from inlay.data import DataError, Document
from inlay.data.config import Paths
from inlay.data.problems import Problems
from inlay.data.sources import find_files, read_files

_JSONL = (".jsonl", ".jsonl.gz")


def read_documents(paths: Paths, *, text_field: str = "text", id_field: str = "id") -> list[Document]:
    """The documents of text files, folders, globs, and of JSON lines (``.jsonl``, ``.jsonl.gz``).

    A text file is called by its path relative to the folder or glob. A line is called by its ``id_field``, or, where it
    has none, by its file and line number.

    Raises:
        DataError: Nothing is found, or files or lines cannot be used; they are listed.
    """
    problems = Problems()
    documents: list[Document] = []
    for path, name in find_files(paths):
        if name.endswith(_JSONL):
            documents += _read_lines(path, name, text_field, id_field, problems)
        else:
            documents += (Document(name, one.text) for one in read_files(str(path), problems))
    problems.check()
    return documents


def _read_lines(path: Path, name: str, text_field: str, id_field: str, problems: Problems) -> Iterator[Document]:
    number = 0
    try:
        with cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    yield _document(line, f"{name}:{number}", text_field, id_field)
                except DataError as error:
                    problems.report(f"{path}:{number}", str(error))
    except (OSError, EOFError, zlib.error) as error:
        problems.report(f"{path}:{number + 1}", f"cannot be read ({error})")
    else:
        if number == 0:
            problems.report(str(path), "is empty")


def _document(line: bytes, place: str, text_field: str, id_field: str) -> Document:
    try:
        row = json.loads(line.decode("utf-8").removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no JSON that can be read ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"should be a JSON object; got {reprlib.repr(row)}")
    text, name = row.get(text_field), row.get(id_field, place)
    if not isinstance(text, str) or not text.strip():
        keys = ", ".join(map(repr, list(row)[:8])) or "none"
        raise DataError(f"field {text_field!r} should be a text; got {reprlib.repr(text)} (its fields: {keys})")
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise DataError(f"field {id_field!r} should be a string or a number; got {reprlib.repr(name)}")
    return Document(str(name), text)
