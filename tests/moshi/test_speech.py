"""Conversations made with espeak-ng: exact alignments, phrases that return, the same files each time."""

from __future__ import annotations

import json
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest

from inlay.data.audio_check import check_audio
from inlay.data.problems import DataError
from inlay.data.speech import SpeechConfig, synthesise
from inlay.data.speech_voice import Voices

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
CONFIG = SpeechConfig(conversations=2, duration=60.0, return_after=12.0, seed=3, user_voices=("en-us+m3",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    synthesise(CONFIG, folder)
    return folder


def read(path: Path) -> np.ndarray:
    """`[samples, 2]`."""
    with wave.open(str(path), "rb") as file:
        assert (file.getframerate(), file.getnchannels()) == (24_000, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, 2)


@needs_espeak
def test_what_is_made_passes_the_check(folder: Path) -> None:
    report = check_audio(str(folder))
    assert (report.findings, len(report.conversations)) == ((), 2)
    assert all(one.samples >= 60 * 24_000 for one in report.conversations)
    assert all(one.samples % 1920 == 0 for one in report.conversations)


@needs_espeak
def test_each_word_sounds_on_its_speakers_channel_exactly_where_the_transcript_says(folder: Path) -> None:
    voices = Voices()
    for path in sorted((folder / "audio").glob("*.wav")):
        samples = read(path)
        left_over = samples.copy()
        for word, (start, end), speaker in json.loads(path.with_suffix(".json").read_text())["alignments"]:
            first, last = round(start * 24_000), round(end * 24_000)
            assert first % 1920 == 0, "a word begins on a frame"
            channel = 0 if speaker == "SPEAKER_MAIN" else 1
            voice = CONFIG.main_voice if channel == 0 else CONFIG.user_voices[0]
            sound = np.round(voices.speak(voice, word) * 32767).astype(np.int16)
            np.testing.assert_array_equal(samples[first:last, channel], sound, err_msg=word)
            left_over[first:last, channel] = 0
        assert not left_over.any(), "nothing sounds outside the words"


@needs_espeak
def test_phrases_return_in_the_same_words_after_return_after_seconds(folder: Path) -> None:
    returns = 0
    for path in sorted((folder / "audio").glob("*.json")):
        content = json.loads(path.read_text())

        def spoken(start: float, end: float, words: list[list] = content["alignments"]) -> list[str]:
            return [word for word, (a, b), speaker in words if speaker == "SPEAKER_MAIN" and start <= a and b <= end]

        for start, end, before_start, before_end in content["returns"]:
            returns += 1
            assert start - before_end >= CONFIG.return_after
            assert spoken(start, end) == spoken(before_start, before_end) != []
            user = [word for word, (a, _), speaker in content["alignments"] if speaker != "SPEAKER_MAIN" and a < start]
            phrase = spoken(start, end)
            told = [index for index in range(len(user)) if user[index : index + len(phrase)] == phrase]
            assert len(told) == 1, "the user tells the phrase once and does not say it when asking for it"
    assert returns >= 5


@needs_espeak
def test_one_seed_gives_the_same_files_and_another_seed_others(folder: Path, tmp_path: Path) -> None:
    one = SpeechConfig(**{**vars(CONFIG), "conversations": 1})
    synthesise(one, tmp_path / "same")
    for name in ("00000.wav", "00000.json"):
        assert (tmp_path / "same" / "audio" / name).read_bytes() == (folder / "audio" / name).read_bytes()
    synthesise(SpeechConfig(**{**vars(one), "seed": 4}), tmp_path / "other")
    other = (tmp_path / "other" / "audio" / "00000.json").read_text()
    assert other != (folder / "audio" / "00000.json").read_text()


@needs_espeak
def test_what_is_there_is_left_and_more_conversations_are_added(tmp_path: Path) -> None:
    short = {**vars(CONFIG), "duration": 6.0, "return_after": 2.0}
    synthesise(SpeechConfig(**{**short, "conversations": 1}), tmp_path)
    first = tmp_path / "audio" / "00000.wav"
    written = first.stat().st_mtime_ns
    seen: list[tuple[int, int]] = []
    manifest = synthesise(SpeechConfig(**short), tmp_path, progress=lambda *told: seen.append(told))
    assert first.stat().st_mtime_ns == written
    assert seen == [(1, 2), (2, 2)]
    assert len(manifest.read_text().splitlines()) == 2
    assert not list(tmp_path.rglob(".*.tmp"))
    with pytest.raises(DataError, match="made with another return_after, seed; choose another folder"):
        synthesise(SpeechConfig(**{**short, "seed": 9, "return_after": 1.0}), tmp_path)


def test_without_espeak_the_message_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"needs espeak-ng, which is not installed: `apt-get install espeak-ng`"):
        synthesise(CONFIG, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_espeak
def test_a_voice_that_does_not_exist_is_told() -> None:
    with pytest.raises(DataError, match=r"could not say 'hello' with voice 'nobody'"):
        Voices().speak("nobody", "hello")


def test_settings_under_which_nothing_could_return_are_refused() -> None:
    with pytest.raises(DataError, match="no phrase could return"):
        SpeechConfig(duration=30, return_after=30)
    with pytest.raises(DataError, match="conversations and duration must be positive"):
        SpeechConfig(conversations=0)
