"""What a run's data are too short for is said, not left out in silence."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from inlay.data import Data, TextConfig, load_data
from inlay.evaluate import evaluate_model
from inlay.report import Report, render_report
from inlay.report.console import print_section
from tests.evaluate.models import llama


def data_of(folder: Path, *lengths: int) -> Data:
    """Held-out documents of these bytes, in sequences of 32."""
    for name, sizes in (("train", (32,)), ("eval", lengths)):
        (folder / name).mkdir()
        for index, size in enumerate(sizes):
            (folder / name / f"{index}.txt").write_text("ab" * (size // 2))
    fields = {"source": "files", "tokenizer": {"kind": "bytes"}, "sequence_length": 32, "add_eos": False}
    paths = {"path": str(folder / "train"), "eval_path": str(folder / "eval")}
    return load_data(TextConfig.model_validate({"task": "text"} | fields | paths))


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"contexts": [1000]}, "a block of 4 tokens and a context of 1,000 before it need 1,004"),
        ({"contexts": [1000, 8]}, "a context of 1,000"),
        ({"block": 500}, "a block of 500 tokens and a context of 1 before it need 501"),
        ({}, "a block of 4 tokens and a context of 28 before it need 32"),
    ],
)
def test_documents_too_short_for_a_growing_context_are_told(tmp_path: Path, settings: dict, needed: str) -> None:
    evaluation = evaluate_model(llama(vocab_size=258), data_of(tmp_path, 20, 16), **settings)
    assert evaluation.contexts == {}
    out = io.StringIO()
    for section in evaluation.sections():
        print_section(Console(file=out, width=400), section)
    page = render_report(Report("Evaluation", sections=evaluation.sections()))
    content = json.loads(evaluation.write(tmp_path / "evaluation.json").read_text())
    for text in (out.getvalue(), page, content["growing_context"]["not_measured"]):
        assert needed in text
        assert "Set evaluate.block and the longest of evaluate.contexts to 20 together, at most" in text


def test_a_growing_context_that_fits_is_measured(tmp_path: Path) -> None:
    evaluation = evaluate_model(llama(vocab_size=258), data_of(tmp_path, 20, 16), block=4, contexts=[16, 2])
    assert evaluation.contexts["no memory"].contexts.tolist() == [2, 16]
    assert evaluation.contexts_missing == ""
    assert "not_measured" not in evaluation.to_json()["growing_context"]
