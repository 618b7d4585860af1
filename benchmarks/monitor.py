"""What watching the memory costs a training.

The monitor measures the steps that are logged and leaves the others alone. So a training logs every step and takes them
in turns with and without the monitor; what a watched step takes longer is spread over the steps from one log to the
next. A step is timed from its beginning to the beginning of the next, so that the log itself is in it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import inlay
from benchmarks.decode import mistral_of
from benchmarks.entry import Aim, Entry, Progress
from benchmarks.measure import ratio, require_same
from inlay.train import InlayTrainer
from inlay.train.monitor import MemoryMonitor

LOGGING_STEPS = 10
VARIANTS = ("watched", "unwatched")


@dataclass(frozen=True)
class Sizes:
    """Of the model, of one step's batch, and rounds of timing; and how attention is computed."""

    width: int = 256
    inner: int = 704
    layers: int = 6
    chunk_size: int = 128
    batch: int = 2
    tokens: int = 1024
    rounds: int = 15
    attention: str = "sdpa"


QUICK = Sizes(width=16, inner=24, layers=4, chunk_size=8, tokens=32, rounds=2)


def run(quick: bool, device: torch.device, progress: Progress) -> Entry:
    """Measure a training step with and without the monitor.

    Raises:
        NotTheSameError: A watched step trains other weights than an unwatched one; nothing is timed.
    """
    sizes = QUICK if quick else Sizes()
    once = replace(sizes, rounds=0, attention="eager")  # on CUDA the backward of SDPA differs from run to run
    trained = {name: Training(once, device, Turns([name], device)).train() for name in VARIANTS}
    require_same(trained["watched"], trained["unwatched"], 0.0, "weights after one step")

    total = len(VARIANTS) * (sizes.rounds + 1)
    turns = Turns(VARIANTS, device, lambda done: progress(done, total, "training steps, watched and not"))
    Training(sizes, device, turns).train()
    logged = ratio(turns.seconds["watched"], turns.seconds["unwatched"])
    spread, quiet = (1 + (figure - 1) / LOGGING_STEPS for figure in (logged.medians, logged.minima))
    table = Table(title="Median time of a step that is logged", title_justify="left")
    table.add_column("step")
    table.add_column("time", justify="right")
    for name, seconds in turns.seconds.items():
        table.add_row(name, f"{statistics.median(seconds):.4f} s")
    table.add_row("watched over unwatched", f"{logged.medians:.3f}x")
    return Entry(
        f"Watching the memory while it trains: {sizes.layers} layers, D={sizes.width}, B={sizes.batch}, "
        f"T={sizes.tokens:,}, a memory in every third layer",
        [table],
        [Aim(f"time of a training with the monitor, one log in {LOGGING_STEPS} steps", spread, 1.02, False, quiet)],
        {"sizes": vars(sizes), "logging_steps": LOGGING_STEPS, "seconds": turns.seconds},
    )


class Turns(TrainerCallback):
    """Gives the trainer its monitor and takes it away again, step by step, and times the steps.

    Attributes:
        seconds: Of each variant's steps, without its first.
        trainer: Whose turns they are.
    """

    trainer: InlayTrainer

    def __init__(self, variants: Any, device: torch.device, tick: Any = lambda done: None) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in variants}
        self._variants = list(variants)
        self._device = device
        self._tick = tick
        self._monitor: MemoryMonitor | None = None
        self._began = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Keep the monitor for the steps that are watched."""
        self._monitor = self.trainer.monitor

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the step before, if any, and begin the next variant's."""
        self._end(state.global_step)
        self.trainer.monitor = self._monitor if self._of(state.global_step) == "watched" else None
        self._began = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the last step."""
        self._end(state.global_step)

    def _of(self, steps_done: int) -> str:
        return self._variants[steps_done % len(self._variants)]

    def _end(self, steps_done: int) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if steps_done > len(self._variants):  # each variant's first step is to warm up
            self.seconds[self._of(steps_done - 1)].append(time.perf_counter() - self._began)
        self._tick(steps_done)


class Training:
    """A Mistral of random weights with a memory in every third layer, ready to train on random tokens."""

    def __init__(self, sizes: Sizes, device: torch.device, turns: Turns) -> None:
        model = mistral_of(
            sizes,
            sliding_window=sizes.chunk_size,
            max_position_embeddings=sizes.tokens,
            attn_implementation=sizes.attention,
        )
        config = inlay.FastWeightConfig(layers="every:3", chunk_size=sizes.chunk_size, init="next_token")
        memory = inlay.attach(model, config).train_only("all")
        steps = len(turns.seconds) * (sizes.rounds + 1)
        rows = torch.randint(1024, (steps * sizes.batch, sizes.tokens))
        self._directory = tempfile.TemporaryDirectory()
        self._model = model
        self._trainer = InlayTrainer(
            memory=memory,
            monitor=MemoryMonitor(memory),
            model=model,
            args=TrainingArguments(
                output_dir=self._directory.name,
                max_steps=steps,
                per_device_train_batch_size=sizes.batch,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=device.type == "cpu",
                dataloader_pin_memory=False,
                remove_unused_columns=False,
                label_names=["labels"],
            ),
            train_dataset=list(rows),
            data_collator=_collate,
            callbacks=[turns],
        )
        self._trainer.remove_callback(PrinterCallback)
        turns.trainer = self._trainer

    def train(self) -> dict[str, Tensor]:
        """The parameters after the training."""
        with self._directory:
            self._trainer.train()
        return {name: parameter.detach() for name, parameter in self._model.named_parameters()}


def _collate(rows: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids}
