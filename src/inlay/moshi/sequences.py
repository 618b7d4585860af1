"""Encoded conversations as training sequences: windows of one file, or files one behind the other, with document ids.

A sequence is one or more *pieces*, a piece being a stretch of frames of one file. Which pieces make which sequence is
settled before the first is read, from frame counts and hashes alone: so an item is the same on every machine and after
every resume, whoever asks for it. Reading an item reads its frames from the shards and no others.

    codes             [17, T]  LMModel's order: text, Moshi's 8 codebooks, the user's 8; −1 where there is no frame
    documents         [T]      which piece of the sequence a frame belongs to, from 0; −1 where there is no frame
    return_distances  [T]      in a phrase that Moshi has said before in the same piece: how many frames ago; else 0

−1 is the model's "zero" token: it has no embedding, and Moshi's masks leave its frames out of every loss.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.data import Dataset

from inlay.data.audio import parse_data
from inlay.data.problems import DataError
from inlay.moshi.codes_store import CodesStore
from inlay.moshi.interleave import FRAME_RATE

if TYPE_CHECKING:
    from rich.table import Table

ZERO_TOKEN = -1
"""LMModel's token for "no input": where a sequence has no frame."""

Packing = Literal["cut", "concatenate"]
Boundary = Literal["reset", "carry"]


class SequenceConfig(BaseModel):
    """Which sequences a run reads. Data are folders that `inlay moshi encode` wrote."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    train_data: str
    """`path:weight,path:weight`. A folder's weight is the share of sequences drawn from it. Where no weight is given,
    here or when encoding, each sequence is read once an epoch."""

    eval_data: str = ""
    """Likewise, for evaluation. Empty: `eval_fraction` of the training files is held out."""

    packing: Packing = "cut"
    """"cut": a sequence is a window of one file. "concatenate": files of one source (a part of the
    DATA that was encoded) follow one another until it is full."""

    min_sec: Annotated[float, Field(ge=0)] | None = None
    """What is left of a file below so many seconds is dropped; 10, or a shorter sequence's own length, when not given.
    With "concatenate" only whole short files are."""

    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of files held out by the hash of their audio, when `eval_data` is empty."""

    shuffle: bool = True
    """Files and sequences in another order, drawn from the run's seed; without, as DATA has them. Evaluation is never
    shuffled."""


class Piece(NamedTuple):
    """Frames `start` to `stop` of one file: which store, and which of its entries."""

    store: int
    entry: int
    start: int
    stop: int

    @property
    def frames(self) -> int:
        """How many frames it has."""
        return self.stop - self.start


Row = tuple[Piece, ...]


@dataclass(frozen=True)
class SequenceStatistics:
    """What a data set holds, known before its first sequence is read."""

    files: int
    """Files that give at least one piece."""

    rows: tuple[tuple[int, ...], ...]
    """The frames of each piece of each sequence, as often as it is read in an epoch."""

    dropped_frames: int
    """Frames in ends and files shorter than `min_sec`."""

    sequence_frames: int
    """Frames of a full sequence."""

    @property
    def frames(self) -> int:
        """Frames of all sequences."""
        return sum(map(sum, self.rows))

    @property
    def documents(self) -> int:
        """Pieces of all sequences."""
        return sum(map(len, self.rows))

    def chunks(self, chunk_size: int, boundary: Boundary = "reset") -> int:
        """Chunks, open last ones included, in which a memory reads all sequences.

        Args:
            chunk_size: C, frames of a chunk.
            boundary: "reset": each document has its own chunks. "carry": a sequence's documents share them.
        """
        rows = ((sum(row),) if boundary == "carry" else row for row in self.rows)
        return sum(math.ceil(frames / chunk_size) for row in rows for frames in row)

    def table(self, name: str, *, chunk_size: int, boundary: Boundary = "reset") -> Table:
        """The figures, to be shown before training."""
        from rich.table import Table

        table = Table(title=name, title_justify="left", show_header=False)
        hours = self.frames / FRAME_RATE / 3600
        table.add_row("files", f"{self.files:,}")
        table.add_row("sequences", f"{len(self.rows):,} of up to {self.sequence_frames:,} frames")
        table.add_row("frames", f"{self.frames:,} ({hours:.2f} h), {self.dropped_frames:,} dropped")
        table.add_row("documents", f"{self.documents:,}")
        chunks = self.chunks(chunk_size, boundary)
        table.add_row("chunks", f"{chunks:,} of {chunk_size} frames, boundary: {boundary}")
        table.add_row("chunks a document", f"{chunks / max(1, self.documents):.1f}")
        return table


class MoshiSequences(Dataset[dict[str, Tensor]]):
    """Sequences by their index; see the module for an item's columns, all int64.

    Args:
        stores: Where the codes lie.
        rows: The pieces of each sequence.
    """

    def __init__(self, stores: Sequence[CodesStore], rows: Sequence[Row]) -> None:
        self.stores = stores
        self.rows = rows
        self.codebooks = 2 * stores[0].identity.codebooks

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        frames = sum(piece.frames for piece in row)
        codes = np.empty((1 + self.codebooks, frames), np.int64)
        documents = np.empty(frames, np.int64)
        distances = np.zeros(frames, np.int64)
        at = 0
        for document, piece in enumerate(row):
            store = self.stores[piece.store]
            here = slice(at, at + piece.frames)
            codes[0, here] = store.text(piece.entry, piece.start, piece.stop)
            codes[1:, here] = store.codes(piece.entry, piece.start, piece.stop)
            documents[here] = document
            mark_returns(store, piece, distances[here])
            at += piece.frames
        return {
            "codes": torch.from_numpy(codes),
            "documents": torch.from_numpy(documents),
            "return_distances": torch.from_numpy(distances),
        }


def mark_returns(store: CodesStore, piece: Piece, distances: np.ndarray) -> None:
    """Write into `distances` `[frames]` of a piece how many frames ago a returning phrase was said within it."""
    for again in store.entries[piece.entry].stored.returns:
        start, stop = math.floor(again.start * FRAME_RATE), math.ceil(again.end * FRAME_RATE)
        before = math.floor(again.before_start * FRAME_RATE)
        if before >= piece.start:  # else it was said outside this window
            distances[max(0, start - piece.start) : max(0, stop - piece.start)] = start - before


def collate_sequences(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack sequences into a batch as long as its longest one.

    Returns:
        `codes` `[B, 17, T]`, `documents` `[B, T]` and `return_distances` `[B, T]`, int64; behind a shorter sequence's
        end −1, −1 and 0.
    """
    frames = max(item["documents"].shape[0] for item in items)
    fill = {"codes": ZERO_TOKEN, "documents": -1, "return_distances": 0}
    return {
        name: torch.stack(
            [torch.nn.functional.pad(item[name], (0, frames - item[name].shape[-1]), value=value) for item in items]
        )
        for name, value in fill.items()
    }


@dataclass(frozen=True)
class MoshiData:
    """A run's sequences; stack them with `collate_sequences`."""

    train: MoshiSequences
    eval: MoshiSequences
    train_statistics: SequenceStatistics
    eval_statistics: SequenceStatistics


def load_sequences(
    config: SequenceConfig, *, duration_sec: float = 100.0, seed: int = 0, needs_eval: bool = True
) -> MoshiData:
    """Open the stores and settle the sequences.

    Args:
        config: Which.
        duration_sec: Seconds of a full one.
        seed: Of the order and of what is drawn by weight.
        needs_eval: Whether there must be a sequence for evaluation.

    Raises:
        DataError: No such store, stores of different Mimis, or no sequence for training or, if needed, evaluation.
    """
    stores, weights = _open_stores(config.train_data)
    if config.eval_data:
        eval_stores, _ = _open_stores(config.eval_data)
        _require_one_mimi([*stores, *eval_stores])
        train_files = _all_files(stores)
        eval_files = _all_files(eval_stores)
    else:
        eval_stores = stores
        files = _all_files(stores)
        eval_files = [file for file in files if is_held_out(_audio_hash(stores, file), config.eval_fraction)]
        held = set(eval_files)
        train_files = [file for file in files if file not in held]
    train = _Rows(stores, config, train_files, duration_sec, seed, shuffle=config.shuffle)
    held_rows = _Rows(eval_stores, config, eval_files, duration_sec, seed, shuffle=False)
    if not train.rows:
        raise DataError(f"no training sequence in {config.train_data}: {train.why_none()}")
    if needs_eval and not held_rows.rows:
        where = config.eval_data or f"the held-out share (eval_fraction {config.eval_fraction})"
        raise DataError(f"no evaluation sequence in {where}: {held_rows.why_none()}, or give data.eval_data")
    rows = train.weighted(weights)
    return MoshiData(
        MoshiSequences(stores, rows),
        MoshiSequences(eval_stores, held_rows.rows),
        train.statistics(rows),
        held_rows.statistics(held_rows.rows),
    )


def frames_of(seconds: float) -> int:
    """Frames of so many seconds, the last of which may be incomplete; as decimals, where 0.56 s are 7 whole frames."""
    return math.ceil(Fraction(str(seconds)) * Fraction(str(FRAME_RATE)))


def is_held_out(audio_sha256: str, fraction: float) -> bool:
    """Whether a file is kept for evaluation: by its content, so it stays there whatever is added or moved."""
    return int(audio_sha256[:16], 16) < fraction * 16**16


def _open_stores(data: str) -> tuple[list[CodesStore], list[float | None]]:
    parts = parse_data(data)
    stores = [CodesStore(part.path) for part in parts]
    _require_one_mimi(stores)
    return stores, [part.weight for part in parts]


def _require_one_mimi(stores: Sequence[CodesStore]) -> None:
    for store in stores[1:]:
        if store.identity != stores[0].identity:
            raise DataError(
                f"{store.directory} was encoded with another Mimi, tokenizer or text than {stores[0].directory}; "
                "encode both with the same weights"
            )


def _all_files(stores: Sequence[CodesStore]) -> list[tuple[int, int]]:
    return [(number, entry) for number, store in enumerate(stores) for entry in range(len(store.entries))]


def _audio_hash(stores: Sequence[CodesStore], file: tuple[int, int]) -> str:
    return stores[file[0]].entries[file[1]].stored.audio.sha256


class _Rows:
    """Cuts files into rows, source by source, so that a row has one source and can be drawn by its weight."""

    def __init__(
        self,
        stores: Sequence[CodesStore],
        config: SequenceConfig,
        files: list[tuple[int, int]],
        duration_sec: float,
        seed: int,
        *,
        shuffle: bool,
    ) -> None:
        self.stores, self.packing, self.seed, self.shuffle = stores, config.packing, seed, shuffle
        self.files = len(files)
        self.dropped = 0
        self.frames = frames_of(duration_sec)
        self.min_sec = min(10.0, duration_sec) if config.min_sec is None else config.min_sec
        self.least = max(1, frames_of(self.min_sec))
        by_source: dict[tuple[int, str], list[tuple[int, int]]] = defaultdict(list)
        for store, entry in files:
            by_source[store, stores[store].entries[entry].source].append((store, entry))
        self.rows_of = {source: self._cut(self._ordered(of_it)) for source, of_it in by_source.items()}
        self.rows = [row for rows in self.rows_of.values() for row in rows]

    def _ordered(self, files: list[tuple[int, int]]) -> list[tuple[int, int]]:
        if not self.shuffle:
            return files
        # By content: the order does not hang on how DATA was written.
        files = sorted(files, key=lambda file: _audio_hash(self.stores, file))
        return [files[index] for index in np.random.default_rng(self.seed).permutation(len(files))]

    def _cut(self, files: list[tuple[int, int]]) -> list[Row]:
        size = self.frames
        rows: list[Row] = []
        row: list[Piece] = []
        room = size
        for store, entry in files:
            frames, at = self.stores[store].entries[entry].frames, 0
            if self.packing == "concatenate" and frames < self.least:
                self.dropped += frames
                continue
            while at < frames:
                piece = Piece(store, entry, at, min(at + room, frames))
                at = piece.stop
                if self.packing == "cut":
                    if piece.frames >= self.least:
                        rows.append((piece,))
                    else:
                        self.dropped += piece.frames
                    continue
                row.append(piece)
                room -= piece.frames
                if not room:
                    rows.append(tuple(row))
                    row, room = [], size
        if row:
            rows.append(tuple(row))
        return rows

    def weighted(self, weights: Sequence[float | None]) -> list[Row]:
        """An epoch's rows: all once, or, if any weight is given, as many in all, shared out by weight: first among the
        folders, if one of them has any, then within each among its sources. What has none beside others that have one
        has 1; where no source of a folder has any, they share it by their rows."""
        of_source = {source: self._source_weight(source) for source, rows in self.rows_of.items() if rows}
        of_store = {store: weights[store] for store, _ in of_source}
        if all(weight is None for weight in (*of_source.values(), *of_store.values())):
            return self.rows
        shares = {source: 1.0 if weight is None else weight for source, weight in of_source.items()}
        if any(weight is not None for weight in of_store.values()):
            for store, weight in of_store.items():
                own = {source: share for source, share in shares.items() if source[0] == store}
                if all(of_source[source] is None for source in own):
                    own = {source: float(len(self.rows_of[source])) for source in own}
                whole = sum(own.values()) / (1.0 if weight is None else weight)
                shares |= {source: share / whole for source, share in own.items()}
        total, drawn = sum(shares.values()), []
        for number, (source, share) in enumerate(shares.items()):
            rows = self.rows_of[source]
            count = max(1, round(len(self.rows) * share / total))
            generator = np.random.default_rng([self.seed, number])
            # Every row once before any is drawn again.
            for first in range(0, count, len(rows)):
                order = generator.permutation(len(rows)) if self.shuffle else np.arange(len(rows))
                drawn += [rows[index] for index in order[: count - first]]
        return drawn

    def _source_weight(self, source: tuple[int, str]) -> float | None:
        store, name = source
        return next(entry.weight for entry in self.stores[store].entries if entry.source == name)

    def statistics(self, rows: Sequence[Row]) -> SequenceStatistics:
        """What these rows hold."""
        files = {(piece.store, piece.entry) for row in rows for piece in row}
        frames = tuple(tuple(piece.frames for piece in row) for row in rows)
        return SequenceStatistics(len(files), frames, self.dropped, self.frames)

    def why_none(self) -> str:
        """Why there is no row, and what to do."""
        if not self.files:
            return "no file falls into it; change data.eval_fraction"
        return f"none of {self.files} files is as long as data.min_sec {self.min_sec}; lower it"
