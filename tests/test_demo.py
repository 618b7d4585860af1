"""The demonstration at a size of seconds: both arms of both tasks, evaluated on the same data, one report."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

from inlay import demo
from inlay.cli import app
from inlay.train import load_recipe, read_metrics, train

RUNS = ("stdlib-memory", "stdlib-no-memory")

TRAINER = {
    "max_steps": 2,
    "logging_steps": 1,
    "warmup_steps": 0,
    "per_device_train_batch_size": 2,
    "save_strategy": "no",
    "disable_tqdm": True,
}
DATA = {
    "recall": {"eval_examples": 8},
    "stdlib": {"max_documents": 12, "eval_fraction": 0.3, "max_eval_sequences": 6, "tokenizer": {"kind": "bytes"}},
}


def train_here(arms: list[demo.Arm], progress: Progress, cores: int) -> None:
    """What the arms' own processes run, in this one, without the runs' own reports."""
    for arm in arms:
        train(load_recipe(arm.recipe, [f"name={arm.directory.name}", *arm.overrides]), arm.directory)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's own recipes, small."""
    for task in demo.TASKS:
        raw = yaml.safe_load(demo.recipe_path(task).read_text())
        raw["trainer"] |= TRAINER
        raw["data"] |= DATA[task]
        (tmp_path / f"{task}.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.setattr(demo, "recipe_path", lambda task: tmp_path / f"{task}.yaml")
    monkeypatch.setattr(demo, "train_arms", train_here)
    monkeypatch.setattr(demo, "cores_here", lambda: 1)


@pytest.mark.usefixtures("small")
def test_the_demo_measures_what_it_reports_and_evaluate_measures_the_same(tmp_path: Path) -> None:
    root, said = tmp_path / "demo", StringIO()
    path = demo.run_demo(root, Console(file=said, width=1000))
    assert path == root / "report.html"
    assert f"report: {path}" in said.getvalue()

    losses = [[line["loss"] for line in read_metrics(root / run / "metrics.jsonl") if "loss" in line] for run in RUNS]
    # A fresh zero memory says nothing: the same start and the same first batch have the same loss, to the last bit.
    assert losses[0][0] == losses[1][0]
    assert losses[0][1:] != losses[1][1:]

    figures = {task: json.loads((root / f"{task}.json").read_text()) for task in demo.TASKS}
    recalls = figures["recall"]["recall"]["variants"]
    texts = figures["stdlib"]["loss_by_position"]
    for variants in (recalls, texts["variants"], figures["stdlib"]["growing_context"]["variants"]):
        assert set(variants) == {"memory", "eta = 0", "no memory"}
    before, after = (texts["variants"][name]["quarters"][-1] for name in ("no memory", "memory"))
    gain = texts["gain_over_baseline"]["memory"]["quarters"][-1]["mean"]
    assert gain == pytest.approx(before - after)

    page = path.read_text()
    assert f"{gain:+.2f}".translate(str.maketrans("+-", "\u2212+")) + " bits" in page
    assert f"{100 * recalls['memory']['accuracy']['mean']:.1f} %" in page
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", page)
    assert "prefers-color-scheme: dark" in page
    for title in ("Recall", "Real text", "Loss with a growing context"):
        assert title in page

    result = CliRunner().invoke(app, ["evaluate", str(root / RUNS[0])], catch_exceptions=False)
    assert "Loss by position" in result.output
    alone = json.loads((root / RUNS[0] / "evaluation.json").read_text())["loss_by_position"]["variants"]
    assert set(alone) == {"memory", "eta = 0"}
    for name, variant in alone.items():
        assert variant["quarters"] == pytest.approx(texts["variants"][name]["quarters"])
    assert "Loss by position" in (root / RUNS[0] / "report.html").read_text()
