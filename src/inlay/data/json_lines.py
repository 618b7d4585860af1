"""JSON from disk, gzipped or not: one value a line or one a file, and what keeps a record from being used."""

from __future__ import annotations

import gzip
import json
import reprlib
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, cast

from inlay.data.problems import Problems

JSONL = (".jsonl", ".jsonl.gz")
"""How names of files with a JSON object on each line end."""

READ_ERRORS = (OSError, EOFError, zlib.error)
"""What reading a file raises that is not there, or not whole."""


class UnusableError(Exception):
    """A record that cannot be used; the message says why and what to do."""


def open_binary(path: Path) -> BinaryIO:
    """The bytes of a file; of one that ends in .gz, what is packed in it."""
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def read_json_lines(path: Path, problems: Problems) -> Iterator[tuple[int, object]]:
    """Yield number and value of each line of JSON; lines of white space are no lines. `problems` takes the others."""
    number, blank = 0, True
    try:
        with open_binary(path) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                blank = False
                try:
                    value = parse_json(line.rstrip(), " of the line")
                except UnusableError as error:
                    problems.report(f"{path}:{number}", str(error))
                else:
                    yield number, value
    except READ_ERRORS as error:
        problems.report(f"{path}:{number + 1}", f"cannot be read ({error})")
    else:
        if blank:
            problems.report(str(path), "holds no text" if number else "is empty")


def parse_json(content: bytes, part: str = "") -> object:
    """The value of JSON in UTF-8. Raises `UnusableError`, in which `part` says what offsets are counted in."""
    if (start := content.find(b"\0")) >= 0:
        raise UnusableError(holds_nul(f"offset {start}{part}"))
    try:
        return json.loads(content.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise UnusableError(not_utf8(content[error.start], error.start) + part) from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise UnusableError(f"is no JSON ({error.msg}, {line}column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise UnusableError(f"is no JSON that can be read ({error})") from error


def get_field(record: object, key: str, hint: str = "") -> object:
    """What a JSON object has under `key`; otherwise `UnusableError`, with `hint` behind it."""
    if not isinstance(record, Mapping):
        raise UnusableError(f"should be a JSON object; got {reprlib.repr(record)}")
    if key not in record:
        keys = ", ".join(map(repr, list(record)[:8])) or "none"
        raise UnusableError(f"has no field {key!r} (its fields: {keys}){hint}")
    return record[key]


def get_identifier(record: object, key: str) -> str:
    """The string or number that a JSON object has under `key`."""
    value = get_field(record, key)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise UnusableError(f"field {key!r} should be a string or a number; got {reprlib.repr(value)}")
    return str(value)


def sound_text(text: str, what: str) -> str:
    """The text, called `what`, if it can be saved as UTF-8 and holds no NUL; otherwise `UnusableError`."""
    if (start := text.find("\0")) >= 0:
        raise UnusableError(f"{what} {holds_nul(f'character {start}')}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnusableError(f"{what} holds half a surrogate pair (character {error.start})") from error
    return text


def not_utf8(byte: int, offset: int) -> str:
    """What is wrong with bytes that are not UTF-8 from `offset` on."""
    return f"is not UTF-8 (byte 0x{byte:02x} at offset {offset})"


def holds_nul(place: str) -> str:
    """What is wrong with a text that holds a NUL."""
    return f"holds a NUL character ({place}): likely UTF-16 without a byte order mark, or no text; save it as UTF-8"
