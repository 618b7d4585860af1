"""The report of a run tells what was logged, also where it is no number."""

from __future__ import annotations

import json
import math
from pathlib import Path

from inlay.train import write_run_report
from inlay.train.directory import METRICS, RECIPE
from inlay.train.recipe import dump_recipe
from inlay.train.report import memory_sections
from tests.train.test_training import recipe


def test_a_run_whose_evaluation_was_not_a_number_has_a_report(tmp_path: Path) -> None:
    (tmp_path / RECIPE).write_text(dump_recipe(recipe()))
    lines = [
        {"step": 1, "loss": 2.0, "eval_loss": 3 * math.log(2)},
        {"step": 2, "loss": "nan", "eval_loss": "nan", "memory/dead_chunks": "nan"},
    ]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_run_report(tmp_path).read_text()
    assert "evaluation loss" in page
    assert "3.00" in page


def test_a_block_without_a_number_leaves_the_others_in_the_figure() -> None:
    blocks = {f"memory/sum_norm/block_{index}": 0.5 for index in range(6)} | {"memory/sum_norm/block_3": "nan"}
    (section,) = memory_sections([{"step": step, "memory/sum_norm": 0.5, **blocks} for step in (1, 2)])
    assert section.title == "The memory while training"
