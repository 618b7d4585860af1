"""Audio files read piece by piece, through `sphn`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from inlay.data.problems import DataError

# sphn finds a sample by its time in these exactly; in Ogg and MP3 it lands on a packet's border.
_SEEKABLE = {".wav", ".flac"}
_MAYBE_OPUS = {".opus", ".ogg", ".oga"}


@dataclass(frozen=True)
class AudioHeader:
    """What a file's header says."""

    sample_rate: int
    """Samples per second."""

    channels: int
    """1 is mono, 2 stereo."""

    samples: int
    """Length in samples of one channel."""

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self.samples / self.sample_rate


def read_header(path: Path) -> AudioHeader:
    """Read a file's header.

    Raises:
        DataError: The file is missing or no audio that sphn reads.
    """
    return _header(_open(path))


def blocks(path: Path, seconds: int) -> Iterator[np.ndarray]:
    """The samples of a file, `[channels, samples]` float32, so many seconds at a time; the last block is shorter.

    WAV and FLAC are read as they are asked for. Other formats cannot be entered at a given sample and are decoded whole
    before the first block: 0.7 GB for an hour of 24 kHz stereo.

    Raises:
        DataError: The file is no audio, or ends before the length that its header says.
    """
    reader = _open(path)
    header = _header(reader)
    whole = None if path.suffix.lower() in _SEEKABLE else _decode_all(reader, path)
    total = header.samples if whole is None else whole.shape[1]
    size = seconds * header.sample_rate
    for first in range(0, total, size):
        expected = min(size, total - first)
        block = whole[:, first : first + expected] if whole is not None else _decode(reader, path, first, expected)
        if block.shape[1] != expected:
            raise cut_short(path, header, first + block.shape[1])
        yield np.ascontiguousarray(block)


def require_end(path: Path, header: AudioHeader) -> None:
    """Look whether the samples go on to where the header says; for WAV and FLAC, others are whole or unreadable.

    Raises:
        DataError: They end before that.
    """
    if path.suffix.lower() not in _SEEKABLE or not header.samples:
        return
    first = max(0, header.samples - header.sample_rate)
    block = _decode(_open(path), path, first, header.samples - first)
    if block.shape[1] < header.samples - first:
        raise cut_short(path, header, first + block.shape[1])


def cut_short(path: Path, header: AudioHeader, samples: int) -> DataError:
    """The error of a file whose samples end before the header says."""
    return DataError(
        f"audio {path} is cut short: its header says {header.duration:.2f} s, "
        f"the samples end by {samples / header.sample_rate:.2f} s"
    )


def _open(path: Path) -> Any:
    try:
        sphn = import_module("sphn")
    except ImportError:
        raise DataError("reading audio needs sphn: pip install sphn") from None
    if not path.is_file():
        raise DataError(f"audio {path} is missing")
    try:
        return sphn.FileReader(str(path))
    except ValueError as error:
        if path.suffix.lower() in _MAYBE_OPUS:
            with suppress(ValueError):
                return _Opus(*sphn.read_opus(str(path)))
        raise DataError(f"audio {path} cannot be read ({_told(error)})") from None


class _Opus:
    """An Opus file with the methods of sphn's ``FileReader``, which reads none."""

    def __init__(self, whole: np.ndarray, sample_rate: int) -> None:
        self.whole, self.sample_rate = whole, sample_rate
        self.channels = whole.shape[0]
        self.duration_sec = whole.shape[1] / sample_rate

    def decode_all(self) -> np.ndarray:
        return self.whole


def _header(reader: Any) -> AudioHeader:
    rate = int(reader.sample_rate)
    return AudioHeader(rate, int(reader.channels), math.floor(float(reader.duration_sec or 0) * rate + 0.5))


def _decode(reader: Any, path: Path, first: int, samples: int) -> np.ndarray:
    rate = int(reader.sample_rate)
    try:
        # A quarter of a sample more: sphn rounds times down, and a time that is a whole sample may lie just below it.
        block: np.ndarray = reader.decode((first + 0.25) / rate, (samples + 0.25) / rate)
    except ValueError as error:
        if "out-of-range" in str(error):
            return np.zeros((int(reader.channels), 0), np.float32)
        raise DataError(f"audio {path} cannot be read at {first / rate:.2f} s ({_told(error)})") from None
    return block[:, :samples]


def _decode_all(reader: Any, path: Path) -> np.ndarray:
    try:
        whole: np.ndarray = reader.decode_all()
    except ValueError as error:
        raise DataError(f"audio {path} cannot be read ({_told(error)})") from None
    return whole


def _told(error: ValueError) -> str:
    return str(error).rpartition('": ')[2]
