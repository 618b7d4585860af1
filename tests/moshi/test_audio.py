"""Manifests, transcripts and audio: what is read, and that every kind of problem is told with its place."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import sphn
from rich.console import Console

from inlay.data.audio import DataPath, Return, Word, parse_data, read_manifests, read_transcript
from inlay.data.audio_check import check_audio, sound_conversations
from inlay.data.audio_reader import blocks, read_header
from inlay.data.problems import DataError, Problems
from tests.moshi.conversations import noise, write_conversation, write_manifest, write_wave


def test_data_is_paths_with_weights(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "odd:2"):
        (tmp_path / name).touch()
    a, b, odd = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "odd:2"))
    assert parse_data(f"{a}:0.7, {b}:3") == [DataPath(a, 0.7), DataPath(b, 3.0)]
    assert parse_data(f"{a},{odd}") == [DataPath(a), DataPath(odd)]
    for data, message in {
        f"{a},": "empty path",
        ":3": "empty path",
        f"{a}:zero": "'zero' is no weight",
        f"{a}:0": "positive number, not 0",
        f"{a}:nan": "positive number, not nan",
        f"{tmp_path}/c.jsonl:2": r"c\.jsonl: no such file",
        f"{a},{tmp_path}/../{tmp_path.name}/a.jsonl": "given twice",
    }.items():
        with pytest.raises(DataError, match=message):
            parse_data(data)


def test_a_folder_gives_all_its_manifests_and_paths_are_relative_to_the_manifest(tmp_path: Path) -> None:
    write_manifest(tmp_path, [{"path": "x/b.wav", "duration": 2}], "b.jsonl")
    write_manifest(tmp_path / "deep", [{"path": "a.wav", "duration": 1.5}, "", {"path": "/abs.wav", "duration": 1}])
    files = read_manifests(f"{tmp_path}:2", Problems())
    assert [(file.path, file.duration) for file in files] == [
        (tmp_path / "x/b.wav", 2.0),
        (tmp_path / "deep/a.wav", 1.5),
        (Path("/abs.wav"), 1.0),
    ]
    assert files[2].where == f"{tmp_path}/deep/data.jsonl:3"
    assert {(file.source, file.weight) for file in files} == {(str(tmp_path), 2.0)}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.jsonl file"):
        read_manifests(str(tmp_path / "empty"), Problems())


def test_a_transcript_gives_words_and_returning_phrases(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    content = {"alignments": [["hi", [0, 0.5], "SPEAKER_MAIN"]], "returns": [[9, 10, 1, 2]], "text_conditions": None}
    path.write_text(json.dumps(content))
    transcript = read_transcript(path)
    assert transcript.words == (Word("hi", 0.0, 0.5, "SPEAKER_MAIN"),)
    assert transcript.returns == (Return(9.0, 10.0, 1.0, 2.0),)
    for broken, message in {
        '{"alignments": [["a", [0, 1], "S"], ["b", [0], "S"]]}': r"alignments\[1\] is \[\"b\", \[0\], \"S\"\], not",
        '{"alignments": [["a", [0, NaN], "S"]]}': r"alignments\[0\]",
        '{"alignments": [["a", [true, 1], "S"]]}': r"alignments\[0\]",
        '{"words": []}': 'needs "alignments"',
        "[": "cannot be read",
        '{"alignments": [], "returns": [[1, 2, 5, 6]]}': r"returns\[0\]",
        '{"alignments": [], "returns": {}}': '"returns" must be a list',
    }.items():
        path.write_text(broken)
        with pytest.raises(DataError, match=message):
            read_transcript(path)


def test_blocks_put_together_are_the_file(tmp_path: Path) -> None:
    samples = noise(5.0123)
    path = write_wave(tmp_path / "a.wav", samples)
    expected = (samples * 32767).round() / 32768
    header = read_header(path)
    assert (header.sample_rate, header.channels, header.samples) == (24_000, 2, samples.shape[1])
    for seconds in (1, 2, 7):
        parts = list(blocks(path, seconds))
        assert all(part.shape[1] == seconds * 24_000 for part in parts[:-1])
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected.astype(np.float32))


@pytest.mark.parametrize("name", ["a.opus", "a.ogg"])
def test_opus_is_read_whole_at_its_own_rate(name: str, tmp_path: Path) -> None:
    tones = np.sin(2 * np.pi * np.array([[300.0], [1000.0]]) * np.arange(48_000) / 24_000).astype(np.float32)
    sphn.write_opus(str(tmp_path / name), tones * 0.5, 24_000)
    header = read_header(tmp_path / name)
    assert (header.sample_rate, header.channels) == (48_000, 2)
    assert header.duration == pytest.approx(2.0, abs=0.05)
    samples = np.concatenate(list(blocks(tmp_path / name, 1)), axis=1)
    assert samples.shape == (2, header.samples)
    spectra = np.abs(np.fft.rfft(samples[:, :48_000]))  # a second: a bin is 1 Hz
    assert spectra.argmax(axis=1).tolist() == [300, 1000]
    (tmp_path / name).write_bytes(b"no sound")
    with pytest.raises(DataError, match="cannot be read"):
        read_header(tmp_path / name)


def test_a_file_that_ends_before_its_header_says_is_told_by_check_and_by_reading(tmp_path: Path) -> None:
    entry = write_conversation(tmp_path, seconds=5)
    path = tmp_path / "a.wav"
    path.write_bytes(path.read_bytes()[: 3 * 24_000 * 4])
    with pytest.raises(DataError, match=r"a\.wav is cut short: its header says 5\.00 s, the samples end by 3\.00 s"):
        list(blocks(path, 2))
    report = check_audio(str(write_manifest(tmp_path, [entry])))
    assert [finding.kind for finding in report.findings] == ["audio unreadable"]
    assert "cut short" in report.findings[0].reason


def word(text: str, start: float, end: float, speaker: str = "SPEAKER_MAIN") -> list[object]:
    return [text, [start, end], speaker]


def test_check_finds_every_kind_of_problem_with_manifest_and_line(tmp_path: Path) -> None:
    good = write_conversation(tmp_path, "good")
    mono = write_conversation(tmp_path, "mono", samples=noise(2, channels=1))
    slow = write_conversation(tmp_path, "slow", rate=16_000)
    lying = {**write_conversation(tmp_path, "lying", seed=2), "duration": 3.0}
    silent = write_conversation(tmp_path, "silent", seed=3, words=[word("hm", 0, 1, "SPEAKER_01")])
    unsorted = write_conversation(tmp_path, "unsorted", seed=4, words=[word("b", 1, 1.2), word("a", 0, 0.5)])
    beyond = write_conversation(tmp_path, "beyond", seed=5, words=[word("a", 0, 1), word("b", 1.9, 2.2)])
    backwards = write_conversation(tmp_path, "backwards", seed=6, words=[word("a", 1, 0.5)])
    alone = write_conversation(tmp_path, "alone", seed=7)
    (tmp_path / "alone.json").unlink()
    copied = write_conversation(tmp_path, "copied")
    noise_file = tmp_path / "noise.wav"
    noise_file.write_bytes(b"no audio at all")
    noise_file.with_suffix(".json").write_text('{"alignments": [["a", [0, 1], "SPEAKER_MAIN"]]}')
    hollow = write_conversation(tmp_path, "hollow", samples=np.zeros((2, 0), np.float32))
    late = write_conversation(tmp_path, "late", seed=8, returns=[[1.5, 2.5, 0.1, 0.5]])
    manifest = write_manifest(
        tmp_path,
        [
            good,
            "{not json",
            {"path": "good.wav", "duration": -1},
            {"duration": 2},
            mono,
            slow,
            lying,
            silent,
            unsorted,
            beyond,
            backwards,
            alone,
            copied,
            {"path": "noise.wav", "duration": 2},
            {"path": "gone.wav", "duration": 2},
            good,
            {**hollow, "duration": 1},
            late,
        ],
    )
    report = check_audio(str(manifest))
    found = {(finding.kind, int(finding.where.rpartition(":")[2])) for finding in report.findings}
    assert found == {
        ("manifest", 2),
        ("manifest", 3),
        ("manifest", 4),
        ("not stereo", 5),
        ("sample rate", 6),
        ("duration", 7),
        ("no main speaker", 8),
        ("not sorted", 9),
        ("beyond the end", 10),
        ("times", 11),
        ("transcript missing", 12),
        ("duplicate", 13),
        ("audio unreadable", 14),
        ("audio missing", 15),
        ("transcript missing", 15),
        ("duplicate", 16),
        ("empty", 17),
        ("duration", 17),
        ("beyond the end", 17),
        ("beyond the end", 18),
    }
    assert [conversation.file.path.name for conversation in report.conversations] == ["good.wav"]
    assert report.exit_code == 1
    reasons = {finding.where.rpartition(":")[2]: finding.reason for finding in report.findings}
    assert "is mono, not stereo (left Moshi, right user): sox -M" in reasons["5"]
    assert "has 16000 Hz, not 24000 Hz: sox slow.wav -r 24000" in reasons["6"]
    assert "3.00 s in the manifest, 2.00 s in" in reasons["7"]
    assert "only SPEAKER_01" in reasons["8"]
    assert "beyond.json: alignments[1] ('b', 1.90–2.20 s) ends beyond the audio's 2.00 s" in reasons["10"]
    assert f"has the content of {tmp_path}/good.wav, at {manifest}:1" in reasons["13"]
    console = Console(width=200, record=True, file=io.StringIO())
    for table in report.tables():
        console.print(table)
    text = console.export_text()
    assert "data.jsonl:11" in text
    assert "by kind" in text


def test_lines_that_no_file_can_have_are_problems_as_well(tmp_path: Path) -> None:
    """A home that is nobody's, names and numbers beyond what the system takes, and JSON deeper than the parser goes."""
    write_conversation(tmp_path, "good")
    deep = write_conversation(tmp_path, "deep", seed=1)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    huge = write_conversation(tmp_path, "huge", seed=2)
    (tmp_path / "huge.json").write_text('{"alignments": [["a", [0, 1' + "0" * 400 + '], "SPEAKER_MAIN"]]}')
    lines = [
        {"path": "~nobody-of-this-name/a.wav", "duration": 2},
        '{"path": "good.wav", "duration": 1' + "0" * 400 + "}",
        '{"path": "good.wav", "duration": ' + "9" * 5000 + "}",
        {"path": "good\0.wav", "duration": 2},
        {"path": f"{'x' * 300}.wav", "duration": 2},
        "[" * 100_000,
        deep,
        huge,
        '{"path": "two\u2028lines.wav", "duration": 2}',
        '{"path": "good.wav", "duration": 2}',
    ]
    manifest = write_manifest(tmp_path, lines)
    manifest.write_bytes(b"\xef\xbb\xbf" + manifest.read_bytes())  # as some editors begin a file
    report = check_audio(str(manifest))
    found = {(int(finding.where.rpartition(":")[2]), finding.kind) for finding in report.findings}
    missing = {(line, kind) for line in (1, 9) for kind in ("audio missing", "transcript missing")}
    assert found == missing | {(line, "manifest") for line in (2, 3, 4, 5, 6)} | {
        (7, "transcript unreadable"),
        (8, "transcript unreadable"),
    }
    assert [conversation.file.where for conversation in report.conversations] == [f"{manifest}:10"]
    assert all(len(finding.reason) < 400 for finding in report.findings)


def test_sound_data_has_exit_code_0_and_none_at_all_1(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, [write_conversation(tmp_path)])
    seen: list[tuple[int, int]] = []
    report = check_audio(str(manifest), progress=lambda done, total: seen.append((done, total)))
    assert (report.exit_code, report.findings, seen) == (0, (), [(1, 1)])
    assert check_audio(str(write_manifest(tmp_path, [], "none.jsonl"))).exit_code == 1


def test_problems_stop_or_are_skipped_as_the_caller_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = write_conversation(tmp_path)
    manifest = write_manifest(tmp_path, [{"path": "gone.wav", "duration": 1}, good])
    with pytest.raises(DataError, match=r"1 problem in the data[^\n]*\n.*data\.jsonl:1: .*gone\.wav is missing; tr"):
        sound_conversations(str(manifest), Problems("raise"))
    kept = sound_conversations(str(manifest), Problems("skip"))
    assert [conversation.file.path.name for conversation in kept] == ["a.wav"]
    assert "data.jsonl:1" in caplog.text
    with pytest.raises(DataError, match="no sound conversation"):
        sound_conversations(str(write_manifest(tmp_path, [{"path": "gone.wav", "duration": 1}])), Problems("skip"))
