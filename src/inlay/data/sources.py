"""Documents, one after another, always in the same order.

Four sources, one promise: a document that cannot be read is never dropped silently, it goes to `Problems` with its
file and line. Names hold no part of the reader's own folders, so that the hash of a name holds out the same documents
everywhere.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from inlay.data.config import Paths, TextConfig
from inlay.data.json_lines import (
    JSONL,
    UnusableError,
    get_field,
    get_identifier,
    holds_nul,
    not_utf8,
    read_json_lines,
    sound_text,
)
from inlay.data.problems import DataError, Problems

Split = Literal["train", "eval"]

# Installed packages are not the library; tests hold files that break on purpose; tables of characters and the
# one-file copy of the language reference are generated, and would be the longest documents of all.
_STDLIB_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)
_STDLIB_SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize")
_ROWS = 64


class Document(NamedTuple):
    """One text. `name` says where it comes from, without the reader's own folders."""

    name: str
    text: str


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document called `name` belongs to the held-out `fraction` (0..1); the same on every machine."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def iterate_documents(config: TextConfig, split: Split, problems: Problems) -> Iterator[Document]:
    """Yield the documents of one split in a fixed order, holding none of the others.

    Args:
        config: which source, and how its evaluation documents are told from the others.
        split: "train" or "eval"; no document is in both unless the user gave the same data twice.
        problems: takes what cannot be read. Where documents are held out, both splits meet the same problems.

    Raises:
        DataError: nothing is found at `path`; or problems, as `problems` decides.
    """
    for document in _read_source(config, split, problems):
        if config.has_eval_data or is_held_out(document.name, config.eval_fraction) == (split == "eval"):
            yield document
    problems.check()


def read_documents(config: TextConfig, problems: Problems) -> tuple[list[Document], list[Document]]:
    """The training and the evaluation documents, each file read once. Raises as `iterate_documents`."""
    train: list[Document] = []
    held_out: list[Document] = []
    for document in _read_source(config, "train", problems):
        out = not config.has_eval_data and is_held_out(document.name, config.eval_fraction)
        (held_out if out else train).append(document)
    if config.has_eval_data:
        held_out.extend(_read_source(config, "eval", problems))
    problems.check()
    return train, held_out


def _read_source(config: TextConfig, split: Split, problems: Problems) -> Iterator[Document]:
    explicit = split == "eval" and config.has_eval_data
    documents: Iterator[Document]
    if config.source == "python-stdlib":
        documents = read_python_stdlib(problems)
    else:
        path = (config.eval_path if explicit else None) or config.path
        assert path is not None, "TextConfig checks it"
        if config.source == "files":
            documents = read_files(path, problems)
        elif config.source == "jsonl":
            documents = read_jsonl(path, config.text_field, problems)
        else:
            name = cast(str, path)
            split_name = config.eval_split if explicit and config.eval_split else config.split
            documents = read_dataset(name, config.dataset_config, split_name, config.text_field, problems)
    return islice(documents, config.max_documents)


def read_python_stdlib(problems: Problems, root: Path | None = None) -> Iterator[Document]:
    """Yield the Python sources of the running Python's standard library (about 10 MB; less on a trimmed install).

    Test folders, installed packages, generated tables and files about this one machine are left out, and so are
    empty files, which hold nothing. `root` reads another library folder.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        skipped = not _STDLIB_SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1])
        if skipped or relative.parts[0].startswith(_STDLIB_SKIPPED_PREFIXES) or not path.is_file():
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            problems.report(str(path), f"cannot be read as Python source ({error})")
            continue
        if text.strip():
            yield Document(relative.as_posix(), text)


def read_files(paths: Paths, problems: Problems) -> Iterator[Document]:
    """Yield one document per UTF-8 file of `paths` (files, folders, globs); hidden files in folders are left out."""
    for path, name in find_files(paths):
        try:
            content = path.read_bytes()
        except OSError as error:
            problems.report(str(path), f"cannot be read ({error.strerror})")
            continue
        try:
            text = content.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            problems.report(f"{path}:{line}", not_utf8(content[error.start], error.start))
            continue
        if (start := content.find(b"\0")) >= 0:
            line = content.count(b"\n", 0, start) + 1
            problems.report(f"{path}:{line}", holds_nul(f"offset {start}"))
        elif text.strip():
            yield Document(name, text)
        else:
            problems.report(str(path), "holds no text" if text else "is empty")


def read_jsonl(paths: Paths, text_field: str, problems: Problems) -> Iterator[Document]:
    """Yield one document per line of the `.jsonl` and `.jsonl.gz` files of `paths`; lines of white space are no lines.

    A line must be a JSON object whose `text_field` is a string with text in it.
    """
    for path, name in find_files(paths, suffixes=JSONL):
        yield from read_jsonl_file(path, name, text_field, problems)


def read_jsonl_file(
    path: Path, name: str, text_field: str, problems: Problems, *, id_field: str | None = None
) -> Iterator[Document]:
    """Yield the documents of one file, as `read_jsonl`.

    Args:
        path: the file.
        name: what it is called; a document is then `name:line`.
        text_field: key of a line's text.
        problems: takes what cannot be read.
        id_field: key of a string or number by which a line is called instead, where it has one.
    """
    seen = dict[str, int]()
    for number, row in read_json_lines(path, problems):
        try:
            document = _document_of_row(row, f"{name}:{number}", text_field, id_field)
            if id_field is not None and (first := seen.setdefault(document.name, number)) != number:
                raise UnusableError(f"has the {id_field} {document.name!r}, as line {first} has")
        except UnusableError as error:
            problems.report(f"{path}:{number}", str(error))
        else:
            yield document


def open_dataset(name: str, dataset_config: str | None, split: str) -> Any:
    """A split of a data set on the hub, in a folder with data files, or as `save_to_disk` wrote it, to be streamed.

    Raises:
        DataError: It cannot be opened.
    """
    from datasets import Dataset, load_dataset, load_from_disk

    folder = Path(name)
    try:
        if not any((folder / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
            return load_dataset(name, dataset_config, split=split, streaming=True)
        saved = load_from_disk(folder)
        splits = {str(saved.split or "train"): saved} if isinstance(saved, Dataset) else saved
        if split not in splits:
            raise ValueError(f"it has {', '.join(splits)}")
        return splits[split].to_iterable_dataset()
    except Exception as error:  # load_dataset raises many kinds, from its own to the network's
        raise cannot_open(name, split, error) from error


def cannot_open(name: str, split: str, error: Exception) -> DataError:
    """What to raise when a data set cannot be opened."""
    return DataError(
        f"cannot open the data set {name}, split {split}: {error}\n"
        "It is a folder with data files, or a hub id such as rajpurkar/squad, which needs a network or a cached copy"
    )


def read_dataset(
    name: str, dataset_config: str | None, split: str, text_field: str, problems: Problems
) -> Iterator[Document]:
    """Yield one document per row of a data set on the hub or in a local folder, read as a stream.

    Raises `DataError` when it cannot be opened or has no column `text_field`.
    """
    where = f"{name} ({split})"
    # Iterated row by row it would hand each worker of a data loader its own part, and the rows other numbers.
    batches = open_dataset(name, dataset_config, split).iter(batch_size=_ROWS)
    try:
        first = next(batches, None)
    except Exception as error:
        raise cannot_open(name, split, error) from error
    if first is not None and text_field not in first:
        raise DataError(f"{where} has no column {text_field!r}; text_field can be one of: {', '.join(first)}")
    index, batch = 0, first
    while batch is not None:
        for value in batch[text_field]:
            try:
                text = _checked_text(value, f"column {text_field!r}")
            except UnusableError as error:
                problems.report(f"{where}:{index}", str(error))
            else:
                yield Document(f"{split}:{index}", text)
            index += 1
        try:
            batch = next(batches, None)
        except Exception as error:
            raise DataError(f"{where} breaks off behind row {index}: {error}") from error


def find_files(paths: Paths, suffixes: tuple[str, ...] = ("",)) -> list[tuple[Path, str]]:
    """The files of a file, folder, glob or list of them, each once, with names relative to the folder or glob.

    Args:
        paths: taken in this order, sorted by name within each. A folder is searched in depth.
        suffixes: which files of a folder count; a file or a glob is taken at its word.

    Raises:
        DataError: one of `paths` leads to no file.
    """
    found: dict[Path, str] = {}
    for entry in (paths,) if isinstance(paths, str) else paths:
        path = Path(entry).expanduser()
        if path.is_dir():
            root, files = path, [file for file in _files_below(path) if file.name.endswith(suffixes)]
        elif path.exists():
            root, files = path.parent, [path]
        else:
            fixed = list(takewhile(lambda part: not glob.has_magic(part), path.parts))
            if len(fixed) == len(path.parts):
                raise DataError(f"no such file or folder: {path} (relative to {Path.cwd()})")
            root = Path(*fixed)
            files = [Path(file) for file in glob.glob(str(path), recursive=True)]
        # A link to nothing is kept: who reads it reports it.
        files = [file for file in files if file.is_file() or not file.exists()]
        named = sorted((file.relative_to(root).as_posix(), file) for file in files)
        if not named:
            kind = f" ending in {' or '.join(suffixes)}" if any(suffixes) and path.is_dir() else ""
            raise DataError(f"no file{kind} in {path}" if path.is_dir() else f"no file matches {path}")
        for name, file in named:
            found.setdefault(file, name)
    return list(found.items())


def _files_below(folder: Path) -> Iterator[Path]:
    """What is no folder in a folder and in those within it, at last in those that links lead to; nothing hidden.

    Raises `DataError` for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read the folder {error.filename} ({error.strerror})")

    waiting, entered = [folder], set[Path]()  # a link may lead back
    while waiting:
        links: list[Path] = []
        for here, inner, names in os.walk(waiting.pop(0), onerror=refuse):
            place = Path(here).resolve()
            inner[:] = [] if place in entered else [name for name in inner if not name.startswith(".")]
            links += [Path(here, name) for name in inner if Path(here, name).is_symlink()]
            if place not in entered:
                yield from (Path(here, name) for name in names if not name.startswith("."))
            entered.add(place)
        waiting += sorted(links)


def _document_of_row(row: object, place: str, text_field: str, id_field: str | None) -> Document:
    if not isinstance(row, dict):
        raise UnusableError(f"is no JSON object but {_json_kind(row)}")
    text = _checked_text(get_field(row, text_field), f"field {text_field!r}")
    return Document(get_identifier(row, id_field) if id_field is not None and id_field in row else place, text)


def _checked_text(text: object, what: str) -> str:
    if not isinstance(text, str):
        raise UnusableError(f"{what} is no string but {_json_kind(text)}")
    if not text.strip():
        raise UnusableError(f"{what} is empty")
    return sound_text(text, what)


def _json_kind(value: object) -> str:
    kinds = {
        dict: "an object",
        list: "an array",
        bool: "a boolean",
        type(None): "null",
        int: "a number",
        float: "a number",
    }
    return kinds.get(type(value), type(value).__name__)
