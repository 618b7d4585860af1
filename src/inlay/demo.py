"""The demonstration: the main job on data that every machine has, measured while you wait.

Two tasks, each trained twice from the same initial weights on the same batches, with a memory and without:

* recall: key-value pairs, asked for far outside the attention window;
* real text: the source of the reader's own Python standard library.

The two arms of a task run side by side as ``inlay train`` processes of their own, one core each: at this size a second
thread gains little. Then both are evaluated here, and one report says what the memory bought.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from inlay.data import Data, load_data
from inlay.evaluate import NO_MEMORY, Evaluation, difference, evaluate_model
from inlay.fastweight import InlayError
from inlay.report import Code, Headline, Report, Section, save_png, training_curves, write_report
from inlay.report import loss_by_position as plot_loss_by_position
from inlay.report.console import print_section
from inlay.report.provenance import provenance
from inlay.train import load_recipe, load_run, read_metrics, training_curve
from inlay.train.allocator import KEEP_FREED_MEMORY
from inlay.train.directory import METRICS, RECIPE

WITH = "memory"

TASKS = {
    "recall": (
        "Recall",
        "The first half of a sequence holds 16 key–value pairs at random places, the second half asks for them in "
        "random order. Attention sees 16 tokens, so an answer can only come from the memory.",
    ),
    "stdlib": (
        "Real text",
        "The source of this machine's own Python standard library, files held out by the hash of their names. "
        "Attention sees 16 tokens; what a model knows of the file before them, it knows through the memory. “eta = 0” "
        "is the model that was trained with the memory, run without it.",
    ),
}


class DemoError(InlayError, RuntimeError):
    """A demo cannot go on: a training process failed, say."""


@dataclass(eq=False)
class Arm:
    """One training of a demo.

    Attributes:
        task: What is trained, and
        variant: how; for the progress bar and errors.
        recipe: The file.
        overrides: What differs from it, as on the command line.
        directory: The run's.
        steps: How many there will be.
        process: The training, once it has started.
    """

    task: str
    variant: str
    recipe: Path
    overrides: tuple[str, ...]
    directory: Path
    steps: int
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def log(self) -> Path:
        """What the process printed."""
        return self.directory.parent / f"{self.directory.name}.log"

    def start(self, threads: int) -> None:
        """Train in a process of its own."""
        command = [sys.executable, "-m", "inlay", "train", str(self.recipe), f"name={self.directory.name}"]
        command += [*self.overrides, "--runs", str(self.directory.parent)]
        environment = os.environ | KEEP_FREED_MEMORY | {"OMP_NUM_THREADS": str(threads)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
            )

    def ended(self) -> bool:
        """Whether the training has ended. Raises :class:`DemoError` if it failed."""
        assert self.process is not None
        code = self.process.poll()
        if code is None:
            return False
        if code != 0:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise DemoError(
                f"training {self.task} ({self.variant}) failed with exit code {code}; {self.log} ends:\n{tail}"
            )
        return True

    def stop(self) -> None:
        """End the training if it still runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()

    def progress(self) -> tuple[int, str]:
        """The last step logged and its loss."""
        lines = [line for line in read_metrics(self.directory / METRICS) if "loss" in line]
        return (int(lines[-1]["step"]), f"loss {lines[-1]['loss']:.2f}") if lines else (0, "starting")


def recipe_path(task: str) -> Path:
    """Where a recipe that comes with the package lies."""
    return Path(str(files("inlay"))) / "recipes" / f"{task}.yaml"


def run_demo(directory: Path, console: Console) -> Path:
    """Train, evaluate and report; figures of earlier demos in ``directory`` are replaced.

    Returns:
        The path of ``report.html``.

    Raises:
        DemoError: A training failed; the message holds the end of its log.
    """
    began = time.monotonic()
    cores = cores_here()
    directory.mkdir(parents=True, exist_ok=True)
    recipes = {task: load_recipe(recipe_path(task)) for task in TASKS}
    arms = [
        Arm(
            task,
            variant,
            recipe_path(task),
            ("memory=null",) if variant == NO_MEMORY else (),
            directory / f"{task}-{variant.replace(' ', '-')}",
            int(recipes[task].trainer["max_steps"]),
        )
        for task in TASKS
        for variant in (WITH, NO_MEMORY)
    ]
    remove_runs([arm.directory for arm in arms])
    with console.status("reading the standard library's source and learning its tokens"):
        data = {task: load_data(recipes[task].data) for task in TASKS}
    with arms_progress(console) as progress:
        for task in TASKS:
            train_arms([arm for arm in arms if arm.task == task], progress, cores)
        torch.set_num_threads(cores)
        evaluations = {
            task: _evaluate([arm for arm in arms if arm.task == task], data[task], progress) for task in TASKS
        }
    for task, evaluation in evaluations.items():
        evaluation.write(directory / f"{task}.json")
        for section in evaluation.sections():
            print_section(console, section)
    path = _report(directory, arms, evaluations, time.monotonic() - began)
    console.print(f"report: {path}", soft_wrap=True)
    return path


def cores_here() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def remove_runs(directories: Iterable[Path]) -> None:
    """Remove the runs of an earlier demo; what is no run is left."""
    for directory in directories:
        if (directory / RECIPE).is_file():
            shutil.rmtree(directory)


def train_arms(arms: list[Arm], progress: Progress, cores: int) -> None:
    """Train arms, as many side by side as there are cores; ends all of them if one fails or we are interrupted."""
    waiting, running = list(arms), dict[Arm, TaskID]()
    try:
        while waiting or running:
            while waiting and len(running) < cores:
                arm = waiting.pop(0)
                arm.start(max(1, cores // len(arms)))
                running[arm] = progress.add_task(f"{arm.task}, {arm.variant}", total=arm.steps, note="starting")
            time.sleep(0.5)
            for arm, bar in list(running.items()):
                ended = arm.ended()
                step, note = arm.progress()
                progress.update(bar, completed=arm.steps if ended else step, note=note)
                if ended:
                    del running[arm]
    finally:
        for arm in running:
            arm.stop()


def _evaluate(arms: list[Arm], data: Data, progress: Progress) -> Evaluation:
    """Both arms on the same held-out data, gains counted from the one without a memory."""
    bar = progress.add_task(f"evaluating {arms[0].task}", total=None, note="")
    evaluation: Evaluation | None = None

    def shown(done: int, total: int) -> None:
        progress.update(bar, completed=done, total=total)

    for arm in arms:
        run = load_run(arm.directory, device="cpu")
        settings = run.recipe.evaluate.model_dump()
        evaluation = evaluate_model(run.model, data, into=evaluation, **settings, progress=shown)
    assert evaluation is not None
    evaluation.baseline = NO_MEMORY
    progress.update(bar, total=1, completed=1)
    return evaluation


def _report(directory: Path, arms: list[Arm], evaluations: dict[str, Evaluation], seconds: float) -> Path:
    recalls, losses = evaluations["recall"].recalls, evaluations["stdlib"].losses
    gain = difference(losses[NO_MEMORY], losses[WITH]).quarters[-1]
    sections = []
    for task, (title, text) in TASKS.items():
        curves = {arm.variant: training_curve(arm.directory) for arm in arms if arm.task == task}
        plot = training_curves(curves, baseline=NO_MEMORY)
        first, *rest = evaluations[task].sections()
        sections.append(Section(title, text, [*first.items, plot.figure()]))
        sections += rest
    picture = plot_loss_by_position(
        {name: losses[name].buckets(48)[:2] for name in (WITH, NO_MEMORY)},
        baseline=NO_MEMORY,
        title="Loss by position on the standard library's source",
        marks={float(evaluations["stdlib"].window or 0): "attention window"},
    )
    save_png(picture, directory / "loss_by_position.png")
    save_png(picture, directory / "loss_by_position_dark.png", dark=True)
    report = Report(
        title="What the memory buys",
        subtitle="Inlay's demonstration: two tasks, trained with a fast-weight memory and without, from the same "
        "initial weights on the same batches",
        summary=[
            Headline(
                "recall with memory",
                f"{100 * recalls[WITH].accuracy:.1f} %",
                f"{100 * recalls[NO_MEMORY].accuracy:.1f} % without; {100 * recalls[WITH].chance:.1f} % by chance",
                "good" if recalls[WITH].accuracy > recalls[NO_MEMORY].accuracy else "bad",
            ),
            Headline(
                "real text, last quarter",
                f"{-gain.mean:+.2f} bits".replace("-", "\u2212"),
                f"per token against no memory, ± {gain.half:.2f}",
                "good" if gain.low > 0 else "bad" if gain.high < 0 else "neutral",
            ),
            Headline("measured in", f"{seconds / 60:.1f} min", "training and evaluation, in this run"),
        ],
        sections=[
            *sections,
            Section("Recipes", items=[Code(recipe_path(task).read_text(), f"{task}.yaml") for task in TASKS]),
        ],
        provenance=provenance(),
    )
    return write_report(report, directory / "report.html")


def arms_progress(console: Console) -> Progress:
    """Bars with a note beside each (the field ``note``)."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
