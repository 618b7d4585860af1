"""The demonstration of soft tokens, on a model trained for a few steps: what it compares, and when it does not."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from inlay import compress_demo
from inlay.demo import DemoError, recipe_path
from inlay.train import allocator

SMALL = {
    "decoder.config.hidden_size": 32,
    "decoder.config.intermediate_size": 48,
    "decoder.config.head_dim": 8,
    "base.stages": [{"facts": 2, "max_steps": 6}],
    "base.batch_size": 16,
    "data.facts": 2,
    "data.questions": 2,
    "questions_per_context": 2,
    "trainer.max_steps": 4,
    "trainer.per_device_train_batch_size": 4,
    "trainer.warmup_steps": 1,
    "trainer.disable_tqdm": True,
    "evaluate.examples": 16,
}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's own recipe at a size of seconds, with a cache of its own."""
    raw = yaml.safe_load(recipe_path(compress_demo.TASK).read_text())
    for key, value in SMALL.items():
        *path, last = key.split(".")
        section = raw
        for name in path:
            section = section[name]
        section[last] = value
    small = tmp_path / "terse.yaml"
    small.write_text(yaml.safe_dump(raw))
    monkeypatch.setattr(compress_demo, "recipe_path", lambda task: small)
    monkeypatch.setattr(compress_demo.torch, "set_num_threads", lambda threads: None)
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path / "cache"))
    return small


def test_nothing_is_compared_before_full_text_answers(tmp_path: Path, recipe: Path) -> None:
    with pytest.raises(DemoError, match=r"0\.0 % of held-out questions from full text .* compares from 95\.0 % on"):
        compress_demo.run_compress_demo(tmp_path / "demo", Console(file=StringIO()))
    assert not (tmp_path / "demo").exists()


def test_the_report_has_every_method_and_a_demo_of_before_is_replaced(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress_demo, "FULL_TEXT_ANSWERS", 0.0)
    for _ in range(2):
        said = StringIO()
        report = compress_demo.run_compress_demo(tmp_path / "demo", Console(file=said, width=200))
    figures = json.loads((tmp_path / "demo" / compress_demo.TASK / "evaluation.json").read_text())
    methods = {(one["method"], one["budget"]) for one in figures["methods"]}
    assert {("full text", None), ("no context", None)} <= methods
    assert {(name, budget) for name in ("soft tokens", "first tokens") for budget in ("4×", "8×")} <= methods
    page = report.read_text()
    assert all(f"soft tokens at {budget}" in page for budget in ("4×", "8×"))
    assert [collapse["budget"] for collapse in figures["collapse"]] == ["4×", "8×"]
    assert str(report) in said.getvalue()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.parametrize(("environment", "expected"), [({}, "True"), ({"MALLOC_TRIM_THRESHOLD_": "1"}, "False")])
def test_freed_memory_is_kept_unless_the_environment_says_otherwise(environment: dict[str, str], expected: str) -> None:
    code = f"import runpy; print(runpy.run_path({allocator.__file__!r})['keep_freed_memory']())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment | {"PATH": ""}, check=True
    )
    assert done.stdout.strip() == expected
