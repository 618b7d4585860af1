"""The report of one run: its loss, what its memory did while it trained, its recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inlay.report import (
    Code,
    Figure,
    Headline,
    Plot,
    Report,
    Section,
    Series,
    Text,
    line_plot,
    training_curves,
    write_report,
)
from inlay.report.canvas import Canvas
from inlay.report.drawing import draw_curves
from inlay.report.numbers import short
from inlay.report.provenance import provenance
from inlay.report.series import clean
from inlay.train.directory import METRICS, RECIPE
from inlay.train.monitor import PREFIX, WARNING
from inlay.train.recipe import dump_recipe, load_recipe
from inlay.train.trainer import read_metrics

Curve = tuple[list[float], list[float]]
_MOST_LINES = 5
_GROUPS = {
    "grad_convolution": "convolution",
    "grad_projection": "projection",
    "grad_base_down_projection": "base down projection",
    "grad_rest": "rest",
}


def training_curve(directory: Path) -> Curve:
    """Steps and training loss (nats per token) that a run logged."""
    lines = [line for line in read_metrics(directory / METRICS) if isinstance(line.get("loss"), float)]
    return [float(line["step"]) for line in lines], [float(line["loss"]) for line in lines]


def write_run_report(directory: Path, sections: Sequence[Section] = ()) -> Path:
    """Write ``report.html`` of the run in ``directory``: training, ``sections`` (an evaluation's), the recipe."""
    recipe = load_recipe(directory / RECIPE)
    steps, loss = training_curve(directory)
    lines = read_metrics(directory / METRICS)
    evaluated = [line["eval_loss"] for line in lines if isinstance(line.get("eval_loss"), float)]
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
            *memory_sections(lines),
            *sections,
            Section("Recipe", items=[Code(dump_recipe(recipe))]),
        ],
        provenance=provenance(),
    )
    return write_report(report, directory / "report.html")


def memory_sections(lines: Sequence[Mapping[str, Any]]) -> list[Section]:
    """The section "The memory while training" from the lines of a metrics file; none if they hold nothing of it.

    See :mod:`inlay.train.monitor` for what the figures are.
    """
    gradients = [series for key, name in _GROUPS.items() if (series := _series(lines, key, name)) is not None]
    figures = [
        _gradient_figure(gradients),
        _block_figure(
            lines,
            "sum_norm",
            "The sum beside the weight it is added to",
            "η‖S‖ / ‖W0‖ at the sequence's end",
            "How large the memory has grown by the end of a sequence.",
        ),
        _block_figure(
            lines,
            "output_share",
            "The memory's part of its layer's output",
            "RMS of the part / RMS of the whole",
            "Over the tokens that can read something. Near 0 the memory says nothing, from 1 on it alone speaks.",
        ),
        _block_figure(lines, "clip_rate", "Clipped updates", "share of the updates, 0 to 1", "Since the log before."),
    ]
    items: list[Text | Figure] = [Text(line[WARNING], tone="warning") for line in lines if WARNING in line]
    items += [figure for figure in figures if figure is not None]
    dead = [share for line in lines if isinstance(share := line.get(PREFIX + "dead_chunks"), float)]
    if dead:
        share = sum(dead) / len(dead)
        items.append(
            Text(
                f"{share:.1%} of the chunks were dead: the last of their document, written and never read. Longer "
                "documents or smaller chunks have fewer."
            )
        )
    return [Section("The memory while training", items=items)] if items else []


def _gradient_figure(series: Sequence[Series]) -> Figure | None:
    if not series:
        return None
    plot = line_plot(
        series, title="Gradient norms before clipping", xlabel="step", ylabel="L2 norm of the group", log_y=True
    )
    return plot.figure(
        "By group of parameters. Convolution and projection are the memory's own: where both lie orders of magnitude "
        "below the base, the memory does not learn."
    )


def _block_figure(lines: Sequence[Mapping[str, Any]], key: str, title: str, ylabel: str, caption: str) -> Figure | None:
    """One line for each block that has a memory; of many blocks their mean, and their range shaded."""
    prefix = f"{key}/block_"
    names = {name.removeprefix(PREFIX + prefix) for line in lines for name in line if name.startswith(PREFIX + prefix)}
    blocks = sorted(names, key=int)
    if len(blocks) > _MOST_LINES:
        drawn = [_series(lines, key, f"mean of {len(blocks)} blocks (shaded: least to most)", range_of=prefix)]
    elif blocks:
        drawn = [_series(lines, prefix + index, f"block {index}") for index in blocks]
    else:
        drawn = [_series(lines, key, "memory")]
    found = [series for series in drawn if series is not None]
    return _from_zero(found, title, ylabel).figure(caption) if found else None


def _from_zero(series: Sequence[Series], title: str, ylabel: str) -> Plot:
    """A plot over steps whose vertical axis begins at 0, so that a share that hardly changes looks like one."""
    curves, notes = clean(series)
    top = max(float(np.nanmax(curve.y if curve.high is None else curve.high)) for curve in curves)

    def paint(canvas: Canvas) -> None:
        draw_curves(canvas, curves, "step", ylabel, y_limits=(0.0, 1.12 * top or 1.0))

    ranges = [f"{c.name} runs from {short(float(c.drawn[0]))} to {short(float(c.drawn[-1]))}" for c in curves]
    return Plot(title, paint, f"{title}: {ylabel} against step. {'; '.join(ranges)}.", note=" ".join(notes))


def _series(lines: Sequence[Mapping[str, Any]], key: str, name: str, *, range_of: str | None = None) -> Series | None:
    """What was logged under ``memory/key`` by step, with the range over the keys that begin with ``range_of``."""
    kept = [line for line in lines if isinstance(line.get(PREFIX + key), float)]
    if not kept:
        return None
    steps, values = [line["step"] for line in kept], [line[PREFIX + key] for line in kept]
    if range_of is None:
        return Series(name, steps, values)
    ranges = [
        [value for other, value in line.items() if other.startswith(PREFIX + range_of) and isinstance(value, float)]
        for line in kept
    ]
    return Series(name, steps, values, band=([*map(min, ranges)], [*map(max, ranges)]))
