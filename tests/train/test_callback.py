"""A plain ``Trainer`` keeps the memory of a PEFT model with its checkpoints, by a callback."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import inlay
from inlay import CheckpointError, Memory, MemoryCallback
from tests.train.test_trainer import model

ROWS = [
    {"input_ids": ids, "labels": ids} for ids in torch.randint(32, (16, 24), generator=torch.Generator().manual_seed(2))
]


def trainer(folder: Path, steps: int = 4, *, resume_from: Path | None = None, **options: Any) -> tuple[Trainer, Memory]:
    net = model()
    memory = inlay.attach(net, inlay.FastWeightConfig(layers="all", chunk_size=4, eta=0.1))
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    memory.train_only("memory+lora")
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    callback = MemoryCallback(memory, resume_from)
    return Trainer(wrapped, arguments, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=[callback]), memory


def trained(made: tuple[Trainer, Memory], resume: Any = None) -> dict[str, Tensor]:
    run, memory = made
    run.train(resume_from_checkpoint=resume)
    return {name: parameter.detach().clone() for name, parameter in memory.named_parameters()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_resumed_run_goes_on_with_the_memory_of_its_checkpoint(tmp_path: Path) -> None:
    whole = trained(trainer(tmp_path / "whole"))
    assert all(bool(value.abs().max() > 0) for value in whole.values())
    trained(trainer(tmp_path / "half", 2))
    assert same(trained(trainer(tmp_path / "half"), resume=True), whole)
    elsewhere = shutil.move(tmp_path / "half" / "checkpoint-2", tmp_path / "elsewhere")
    assert same(trained(trainer(tmp_path / "new", resume_from=elsewhere), resume=str(elsewhere)), whole)
    shutil.rmtree(elsewhere / "memory")
    with pytest.raises(CheckpointError, match=r"memory is not there.*MemoryCallback\(memory, resume_from="):
        trained(trainer(tmp_path / "new", resume_from=elsewhere), resume=str(elsewhere))


def test_the_best_checkpoints_memory_is_loaded(tmp_path: Path) -> None:
    rising = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "greater_is_better": True}
    run, memory = trainer(tmp_path / "best", **rising)  # the larger loss, which is that of the second step
    found = trained((run, memory))
    assert Path(run.state.best_model_checkpoint or "").name == "checkpoint-2"
    fresh = trainer(tmp_path / "fresh")[1]
    fresh.load(tmp_path / "best" / "checkpoint-2" / "memory")
    assert same(dict(fresh.named_parameters()), found)
    fresh.load(tmp_path / "best" / "checkpoint-4" / "memory")
    assert not same(dict(fresh.named_parameters()), found)
