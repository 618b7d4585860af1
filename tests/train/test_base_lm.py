"""The small decoder: trained once, kept by a hash of all it depends on, and honest about how well it answers."""

from __future__ import annotations

import threading
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from inlay.train import base_lm
from inlay.train.base_lm import base_outcome, build_base_lm
from inlay.train.compress_recipe import CompressRecipe, load_compress_recipe
from inlay.train.muon import MuonAdamW

OVERRIDES = [
    "decoder.config.hidden_size=32",
    "decoder.config.intermediate_size=64",
    "decoder.config.num_attention_heads=2",
    "decoder.config.num_key_value_heads=2",
    "base.stages=[{facts: 2, max_steps: 6}]",
    "base.batch_size=16",
    "data.facts=2",
    "data.questions=2",
    "questions_per_context=2",
]


def recipe(*overrides: str) -> CompressRecipe:
    return load_compress_recipe(Path("src/inlay/recipes/facts.yaml"), [*OVERRIDES, *overrides])


def built(tmp_path: Path, *overrides: str) -> tuple[Any, str]:
    console = Console(file=StringIO(), width=200)
    model, _ = build_base_lm(recipe(*overrides), console, cache_dir=tmp_path)
    assert isinstance(console.file, StringIO)
    return model, console.file.getvalue()


def test_it_is_trained_once_and_then_taken_from_the_cache(tmp_path: Path) -> None:
    first, _ = built(tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again, _ = built(tmp_path)
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    weights = again.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in first.state_dict().items())
    assert base_outcome(recipe(), cache_dir=tmp_path).steps == 6  # type: ignore[union-attr]


def test_a_decoder_without_its_weights_is_trained_anew(tmp_path: Path) -> None:
    """What was left where only the first of two processes could save: base.json and the tokenizer."""
    first, _ = built(tmp_path)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        next(tmp_path.rglob(name)).unlink()
    assert base_outcome(recipe(), cache_dir=tmp_path) is None
    again, _ = built(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    assert base_outcome(recipe(), cache_dir=tmp_path) is not None


def test_other_processes_wait_at_no_barrier_while_the_first_trains_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process group gives up on who waits for longer than its timeout, 10 minutes on GPUs."""
    there_at_barrier = []
    begun = threading.Event()
    found: dict[str, Tensor] = {}

    def wait_for_everyone() -> None:
        there_at_barrier.append(base_outcome(recipe(), cache_dir=tmp_path) is not None)

    def second() -> Any:
        begun.set()
        return SimpleNamespace(is_main_process=False, wait_for_everyone=wait_for_everyone)

    with monkeypatch.context() as patch:
        patch.setattr(base_lm, "PartialState", second)
        waiting = threading.Thread(target=lambda: found.update(built(tmp_path)[0].state_dict()))
        waiting.start()
        begun.wait()
    first, _ = built(tmp_path)
    waiting.join()
    assert there_at_barrier == [True]
    assert all(torch.equal(value, found[name]) for name, value in first.state_dict().items())


def test_another_recipe_is_another_model(tmp_path: Path) -> None:
    built(tmp_path)
    assert base_outcome(recipe("seed=1"), cache_dir=tmp_path) is None
    assert base_outcome(recipe("base.learning_rate=1e-3"), cache_dir=tmp_path) is None
    # What the compressor is changes nothing about the decoder.
    assert base_outcome(recipe("compressor.ratios=[2]"), cache_dir=tmp_path) is not None


def test_a_decoder_that_cannot_answer_is_said_to_be_one(tmp_path: Path) -> None:
    """Six steps teach nothing: 0 % of full texts are answered, and the recipe wants 98."""
    _, said = built(tmp_path)
    assert "exactly" in said
    assert "base.exact_match is 98 %" in said
    assert not base_outcome(recipe(), cache_dir=tmp_path).reached  # type: ignore[union-attr]


def test_a_stage_ends_where_it_answers_and_the_rate_falls_over_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []
    step = MuonAdamW.step
    monkeypatch.setattr(base_lm, "full_text_exact_match", lambda *arguments: 0.5)
    monkeypatch.setattr(base_lm, "_WARMUP", 1)
    monkeypatch.setattr(
        MuonAdamW, "step", lambda self, *given: (rates.append(self.param_groups[-1]["lr"]), step(self, *given))[1]
    )
    stages = "[{facts: 1, exact_match: 0.4, max_steps: 9}, {facts: 2, max_steps: 4}]"
    built(tmp_path, "base.eval_steps=2", f"base.stages={stages}", "base.muon=0.01", "base.learning_rate=1.0")
    assert rates == pytest.approx([1, 1, 1, 0.75, 0.5, 0.25])
    outcome = base_outcome(
        recipe("base.eval_steps=2", f"base.stages={stages}", "base.muon=0.01", "base.learning_rate=1.0"),
        cache_dir=tmp_path,
    )
    assert outcome is not None
    assert outcome.looks == ((2, 1, 0.5), (4, 2, 0.5), (6, 2, 0.5))
