"""Small conversations on disk: stereo noise or tones with a transcript beside."""

from __future__ import annotations

import json
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RATE = 24_000


def write_wave(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    """Write `[channels, samples]` in −1…1 as 16-bit PCM."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[0])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.T * 32767).round().astype("<i2").tobytes())
    return path


def noise(seconds: float, *, seed: int = 0, channels: int = 2, rate: int = RATE) -> np.ndarray:
    """Noise of slowly changing loudness, `[channels, samples]` float32."""
    samples = round(seconds * rate)
    generator = np.random.default_rng(seed)
    loudness = np.repeat(generator.random((channels, samples // 2400 + 1)), 2400, axis=1)[:, :samples]
    return (generator.uniform(-0.9, 0.9, (channels, samples)) * loudness).astype(np.float32)


def write_conversation(
    folder: Path,
    name: str = "a",
    *,
    seconds: float = 2.0,
    seed: int = 0,
    samples: np.ndarray | None = None,
    words: Sequence[Any] = (["hello", [0.1, 0.5], "SPEAKER_MAIN"], ["there", [0.6, 1.0], "SPEAKER_MAIN"]),
    rate: int = RATE,
    **extra: Any,
) -> dict[str, Any]:
    """Write audio and transcript; returns the manifest's entry."""
    samples = noise(seconds, seed=seed, rate=rate) if samples is None else samples
    path = write_wave(folder / f"{name}.wav", samples, rate)
    path.with_suffix(".json").write_text(json.dumps({"alignments": list(words), **extra}))
    return {"path": f"{name}.wav", "duration": samples.shape[1] / rate}


def write_manifest(folder: Path, entries: Sequence[Any], name: str = "data.jsonl") -> Path:
    """Write one line per entry; a string is written as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries))
    return path
