"""Whole runs on a device that is not the CPU, shown without one: figures and files are the CPU's, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from moshi.models import LMModel
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import TrainingArguments

from inlay.moshi.weights import MoshiCheckpoint
from inlay.train import compress, read_metrics, train
from inlay.train.compress import train_compressor
from inlay.train.moshi import train_moshi
from tests.moshi.runs import make_recipe, make_store, make_toy
from tests.other_device import ELSEWHERE, elsewhere, other_device
from tests.train.compression import decoder
from tests.train.compression import recipe as compress_recipe
from tests.train.test_training import recipe as text_recipe

__all__ = ["decoder", "other_device"]

TRAINER = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "optim": "adamw_torch"}
_OF_TIME = ("_runtime", "_per_second", "seconds")


def figures(directory: Path) -> dict[str, Any]:
    """What a run logged, but for how long it took."""
    lines = enumerate(read_metrics(directory / "metrics.jsonl"))
    return {f"{n} {key}": value for n, line in lines for key, value in line.items() if not key.endswith(_OF_TIME)}


def tensors(directory: Path) -> dict[str, bytes]:
    """What a run keeps of what it trained."""
    found = {}
    for path in directory.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            found[f"{path.relative_to(directory)} {name}"] = tensor.numpy().tobytes()
    assert found
    return found


def assert_the_same(run: Callable[[Path, bool], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``run``, given a directory and ``use_cpu``, leaves the same on the CPU and where there is another device."""
    moved, load_lm = nn.Module.to, MoshiCheckpoint.load_lm

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device = args[0] if args else kwargs.get("device")
        is_there = isinstance(device, str | torch.device) and torch.device(device).type == ELSEWHERE
        return elsewhere(module) if is_there else moved(module, *args, **kwargs)

    def load_there(checkpoint: MoshiCheckpoint, **overrides: Any) -> LMModel:
        return elsewhere(load_lm(replace(checkpoint, device="cpu"), **overrides))  # safetensors knows no such device

    run(tmp_path / "here", True)
    AcceleratorState._reset_state(reset_partial_state=True)
    there = property(lambda _: torch.device(ELSEWHERE))
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "to", to)
        patch.setattr(MoshiCheckpoint, "load_lm", load_there)
        patch.setattr(TrainingArguments, "device", there)
        patch.setattr(PartialState, "default_device", there)
        run(tmp_path / "there", False)
    AcceleratorState._reset_state(reset_partial_state=True)
    here, from_there = ({**figures(tmp_path / name), **tensors(tmp_path / name)} for name in ("here", "there"))
    assert here == from_there


def test_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradient checkpointing, evaluation and checkpoints."""

    def run(directory: Path, use_cpu: bool) -> None:
        train(text_recipe(trainer={**TRAINER, "gradient_checkpointing": True, "use_cpu": use_cpu}), directory)

    assert_the_same(run, tmp_path, monkeypatch)


def test_moshi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With adapters and memory, several documents in a sequence."""
    checkpoint = make_toy(tmp_path / "toy")
    store = make_store(tmp_path / "codes", checkpoint, files=2)
    lora = {"mode": "memory+lora", "lora": {"enable": True, "rank": 2}, "gradient_checkpointing": True}
    often = {"do_eval": True, "eval_freq": 1, "log_freq": 1, "max_steps": 2}

    def run(directory: Path, use_cpu: bool) -> None:
        trainer = {"use_cpu": use_cpu, "disable_tqdm": True, "optim": "adamw_torch"}
        train_moshi(make_recipe(checkpoint, store, trainer=trainer, **lora, **often), directory)

    assert_the_same(run, tmp_path, monkeypatch)


def test_soft_tokens(decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder is loaded beforehand: transformers makes a model on ``meta``, which is the other device's name."""
    with _disable_current_modes():
        loaded = compress._decoder(compress_recipe(decoder), decoder, Console(quiet=True))
    monkeypatch.setattr(compress, "_decoder", lambda *_: copy.deepcopy(loaded))

    def run(directory: Path, use_cpu: bool) -> None:
        train_compressor(compress_recipe(decoder, {**TRAINER, "use_cpu": use_cpu}), directory)

    assert_the_same(run, tmp_path, monkeypatch)
