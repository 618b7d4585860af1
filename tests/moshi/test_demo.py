"""The demonstration on speech, at a size of seconds: every step runs, on files of the real formats."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

from inlay import moshi_demo
from inlay.cli import app
from inlay.demo import Arm, DemoError, arms_progress, recipe_path, train_arms
from inlay.evaluate.moshi import MoshiEvaluation, SpanLoss, StreamLoss
from inlay.moshi.toy import ToySizes

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
SMALL = {"max_steps": 2, "batch_size": 2, "duration_sec": 12, "log_freq": 1}


def train_here(arms: list[Arm], progress: Progress, cores: int) -> None:
    """What the arms' own processes run, in this one."""
    for arm in arms:
        words = ["train", str(arm.recipe), f"name={arm.directory.name}", *arm.overrides]
        CliRunner().invoke(app, [*words, "--runs", str(arm.directory.parent)], catch_exceptions=False)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's own recipe and data, small."""
    raw = yaml.safe_load(recipe_path(moshi_demo.TASK).read_text()) | SMALL
    raw["memory"]["layers"] = [0]
    raw["trainer"] = {"disable_tqdm": True}
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(raw))
    monkeypatch.setattr(moshi_demo, "recipe_path", lambda task: recipe)
    monkeypatch.setattr(moshi_demo, "cores_here", lambda: 1)
    monkeypatch.setattr(moshi_demo, "train_arms", train_here)
    sizes = ToySizes(dim=16, num_layers=1, num_heads=2, context=12, depformer_dim=8, depformer_layers=1)
    monkeypatch.setattr(moshi_demo, "SIZES", sizes)
    monkeypatch.setattr(moshi_demo, "REACH", 12)
    train = replace(moshi_demo.TRAIN, conversations=3, duration=12.0, return_after=2.0)
    monkeypatch.setattr(moshi_demo, "TRAIN", train)
    monkeypatch.setattr(moshi_demo, "HELD_OUT", replace(train, conversations=2, seed=1))
    return recipe


@needs_espeak
def test_every_step_leaves_its_files_and_uses_the_conversations_of_before(tmp_path: Path, small: Path) -> None:
    said, root = StringIO(), tmp_path / "demo"
    moshi_demo._make_conversations(moshi_demo.TRAIN, root / "speech-train", Console(file=StringIO()))
    kept = {file: file.stat().st_mtime_ns for file in root.glob("speech-*/audio/*")}
    path = moshi_demo.run_moshi_demo(root, Console(file=said, width=1000))
    assert len(kept) == 6
    assert kept == {file: file.stat().st_mtime_ns for file in root.glob("speech-train/audio/*")}
    figures = json.loads((root / "evaluation.json").read_text())
    assert set(figures["variants"]) == {"memory", "eta = 0", "no memory"}
    assert figures["baseline"] == "no memory"
    assert figures["returned_after_frames"] == 12
    for variant in figures["variants"].values():
        assert variant["text"]["returned_phrases"]["tokens"] > 0
    page = path.read_text()
    for told in ("Returned phrases", "Loss by position, text", "Streaming: ", "returned phrases, audio"):
        assert told in page
    streamed = json.loads((root / "stream" / "run.json").read_text())
    assert streamed["chunks"] == (streamed["frames"] + 1) // 25  # the first frame is stepped twice
    assert (root / "answer.wav").stat().st_size > 44
    assert str(path) in said.getvalue()


@needs_espeak
def test_conversations_that_were_damaged_are_not_trained_on(tmp_path: Path, small: Path) -> None:
    root, said = tmp_path / "demo", StringIO()
    moshi_demo._make_conversations(moshi_demo.TRAIN, root / "speech-train", Console(file=StringIO()))
    (root / "speech-train" / "audio" / "00001.json").write_text("[")
    with pytest.raises(DemoError, match="unsound conversations; delete it"):
        moshi_demo.run_moshi_demo(root, Console(file=said, width=1000))
    assert "what is wrong" in said.getvalue()
    assert "00001.json" in said.getvalue()


def test_a_training_that_fails_ends_the_demo_with_the_end_of_its_log(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: broken\nmoshi_paths: {}\n")
    arm = Arm("moshi", "memory", recipe, (), tmp_path / "run", 2)
    with arms_progress(Console(file=StringIO())) as progress, pytest.raises(DemoError) as error:
        train_arms([arm], progress, 1)
    assert "training moshi (memory) failed with exit code 2" in str(error.value)
    assert f"{recipe} is no valid recipe" in str(error.value).replace("\n", "")


def test_a_loss_is_lower_by_a_share_of_the_baselines() -> None:
    def losses(*bits: float) -> dict[str, StreamLoss]:
        position: Any = None
        of_text = SpanLoss(np.array(bits), np.array([1, 1]))
        return {"text": StreamLoss(position, of_text, of_text, 0.0)}

    variants = {"memory": losses(1.0, 3.0), "no memory": losses(4.0, 4.0), "eta = 0": losses(8.0, 8.0)}
    evaluation = MoshiEvaluation(12, 24, "no memory", variants)
    assert moshi_demo.less(evaluation, "text", "no memory")[0] == pytest.approx(0.5)
    assert moshi_demo.less(evaluation, "text", "eta = 0")[0] == pytest.approx(0.75)
