"""Soft tokens kept for later: many documents under their ids, written once and answered from as often as one likes.

A store is one file (``store_file.py``) or a folder of them, ``shard-00000.safetensors`` and on. The folder has no index
of its own that could disagree with what is there: each shard says what it holds, and of a document that stands in two
of them the later one counts. A shard is there whole or not at all, so a writer that is killed has lost what it had not
yet written and nothing else.

    store = SoftTokenStore.open("store")
    store.check(model, compressor, layout)                                   # else the slots mean nothing
    answers = layout.answer(model, store.load(["a.txt", "b.txt"]), ["Who?", "Where?"])

``layout`` is a layout bound to the model's tokenizer. The same without a store:
``layout.answer(model, compressor.compress(ids, mask), questions)``.
"""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from inlay.files import locked, remove_abandoned
from inlay.softtoken.compressors import Compressor
from inlay.softtoken.layout import PromptLayout
from inlay.softtoken.prompting import BoundLayout
from inlay.softtoken.store_file import (
    Slots,
    StoredDocument,
    StoreError,
    StoreFile,
    StoreHeader,
    hash_text,
    join_rows,
    read_file,
    split_rows,
    write_file,
)
from inlay.softtoken.tokens import Form, SoftTokens

__all__ = ["SoftTokenStore", "StoreError", "StoreHeader", "StoreWriter", "StoredDocument", "hash_text", "save_store"]

SHARD_BYTES = 2**28
SHARD_SECONDS = 30.0
_SHARD = re.compile(r"shard-(\d{5,})\.safetensors")


class SoftTokenStore:
    """Stored soft tokens, read document by document. Made by :meth:`open`.

    Attributes:
        path: The file or folder.
        header: What the slots belong to.
        documents: What is stored, by id.
    """

    def __init__(self, path: Path, files: Sequence[StoreFile]) -> None:
        self.path = path
        self.header = files[-1].header  # the newest knows where its run lies now
        self.files = tuple(files)
        for file in files:
            if odd := file.header.difference(files[0].header):
                raise StoreError(f"{file.path} does not belong with {files[0].path}: it is of {odd}")
            if file.tensors != files[0].tensors:
                raise StoreError(f"{file.path} does not belong with {files[0].path}: its slots have another form")
        self._places = {
            document.id: (number, index)
            for number, file in enumerate(files)
            for index, document in enumerate(file.documents)
        }
        self.documents: Mapping[str, StoredDocument] = MappingProxyType(
            {name: files[number].documents[index] for name, (number, index) in self._places.items()}
        )

    @classmethod
    def open(cls, path: str | Path) -> SoftTokenStore:
        """Read the headers of the store at ``path``, a file or a folder of shards; no slot is read.

        Raises:
            StoreError: There is none, a file is damaged or of a newer format, or shards do not belong together.
        """
        path = Path(path)
        files = _shards(path) if path.is_dir() else [path]
        if not files:
            raise StoreError(
                f"{path} holds no soft tokens: there is no shard in it. Write some with inlay compress encode"
            )
        return cls(path, [read_file(file) for file in files])

    @property
    def form(self) -> Form:
        """``embeddings`` or ``kv``."""
        return "embeddings" if "embeddings" in self.files[0].tensors else "kv"

    def load(self, ids: Sequence[str]) -> SoftTokens:
        """The slots of these documents as they were written, bit for bit: one row each, zeros behind shorter ones.

        Args:
            ids: In any order; one may come twice. Nothing of other documents is read.

        Returns:
            Slots on the CPU.

        Raises:
            StoreError: An id is not in the store (the nearest ones are named), or a file is damaged.
        """
        if isinstance(ids, str):
            raise StoreError(f"ids are a list; got the text {ids!r}: give [{ids!r}]")
        wanted: dict[int, list[str]] = {}
        for name in dict.fromkeys(ids):
            number, _ = self._places[self.find(name).id]
            wanted.setdefault(number, []).append(name)
        slots: dict[str, Slots] = {}
        for number, names in wanted.items():
            read = self.files[number].read([self._places[name][1] for name in names])
            slots |= zip(names, read, strict=True)
        return join_rows([slots[name] for name in ids])

    def find(self, name: str) -> StoredDocument:
        """What is noted of the document called ``name``.

        Raises:
            StoreError: There is none; the nearest ids are named.
        """
        if name in self.documents:
            return self.documents[name]
        near = difflib.get_close_matches(name, self.documents, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {self._some_ids()}"
        raise StoreError(f"{self.path} holds no document {name!r}; {hint}")

    def current(self, number: int) -> list[int]:
        """The documents of file ``number`` that no later file holds anew, by their index in it."""
        documents = self.files[number].documents
        return [index for index, one in enumerate(documents) if self._places[one.id] == (number, index)]

    def check(self, model: Any, compressor: Compressor[Any], layout: PromptLayout | BoundLayout) -> None:
        """Refuse soft tokens of another decoder, compressor or layout.

        Raises:
            StoreError: Names what differs.
        """
        self.check_header(StoreHeader.of(model, compressor, layout))

    def check_header(self, here: StoreHeader) -> None:
        """The same with a header that was made before."""
        if odd := self.header.difference(here):
            raise StoreError(f"the soft tokens in {self.path} are of {odd}. Encode the documents again")

    def run(self) -> Path:
        """The folder of the run that wrote the store.

        Raises:
            StoreError: No run wrote it, or the folder is not there any more.
        """
        if self.header.run is None:
            raise StoreError(f"{self.path} does not say which run wrote it; name it with --run")
        run = Path(self.header.run)
        if not run.is_dir():
            raise StoreError(
                f"the run that wrote {self.path} lay in {run} and is not there; say with --run where it is"
            )
        return run

    def only_document(self) -> str:
        """The id of the one document there is.

        Raises:
            StoreError: There are several.
        """
        if len(self.documents) != 1:
            raise StoreError(f"{self.path} holds {len(self.documents):,} documents; say which: {self._some_ids()}")
        return next(iter(self.documents))

    def _some_ids(self) -> str:
        names = ", ".join(map(repr, islice(self.documents, 5)))
        return names + (f" and {len(self.documents) - 5:,} more" if len(self.documents) > 5 else "")


class StoreWriter:
    """Adds documents to a folder of shards, as a context manager; one writer at a time.

    What is added is gathered and written as one shard when it has grown large, when the last one is some time ago, and
    when the block is left, in an error too. A document that is there already is replaced: its new slots count as soon
    as their shard is written, and the old ones are taken out when the block is left.

    Args:
        path: The folder; made if it is not there.
        header: What the slots belong to.
        shard_bytes: Slots of so many bytes are written at once.
        shard_seconds: Most seconds between two writes; a kill loses no more work than that.

    Attributes:
        stored: The documents in the folder when it was entered, by id.

    Raises:
        StoreError: On entering, when another process is writing there, what is there is damaged or belongs to
            something else, or the folder holds other files.
    """

    def __init__(
        self,
        path: str | Path,
        header: StoreHeader,
        *,
        shard_bytes: int = SHARD_BYTES,
        shard_seconds: float = SHARD_SECONDS,
    ) -> None:
        self.path = Path(path)
        self.header = header
        self.stored: Mapping[str, StoredDocument] = {}
        self._shard_bytes = shard_bytes
        self._shard_seconds = shard_seconds
        self._gathered: dict[str, tuple[StoredDocument, Slots]] = {}
        self._nbytes = 0
        self._written = time.monotonic()
        self._tensors: dict[str, tuple[str, list[int]]] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self.path.is_file():
            raise StoreError(f"{self.path} is a file; documents are added to a folder of shards")
        self.path.mkdir(parents=True, exist_ok=True)
        foreign = [entry.name for entry in self.path.iterdir() if not entry.name.startswith((".", "shard-"))]
        if foreign:
            raise StoreError(
                f"{self.path} holds other files ({sorted(foreign)[0]}, …); give the store a folder of its own"
            )
        busy = StoreError(f"another process is writing to {self.path}; wait for it, or stop it")
        with ExitStack() as stack:  # lets go of the lock if what is there is refused
            stack.enter_context(locked(self.path, busy))
            remove_abandoned(self.path)
            if _shards(self.path):
                store = SoftTokenStore.open(self.path)
                store.check_header(self.header)
                self.stored, self._tensors = store.documents, store.files[0].tensors
            self._written = time.monotonic()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        with self._stack:
            self.flush()
            self._sweep()

    def add(self, documents: Sequence[StoredDocument], memory: SoftTokens) -> None:
        """Take the slots of ``documents``, one row of ``memory`` each.

        Raises:
            StoreError: Their form, dtype or width is not that of the store, they are not as many as noted, or hold NaN
                or infinity. None of them is taken then.
        """
        rows = split_rows(documents, memory)
        kind = {name: (str(tensor.dtype), [*tensor.shape[1:]]) for name, tensor in rows[0].items()}
        if self._tensors is None:
            self._tensors = kind
        if kind != self._tensors:
            odd = sorted(name for name in kind | self._tensors if kind.get(name) != self._tensors.get(name))[0]
            raise StoreError(
                f"{self.path} holds slots of another form, dtype or width: {odd!r} is {self._tensors.get(odd)} there "
                f"and {kind.get(odd)} here"
            )
        self._gathered |= {one.id: (one, slots) for one, slots in zip(documents, rows, strict=True)}
        self._nbytes += memory.nbytes
        if self._nbytes >= self._shard_bytes or time.monotonic() - self._written >= self._shard_seconds:
            self.flush()

    def flush(self) -> None:
        """Write what was gathered, if there is any, as the next shard."""
        if self._gathered:
            number = max(map(_number, _shards(self.path)), default=-1) + 1
            documents, slots = zip(*self._gathered.values(), strict=True)
            write_file(self.path / f"shard-{number:05}.safetensors", self.header, documents, slots)
            self._gathered, self._nbytes = {}, 0
        self._written = time.monotonic()

    def _sweep(self) -> None:
        """Take the slots that were replaced out of their shards."""
        if not _shards(self.path):
            return
        store = SoftTokenStore.open(self.path)
        for number, file in enumerate(store.files):
            kept = store.current(number)
            if not kept:
                file.path.unlink()
            elif len(kept) < len(file.documents):
                write_file(file.path, file.header, [file.documents[i] for i in kept], file.read(kept))


def save_store(path: str | Path, header: StoreHeader, documents: Sequence[StoredDocument], memory: SoftTokens) -> None:
    """Write one file that holds all ``documents``, one row of ``memory`` each; :meth:`SoftTokenStore.open` reads it.

    Raises:
        StoreError: They do not go together, or slots hold NaN or infinity. The file is left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, header, documents, split_rows(documents, memory))


def _shards(folder: Path) -> list[Path]:
    """The shards of a folder in the order they were begun in."""
    return sorted((file for file in folder.iterdir() if _SHARD.fullmatch(file.name)), key=_number)


def _number(shard: Path) -> int:
    match = _SHARD.fullmatch(shard.name)
    assert match is not None
    return int(match[1])
