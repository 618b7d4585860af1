"""The report of one run."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from inlay import __version__
from inlay.report import Code, Headline, Report, Section, training_curves, write_report
from inlay.train.recipe import dump_recipe, load_recipe
from inlay.train.run import METRICS, RECIPE
from inlay.train.trainer import read_metrics

Curve = tuple[list[float], list[float]]


def training_curve(directory: Path) -> Curve:
    """Steps and training loss (nats per token) that a run logged."""
    lines = [line for line in read_metrics(directory / METRICS) if isinstance(line.get("loss"), float)]
    return [float(line["step"]) for line in lines], [float(line["loss"]) for line in lines]


def provenance() -> dict[str, Any]:
    """What a report says of where its figures come from."""
    return {
        "inlay": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
    }


def write_run_report(directory: Path, sections: Sequence[Section] = ()) -> Path:
    """Write ``report.html`` of the run in ``directory``: training, ``sections`` (an evaluation's), the recipe."""
    recipe = load_recipe(directory / RECIPE)
    steps, loss = training_curve(directory)
    evaluated = [line["eval_loss"] for line in read_metrics(directory / METRICS) if "eval_loss" in line]
    headlines = []
    if loss:
        headlines.append(Headline("training loss", f"{loss[-1] / math.log(2):.2f}", "bits per token, last logged"))
        headlines.append(Headline("steps", f"{steps[-1]:.0f}"))
    if evaluated:
        headlines.append(Headline("evaluation loss", f"{evaluated[-1] / math.log(2):.2f}", "bits per token"))
    curve = training_curves({recipe.name: (steps, loss)}).figure("Training loss, as logged and smoothed.")
    memory = "without a memory" if recipe.memory is None else f"memory in blocks {recipe.memory.layers}"
    report = Report(
        title=recipe.name,
        subtitle=memory,
        summary=headlines,
        sections=[
            Section("Training", items=[curve]),
            *sections,
            Section("Recipe", items=[Code(dump_recipe(recipe))]),
        ],
        provenance=provenance(),
    )
    return write_report(report, directory / "report.html")
