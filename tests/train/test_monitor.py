"""The monitor logs what a hand-made backward gives, disturbs nothing, and warns when the memory gets no gradient."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

import inlay
from inlay.doctor.gradients import BASE, CONVOLUTION, PROJECTION
from inlay.train import InlayTrainer, monitor, read_metrics, train, write_run_report
from inlay.train.monitor import WARNING, MemoryMonitor, starvation
from inlay.train.report import memory_sections
from tests.fastweight.families import BY_NAME, enable_checkpointing
from tests.train.test_training import recipe

LLAMA = BY_NAME["llama"]
ROWS = [{"input_ids": row} for row in LLAMA.tokens(4, 12)]


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def attached(mode: str = "all", **changes: Any) -> inlay.Memory:
    model = LLAMA.make()
    torch.manual_seed(1)
    return inlay.attach(model, LLAMA.config(**changes)).train_only(mode)  # type: ignore[arg-type]


def trainer_of(
    memory: inlay.Memory, directory: Path, *, watch: bool = True, rows: Any = ROWS, **arguments: Any
) -> InlayTrainer:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }
    return InlayTrainer(
        memory=memory,
        monitor=MemoryMonitor(memory) if watch else None,
        model=memory.model,
        args=TrainingArguments(output_dir=str(directory), **defaults | arguments),
        train_dataset=rows,
        data_collator=collate,
    )


def logs_of(trainer: InlayTrainer) -> list[dict[str, Any]]:
    """The Trainer's logs, without its closing summary."""
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def norm(parameters: dict[str, nn.Parameter], choose: Callable[[str], bool]) -> float:
    return math.sqrt(sum(float(p.grad.double().pow(2).sum()) for name, p in parameters.items() if choose(name)))  # type: ignore[union-attr]


def hand_made_norms(memory: inlay.Memory) -> dict[str, float]:
    """Gradient norms of one backward over all rows, by the names of the parameters."""
    memory.model(**collate(ROWS), use_cache=False).loss.backward()
    named = dict(memory.model.named_parameters())
    base = {f"model.layers.{block}.mlp.down_proj.weight" for block in (0, 2)}
    return {
        "memory/grad_convolution": norm(named, lambda name: name.endswith("target.conv")),
        "memory/grad_projection": norm(named, lambda name: name.endswith("target.projection")),
        "memory/grad_base_down_projection": norm(named, lambda name: name in base),
        "memory/grad_rest": norm(named, lambda name: "target." not in name and name not in base),
        "memory/grad_convolution/block_2": norm(named, lambda name: ".2." in name and name.endswith("target.conv")),
    }


@pytest.mark.parametrize(
    "arguments",
    [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}],
    ids=["one batch", "accumulated"],
)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_gradient_norms_are_those_of_a_hand_made_backward_before_clipping(
    tmp_path: Path, arguments: dict[str, Any], checkpointed: bool
) -> None:
    memory = attached()
    if checkpointed:
        enable_checkpointing(memory.model)
    (line,) = logs_of(trainer_of(memory, tmp_path, max_grad_norm=1e-3, **arguments))
    expected = hand_made_norms(attached())
    assert all(value > 2e-3 for value in expected.values())  # clipping would show
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_gradients_that_fp16_scaled_are_told_unscaled(tmp_path: Path) -> None:
    trainer = trainer_of(attached(), tmp_path, max_grad_norm=0.0)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    (line,) = logs_of(trainer)
    expected = hand_made_norms(attached())
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_what_is_frozen_has_no_norm(tmp_path: Path) -> None:
    (line,) = logs_of(trainer_of(attached("memory"), tmp_path))
    grads = {name for name in line if name.startswith("memory/grad_") and "block" not in name}
    assert grads == {"memory/grad_convolution", "memory/grad_projection"}


def test_several_blocks_are_told_one_by_one_and_one_block_is_not(tmp_path: Path) -> None:
    (several,) = logs_of(trainer_of(attached(max_update_ratio=0.01), tmp_path))
    for name in ("sum_norm", "output_share", "clip_rate"):
        blocks = [several[f"memory/{name}/block_{index}"] for index in (0, 2)]
        assert several[f"memory/{name}"] == pytest.approx(sum(blocks) / 2)
    for name in ("convolution", "projection", "base_down_projection"):
        blocks = [several[f"memory/grad_{name}/block_{index}"] for index in (0, 2)]
        assert several[f"memory/grad_{name}"] == pytest.approx(math.hypot(*blocks))
    (one,) = logs_of(trainer_of(attached(layers=[1]), tmp_path))
    assert not any("block" in name for name in one)
    assert "memory/clip_rate" not in one  # it does not clip
    assert one["memory/dead_chunks"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"logging_steps": 3},
        {"logging_steps": 3, "logging_first_step": True},
        {"logging_steps": 0.25},
        {"logging_strategy": "epoch"},
        {"logging_strategy": "epoch", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
        {"logging_strategy": "no"},
    ],
    ids=lambda arguments: " ".join(map(str, arguments.values())),
)
def test_every_step_that_is_logged_is_measured_once_and_no_other(
    tmp_path: Path, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def count(layer: Any, seen: Any) -> Any:
        measured.append(layer.index)
        return layer_vitals(layer, seen)

    layer_vitals = monitor.layer_vitals
    monkeypatch.setattr(monitor, "layer_vitals", count)
    options = {"per_device_train_batch_size": 2, "max_steps": 8} | arguments
    lines = logs_of(trainer_of(attached(), tmp_path, rows=[*ROWS, ROWS[0]], **options))
    assert all("memory/grad_convolution" in line and "memory/output_share" in line for line in lines)
    assert measured == [0, 2] * len(lines)
    assert bool(lines) == (arguments.get("logging_strategy") != "no")


def test_evaluation_leaves_no_mark_on_the_clip_rate(tmp_path: Path) -> None:
    memory = attached(max_update_norm=1e-5)
    trainer = trainer_of(memory, tmp_path, max_steps=4, logging_steps=2)
    evaluate = trainer.evaluate

    def evaluate_unclipped(*args: Any, **kwargs: Any) -> Any:
        with memory.using(max_update_norm=1e5):
            return evaluate(ROWS)

    trainer.evaluate = evaluate_unclipped  # type: ignore[method-assign]
    trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 3  # between two logs
    assert [line["memory/clip_rate"] for line in logs_of(trainer)] == [1.0, 1.0]
    assert any("eval_loss" in line for line in trainer.state.log_history)


def test_training_is_the_same_to_the_bit_with_and_without_the_monitor(tmp_path: Path) -> None:
    weights = []
    for watch in (True, False):
        memory = attached(max_update_ratio=0.5)
        logs_of(trainer_of(memory, tmp_path, watch=watch, max_steps=3, per_device_train_batch_size=2))
        weights.append(dict(memory.model.named_parameters()))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_nothing_stays_on_the_layers_after_training_or_an_error(tmp_path: Path) -> None:
    memory = attached()
    logs_of(trainer_of(memory, tmp_path))
    assert [layer.observer for layer in memory.layers.values()] == [None, None]

    def fail(*_: Any) -> None:
        raise RuntimeError("the forward broke off")

    handle = memory.model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broke off"):
        trainer_of(memory, tmp_path).train()
    handle.remove()
    assert [layer.observer for layer in memory.layers.values()] == [None, None]


def watched(memory: inlay.Memory, directory: Path, steps: int = 7, **options: Any) -> tuple[list[str], list[Any]]:
    """The warnings of a run that logs every step, and its logs."""
    told: list[str] = []
    trainer = trainer_of(memory, directory, max_steps=steps, **options.pop("arguments", {}))
    assert trainer.monitor is not None
    trainer.monitor.alarm = told.append
    trainer.monitor.diagnose = options.pop("diagnose", None)
    return told, logs_of(trainer)


def test_a_memory_that_the_clip_keeps_from_learning_is_told_of_once(tmp_path: Path) -> None:
    told, lines = watched(attached(max_update_norm=1e-5), tmp_path, diagnose=lambda: "the clip does it")
    (warning,) = told
    assert "of what their base down projection gets" in warning
    assert warning.endswith("The clip does it.")
    assert [line["step"] for line in lines if WARNING in line] == [4]  # three in a row, the first not counted
    assert lines[3][WARNING] == warning


def test_steps_of_the_warm_up_do_not_count(tmp_path: Path) -> None:
    _, lines = watched(attached(max_update_norm=1e-5), tmp_path, arguments={"warmup_steps": 3})
    assert [line["step"] for line in lines if WARNING in line] == [6]


def test_beside_a_frozen_base_a_gradient_below_adams_epsilon_is_told_of(tmp_path: Path) -> None:
    told, _ = watched(attached("memory", eta=1e-9), tmp_path, steps=4)
    assert "below AdamW's epsilon (1e-08)" in told[0]


@pytest.mark.parametrize(
    ("mode", "init"), [("all", "zero"), ("all", "next_token"), ("all", {"normal": 0.02}), ("memory", "zero")]
)
def test_a_healthy_memory_is_not_warned_of(tmp_path: Path, mode: str, init: Any) -> None:
    told, lines = watched(attached(mode, init=init), tmp_path)
    assert told == []
    assert len(lines) == 7


def test_at_zero_init_the_projection_may_have_no_gradient(tmp_path: Path) -> None:
    (line,) = logs_of(trainer_of(attached(init="zero"), tmp_path))
    assert line["memory/grad_projection"] == 0.0
    norms = {CONVOLUTION: 1e-2, PROJECTION: 0.0, BASE: 1.0}
    groups = {name: [nn.Parameter(torch.zeros(10))] for name in norms}
    assert starvation(norms, groups, 1e-8) is None
    assert starvation({**norms, CONVOLUTION: 9e-5}, groups, 1e-8) is not None
    assert starvation({CONVOLUTION: 9e-5, PROJECTION: 0.0}, groups, 1e-8) is None
    assert starvation({CONVOLUTION: 3e-8, PROJECTION: 0.0}, groups, 1e-8) is not None  # 3e-8 / √10 < 1e-8
    assert starvation({}, groups, 1e-8) is None


def test_a_diagnosis_that_fails_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> str:
        raise MemoryError("no room for a backward")

    told, lines = watched(attached(max_update_norm=1e-5), tmp_path, diagnose=fail)
    assert "MemoryError: no room for a backward" in told[0]
    assert len(lines) == 7


def test_without_a_console_the_warning_goes_to_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="inlay.train.monitor"):
        logs_of(trainer_of(attached(max_update_norm=1e-5), tmp_path, max_steps=5))
    assert [record.message for record in caplog.records if "convolution and projection" in record.message]


def test_a_run_keeps_the_figures_in_its_files_and_goes_on_with_them_when_resumed(tmp_path: Path) -> None:
    memory = {"layers": [1], "chunk_size": 8, "eta": 0.1, "init": "next_token", "max_update_norm": 1e-5}
    directory = tmp_path / "run"
    train(recipe(memory=memory, trainer={"max_steps": 3}), directory)
    train(recipe(memory=memory, trainer={"max_steps": 7}), directory, resume=True)

    lines = [line for line in read_metrics(directory / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    names = {name for line in lines for name in line if name.startswith("memory/")} - {WARNING}
    assert {"memory/grad_rest", "memory/sum_norm", "memory/clip_rate", "memory/dead_chunks"} <= names
    boards = [EventAccumulator(str(file)).Reload() for file in sorted((directory / "tensorboard").iterdir())]
    for name in names:
        shown = [(event.step, event.value) for board in boards for event in board.Scalars(f"train/{name}")]
        assert shown == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]

    page = write_run_report(directory).read_text()
    for shown_text in ("The memory while training", "Gradient norms before clipping", "Clipped updates", "25.0%"):
        assert shown_text in page
    assert [line["step"] for line in lines if WARNING in line] == [7]  # counted anew after the resume
    assert "Step 7: the memory" in page


def test_the_report_has_no_such_section_without_a_memory_and_a_range_for_many_blocks() -> None:
    assert memory_sections([{"step": 1, "loss": 2.0}]) == []
    many = {f"memory/sum_norm/block_{index}": 0.1 * index for index in range(6)}
    (section,) = memory_sections([{"step": step, "memory/sum_norm": 0.25, **many} for step in (1, 2)])
    (figure,) = section.items
    assert "mean of 6 blocks" in figure.light_svg  # type: ignore[union-attr]
    assert "block 3" not in figure.light_svg  # type: ignore[union-attr]
