"""Sequences from a store: which frames they hold, documents, padding, returns, weights, the held-out share."""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from inlay.data.audio import AudioFile, Return
from inlay.data.problems import DataError
from inlay.moshi.codes_store import CodesIdentity, CodesWriter, FileStamp
from inlay.moshi.sequences import (
    MoshiData,
    MoshiSequences,
    SequenceConfig,
    collate_sequences,
    frames_of,
    is_held_out,
    load_sequences,
)

IDENTITY = CodesIdentity(
    mimi="m",
    tokenizer="t",
    codebooks=8,
    card=64,
    frame_rate=12.5,
    text_padding_id=3,
    end_of_text_padding_id=0,
    main_speaker="SPEAKER_MAIN",
    keep_and_shift=False,
)


def frame_codes(name: str, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes that tell file, stream and frame apart."""
    offset = int(hashlib.sha256(name.encode()).hexdigest()[:4], 16) % 1000
    codes = (offset + 7 * np.arange(16)[:, None] + np.arange(frames)).astype(np.int16)
    return codes, (offset + np.arange(frames)).astype(np.int32)


def write_store(
    folder: Path,
    lengths: dict[str, int],
    *,
    returns: dict[str, list[Return]] | None = None,
    weights: dict[str, float] | None = None,
    identity: CodesIdentity = IDENTITY,
) -> Path:
    """A store of files of so many frames; a file "a/x" is of source "a"."""
    with CodesWriter(folder, identity, shard_frames=100) as writer:
        files = []
        for name, frames in lengths.items():
            codes, text = frame_codes(name, frames)
            stamp = FileStamp(name, 1, 1, hashlib.sha256(name.encode()).hexdigest())
            spans = (returns or {}).get(name, [])
            stored = writer.add(stamp, stamp, codes=codes, text=text, samples=frames * 1920, returns=spans)
            source = name.partition("/")[0]
            file = AudioFile(Path(name), frames / 12.5, "", source, (weights or {}).get(source))
            files.append((file, stored))
        writer.finish(files)
    return folder


def load(folder: Path | str, duration_sec: float = 4, seed: int = 0, **options: Any) -> MoshiData:
    held = str(folder).partition(":")[0]
    settings = {"min_sec": 0.8, "eval_data": held, "shuffle": False} | options
    return load_sequences(SequenceConfig(train_data=str(folder), **settings), duration_sec=duration_sec, seed=seed)


def pieces_of(sequences: MoshiSequences) -> list[list[tuple[str, int, int]]]:
    stores = sequences.stores
    return [[(stores[p.store].entries[p.entry].path, p.start, p.stop) for p in row] for row in sequences.rows]


def test_windows_are_cut_from_each_file_and_short_ends_dropped(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "s", {"a": 120, "b": 50, "c": 9, "d": 59})
    data = load(folder)
    assert pieces_of(data.train) == [
        [("a", 0, 50)],
        [("a", 50, 100)],
        [("a", 100, 120)],
        [("b", 0, 50)],
        [("d", 0, 50)],
    ]
    assert data.train_statistics.dropped_frames == 9 + 9
    item = data.train[1]
    codes, text = frame_codes("a", 120)
    assert item["codes"].dtype == torch.int64
    np.testing.assert_array_equal(item["codes"][0], text[50:100])
    np.testing.assert_array_equal(item["codes"][1:9], codes[:8, 50:100])
    np.testing.assert_array_equal(item["codes"][9:], codes[8:, 50:100])
    assert item["documents"].tolist() == [0] * 50


def test_files_are_concatenated_until_a_sequence_is_full(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "s", {"s/a": 30, "s/b": 40, "s/c": 5, "s/d": 60})
    data = load(folder, packing="concatenate")
    assert pieces_of(data.train) == [
        [("s/a", 0, 30), ("s/b", 0, 20)],
        [("s/b", 20, 40), ("s/d", 0, 30)],
        [("s/d", 30, 60)],
    ]
    assert data.train_statistics.dropped_frames == 5
    item = data.train[0]
    assert item["documents"].tolist() == [0] * 30 + [1] * 20
    np.testing.assert_array_equal(item["codes"][0, 30:], frame_codes("s/b", 40)[1][:20])


def test_files_of_two_sources_share_no_sequence(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "s", {"x/a": 30, "y/b": 30, "x/c": 30})
    data = load(folder, packing="concatenate")
    assert pieces_of(data.train) == [[("x/a", 0, 30), ("x/c", 0, 20)], [("x/c", 20, 30)], [("y/b", 0, 30)]]


def test_a_batch_is_padded_with_the_models_zero_token(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "s", {"a": 50, "b": 20})
    data = load(folder)
    batch = collate_sequences([data.train[0], data.train[1]])
    assert {name: tuple(column.shape) for name, column in batch.items()} == {
        "codes": (2, 17, 50),
        "documents": (2, 50),
        "return_distances": (2, 50),
    }
    assert (batch["codes"][1, :, 20:] == -1).all()
    assert (batch["documents"][1, 20:] == -1).all()
    assert (batch["return_distances"] == 0).all()
    np.testing.assert_array_equal(batch["codes"][0], data.train[0]["codes"])
    np.testing.assert_array_equal(batch["codes"][1, :, :20], data.train[1]["codes"])
    assert (batch["documents"][1, :20] == 0).all()


def test_returning_phrases_are_marked_with_how_far_back_they_were_said(tmp_path: Path) -> None:
    # Frames 25 to 29 (2.00–2.35 s), said before from frame 3 (0.25 s); and 40 to 42, said before from frame 25.
    returns = {"a": [Return(2.0, 2.35, 0.25, 0.6), Return(3.2, 3.4, 2.0, 2.35)]}
    folder = write_store(tmp_path / "s", {"a": 50, "b": 50}, returns=returns)
    marked = load(folder).train[0]["return_distances"]
    expected = torch.zeros(50, dtype=torch.int64)
    expected[25:30] = 22
    expected[40:43] = 15
    assert torch.equal(marked, expected)
    # In windows of 20 frames, frame 25's phrase was said in the window before: no memory of this one holds it.
    windows = load(folder, duration_sec=1.6).train
    assert [int(windows[index]["return_distances"].sum()) for index in range(3)] == [0, 0, 0]
    # And in one of 24 to 48, the second return is, the first is not.
    both = load(folder, duration_sec=24 / 12.5).train[1]["return_distances"]
    assert both.nonzero().flatten().tolist() == [16, 17, 18]


def test_statistics_count_chunks_as_the_memory_does(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "s", {"s/a": 30, "s/b": 40, "s/d": 60})
    statistics = load(folder, packing="concatenate").train_statistics
    assert (statistics.files, statistics.frames, statistics.documents) == (3, 130, 5)
    assert statistics.rows == ((30, 20), (20, 30), (30,))
    assert statistics.chunks(16) == 2 + 2 + 2 + 2 + 2
    assert statistics.chunks(16, "carry") == 4 + 4 + 2


def test_the_held_out_share_hangs_on_content_alone(tmp_path: Path) -> None:
    names = {f"f{index}": 20 for index in range(200)}
    folder = write_store(tmp_path / "s", names)
    data = load(folder, eval_data="", eval_fraction=0.2)
    held = {row[0][0] for row in pieces_of(data.eval)}
    trained = {row[0][0] for row in pieces_of(data.train)}
    assert held | trained == set(names)
    assert not held & trained
    assert 25 <= len(held) <= 55
    more = write_store(tmp_path / "more", {f"f{index}": 20 for index in reversed(range(300))})
    held_again = {row[0][0] for row in pieces_of(load(more, eval_data="", eval_fraction=0.2).eval)}
    assert held == held_again & set(names)
    assert not is_held_out("0" * 64, 0.0)
    assert is_held_out("f" * 64, 1.0)


def test_order_is_that_of_the_seed_and_not_of_the_data(tmp_path: Path) -> None:
    names = [f"s/{index}" for index in range(30)]
    one = write_store(tmp_path / "one", dict.fromkeys(names, 20))
    two = write_store(tmp_path / "two", dict.fromkeys(reversed(names), 20))

    def order(folder: Path, seed: int) -> list[list[tuple[str, int, int]]]:
        return pieces_of(load(folder, shuffle=True, seed=seed).train)

    assert order(one, 1) == order(two, 1) == order(one, 1)
    assert order(one, 1) != order(one, 2)
    assert sorted(order(one, 1)) == sorted(order(one, 2))
    assert pieces_of(load(one, shuffle=True).eval) == [[(name, 0, 20)] for name in names]


def test_weights_share_out_an_epoch_and_read_every_sequence_before_any_twice(tmp_path: Path) -> None:
    big = write_store(tmp_path / "big", {f"b/{index}": 20 for index in range(30)})
    small = write_store(tmp_path / "small", {f"s/{index}": 20 for index in range(10)})
    plain = load(f"{big},{small}", eval_data=str(small)).train
    assert Counter(row[0][0][0] for row in pieces_of(plain)) == {"b": 30, "s": 10}
    weighted = load(f"{big}:1,{small}:3", eval_data=str(small)).train
    drawn = Counter(row[0][0] for row in pieces_of(weighted))
    assert {name: sum(n for file, n in drawn.items() if file[0] == name) for name in "bs"} == {"b": 10, "s": 30}
    assert set(drawn.values()) == {1, 3}
    assert load(f"{big}:1,{small}:3", eval_data=str(small)).train.rows == weighted.rows


def test_without_shuffle_weighted_rows_are_in_the_order_of_the_data(tmp_path: Path) -> None:
    names = [f"s/{index}" for index in range(10)]
    one, other = (write_store(tmp_path / name, {**dict.fromkeys(names, 20)}) for name in ("one", "other"))
    rows = load(f"{one}:1,{other}:3").train.rows
    assert [row[0][:2] for row in rows] == [(0, i) for i in range(5)] + [(1, i % 10) for i in range(15)]
    shuffled = load(f"{one}:1,{other}:3", shuffle=True).train.rows
    assert Counter(row[0].store for row in shuffled) == {0: 5, 1: 15}
    assert {row[0].entry for row in shuffled[5:15]} == set(range(10))


def test_weights_given_when_encoding_hold_within_a_store(tmp_path: Path) -> None:
    lengths = {f"{source}/{index}": 20 for source in ("x", "y") for index in range(20)}
    folder = write_store(tmp_path / "s", lengths, weights={"x": 3.0, "y": 1.0})
    drawn = Counter(row[0][0][0] for row in pieces_of(load(folder).train))
    assert drawn == {"x": 30, "y": 10}


@pytest.mark.parametrize("inner", [None, {"x": 3.0, "y": 1.0}])
def test_a_folders_weight_is_its_share_whatever_it_was_encoded_from(
    tmp_path: Path, inner: dict[str, float] | None
) -> None:
    several = {f"{source}/{index}": 20 for source, count in (("x", 15), ("y", 5)) for index in range(count)}
    one = write_store(tmp_path / "several", several, weights=inner)
    other = write_store(tmp_path / "one", {f"z/{index}": 20 for index in range(20)})
    drawn = Counter(row[0][0][0] for row in pieces_of(load(f"{one}:1,{other}:1").train))
    total = sum(drawn.values())
    assert drawn["z"] / total == pytest.approx(0.5, abs=0.03)
    assert drawn["x"] / total == pytest.approx(0.375, abs=0.03)


def test_items_are_the_same_in_worker_processes(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "s", {"a": 120, "b": 50})
    train = load(folder).train
    again = pickle.loads(pickle.dumps(train))
    for index in range(len(train)):
        assert all(torch.equal(train[index][name], again[index][name]) for name in train[index])


def test_what_cannot_be_is_told_with_the_fix(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "s", {"a": 20})
    with pytest.raises(DataError, match=r"no training sequence in .*: none of 1 files is as long as data.min_sec 4"):
        load(folder, min_sec=4)
    with pytest.raises(DataError, match=r"no evaluation sequence in the held-out share .* or give data.eval_data"):
        load(folder, eval_data="", eval_fraction=0)
    other = CodesIdentity(**{**vars(IDENTITY), "mimi": "another"})
    strange = write_store(tmp_path / "o", {"a": 20}, identity=other)
    with pytest.raises(DataError, match="was encoded with another Mimi, tokenizer or text than"):
        load(f"{folder},{strange}")
    with pytest.raises(DataError, match=r"none of 1 files is as long as data\.min_sec 10"):
        load(folder, duration_sec=20, min_sec=None)
    with pytest.raises(ValidationError, match="minimum_sec"):
        SequenceConfig(train_data="x", minimum_sec=10)


def test_a_sequence_shorter_than_ten_seconds_is_whole_at_its_own_length(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "s", {"a": 120})
    assert pieces_of(load(folder, min_sec=None).train) == [[("a", 0, 50)], [("a", 50, 100)]]


def test_the_longest_sequence_is_32000_frames() -> None:
    assert frames_of(2560) == 32_000


def test_seconds_that_are_whole_frames_are_so_many_and_no_more(tmp_path: Path) -> None:
    """In floats 17.6 · 12.5 lies just above 220."""
    assert [frames for frames in range(1, 32_001) if frames_of(round(frames * 0.08, 2)) != frames] == []
    assert (frames_of(17.601), frames_of(0.001), frames_of(1e-5), frames_of(0)) == (221, 1, 1, 0)
    folder = write_store(tmp_path / "s", {"a": 440, "b": 220})
    assert pieces_of(load(folder, duration_sec=17.6, min_sec=17.6).train) == [
        [("a", 0, 220)],
        [("a", 220, 440)],
        [("b", 0, 220)],
    ]
