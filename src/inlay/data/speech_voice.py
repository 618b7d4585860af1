"""Words spoken by espeak-ng, one at a time, so that where each begins and ends is known to the sample."""

from __future__ import annotations

import shutil
import subprocess
from importlib import import_module

import numpy as np

from inlay.data.audio import SAMPLE_RATE
from inlay.data.problems import DataError

PROGRAM = "espeak-ng"
_WAVE_HEADER = 44  # bytes before the samples in what espeak-ng writes to a pipe
_SILENCE = 0.01  # of full scale; what is quieter at a word's ends is cut off
_LEVEL = 0.6  # peak of every word


class Voices:
    """Speaks words and keeps their waveforms.

    Args:
        words_per_minute: espeak-ng's speed.

    Raises:
        DataError: espeak-ng is not installed; the message says how to install it.
    """

    def __init__(self, words_per_minute: int = 165) -> None:
        program = shutil.which(PROGRAM)
        if program is None:
            raise DataError(
                f"making conversations needs {PROGRAM}, which is not installed: "
                "`apt-get install espeak-ng` (Debian, Ubuntu), `dnf install espeak-ng` (Fedora), "
                "`brew install espeak-ng` (macOS)"
            )
        self._program = program
        self._speed = words_per_minute
        self._spoken: dict[tuple[str, str], np.ndarray] = {}

    def speak(self, voice: str, word: str) -> np.ndarray:
        """A word's waveform at 24 kHz, without silence at its ends: `[samples]` float32.

        Raises:
            DataError: espeak-ng does not know the voice, or failed.
        """
        if (voice, word) not in self._spoken:
            self._spoken[voice, word] = self._synthesise(voice, word)
        return self._spoken[voice, word]

    def _synthesise(self, voice: str, word: str) -> np.ndarray:
        command = [self._program, "-v", voice, "-s", str(self._speed), "-z", "--stdout", word]
        result = subprocess.run(command, capture_output=True, check=False)
        if result.returncode or len(result.stdout) <= _WAVE_HEADER:
            told = result.stderr.decode(errors="replace").strip() or "no sound"
            raise DataError(f"{PROGRAM} could not say {word!r} with voice {voice!r}: {told} (`{PROGRAM} --voices`)")
        rate = int.from_bytes(result.stdout[24:28], "little")
        samples = np.frombuffer(result.stdout[_WAVE_HEADER:], "<i2").astype(np.float32) / 32768
        try:
            resample = import_module("sphn").resample
        except ImportError:
            raise DataError("making conversations needs sphn: pip install sphn") from None
        samples = resample(samples[None], rate, SAMPLE_RATE)[0]
        loud = np.flatnonzero(np.abs(samples) > _SILENCE)
        if not len(loud):
            raise DataError(f"{PROGRAM} says nothing for {word!r} with voice {voice!r}")
        samples = samples[loud[0] : loud[-1] + 1]
        return (samples * (_LEVEL / np.abs(samples).max())).astype(np.float32)
