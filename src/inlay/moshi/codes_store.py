"""Codes on disk: safetensors shards, each whole under its name, and an index of them all.

    OUT/index.json                what the codes belong to, and the files of DATA with shard and key; written last
    OUT/shard-00000.safetensors   {key}.codes [16, T], left channel's 8 codebooks, then right channel's; {key}.text [T]

A shard's own metadata tells what it holds and from which bytes it was made, so the shards alone say what is done. A
shard is whole or not there (:mod:`inlay.files`), also where a process was killed. The next run takes up what the shards
hold, encodes the rest and writes the index. A file is known by the hashes of its audio and transcript: moved files are
not encoded again, and changed ones are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from inlay.data.audio import AudioFile, Return
from inlay.data.problems import DataError
from inlay.files import locked, remove_abandoned, replacing, write_whole

INDEX_NAME = "index.json"
FORMAT = 1

SHARD_FRAMES = 90_000
"""Frames after which a shard is closed: 2 hours of audio, 3 MB."""

SHARD_SECONDS = 120.0
"""Seconds after which a shard is closed with what it holds: with SHARD_FRAMES, the most that a kill can cost."""

_HEADER = "inlay"


@dataclass(frozen=True)
class CodesIdentity:
    """What codes belong to: those of two stores go together where this is the same."""

    mimi: str
    """SHA-256 of Mimi's weights and sizes."""

    tokenizer: str
    """SHA-256 of the text tokenizer."""

    codebooks: int
    """Codebooks of one channel: 8."""

    card: int
    """Codes in a codebook: 2,048 in Mimi."""

    frame_rate: float
    """Frames per second: 12.5."""

    text_padding_id: int
    """Token of frames in which no word piece is due."""

    end_of_text_padding_id: int
    """Token of the last padding before a piece."""

    main_speaker: str
    """Whose words are the text stream."""

    keep_and_shift: bool
    """Whether pieces still due when the next word begins were kept."""


@dataclass(frozen=True)
class FileStamp:
    """A file's bytes, and what tells without reading that they are the same."""

    path: str
    size: int
    modified_ns: int
    sha256: str

    def describes(self, path: Path) -> bool:
        """Whether the file of this path has the size and time of change that the stamp has."""
        status = path.stat()
        return (status.st_size, status.st_mtime_ns) == (self.size, self.modified_ns)


@dataclass(frozen=True)
class StoredFile:
    """One encoded conversation, as its shard tells it."""

    audio: FileStamp
    transcript: FileStamp
    frames: int
    samples: int
    returns: tuple[Return, ...]
    shard: str
    key: str

    @property
    def content(self) -> tuple[str, str]:
        """What it is known by: the hashes of audio and transcript."""
        return self.audio.sha256, self.transcript.sha256


@dataclass(frozen=True)
class CodesEntry:
    """One conversation of a store, in the order of DATA."""

    stored: StoredFile
    path: str
    """The audio file, as DATA named it."""
    source: str
    """The part of DATA that it came by."""
    weight: float | None
    """The weight of that part."""

    @property
    def frames(self) -> int:
        """T, frames of the conversation."""
        return self.stored.frames


class CodesStore:
    """Codes to read. Every call reads what it returns and no more; a store can be sent to worker processes.

    Args:
        directory: What `inlay moshi encode` wrote.

    Raises:
        DataError: No finished store.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        index = _read_index(self.directory)
        try:
            self.identity = CodesIdentity(**index["identity"])
            self.entries = [
                CodesEntry(_stored(entry["stored"]), entry["path"], entry["source"], entry["weight"])
                for entry in index["entries"]
            ]
        except (KeyError, TypeError) as error:
            path = self.directory / INDEX_NAME
            raise DataError(f"{path} is damaged ({error}); run `inlay moshi encode` again") from None

    def codes(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Codes of frames `start` to `stop` of a conversation: `[16, frames]`, Moshi's 8 codebooks, then the user's."""
        return self._read(index, "codes", start, stop)

    def text(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The text stream of the same frames: `[frames]` int32."""
        return self._read(index, "text", start, stop)

    def _read(self, index: int, name: str, start: int, stop: int | None) -> np.ndarray:
        stored = self.entries[index].stored
        path = self.directory / stored.shard
        try:
            with safe_open(path, framework="np") as shard:
                tensor = shard.get_slice(f"{stored.key}.{name}")
                whole = [slice(None)] * (len(tensor.get_shape()) - 1)
                part: np.ndarray = tensor[(*whole, slice(start, stored.frames if stop is None else stop))]
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read ({error}); delete it and run `inlay moshi encode` again") from None
        return part


class CodesWriter:
    """A store being written. Only one can be open on a folder; the lock goes with the process.

    Args:
        directory: The store's folder; made if needed.
        identity: What the codes will belong to; must be that of the codes which are there.
        shard_frames: A shard is closed when it holds so many.

    Raises:
        DataError: Another process writes there, the codes there are another Mimi's, or a shard is damaged.
    """

    def __init__(self, directory: str | Path, identity: CodesIdentity, *, shard_frames: int) -> None:
        self.directory = Path(directory)
        self.identity = identity
        self.shard_frames = shard_frames
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise DataError(f"{self.directory}: OUT is a folder, and here is a file; choose another name") from None
        busy = DataError(f"{self.directory}: another `inlay moshi encode` is writing there; wait for it")
        self._lock = ExitStack()
        self._lock.enter_context(locked(self.directory, busy))
        self.stored: dict[tuple[str, str], StoredFile] = {}
        self._next = 0
        try:
            self._take_up()
        except BaseException:
            self._lock.close()
            raise
        self._written = monotonic()
        self._waiting: dict[str, np.ndarray] = {}
        self._files: list[StoredFile] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        try:
            self.flush()
        finally:
            self._lock.close()

    def add(
        self,
        audio: FileStamp,
        transcript: FileStamp,
        *,
        codes: np.ndarray,
        text: np.ndarray,
        samples: int,
        returns: Iterable[Return],
    ) -> StoredFile:
        """Take one conversation: `codes` `[16, T]`, `text` `[T]`. It is on the disk when its shard is closed."""
        key = str(len(self._files))
        stored = StoredFile(audio, transcript, codes.shape[1], samples, tuple(returns), _shard_name(self._next), key)
        self._waiting |= {f"{key}.codes": np.ascontiguousarray(codes), f"{key}.text": np.ascontiguousarray(text)}
        self._files.append(stored)
        self.stored[stored.content] = stored
        full = sum(file.frames for file in self._files) >= self.shard_frames
        if full or monotonic() - self._written > SHARD_SECONDS:
            self.flush()
        return stored

    def flush(self) -> None:
        """Write what is waiting as a shard."""
        if not self._files:
            return
        header = {"format": FORMAT, "identity": asdict(self.identity), "files": [asdict(file) for file in self._files]}
        with replacing(self.directory / _shard_name(self._next)) as path:
            save_file(self._waiting, path, metadata={_HEADER: json.dumps(header)})
        self._next += 1
        self._written = monotonic()
        self._waiting, self._files = {}, []

    def finish(self, files: Iterable[tuple[AudioFile, StoredFile]]) -> None:
        """Write the index: these files, in this order, are the store."""
        self.flush()
        entries = [asdict(CodesEntry(stored, str(file.path), file.source, file.weight)) for file, stored in files]
        index = {"format": FORMAT, "identity": asdict(self.identity), "entries": entries}
        write_whole(self.directory / INDEX_NAME, json.dumps(index, indent=1, ensure_ascii=False))

    def _take_up(self) -> None:
        remove_abandoned(self.directory)
        for path in sorted(self.directory.glob("shard-*.safetensors")):
            header = _read_header(path)
            _require_same(self.directory, CodesIdentity(**header["identity"]), self.identity)
            for file in map(_stored, header["files"]):
                self.stored[file.content] = file
            self._next = int(path.stem.removeprefix("shard-")) + 1


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _read_index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX_NAME
    if not path.is_file():
        if any(directory.glob("shard-*.safetensors")):
            raise DataError(
                f"{directory}: encoding has not finished; run the same `inlay moshi encode` again, it goes on"
            )
        raise DataError(f"{directory}: no {INDEX_NAME}; give a folder that `inlay moshi encode DATA OUT` wrote")
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _require_format(path, index.get("format"))
    except (ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read ({error}); run `inlay moshi encode` again") from None
    return index


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="np") as shard:
            header: dict[str, Any] = json.loads((shard.metadata() or {})[_HEADER])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); delete it, its files will be encoded again") from None
    _require_format(path, header["format"])
    return header


def _require_format(path: Path, found: object) -> None:
    if found != FORMAT:
        raise DataError(f"{path} has format {found}, this version reads {FORMAT}; encode into another folder")


def _require_same(directory: Path, there: CodesIdentity, wanted: CodesIdentity) -> None:
    for field in fields(CodesIdentity):
        old, new = getattr(there, field.name), getattr(wanted, field.name)
        if old != new:
            raise DataError(
                f"{directory} holds codes with {field.name} {old}, this call would add some with {new}; "
                "encode into another folder"
            )


def _stored(entry: Mapping[str, Any]) -> StoredFile:
    return StoredFile(
        **{
            **entry,
            "audio": FileStamp(**entry["audio"]),
            "transcript": FileStamp(**entry["transcript"]),
            "returns": tuple(Return(*again) for again in entry["returns"]),
        }
    )
