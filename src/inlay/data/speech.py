"""Conversations of two speakers, made with espeak-ng, in which phrases return: data that shows what a memory is for.

The user tells a fact ("the number of the hotel is four seven two nine") and Moshi repeats it; after other talk the user
asks for it, and Moshi says it once more in the same words. Whoever predicts the second saying needs the first, and
`return_after` puts it further back than attention sees. Where each phrase returns is noted in the transcript.

Every word is synthesised by itself and begins on a frame of Mimi (80 ms), so the alignments are exact and a word's
sound falls into frames in the same way each time. Both speakers have a channel: left is Moshi, right the user. At times
Moshi says "yes" while the user speaks. The same settings give the same files, byte for byte, wherever espeak-ng is of
one version.
"""

from __future__ import annotations

import json
import math
import wave
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from inlay.data.audio import MAIN_SPEAKER, SAMPLE_RATE
from inlay.data.problems import DataError
from inlay.data.speech_dialogue import STYLES, Fact, Style, Turn
from inlay.data.speech_voice import Voices
from inlay.files import replacing_together, write_whole

MANIFEST_NAME = "data.jsonl"
SETTINGS_NAME = "speech.json"
USER = "SPEAKER_USER"
FRAME = 0.08
"""Seconds of a frame of Mimi."""

Progress = Callable[[int, int], None]
"""Is told how many of how many conversations are there."""


@dataclass(frozen=True)
class SpeechConfig:
    """What conversations are made."""

    conversations: int = 32
    """How many."""

    duration: float = 120.0
    """Seconds of each, at least; it ends with the exchange in which it gets there."""

    return_after: float = 30.0
    """Seconds between a phrase and its return, at least. Attention reaches layers × context frames of 80 ms back."""

    seed: int = 0
    """Of everything that is drawn; another seed makes another data set, for evaluation."""

    style: Style = "talk"
    """"talk": sentences, with small talk between them. "quiz": catchwords, whose answers return often."""

    main_voice: str = "en-us+f3"
    """Moshi's voice, in all conversations."""

    user_voices: tuple[str, ...] = ("en-us+m3", "en-gb+m7", "en-us+f5")
    """The user's voice is one of these."""

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise DataError(f"style is {self.style!r}; there are: {', '.join(STYLES)}")
        if self.conversations < 1 or self.duration <= 0 or self.return_after < 0 or not self.user_voices:
            raise DataError(
                "conversations and duration must be positive, return_after not negative, a user voice given"
            )
        if self.return_after >= self.duration:
            raise DataError(
                f"return_after {self.return_after:g} s is not shorter than a conversation of {self.duration:g} s: "
                "no phrase could return"
            )


def synthesise(config: SpeechConfig, out: str | Path, *, progress: Progress | None = None) -> Path:
    """Make conversations in moshi-finetune's format; those that are there already are left.

    Args:
        config: What is made.
        out: The folder: gets `data.jsonl`, and `audio/` with a .wav and .json for each conversation.
        progress: Told after each.

    Returns:
        The manifest, for `inlay moshi check` and `encode`.

    Raises:
        DataError: espeak-ng is missing or failed, or the folder holds conversations made with other settings.
    """
    voices = Voices()
    folder = Path(out)
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    _require_settings(folder / SETTINGS_NAME, config)
    lines = []
    for index in range(config.conversations):
        path = folder / "audio" / f"{index:05d}.wav"
        if not (path.is_file() and path.with_suffix(".json").is_file()):
            made = _Conversation(config, index, voices)
            made.write(path)
        with wave.open(str(path), "rb") as file:
            duration = file.getnframes() / SAMPLE_RATE
        lines.append(json.dumps({"path": f"audio/{path.name}", "duration": duration}))
        if progress is not None:
            progress(index + 1, config.conversations)
    return write_whole(folder / MANIFEST_NAME, "\n".join(lines) + "\n")


@dataclass
class _Speaker:
    voice: str
    name: str
    free: float = 0.0
    """The second from which this speaker is silent."""
    sounds: list[tuple[int, np.ndarray]] = field(default_factory=list)


class _Conversation:
    """One conversation: word after word is put where the speaker before has ended."""

    def __init__(self, config: SpeechConfig, index: int, voices: Voices) -> None:
        self.voices = voices
        self.generator = np.random.default_rng([config.seed, index])
        user_voice = config.user_voices[self.generator.integers(len(config.user_voices))]
        self.main, self.user = _Speaker(config.main_voice, MAIN_SPEAKER), _Speaker(user_voice, USER)
        self.alignments: list[tuple[str, tuple[float, float], str]] = []
        self.returns: list[tuple[float, float, float, float]] = []
        self._spans: dict[Fact, tuple[float, float]] = {}
        self.dialogue = STYLES[config.style](self.generator, return_after=config.return_after)
        now = 2 * FRAME
        while now < config.duration:
            for turn in self.dialogue.exchange(now):
                now = self._say_turn(turn, now)
        self.frames = math.ceil(max(now, self.main.free, self.user.free) / FRAME)

    def _say_turn(self, turn: Turn, now: float) -> float:
        """Say a turn from `now` on; returns when the next may begin."""
        speaker = self.main if turn.main else self.user
        start = max(now, speaker.free)
        spans = []
        for word in turn.words:
            spans.append(self._say(speaker, word, start))
            start = _on_frame(spans[-1][1])
        if not turn.main and len(turn.words) > 6 and self.generator.random() < 0.3:
            at = spans[int(self.generator.integers(3, len(spans)))][0]
            self._say(self.main, self.dialogue.acknowledgement(), max(at, _on_frame(self.main.free)))
        if turn.fact is not None and turn.phrase is not None:
            phrase = spans[turn.phrase]
            self._note_phrase(turn.fact, phrase[0][0], phrase[-1][1])
        return start + FRAME * int(self.generator.integers(2, 6))

    def _say(self, speaker: _Speaker, word: str, start: float) -> tuple[float, float]:
        sound = self.voices.speak(speaker.voice, word)
        first = round(start * SAMPLE_RATE)
        speaker.sounds.append((first, sound))
        span = (first / SAMPLE_RATE, (first + len(sound)) / SAMPLE_RATE)
        self.alignments.append((word, span, speaker.name))
        speaker.free = _on_frame(span[1])
        return span

    def _note_phrase(self, fact: Fact, start: float, end: float) -> None:
        if fact in self._spans:
            self.returns.append((start, end, *self._spans[fact]))
        self._spans[fact] = (start, end)
        self.dialogue.note_said(fact, end)

    def write(self, path: Path) -> None:
        """Write the transcript and the audio, each whole or not at all."""
        samples = np.zeros((self.frames * round(FRAME * SAMPLE_RATE), 2), "<i2")
        for channel, speaker in enumerate((self.main, self.user)):
            for first, sound in speaker.sounds:
                samples[first : first + len(sound), channel] = np.round(sound * 32767)
        self.alignments.sort(key=lambda word: (word[1], word[2]))
        content = {"alignments": self.alignments, "returns": self.returns}
        with replacing_together(path) as new:
            transcript = new / path.with_suffix(".json").name
            transcript.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
            with wave.open(str(new / path.name), "wb") as file:
                file.setnchannels(2)
                file.setsampwidth(2)
                file.setframerate(SAMPLE_RATE)
                file.writeframes(samples.tobytes())


def _on_frame(seconds: float) -> float:
    """The first frame's border at or behind a time."""
    samples = round(FRAME * SAMPLE_RATE)
    return -(-round(seconds * SAMPLE_RATE) // samples) * samples / SAMPLE_RATE


def _require_settings(path: Path, config: SpeechConfig) -> None:
    wanted = json.loads(json.dumps(asdict(config)))
    # More of the same conversations are no other ones.
    wanted.pop("conversations")
    if path.is_file():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise DataError(f"{path} is not JSON; delete {path.parent} or choose another folder") from None
        if there != wanted:
            other = sorted(key for key in wanted if there.get(key) != wanted[key])
            raise DataError(
                f"{path.parent} holds conversations made with another {', '.join(other)}; choose another folder"
            )
    write_whole(path, json.dumps(wanted, indent=1) + "\n")
