"""Mimi's codes: streamed ones equal those of one forward; a store survives kill -9 without loss or duplicates."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import BaseContext
from pathlib import Path

import numpy as np
import pytest
import torch
from moshi.models.compression import MimiModel
from safetensors import safe_open

from inlay.data.audio import Word
from inlay.data.audio_reader import blocks
from inlay.data.problems import DataError
from inlay.files import _machine
from inlay.moshi import encode
from inlay.moshi.codes import mimi_codes
from inlay.moshi.codes_store import CodesStore
from inlay.moshi.encode import EncodeSummary, encode_data
from inlay.moshi.interleave import Interleaver
from inlay.moshi.toy import ToySizes, write_toy_checkpoint
from inlay.moshi.weights import MoshiCheckpoint, load_checkpoint
from tests.moshi.conversations import noise, write_conversation, write_manifest

SIZES = ToySizes(dim=16, num_layers=1, num_heads=2, context=8, card=32, depformer_dim=16, depformer_layers=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MoshiCheckpoint:
    folder = tmp_path_factory.mktemp("toy")
    return load_checkpoint(write_toy_checkpoint(folder, sizes=SIZES))


@pytest.fixture
def mimi(checkpoint: MoshiCheckpoint) -> MimiModel:
    """A Mimi whose attention weighs as much as its residual: the toy's layer scale of 0.01 would hide a lost key."""
    mimi = checkpoint.info.get_mimi()
    for layer in mimi.encoder_transformer.transformer.layers:
        layer.layer_scale_1.scale.data.fill_(1.0)
    return mimi


@torch.inference_mode()
def whole_codes(mimi: MimiModel, samples: np.ndarray) -> np.ndarray:
    """The truth: one forward over the whole file, `[16, T]`."""
    return mimi.encode(torch.from_numpy(samples)[:, None]).flatten(0, 1).numpy()


def cut(samples: np.ndarray, seconds: int) -> list[np.ndarray]:
    return [samples[:, at : at + seconds * 24_000] for at in range(0, samples.shape[1], seconds * 24_000)]


@pytest.mark.parametrize("seconds", [2, 4])
def test_streamed_codes_are_those_of_one_forward_past_the_attention_context(mimi: MimiModel, seconds: int) -> None:
    # Mimi's attention sees 250 steps, 10 s.
    samples = noise(32.123)
    expected = whole_codes(mimi, samples)
    assert expected.shape == (16, -(-samples.shape[1] // 1920))
    streamed = mimi_codes(mimi, cut(samples, seconds), seconds=seconds)
    assert streamed.dtype == np.int16
    np.testing.assert_array_equal(streamed, expected)


def test_the_attention_context_reaches_those_codes(mimi: MimiModel) -> None:
    """So the test above would fail with keys lost: Mimi's own ring, called with many steps, gives other codes."""
    samples = noise(32.0)
    with torch.inference_mode(), mimi.streaming(2):
        parts = [mimi.encode(torch.from_numpy(part)[:, None]).flatten(0, 1).numpy() for part in cut(samples, 4)]
    assert (np.concatenate(parts, 1) != whole_codes(mimi, samples)).mean() > 0.01


@pytest.mark.parametrize("samples", [1, 1919, 1920, 1921, 2 * 24_000, 2 * 24_000 + 1])
def test_a_last_frame_that_is_not_full_is_a_frame(mimi: MimiModel, samples: int) -> None:
    sound = noise(3.0)[:, :samples]
    np.testing.assert_array_equal(mimi_codes(mimi, cut(sound, 2), seconds=2), whole_codes(mimi, sound))


def make_data(folder: Path, files: int, seconds: float = 2.0) -> Path:
    entries = [
        write_conversation(
            folder, f"{index:02}", seconds=seconds + index / 10, seed=index, returns=[[1.0, 1.5, 0.1, 0.5]]
        )
        for index in range(files)
    ]
    return write_manifest(folder, entries)


def test_encoding_gives_both_channels_and_the_text_stream(checkpoint: MoshiCheckpoint, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", 3)
    seen: list[tuple[float, float]] = []
    summary = encode_data(f"{data}:2", tmp_path / "out", checkpoint, progress=lambda *told: seen.append(told))
    assert summary == EncodeSummary(files=3, encoded=3, skipped=0, frames=25 + 27 + 28)
    assert seen[-1] == pytest.approx((6.3, 6.3))
    store = CodesStore(tmp_path / "out")
    assert [Path(entry.path).name for entry in store.entries] == ["00.wav", "01.wav", "02.wav"]
    assert {(entry.source, entry.weight) for entry in store.entries} == {(str(data), 2.0)}
    words = [Word("hello", 0.1, 0.5, "SPEAKER_MAIN"), Word("there", 0.6, 1.0, "SPEAKER_MAIN")]
    for index, entry in enumerate(store.entries):
        samples = np.concatenate(list(blocks(tmp_path / "data" / f"{index:02}.wav", 60)), axis=1)
        codes = store.codes(index)
        np.testing.assert_array_equal(codes, whole_codes(checkpoint.mimi, samples))
        expected = Interleaver(checkpoint.text_tokenizer).text_stream(words, entry.frames)
        np.testing.assert_array_equal(store.text(index), expected)
        np.testing.assert_array_equal(store.codes(index, 5, 9), codes[:, 5:9])
        np.testing.assert_array_equal(store.text(index, 5, 9), expected[5:9])
        assert [tuple(again) for again in entry.stored.returns] == [(1.0, 1.5, 0.1, 0.5)]
    left, right = store.codes(0)[:8], store.codes(0)[8:]
    assert not np.array_equal(left, right)


def test_several_workers_give_the_same_store(checkpoint: MoshiCheckpoint, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", 4)
    encode_data(str(data), tmp_path / "one", checkpoint)
    encode_data(str(data), tmp_path / "two", checkpoint, workers=2, shard_frames=1)
    one, two = CodesStore(tmp_path / "one"), CodesStore(tmp_path / "two")
    assert one.identity == two.identity
    assert len(list((tmp_path / "two").glob("shard-*"))) == 4
    for index in range(4):
        assert one.entries[index].stored.content == two.entries[index].stored.content
        np.testing.assert_array_equal(one.codes(index), two.codes(index))


def test_workers_are_no_forks_and_a_device_that_is_full_is_told(
    checkpoint: MoshiCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts: list[BaseContext] = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers: int, *, mp_context: BaseContext, **_: object) -> None:
            contexts.append(mp_context)
            super().__init__(workers)

    def full(_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(encode, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(encode, "_encode_in_worker", full)
    with pytest.raises(DataError, match=r"the device's memory is full .* with fewer workers"):
        encode_data(str(make_data(tmp_path / "data", 2)), tmp_path / "out", checkpoint, workers=2)
    assert [context.get_start_method() for context in contexts] == ["spawn"]


def keys(out: Path) -> list[tuple[str, str]]:
    """The contents that the shards hold, each time they do."""
    found = []
    for path in sorted(out.glob("shard-*.safetensors")):
        with safe_open(path, framework="np") as shard:
            header = json.loads(shard.metadata()["inlay"])
            assert len(shard.keys()) == 2 * len(header["files"])
        found += [(file["audio"]["sha256"], file["transcript"]["sha256"]) for file in header["files"]]
    return found


def kill_while_encoding(data: Path, out: Path, checkpoint: MoshiCheckpoint, *, workers: int, at_shards: int) -> None:
    """Encode in a process of its own, and kill -9 it once `at_shards` shards are there. It leaves no process behind.

    The process is a fork of this one, which has read torch already: reading it anew takes longer than the encoding.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: this process has threads
        process = os.fork()
    if not process:
        os.setsid()
        try:
            encode_data(str(data), out, checkpoint, workers=workers, shard_frames=40)
        finally:
            os._exit(0)
    try:
        deadline = time.monotonic() + 300
        while len(list(out.glob("shard-*.safetensors"))) < at_shards and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL, "it had finished before it could be killed"
        _wait_until_gone(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)


def _wait_until_gone(group: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("workers outlived the process that had started them")


@pytest.mark.parametrize(("workers", "kills"), [(1, (1, 2, 5)), (2, (1,))])
def test_killed_again_and_again_it_goes_on_without_loss_or_duplicates(
    checkpoint: MoshiCheckpoint, tmp_path: Path, workers: int, kills: tuple[int, ...]
) -> None:
    data = make_data(tmp_path / "data", 12, seconds=6.0)
    out = tmp_path / "out"
    for at_shards in kills:
        kill_while_encoding(data, out, checkpoint, workers=workers, at_shards=at_shards)
        with pytest.raises(DataError, match="encoding has not finished; run the same"):
            CodesStore(out)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.safetensors")}
    assert len(before) >= kills[-1]
    (out / f".shard-00099.safetensors.{_machine()}-{os.getpid()}.00aa.tmp").mkdir()
    summary = encode_data(str(data), out, checkpoint, shard_frames=40)
    assert (summary.files, summary.encoded) == (12, 12 - len(before))
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}.items()
    assert not list(out.glob(".*.tmp"))
    assert len(keys(out)) == len(set(keys(out))) == 12
    whole = encode_data(str(data), tmp_path / "whole", checkpoint)
    assert whole.encoded == 12
    interrupted, straight = CodesStore(out), CodesStore(tmp_path / "whole")
    for index in range(12):
        np.testing.assert_array_equal(interrupted.codes(index), straight.codes(index))
        np.testing.assert_array_equal(interrupted.text(index), straight.text(index))


def test_done_work_is_known_by_content(checkpoint: MoshiCheckpoint, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", 3)
    out = tmp_path / "out"
    encode_data(str(data), out, checkpoint)
    assert encode_data(str(data), out, checkpoint).encoded == 0
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "data", moved)
    assert encode_data(str(moved / "data.jsonl"), out, checkpoint).encoded == 0
    assert CodesStore(out).entries[0].path == str(moved / "00.wav")
    write_conversation(moved, "01", seconds=2.1, seed=99)
    summary = encode_data(str(moved / "data.jsonl"), out, checkpoint)
    assert (summary.files, summary.encoded) == (3, 1)
    changed, first = CodesStore(out), keys(out)
    assert changed.entries[1].stored.content == first[-1]
    assert changed.entries[1].stored.returns == ()


def test_what_changes_while_files_are_encoded_is_read_as_it_is_then(
    checkpoint: MoshiCheckpoint, tmp_path: Path
) -> None:
    data, out = make_data(tmp_path / "data", 3), tmp_path / "out"
    mended = [["mended", [0.2, 0.9], "SPEAKER_MAIN"]]

    def change(done: float, total: float) -> None:
        if 0 < done < 2.05:  # the first file is under way
            write_conversation(tmp_path / "data", "01", seconds=2.1, seed=1, words=mended)
            write_conversation(tmp_path / "data", "02", seconds=2.2, seed=2, words=[["late", [1, 9], "SPEAKER_MAIN"]])

    summary = encode_data(str(data), out, checkpoint, on_error="skip", progress=change)
    assert (summary.files, summary.skipped) == (2, 1)
    encode_data(str(data), tmp_path / "anew", checkpoint, on_error="skip")
    ours, anew = CodesStore(out), CodesStore(tmp_path / "anew")
    for index, entry in enumerate(ours.entries):
        assert entry.stored.content == anew.entries[index].stored.content
        assert entry.stored.returns == anew.entries[index].stored.returns
        np.testing.assert_array_equal(ours.text(index), anew.text(index))


def test_codes_of_another_mimi_or_another_text_are_refused(checkpoint: MoshiCheckpoint, tmp_path: Path) -> None:
    data, out = make_data(tmp_path / "data", 1), tmp_path / "out"
    encode_data(str(data), out, checkpoint)
    other = load_checkpoint(write_toy_checkpoint(tmp_path / "toy", seed=5, sizes=SIZES))
    with pytest.raises(DataError, match=r"holds codes with mimi .* encode into another folder"):
        encode_data(str(data), out, other)
    with pytest.raises(DataError, match="holds codes with keep_and_shift False, this call would add some with True"):
        encode_data(str(data), out, checkpoint, keep_and_shift=True)


def test_two_calls_do_not_write_into_one_store(checkpoint: MoshiCheckpoint, tmp_path: Path) -> None:
    data, out = make_data(tmp_path / "data", 2), tmp_path / "out"

    def second_call(done: float, total: float) -> None:
        with pytest.raises(DataError, match="another `inlay moshi encode` is writing there"):
            encode_data(str(data), out, checkpoint)

    encode_data(str(data), out, checkpoint, progress=second_call)
    assert len(CodesStore(out).entries) == 2


def test_a_broken_file_stops_or_is_left_out_and_what_is_done_is_kept(
    checkpoint: MoshiCheckpoint, tmp_path: Path
) -> None:
    data, out = make_data(tmp_path / "data", 3), tmp_path / "out"
    broken = tmp_path / "data" / "01.wav"
    broken.write_bytes(broken.read_bytes()[:50_000])
    with pytest.raises(DataError, match=r"data\.jsonl:2: audio .*01\.wav is cut short"):
        encode_data(str(data), out, checkpoint)
    summary = encode_data(str(data), out, checkpoint, on_error="skip")
    assert (summary.files, summary.skipped) == (2, 1)
    assert [Path(entry.path).name for entry in CodesStore(out).entries] == ["00.wav", "02.wav"]


def test_a_folder_that_is_no_store_and_a_damaged_shard_are_told(checkpoint: MoshiCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no index\.json; give a folder that `inlay moshi encode DATA OUT` wrote"):
        CodesStore(tmp_path)
    data, out = make_data(tmp_path / "data", 1), tmp_path / "out"
    encode_data(str(data), out, checkpoint)
    with pytest.raises(DataError, match="OUT is a folder, and here is a file"):
        encode_data(str(data), data, checkpoint)
    index = out / "index.json"
    whole = index.read_text()
    index.write_text('{"format": 1, "entries": []}')
    with pytest.raises(DataError, match=r"index\.json is damaged \('identity'\); run `inlay moshi encode` again"):
        CodesStore(out)
    index.write_text(whole)
    shard = out / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DataError, match=r"shard-00000\.safetensors cannot be read"):
        CodesStore(out).codes(0)
    with pytest.raises(DataError, match=r"shard-00000\.safetensors is damaged .* delete it"):
        encode_data(str(data), out, checkpoint)
    shard.unlink()
    assert encode_data(str(data), out, checkpoint).encoded == 1
