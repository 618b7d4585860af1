"""Toy checkpoints and stores of codes for training: made in a second, without audio."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inlay.data.audio import AudioFile, Return
from inlay.moshi.codes_store import CodesWriter, FileStamp
from inlay.moshi.encode import identity_of
from inlay.moshi.interleave import FRAME_RATE, Interleaver
from inlay.moshi.toy import ToySizes, write_toy_checkpoint
from inlay.moshi.weights import MoshiCheckpoint, load_checkpoint
from inlay.train.moshi_recipe import MoshiRecipe
from inlay.train.yaml_recipe import check_recipe

SIZES = ToySizes(dim=16, num_layers=3, num_heads=2, context=12, card=16, depformer_dim=8, depformer_layers=1)
PHRASE = 10
PERIOD = 40


def make_toy(folder: Path) -> MoshiCheckpoint:
    """A tiny Moshi in the files of a real one."""
    return load_checkpoint(write_toy_checkpoint(folder, sizes=SIZES), dtype=torch.float32)


def make_store(
    folder: Path,
    checkpoint: MoshiCheckpoint,
    *,
    files: int = 4,
    frames: int = 120,
    seed: int = 0,
    words: bool = True,
    period: int = PERIOD,
) -> Path:
    """Conversations of random codes in which Moshi says one phrase again every ``period`` frames, aloud or silently."""
    tokenizer = checkpoint.text_tokenizer
    identity = identity_of(checkpoint, Interleaver(tokenizer))
    generator = np.random.default_rng(seed)
    card, text_card = checkpoint.lm_config["card"], checkpoint.lm_config["text_card"]
    with CodesWriter(folder, identity, shard_frames=10_000) as writer:
        stored = []
        for number in range(files):
            codes = generator.integers(0, card, (16, frames)).astype(np.int16)
            text = np.full(frames, 3, np.int32)
            if words:
                text[::4] = generator.integers(10, text_card, len(text[::4]))
            returns = []
            for again in range(period, frames - PHRASE + 1, period):
                codes[:8, again : again + PHRASE] = codes[:8, :PHRASE]
                text[again : again + PHRASE] = text[:PHRASE]
                at = [x / FRAME_RATE for x in (again, again + PHRASE, again - period, again - period + PHRASE)]
                returns.append(Return(*at))
            name = f"{folder.name}-{number}"
            stamp = FileStamp(name, 1, 1, hashlib.sha256(f"{seed} {name}".encode()).hexdigest())
            entry = writer.add(stamp, stamp, codes=codes, text=text, samples=frames * 1920, returns=returns)
            stored.append((AudioFile(Path(name), frames / FRAME_RATE, "", "toy", None), entry))
        writer.finish(stored)
    return folder


def make_recipe(checkpoint: MoshiCheckpoint, store: Path, **changes: Any) -> MoshiRecipe:
    """A recipe of three steps on the CPU."""
    raw: dict[str, Any] = {
        "name": "toy",
        "moshi_paths": {"hf_repo_id": checkpoint.source},
        "memory": {"layers": [0, 2], "chunk_size": 16, "eta": 0.1},
        "data": {"train_data": str(store), "eval_data": str(store), "min_sec": 1.0},
        "duration_sec": 9.6,
        "batch_size": 2,
        "max_steps": 3,
        "optim": {"lr": 1e-2},
        "param_dtype": "float32",
        "trainer": {"use_cpu": True, "disable_tqdm": True},
    }
    return check_recipe(MoshiRecipe, raw | changes)
