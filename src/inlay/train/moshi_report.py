"""The report of one Moshi run: its loss, text and audio apart, what its memory did while it trained, its recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from inlay.evaluate.moshi import MoshiEvaluation, evaluate_moshi
from inlay.evaluate.scoring import Progress
from inlay.moshi.model import MoshiForTraining
from inlay.report import Code, Headline, Report, Section, training_curves, write_report
from inlay.report.provenance import provenance
from inlay.train.directory import METRICS, RECIPE
from inlay.train.moshi import load_moshi_run, refuse_other_codes
from inlay.train.moshi_recipe import load_moshi_recipe
from inlay.train.report import memory_sections
from inlay.train.trainer import read_metrics
from inlay.train.yaml_recipe import dump_recipe


def write_moshi_report(directory: Path, sections: Sequence[Section] = ()) -> Path:
    """Write ``report.html`` of the run in ``directory``: training, ``sections`` (an evaluation's), the recipe."""
    recipe = load_moshi_recipe(directory / RECIPE)
    lines = read_metrics(directory / METRICS)
    logged = [line for line in lines if isinstance(line.get("loss/text"), float)]
    steps = [float(line["step"]) for line in logged]
    headlines = []
    if logged:
        for part in ("text", "audio"):
            bits = logged[-1][f"loss/{part}"] / math.log(2)
            headlines.append(Headline(f"{part} loss", f"{bits:.2f}", "bits per token, weighted, last logged"))
        headlines.append(Headline("steps", f"{steps[-1]:.0f}"))
    evaluated = [line for line in lines if isinstance(line.get("eval_loss/text"), float)]
    if evaluated:
        bits = evaluated[-1]["eval_loss/text"] / math.log(2)
        headlines.append(Headline("evaluation, text", f"{bits:.2f}", "bits per token, weighted"))
    curves = {part: (steps, [line[f"loss/{part}"] for line in logged]) for part in ("text", "audio")}
    curve = training_curves(curves).figure("Training loss of text and audio tokens, as logged and smoothed.")
    memory = "without a memory" if recipe.memory is None else f"memory in blocks {recipe.memory.layers}"
    report = Report(
        title=recipe.name,
        subtitle=f"Moshi, {memory}, {recipe.mode}",
        summary=headlines,
        sections=[
            Section("Training", items=[curve]),
            *memory_sections(lines),
            *sections,
            Section("Recipe", items=[Code(dump_recipe(recipe))]),
        ],
        provenance=provenance(),
    )
    return write_report(report, directory / "report.html")


def evaluate_moshi_run(
    directory: Path, *, device: str | None = None, progress: Progress | None = None
) -> tuple[MoshiEvaluation, Path]:
    """Measure a finished run, write ``evaluation.json`` and the report into its directory.

    Args:
        directory: The run's.
        device: The GPU if there is one, else the CPU.
        progress: Called with the sequences done and in all, for each variant.

    Returns:
        The evaluation and where the report is.

    Raises:
        RunError: It is no finished run.
        DataError: The run's data cannot be read, or hold no sequence for evaluation.
    """
    run = load_moshi_run(directory, device=device)
    data = run.recipe.load_data(needs_eval=True)
    refuse_other_codes(data, run.checkpoint)
    task = MoshiForTraining(run.lm, run.recipe.loss)
    try:
        evaluation = evaluate_moshi(task, data.eval, **run.recipe.evaluate.model_dump(), progress=progress)
    finally:
        task.restore()
    evaluation.write(directory / "evaluation.json")
    return evaluation, write_moshi_report(directory, evaluation.sections())
