"""Whether conversations on disk are what training takes them for: `inlay moshi check`.

Every file is looked at in its header and at its end, every transcript word by word; a problem is told with the
manifest's line and the file it lies in, so that all of them can be mended before hours of encoding.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from inlay.data.audio import MAIN_SPEAKER, SAMPLE_RATE, AudioFile, Transcript, Word, read_manifests, read_transcript
from inlay.data.audio_reader import AudioHeader, read_header, require_end
from inlay.data.problems import DataError, Problems
from inlay.files import sha256

if TYPE_CHECKING:
    from rich.table import Table

TOLERANCE = 0.08
"""Seconds by which times may disagree: one frame of Mimi."""

Progress = Callable[[int, int], None]
"""Is told how many of how many files have been looked at."""


class Finding(NamedTuple):
    """One problem: its kind, manifest and line, and what is wrong with which file."""

    kind: str
    where: str
    reason: str


@dataclass(frozen=True)
class Conversation:
    """A conversation that has been looked at and is sound."""

    file: AudioFile
    samples: int
    """Samples of a channel, at 24 kHz."""

    transcript: Transcript


@dataclass(frozen=True)
class AudioReport:
    """What `check_audio` saw."""

    data: str
    files: int
    """Lines of manifests that are conversations."""

    conversations: tuple[Conversation, ...]
    """Those without a problem."""

    findings: tuple[Finding, ...]
    """All problems, in the manifests' order."""

    @property
    def exit_code(self) -> int:
        """0 when there is no problem and at least one conversation, else 1."""
        return int(bool(self.findings) or not self.conversations)

    @property
    def seconds(self) -> float:
        """Length of the sound conversations."""
        return sum(one.samples for one in self.conversations) / SAMPLE_RATE

    @property
    def returns(self) -> int:
        """Phrases of theirs that return."""
        return sum(len(one.transcript.returns) for one in self.conversations)

    def tables(self) -> Iterator[Table]:
        """What there is, and, if anything is wrong, how often and where."""
        from rich.markup import escape
        from rich.table import Table

        summary = Table(title=escape(self.data), title_justify="left", show_header=False)
        words = Counter(word.speaker == MAIN_SPEAKER for one in self.conversations for word in one.transcript.words)
        summary.add_row("conversations", f"{self.files:,}")
        summary.add_row("sound", f"{len(self.conversations):,}")
        summary.add_row("hours of these", f"{self.seconds / 3600:.2f}")
        summary.add_row("words of the main speaker", f"{words[True]:,}")
        summary.add_row("words of others", f"{words[False]:,}")
        summary.add_row("phrases that return", f"{self.returns:,}")
        yield summary
        if self.findings:
            kinds = Table("problem", "times", title="by kind", title_justify="left")
            for kind, times in Counter(finding.kind for finding in self.findings).most_common():
                kinds.add_row(kind, f"{times:,}")
            yield kinds
            problems = Table("where", "what is wrong", title="problems", title_justify="left")
            for finding in self.findings:
                problems.add_row(escape(finding.where), escape(finding.reason))
            yield problems


def check_audio(data: str, *, progress: Progress | None = None) -> AudioReport:
    """Look at every conversation of DATA and report all problems.

    Args:
        data: `path:weight,path:weight`.
        progress: Told after every file.

    Raises:
        DataError: DATA itself is malformed.
    """
    listed = _Listed()
    files = read_manifests(data, listed)
    findings = list(listed.findings)
    if not files and not findings:
        findings.append(
            Finding("manifest", data, 'lists no conversation: a line of a manifest is {"path": …, "duration": …}')
        )
    conversations: list[Conversation] = []
    duplicates = find_duplicates(files)
    for index, file in enumerate(files):
        found = [*duplicates.get(index, ())]
        conversation, problems = examine(file)
        found.extend(problems)
        if conversation is not None and not found:
            conversations.append(conversation)
        findings.extend(found)
        if progress is not None:
            progress(index + 1, len(files))
    return AudioReport(data, len(files), tuple(conversations), tuple(findings))


def sound_conversations(data: str, problems: Problems, *, progress: Progress | None = None) -> list[Conversation]:
    """The conversations of DATA that have no problem.

    Args:
        data: `path:weight,path:weight`.
        problems: Takes the others: skips them, or raises with all that it found.
        progress: Told after every file.

    Raises:
        DataError: As `problems` has it, or no conversation is left.
    """
    report = check_audio(data, progress=progress)
    reasons: dict[str, list[str]] = defaultdict(list)
    for finding in report.findings:
        reasons[finding.where].append(finding.reason)
    for where, of_one in reasons.items():
        problems.report(where, "; ".join(of_one))
    problems.check()
    if not report.conversations:
        raise DataError(f"no sound conversation in {data}: `inlay moshi check` lists what is wrong")
    return list(report.conversations)


def examine(file: AudioFile) -> tuple[Conversation | None, list[Finding]]:
    """Look at one conversation: all that is wrong with it, and it itself when audio and transcript can be read."""
    found: list[Finding] = []

    def note(kind: str, reason: str) -> None:
        found.append(Finding(kind, file.where, reason))

    header, transcript = None, None
    try:
        header = read_header(file.path)
        require_end(file.path, header)
    except DataError as error:
        note("audio unreadable" if file.path.is_file() else "audio missing", str(error))
    try:
        transcript = read_transcript(file.transcript_path)
    except DataError as error:
        exists = file.transcript_path.is_file()
        note("transcript unreadable" if exists else "transcript missing", str(error))
    if header is not None:
        _examine_header(file, header, note)
    if transcript is not None:
        _examine_words(file, transcript, header.duration if header else None, note)
    if header is None or transcript is None:
        return None, found
    return Conversation(file, header.samples, transcript), found


def _examine_header(file: AudioFile, header: AudioHeader, note: Callable[[str, str], None]) -> None:
    if header.channels != 2:
        fix = f"sox -M LEFT.wav RIGHT.wav {file.path.name}" if header.channels == 1 else "keep two channels"
        count = "mono" if header.channels == 1 else f"{header.channels} channels"
        note("not stereo", f"audio {file.path} is {count}, not stereo (left Moshi, right user): {fix}")
    if header.sample_rate != SAMPLE_RATE:
        fix = f"sox {file.path.name} -r {SAMPLE_RATE} OUT.wav"
        note("sample rate", f"audio {file.path} has {header.sample_rate} Hz, not {SAMPLE_RATE} Hz: {fix}")
    if not header.samples:
        note("empty", f"audio {file.path} holds no sample")
    if abs(header.duration - file.duration) > TOLERANCE:
        found = f"{header.duration:.2f} s in {file.path}"
        note("duration", f"duration is {file.duration:.2f} s in the manifest, {found}; write that length there")


def _examine_words(
    file: AudioFile, transcript: Transcript, duration: float | None, note: Callable[[str, str], None]
) -> None:
    path = file.transcript_path

    def name(index: int, word: Word) -> str:
        return f"{path}: alignments[{index}] ({word.text!r}, {word.start:.2f}–{word.end:.2f} s)"

    words = transcript.words
    for index in range(1, len(words)):
        if words[index].start < words[index - 1].start:
            note("not sorted", f"{name(index, words[index])} starts before the word ahead of it; sort by start")
            break  # one is enough: an unsorted transcript would list half its words
    for index, word in enumerate(words):
        if word.start < 0 or word.end < word.start:
            note("times", f"{name(index, word)} starts before 0 s or ends before it starts")
    if duration is not None:
        _examine_ends(transcript, duration, path, name, note)
    if not any(word.speaker == MAIN_SPEAKER for word in words):
        others = ", ".join(sorted({word.speaker for word in words})) or "no word"
        note("no main speaker", f"{path}: no word of {MAIN_SPEAKER}, only {others}: the text stream would be empty")


def _examine_ends(
    transcript: Transcript,
    duration: float,
    path: Path,
    name: Callable[[int, Word], str],
    note: Callable[[str, str], None],
) -> None:
    beyond = [(i, word) for i, word in enumerate(transcript.words) if word.end > duration + TOLERANCE]
    if beyond:
        more = f", and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        note("beyond the end", f"{name(*beyond[0])} ends beyond the audio's {duration:.2f} s{more}; cut it to that")
    for index, again in enumerate(transcript.returns):
        if again.end > duration + TOLERANCE:
            note("beyond the end", f"{path}: returns[{index}] ends beyond the audio's {duration:.2f} s")


def find_duplicates(files: Sequence[AudioFile]) -> dict[int, list[Finding]]:
    """Files that were listed before, under the same path or with the same content, by their index.

    Only files of one size are read and compared, so this costs nothing where there is no duplicate.
    """
    found: dict[int, list[Finding]] = defaultdict(list)
    first_of_path: dict[Path, int] = {}
    by_size: dict[int, list[int]] = defaultdict(list)
    for index, file in enumerate(files):
        path = file.path.resolve()
        first = first_of_path.setdefault(path, index)
        if first != index:
            found[index].append(
                Finding("duplicate", file.where, f"audio {file.path} is listed before, at {files[first].where}")
            )
        elif path.is_file():
            by_size[path.stat().st_size].append(index)
    for candidates in by_size.values():
        first_of_hash: dict[str, int] = {}
        for index in candidates if len(candidates) > 1 else ():
            first = first_of_hash.setdefault(sha256(files[index].path), index)
            if first != index:
                reason = f"audio {files[index].path} has the content of {files[first].path}, at {files[first].where}"
                found[index].append(Finding("duplicate", files[index].where, reason))
    return found


class _Listed(Problems):
    """Keeps the problems of manifests as findings, raising none."""

    def __init__(self) -> None:
        super().__init__()
        self.findings: list[Finding] = []

    def report(self, where: str, reason: str) -> None:
        self.findings.append(Finding("manifest", where, reason))
