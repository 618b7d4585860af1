"""Two-channel conversations on disk, in moshi-finetune's format: manifests, audio and word-by-word transcripts.

    DATA         `path` or `path:weight`, several with commas between; a path is a .jsonl file or a folder of them
    data.jsonl   a line per conversation: {"path": "calls/a.wav", "duration": 24.52}, the path relative to the manifest
    calls/a.wav  24 kHz stereo: the left channel is Moshi, the right one the user
    calls/a.json {"alignments": [["hello", [0.32, 0.71], "SPEAKER_MAIN"], …]}, seconds, in order of the starts

A transcript may hold `returns` besides: `[start, end, before_start, before_end]` of each phrase that the main speaker
says again, and of where that speaker had said it last. Conversations that :mod:`inlay.data.speech` makes have it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from inlay.data.problems import DataError, Problems

SAMPLE_RATE = 24_000
"""Samples per second that Mimi works at."""

MAIN_SPEAKER = "SPEAKER_MAIN"
"""What transcripts call the speaker on the left channel: Moshi."""

_LONGEST_NAME = 255
"""Bytes in a file's name that file systems take at most."""


class Word(NamedTuple):
    """One word of a transcript: the text, its start and end in seconds, and who says it."""

    text: str
    start: float
    end: float
    speaker: str


class Return(NamedTuple):
    """A phrase that is said again: where, and where it was said last before; seconds."""

    start: float
    end: float
    before_start: float
    before_end: float


@dataclass(frozen=True)
class Transcript:
    """The words of a conversation, and its phrases that return."""

    words: tuple[Word, ...]
    returns: tuple[Return, ...] = ()


@dataclass(frozen=True)
class DataPath:
    """One part of DATA: a file or folder, and its weight if one was given."""

    path: Path
    weight: float | None = None


@dataclass(frozen=True)
class AudioFile:
    """A line of a manifest."""

    path: Path
    """The audio file."""

    duration: float
    """Seconds, as the manifest says."""

    where: str
    """Manifest and line, as in "data.jsonl:3"."""

    source: str
    """The part of DATA that it came by."""

    weight: float | None
    """The weight given to that part."""

    @property
    def transcript_path(self) -> Path:
        """The transcript beside the audio."""
        return self.path.with_suffix(".json")


def parse_data(data: str) -> list[DataPath]:
    """Read `path:weight,path:weight`.

    Raises:
        DataError: No path, one that does not exist, one given twice, or a weight that is not a positive number.
    """
    parts: list[DataPath] = []
    for text in (part.strip() for part in data.split(",")):
        if not text:
            raise DataError(f"empty path in DATA {data!r}: write path:weight,path:weight")
        head, colon, tail = text.rpartition(":")
        path, weight = Path(text), None
        if colon and not path.exists():
            path = Path(head)
            try:
                weight = float(tail)
            except ValueError:
                raise DataError(f"{text}: no such file or folder, and {tail!r} is no weight") from None
            if not (math.isfinite(weight) and weight > 0):
                raise DataError(f"{text}: the weight must be a positive number, not {tail}")
        if not str(head if weight is not None else text).strip():
            raise DataError(f"empty path in DATA {data!r}: write path:weight,path:weight")
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        if any(path.resolve() == part.path.resolve() for part in parts):
            raise DataError(f"{path} is given twice in DATA; raise its weight instead")
        parts.append(DataPath(path, weight))
    return parts


def read_manifests(data: str, problems: Problems) -> list[AudioFile]:
    """Read the manifests of DATA, in order; what they point to is not looked at yet.

    Args:
        data: `path:weight,path:weight`; of a folder, every .jsonl file in it, at any depth.
        problems: Takes every line that is not a conversation.

    Raises:
        DataError: DATA is malformed, or a folder holds no manifest.
    """
    files: list[AudioFile] = []
    for part in parse_data(data):
        manifests = sorted(part.path.rglob("*.jsonl")) if part.path.is_dir() else [part.path]
        if not manifests:
            raise DataError(f"{part.path}: no .jsonl file in this folder")
        for manifest in manifests:
            files.extend(_read_manifest(manifest, part, problems))
    return files


def _read_manifest(manifest: Path, part: DataPath, problems: Problems) -> Iterator[AudioFile]:
    try:
        lines = manifest.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: JSON may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        problems.report(str(manifest), f"manifest cannot be read ({error})")
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{manifest}:{number}"
        try:
            path, duration = _parse_line(line)
        except DataError as error:
            problems.report(where, str(error))
            continue
        yield AudioFile(manifest.parent / path, duration, where, str(part.path), part.weight)


def _parse_line(line: str) -> tuple[Path, float]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"manifest line is not JSON ({error})") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or not entry["path"]:
        raise DataError('manifest line needs "path", the audio file as a string')
    duration = entry.get("duration")
    if not _is_number(duration) or duration <= 0:
        raise DataError(f'manifest line needs "duration", a positive number of seconds, not {_shortened(duration)}')
    try:
        path = Path(entry["path"]).expanduser()
    except RuntimeError:  # "~somebody" is no user here: a file may be called so
        path = Path(entry["path"])
    if "\0" in entry["path"] or any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
        raise DataError(f'"path" can be the name of no file: {_shortened(entry["path"])}')
    return path, float(duration)


def read_transcript(path: Path) -> Transcript:
    """Read the transcript beside an audio file.

    Raises:
        DataError: Missing, not JSON, or not of the format; the message names the entry.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"transcript {path} is missing; it stands beside the audio under the same name") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"transcript {path} cannot be read ({error})") from None
    if not isinstance(content, Mapping) or not isinstance(content.get("alignments"), list):
        raise DataError(f'transcript {path} needs "alignments", a list of [word, [start, end], speaker]')
    words = tuple(
        _parse_word(entry, f"{path}: alignments[{index}]") for index, entry in enumerate(content["alignments"])
    )
    returns = content.get("returns", [])
    if not isinstance(returns, list):
        raise DataError(f'{path}: "returns" must be a list of [start, end, before_start, before_end]')
    return Transcript(words, tuple(_parse_return(entry, f"{path}: returns[{i}]") for i, entry in enumerate(returns)))


def _parse_word(entry: Any, where: str) -> Word:
    match entry:
        case [str(text), [start, end], str(speaker)] if _is_number(start) and _is_number(end):
            return Word(text, float(start), float(end), speaker)
    raise DataError(f"{where} is {_shortened(entry)}, not [word, [start, end], speaker]")


def _parse_return(entry: Any, where: str) -> Return:
    if isinstance(entry, list) and len(entry) == 4 and all(map(_is_number, entry)):
        again = Return(*map(float, entry))
        if 0 <= again.before_start < again.before_end <= again.start < again.end:
            return again
    raise DataError(f"{where} is {_shortened(entry)}, not [start, end, before_start, before_end] in seconds")


def _is_number(value: Any) -> TypeGuard[float]:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _shortened(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
