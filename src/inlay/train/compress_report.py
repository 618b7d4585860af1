"""The report of one compression run: its losses by objective, its recipe, and whatever an evaluation adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inlay.data import load_qa
from inlay.evaluate.compress_suite import CompressSuite, Shown, measure_compression
from inlay.evaluate.scoring import choose
from inlay.report import Code, Figure, Headline, Report, Section, training_curves, write_report
from inlay.report.provenance import provenance
from inlay.train.compress import load_compress_run
from inlay.train.compress_recipe import CompressRecipe, load_compress_recipe
from inlay.train.compress_trainer import PRETRAINING
from inlay.train.directory import METRICS, RECIPE
from inlay.train.trainer import read_metrics
from inlay.train.yaml_recipe import dump_recipe

Curve = tuple[list[float], list[float]]
_LOSS, _EVAL_LOSS = "loss/", "eval_loss/"


def objective_curves(directory: Path, prefix: str = _LOSS) -> dict[str, Curve]:
    """Steps and values of each objective that the Trainer logged in ``directory`` under ``prefix``.

    Args:
        directory: Of a run, or its ``pretraining/``.
        prefix: ``loss/`` for training, ``eval_loss/`` for evaluation while training.
    """
    curves: dict[str, Curve] = {}
    for line in read_metrics(directory / METRICS):
        for key, value in line.items():
            if key.startswith(prefix) and isinstance(value, float):
                steps, values = curves.setdefault(key.removeprefix(prefix), ([], []))
                steps.append(float(line["step"]))
                values.append(value)
    return curves


def measure_compress_run(directory: Path, *, shown: Shown, device: str | None = None) -> CompressSuite:
    """Ask the held-out questions of a finished run, as its recipe's ``evaluate`` says.

    Args:
        directory: Of the run.
        shown: Opens what shows the progress of each part.
        device: Where to; CUDA if there is one when not given.

    Raises:
        RunError: There is no finished run.
    """
    run = load_compress_run(directory, device=device)
    recipe, asked, held_out = run.recipe, run.recipe.evaluate, load_qa(run.recipe.data).eval
    return measure_compression(
        run.model,
        run.compressor,
        run.layout,
        [held_out[index] for index in choose(len(held_out), asked.examples)],
        shown=shown,
        ratios=asked.ratios,
        context_tokens=recipe.context_tokens,
        batch_size=asked.batch_size,
        seed=recipe.seed,
    )


def write_compress_report(
    directory: Path,
    sections: Sequence[Section] = (),
    summary: Sequence[Headline] | None = None,
    path: Path | None = None,
) -> Path:
    """Write the report of the run in ``directory``: ``sections`` (an evaluation's), training, the recipe.

    Args:
        directory: Of the run.
        sections: Come first.
        summary: The cards at the top; when not given, the last losses and the number of steps.
        path: Where to; ``report.html`` of the run when not given.
    """
    recipe = load_compress_recipe(directory / RECIPE)
    parts = {"Pretraining": directory / PRETRAINING, "Training": directory}
    training = [Section(title, items=figures) for title, place in parts.items() if (figures := _figures(place))]
    report = Report(
        title=recipe.name,
        subtitle=_what(recipe),
        summary=_headlines(read_metrics(directory / METRICS)) if summary is None else summary,
        sections=[*sections, *training, Section("Recipe", items=[Code(dump_recipe(recipe))])],
        provenance=provenance(),
    )
    return write_report(report, path or directory / "report.html")


def _figures(directory: Path) -> list[Figure]:
    figures = []
    for prefix, what in ((_LOSS, "as logged and smoothed"), (_EVAL_LOSS, "on held-out contexts")):
        curves = objective_curves(directory, prefix)
        if curves:
            plot = training_curves(
                curves, title="Loss by objective", ylabel="nats per token", window=1 if prefix == _EVAL_LOSS else None
            )
            figures.append(plot.figure(f"Each objective by itself, without its weight, {what}."))
    return figures


def _headlines(lines: Sequence[Mapping[str, Any]]) -> list[Headline]:
    """The last answer losses, and how many steps it took."""
    names = {_LOSS: "answer loss", _EVAL_LOSS: "answer loss, held out"}
    headlines = []
    for prefix, name in names.items():
        found = [line[f"{prefix}answer"] for line in lines if isinstance(line.get(f"{prefix}answer"), float)]
        if found:
            headlines.append(Headline(name, f"{found[-1]:.2f}", "nats per token, last logged"))
    return [*headlines, Headline("steps", str(max((line["step"] for line in lines), default=0)))]


def _what(recipe: CompressRecipe) -> str:
    compressor = recipe.compressor
    budget = f"{compressor.slots} slots" if compressor.slots else " and ".join(f"{r}×" for r in compressor.ratios)
    decoder = "a frozen decoder" if recipe.decoder_lora is None else "a decoder with LoRA"
    return f"{compressor.kind} at {budget} before {decoder}"
