"""An evaluation says the same in JSON, in the terminal and in the report, and compares only what can be compared."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

import inlay
from inlay import FastWeightConfig
from inlay.data import RecallDataset
from inlay.evaluate import (
    Evaluation,
    EvaluationError,
    difference,
    growing_context,
    loss_by_position,
    recall_accuracy,
    with_and_without_memory,
)
from inlay.report import Report, render_report
from inlay.report.console import print_section
from tests.evaluate.models import Guesser, Oracle, llama
from tests.evaluate.test_position import RANDOM, documents, packed
from tests.evaluate.test_recall_accuracy import CONFIG


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    model, texts = llama(), documents(24, 24, 24)
    data = packed(texts, 24)
    inlay.attach(model, FastWeightConfig(**RANDOM, eta=0.05))
    recall = RecallDataset(CONFIG, "eval")
    return (
        Evaluation(baseline="eta = 0", window=8)
        .add(with_and_without_memory(model, lambda: loss_by_position(model, data)))
        .add(with_and_without_memory(model, lambda: growing_context(model, texts, block=4, contexts=[2, 8, 16])))
        .add({"memory": recall_accuracy(Oracle(recall), recall, bins=[0, 10, 30, 64])})
        .add({"eta = 0": recall_accuracy(Guesser(recall), recall, bins=[0, 10, 30, 64])})
    )


def test_the_file_holds_the_figures_and_null_for_what_is_not_a_number(evaluation: Evaluation, tmp_path) -> None:
    path = evaluation.write(tmp_path / "new" / "evaluation.json")
    assert [file.name for file in path.parent.iterdir()] == ["evaluation.json"]
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in the file"))
    memory, base = evaluation.losses["memory"], evaluation.losses["eta = 0"]
    variants = content["loss_by_position"]["variants"]
    assert variants["memory"]["bits_per_token"] == memory.mean
    assert variants["eta = 0"]["quarters"] == base.quarters().tolist()
    assert variants["memory"]["bits"][0] is None
    gain = content["loss_by_position"]["gain_over_baseline"]
    assert list(gain) == ["memory"]
    assert gain["memory"]["quarters"][3] == difference(base, memory).quarters[3].to_json()
    assert content["growing_context"]["variants"]["memory"]["contexts"] == [2, 8, 16]
    assert content["recall"]["variants"]["memory"]["accuracy"]["mean"] == 1.0
    assert content["recall"]["variants"]["memory"]["accuracy_by_distance"] == [None, 1.0, 1.0]


def test_terminal_and_report_show_every_variant_and_the_gain(evaluation: Evaluation) -> None:
    out = io.StringIO()
    console = Console(file=out, width=140)
    for section in evaluation.sections():
        print_section(console, section)
    page = render_report(Report("Evaluation", sections=evaluation.sections()))
    for text in (out.getvalue(), page):
        assert f"{evaluation.losses['memory'].quarters()[3]:.3f}" in text
        assert "gain of memory" in text
        assert f"{evaluation.contexts['eta = 0'].perplexity[0]:,.1f}" in text
        assert "100.0 %" in text
        assert "4 tokens of 3 pieces from 3 documents (0 more too short)" in " ".join(text.split())
    assert page.count("<svg") >= 3
    assert [section.title for section in evaluation.sections()] == [
        "Loss by position",
        "Loss with a growing context",
        "Recall",
    ]


def test_one_variant_alone_and_a_baseline_that_was_not_measured() -> None:
    data = packed(documents(16, 16), 16)
    alone = Evaluation(baseline="no memory").add({"memory": loss_by_position(llama(), data)})
    assert alone.to_json()["loss_by_position"]["gain_over_baseline"] == {}
    assert len(alone.sections()) == 1
    assert Evaluation().sections() == []


def test_a_single_sequence_has_a_gain_and_no_interval() -> None:
    data = packed(documents(16), 16)
    two = Evaluation("a").add({name: loss_by_position(llama(seed), data) for seed, name in enumerate("ab")})
    gain = two.to_json()["loss_by_position"]["gain_over_baseline"]["b"]["mean"]
    assert gain["mean"] is not None
    assert gain["low"] is gain["high"] is None
    assert len(two.sections()) == 1


def test_losses_of_different_sequences_do_not_stand_in_one_evaluation() -> None:
    one, other = (loss_by_position(llama(), packed(documents(16, 16, seed=seed), 16)) for seed in (0, 1))
    with pytest.raises(EvaluationError, match="different sequences"):
        Evaluation().add({"memory": one}).add({"no memory": other})
    with pytest.raises(EvaluationError, match="not a result"):
        Evaluation().add({"memory": 3.0})  # type: ignore[dict-item]
