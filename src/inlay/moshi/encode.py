"""Conversations encoded once, before training: `inlay moshi encode`.

Each file becomes Mimi's codes of both channels and a text stream of as many frames, in a store that training reads
without Mimi. Files are encoded by several processes; what is done is kept, whatever stops the work.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait as wait_for
from pathlib import Path

import numpy as np
import torch

from inlay.data.audio import MAIN_SPEAKER, SAMPLE_RATE, AudioFile, Return
from inlay.data.audio_check import Conversation, examine, sound_conversations
from inlay.data.audio_reader import blocks
from inlay.data.config import OnError
from inlay.data.problems import DataError, Problems
from inlay.files import sha256
from inlay.moshi.codes import BLOCK_SECONDS, mimi_codes
from inlay.moshi.codes_store import SHARD_FRAMES, CodesIdentity, CodesWriter, FileStamp, StoredFile
from inlay.moshi.interleave import FRAME_RATE, Interleaver
from inlay.moshi.weights import MoshiCheckpoint, load_checkpoint

Progress = Callable[[float, float], None]
"""Is told how many of how many seconds of audio are done."""


@dataclass(frozen=True)
class EncodeSummary:
    """What a call of `encode_data` did."""

    files: int
    """Conversations in the store now."""

    encoded: int
    """Of these, encoded by this call."""

    skipped: int
    """Lines of DATA that were left out, for a problem each."""

    frames: int
    """Frames in the store."""

    @property
    def hours(self) -> float:
        """Hours of audio in the store."""
        return self.frames / FRAME_RATE / 3600


def identity_of(checkpoint: MoshiCheckpoint, interleaver: Interleaver) -> CodesIdentity:
    """What codes made with this checkpoint belong to."""
    return CodesIdentity(
        mimi=checkpoint.mimi_hash,
        tokenizer=checkpoint.tokenizer_hash,
        codebooks=checkpoint.codebooks,
        card=int(checkpoint.lm_config["card"]),
        frame_rate=interleaver.frame_rate,
        text_padding_id=interleaver.padding_id,
        end_of_text_padding_id=interleaver.end_of_padding_id,
        main_speaker=interleaver.main_speaker,
        keep_and_shift=interleaver.keep_and_shift,
    )


def encode_data(
    data: str,
    out: str | Path,
    checkpoint: MoshiCheckpoint,
    *,
    workers: int = 1,
    on_error: OnError = "raise",
    keep_and_shift: bool = False,
    shard_frames: int = SHARD_FRAMES,
    progress: Progress | None = None,
) -> EncodeSummary:
    """Encode the conversations of DATA into a store; what the store holds already is not encoded again.

    Args:
        data: `path:weight,path:weight`, see `inlay.data.audio`.
        out: The store's folder.
        checkpoint: Gives Mimi and the text tokenizer. Its language model is not built.
        workers: Processes that encode; 1 is this process. Each puts a Mimi of its own on the checkpoint's device, so
            several share a GPU. They are no forks, in which CUDA does not work.
        on_error: What happens to conversations with a problem: "raise" encodes none until all are sound, "skip" leaves
            them out.
        keep_and_shift: See `Interleaver`.
        shard_frames: Frames after which a shard is closed.
        progress: Told of every block (with several workers, of every file).

    Raises:
        DataError: A problem in the data with "raise", or OUT belongs to another Mimi or is being written.
    """
    problems = Problems(on_error)
    conversations = sound_conversations(data, problems)
    setup = _Setup(checkpoint.source, str(checkpoint.device), keep_and_shift, max(1, (os.cpu_count() or 1) // workers))
    identity = identity_of(checkpoint, setup.interleaver(checkpoint))
    files: dict[AudioFile, StoredFile] = {}
    encoded = 0
    total = sum(one.samples for one in conversations) / SAMPLE_RATE
    with CodesWriter(out, identity, shard_frames=shard_frames) as writer:
        there = _Known(writer.stored)
        todo = []
        for one in conversations:
            stored = there.find(one)
            if stored is None:
                todo.append(one)
            else:
                files[one.file] = stored
        done = sum(file.samples for file in files.values()) / SAMPLE_RATE
        tell = _Told(progress, done, total)
        tell(0.0)
        results = (
            _in_this_process(todo, setup, checkpoint, tell) if workers == 1 else _in_workers(todo, setup, workers, tell)
        )
        for one, result in results:
            if isinstance(result, DataError):
                problems.report(one.file.where, str(result))
                continue
            files[one.file] = writer.add(
                result.audio,
                result.transcript,
                codes=result.codes,
                text=result.text,
                samples=result.samples,
                returns=result.returns,
            )
            encoded += 1
        problems.check()
        if not files:
            raise DataError(f"no conversation of {data} could be encoded")
        writer.finish((one.file, files[one.file]) for one in conversations if one.file in files)
    return EncodeSummary(len(files), encoded, problems.skipped, sum(file.frames for file in files.values()))


class _Known:
    """Finds what a store holds: by path, size and time of change, else by the hashes of the bytes."""

    def __init__(self, stored: dict[tuple[str, str], StoredFile]) -> None:
        self.stored = stored
        self.by_path = {file.audio.path: file for file in stored.values()}
        self.sizes = {file.audio.size for file in stored.values()}

    def find(self, one: Conversation) -> StoredFile | None:
        audio, transcript = one.file.path, one.file.transcript_path
        known = self.by_path.get(str(audio.resolve()))
        if known and known.audio.describes(audio) and known.transcript.describes(transcript):
            return known
        if audio.stat().st_size not in self.sizes:
            return None
        return self.stored.get((sha256(audio), sha256(transcript)))


class _Told:
    def __init__(self, progress: Progress | None, done: float, total: float) -> None:
        self.progress, self.done, self.total = progress, done, total

    def __call__(self, seconds: float) -> None:
        self.done += seconds
        if self.progress is not None:
            self.progress(self.done, self.total)


@dataclass(frozen=True)
class _Setup:
    """What a worker builds its Mimi and interleaver from."""

    source: str
    device: str
    keep_and_shift: bool
    threads: int

    def interleaver(self, checkpoint: MoshiCheckpoint) -> Interleaver:
        return Interleaver(
            checkpoint.text_tokenizer,
            padding_id=checkpoint.text_padding_id,
            end_of_padding_id=checkpoint.end_of_text_padding_id,
            main_speaker=MAIN_SPEAKER,
            keep_and_shift=self.keep_and_shift,
        )


@dataclass(frozen=True)
class _Encoded:
    audio: FileStamp
    transcript: FileStamp
    codes: np.ndarray
    text: np.ndarray
    samples: int
    returns: tuple[Return, ...]


class _Encoder:
    def __init__(self, setup: _Setup, checkpoint: MoshiCheckpoint) -> None:
        self.mimi = checkpoint.mimi
        self.interleaver = setup.interleaver(checkpoint)

    def __call__(self, file: AudioFile, tell: Callable[[float], None] | None = None) -> _Encoded:
        # Stamped first, then read: should a file change meanwhile, the next call sees another stamp.
        audio, transcript = _stamp(file.path), _stamp(file.transcript_path)
        now, found = examine(file)
        if now is None or found:
            raise DataError("; ".join(finding.reason for finding in found))
        codes = mimi_codes(self.mimi, _told_blocks(file.path, tell))
        text = self.interleaver.text_stream(now.transcript.words, codes.shape[1])
        return _Encoded(audio, transcript, codes, text, now.samples, now.transcript.returns)


def _told_blocks(path: Path, tell: Callable[[float], None] | None) -> Iterator[np.ndarray]:
    for block in blocks(path, BLOCK_SECONDS):
        yield block
        if tell is not None:
            tell(block.shape[1] / SAMPLE_RATE)


def _stamp(path: Path) -> FileStamp:
    try:
        status = path.stat()
        return FileStamp(str(path.resolve()), status.st_size, status.st_mtime_ns, sha256(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read any more ({error.strerror})") from None


_Results = Iterator[tuple[Conversation, _Encoded | DataError]]


def _in_this_process(todo: list[Conversation], setup: _Setup, checkpoint: MoshiCheckpoint, tell: _Told) -> _Results:
    encoder = _Encoder(setup, checkpoint) if todo else None
    for one in todo:
        assert encoder is not None
        try:
            yield one, encoder(one.file, tell)
        except DataError as error:
            yield one, error


def _in_workers(todo: list[Conversation], setup: _Setup, workers: int, tell: _Told) -> _Results:
    """Files as they are done; at most two a worker are under way or waiting, whatever the data's size."""
    waiting = iter(todo)
    under_way: dict[Future[_Encoded], Conversation] = {}
    pool = ProcessPoolExecutor(
        min(workers, max(1, len(todo))), mp_context=get_context("spawn"), initializer=_start_worker, initargs=(setup,)
    )
    try:
        while True:
            for one in islice(waiting, 2 * workers - len(under_way)):
                under_way[pool.submit(_encode_in_worker, one.file)] = one
            if not under_way:
                return
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                one = under_way.pop(future)
                try:
                    result: _Encoded | DataError = future.result()
                except DataError as error:
                    result = error
                tell(one.samples / SAMPLE_RATE)
                yield one, result
    except (BrokenProcessPool, torch.OutOfMemoryError) as error:
        full = isinstance(error, torch.OutOfMemoryError)
        why = "the device's memory is full" if full else "a worker process ended (out of memory?)"
        raise DataError(
            f"{why} before a file was encoded; run the same call again with fewer workers, it goes on where it stopped"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: _Encoder | None = None


def _start_worker(setup: _Setup) -> None:
    global _encoder
    parent = parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    # A worker waits for work at a pipe whose other end it holds itself: it would outlive a parent that was killed.
    threading.Thread(target=leave_with_parent, daemon=True).start()
    torch.set_num_threads(setup.threads)
    _encoder = _Encoder(setup, load_checkpoint(setup.source, device=setup.device))


def _encode_in_worker(file: AudioFile) -> _Encoded:
    assert _encoder is not None
    return _encoder(file)
