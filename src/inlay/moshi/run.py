"""Full duplex from a file: Moshi hears a recording frame by frame, and its answer keeps the recording's time."""

from __future__ import annotations

import os
import wave
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import numpy as np

from inlay.data.audio_reader import blocks, read_header
from inlay.fastweight.memory import find_memory
from inlay.files import replacing
from inlay.moshi.commits import Commit
from inlay.moshi.duplex import Duplex, DuplexError, Moshi, Reply, Samples, Voice
from inlay.moshi.streaming import stream_of

_BLOCK_SECONDS = 30
_LINE = 80


@dataclass
class Run:
    """A file that was heard to its end.

    Attributes:
        source: What was heard.
        model: Who heard it.
        frames: Frames heard.
        frame_rate: Frames per second.
        milliseconds: Of each frame.
        commits: Chunks that the memory wrote; empty without one.
        transcript: (second, what Moshi said from there on until it paused).
        chunk_size: C; None without a memory.
        state_bytes: Bytes of the memory's state.
        frames_before: Frames that the session had heard before.
        sum_before: Largest η‖S‖ / ‖W0‖ of the memory that the session brought; 0 without one.
        spent: Computing time in seconds.
        saying: What Moshi has said since it paused, until that is a line of the transcript.
    """

    source: str
    model: str
    frame_rate: float
    frames: int = 0
    milliseconds: list[float] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    transcript: list[tuple[float, str]] = field(default_factory=list)
    chunk_size: int | None = None
    state_bytes: int = 0
    frames_before: int = 0
    sum_before: float = 0.0
    spent: float = 0.0
    saying: str = ""

    @property
    def audio_seconds(self) -> float:
        """Length of what was heard."""
        return self.frames / self.frame_rate

    @property
    def real_time_factor(self) -> float:
        """Computing time by audio time; below 1 is faster than real time."""
        return self.spent / self.audio_seconds if self.frames else float("nan")

    @property
    def late_frames(self) -> int:
        """Frames that took longer than they last."""
        return sum(ms > 1000 / self.frame_rate for ms in self.milliseconds)

    @property
    def largest_sum(self) -> float:
        """Largest η‖S‖ / ‖W0‖ while it was heard."""
        return max(self.sum_before, *(commit.relative_sum for commit in self.commits), 0.0)

    @property
    def chunks(self) -> int:
        """Chunks that each layer has written."""
        return len({commit.chunk for commit in self.commits})


def run_file(
    moshi: Moshi,
    source: str | Path,
    target: str | Path | None,
    *,
    voice: Voice | None = None,
    session: str | Path | None = None,
    stereo: bool = False,
    on_frame: Callable[[Run, int, Reply], None] | None = None,
) -> Run:
    """Let Moshi hear a recording and write down its answer.

    Args:
        moshi: Who listens.
        source: The user's voice; of a stereo file the right channel, as in the training data.
        target: A 16-bit WAV of the same length, Moshi's answer; None writes none. It appears when all is heard.
        voice: How tokens are drawn.
        session: Gone on from if the file exists, and written at the end.
        stereo: Write the user's voice too, on the right, as in the training data.
        on_frame: Called after each frame with the run so far, its frames in all, and the reply.

    Raises:
        DataError: The recording is missing or cannot be read.
        DuplexError: It has more than two channels or no samples, or the answer or the session could not be written
            where it is wanted; said before anything is heard.
        CheckpointError: The session is damaged or of another model.
    """
    source = Path(source)
    for what, path in (("answer", target), ("session", session)):
        if path is not None:
            require_place(Path(path), what, source)
    frames, total = _user_frames(source, moshi.mimi.sample_rate, moshi.frame_size)
    run = Run(str(source), moshi.source, moshi.mimi.frame_rate)
    caption = _Caption(run)
    with ExitStack() as stack:
        write = None
        if target is not None:
            write = stack.enter_context(_wav(Path(target), moshi.mimi.sample_rate, 2 if stereo else 1))
        duplex = stack.enter_context(Duplex(moshi, voice=voice, session=session))
        run.frames_before = max(0, duplex.frames - 1)  # the first was stepped twice
        stream, memory = stream_of(moshi.lm), find_memory(moshi.lm)
        if duplex.log is not None and stream is not None and stream.steps is not None and memory is not None:
            run.chunk_size, run.state_bytes = memory.config.chunk_size, stream.steps.nbytes
            run.sum_before = duplex.log.relative_sum()
        for heard in frames:
            reply = duplex.hear(heard)
            run.frames += 1
            run.milliseconds.append(reply.milliseconds)
            run.spent += reply.milliseconds / 1000
            caption.add(reply.text)
            if write is not None:
                write(np.stack([reply.samples, heard] if stereo else [reply.samples]))
            if on_frame is not None:
                on_frame(run, total, reply)
        caption.close()
        run.commits = [] if duplex.log is None else duplex.log.commits
        if session is not None:
            duplex.save(session)
    return run


def require_place(path: Path, what: str, source: Path | None = None) -> None:
    """Make the folder in which ``path`` will be written, before the time is spent on what goes there.

    Raises:
        DuplexError: There can be no such folder, or ``path`` is what is heard.
    """
    if source is not None and path.resolve() == source.resolve():
        raise DuplexError(f"the {what} would be written over {source}, which is heard; give it another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DuplexError(f"the {what} cannot be written to {path}: {error.strerror} ({error.filename})") from None
    if not os.access(path.parent, os.W_OK):
        raise DuplexError(f"the {what} cannot be written to {path}: {path.parent} is read-only")


def _user_frames(path: Path, rate: int, frame_size: int) -> tuple[Iterator[Samples], int]:
    """The user's voice in frames at ``rate``, the last one filled up with silence, and how many there are."""
    header = read_header(path)
    if header.channels > 2:
        raise DuplexError(f"{path} has {header.channels} channels; give mono, or stereo with the user on the right")
    samples = header.samples if header.sample_rate == rate else round(header.samples * rate / header.sample_rate)
    if samples == 0:
        raise DuplexError(f"{path} holds no samples")

    def voice() -> Iterator[Samples]:
        if header.sample_rate == rate:
            for block in blocks(path, _BLOCK_SECONDS):
                yield block[-1]
        else:  # resampled in one piece, so that there are no seams
            whole = np.concatenate([block[-1:] for block in blocks(path, _BLOCK_SECONDS)], axis=1)
            sphn = import_module("sphn")
            yield sphn.resample(whole, src_sample_rate=header.sample_rate, dst_sample_rate=rate)[0, :samples]

    def frames() -> Iterator[Samples]:
        rest = np.zeros(0, np.float32)
        for piece in voice():
            rest = np.concatenate([rest, piece])
            whole = len(rest) // frame_size
            yield from rest[: whole * frame_size].reshape(whole, frame_size)
            rest = rest[whole * frame_size :]
        if len(rest):
            yield np.pad(rest, (0, frame_size - len(rest)))

    return frames(), -(-samples // frame_size)


@contextmanager
def _wav(path: Path, rate: int, channels: int) -> Iterator[Callable[[Samples], None]]:
    """Gives what adds ``[channels, samples]`` to a 16-bit WAV, which is at ``path`` once all went well."""
    with replacing(path) as new, wave.open(str(new), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)

        def write(samples: Samples) -> None:
            file.writeframes((np.clip(samples.T, -1, 1) * 32767).round().astype("<i2").tobytes())

        yield write


class _Caption:
    """The transcript: a line of it is what is said without a pause of a second, broken between words if long."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._since = 0.0
        self._silent = 0

    def add(self, text: str) -> None:
        """Take the text of the newest frame."""
        run = self._run
        if text.startswith(" ") and len(run.saying) > _LINE:
            self.close()
        if text:
            if not run.saying:
                self._since = run.frames_before / run.frame_rate + run.audio_seconds
            run.saying += text
            self._silent = 0
        else:
            self._silent += 1
            if self._silent >= run.frame_rate:
                self.close()

    def close(self) -> None:
        """End the line."""
        if self._run.saying.strip():
            self._run.transcript.append((self._since, self._run.saying.strip()))
        self._run.saying, self._silent = "", 0
