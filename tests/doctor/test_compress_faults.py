"""Faults that inlay's own parts rule out, built by hand: the doctor names each, and none in a run that is sound."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from inlay.doctor import Finding
from inlay.doctor.compress import examine_compression
from inlay.doctor.compress_alignment import examine_alignment
from inlay.doctor.compress_case import CompressCase
from inlay.doctor.compress_evaluation import examine_evaluation
from inlay.doctor.compress_layout import examine_layout
from inlay.doctor.compress_overfit import Overfit, name_fault, overfit_one_batch
from inlay.doctor.compress_questions import examine_questions
from inlay.doctor.compress_slots import examine_slots
from inlay.doctor.findings import Severity
from inlay.evaluate.squad import normalize_answer
from inlay.softtoken import objectives
from inlay.softtoken.compressors import CrossAttentionConfig
from inlay.softtoken.objectives import Predictions, predictions
from tests.doctor import compress_cases as cases
from tests.evaluate import reading
from tests.softtoken.local import mistral, words

END = 1


def named(findings: Sequence[Finding]) -> dict[str, Finding]:
    return {finding.code: finding for finding in findings}


def learnt(case: CompressCase) -> Overfit:
    return overfit_one_batch(case, seconds=math.inf)


def test_a_sound_run_is_healthy_stands_beside_its_baselines_and_is_left_as_it_was() -> None:
    case = cases.reads()
    tensors = {**dict(case.task.named_parameters()), **dict(case.task.named_buffers())}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    flags = {name: tensor.requires_grad for name, tensor in tensors.items()}
    modules = [(module, type(module), module.training) for module in case.task.modules()]
    torch.manual_seed(7)
    state, python = torch.get_rng_state(), random.getstate()
    diagnosis = examine_compression(case)

    assert diagnosis.findings == []
    assert diagnosis.exit_code == 0
    assert not diagnosis.skipped
    measured = diagnosis.to_json()["examinations"]["before training"]
    scores = {one["name"]: one["exact_match"] for one in measured["methods"]}
    assert scores["full text"]["low"] > 0.8
    assert scores["no context"]["high"] < 0.2
    assert set(scores) == {
        "full text",
        "no context",
        "another context",
        "compressor, untrained 4×",
        "mean-pooled 4×",
        "first tokens 4×",
        "last tokens 4×",
        "random span 4×",
    }

    after = {**dict(case.task.named_parameters()), **dict(case.task.named_buffers())}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: tensor.requires_grad for name, tensor in after.items()} == flags
    assert all(tensor.grad is None for tensor in after.values())
    assert [(module, type(module), module.training) for module in case.task.modules()] == modules
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python


def test_labels_shifted_twice_are_named_by_batch_and_by_the_model_that_copies() -> None:
    found = examine_alignment(cases.case(cases.counting(), faulty=cases.ShiftedTwice))
    assert found.at_place[0] == 0.0
    assert found.at_place[1] == 1.0
    for losses in found.losses.values():
        assert losses[2] < 1e-6
        assert losses[1] > 10
    codes = named(found.findings())
    assert set(codes) == {"alignment.labels", "alignment.shifted_twice"}
    assert "10 12 14" in codes["alignment.shifted_twice"].says
    assert all(finding.severity is Severity.FATAL for finding in found.findings())


def test_objectives_that_shift_once_more_are_told_from_the_models_own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifting(logits: Tensor, labels: Tensor) -> Predictions:
        return predictions(logits, nn.functional.pad(labels[:, 1:], (0, 1), value=-100))

    case = cases.case(cases.counting())
    assert examine_alignment(case).findings() == []
    monkeypatch.setattr(objectives, "predictions", shifting)
    found = examine_alignment(case)
    assert found.losses["transformers' loss"][1] < 1e-6
    (fault,) = found.findings()
    assert fault.code == "alignment.shifted_twice"
    assert "inlay's objectives" in fault.says


def test_a_batch_learnt_with_labels_shifted_twice_does_not_come_back() -> None:
    found = learnt(cases.case(cases.counting(), faulty=cases.ShiftedTwice))
    assert found.learnt
    codes = named(found.findings())
    assert "overfit.shifted_twice" in codes, found.rows
    assert codes["overfit.shifted_twice"].severity is Severity.FATAL


def test_a_sound_batch_comes_back_token_for_token() -> None:
    found = learnt(cases.case(cases.counting()))
    assert found.findings() == []
    assert len(found.rows) == 4
    assert all(row.said == row.wanted and row.said[-1] == "</s>" for row in found.rows)


def test_an_end_that_is_not_taught_is_seen_in_the_batch_and_in_what_is_generated() -> None:
    case = cases.case(cases.counting(length=3), faulty=cases.EndUntaught)
    seen = named(examine_layout(case).findings())
    assert seen["layout.eos"].severity is Severity.FATAL
    assert "0 of 8 rows" in seen["layout.eos"].says
    assert "its own" not in seen["layout.eos"].says
    found = learnt(case)
    assert set(named(found.findings())) == {"overfit.endless"}, found.rows


def test_a_token_in_training_alone_is_named_with_its_place() -> None:
    case = cases.case(cases.counting(), faulty=cases.BosInTrainingAlone)
    seen = examine_layout(case)
    (fault,) = seen.findings()
    assert fault.code == "layout.only_in_training"
    assert fault.severity is Severity.FATAL
    place = seen.generation[-1].position + 1
    assert f"'<s>' stands at position {place}" in fault.says
    assert "training alone" in fault.says
    assert [token.token for token in seen.training[len(seen.generation) :]][:2] == ["<s>", "10"]
    found = learnt(case)
    assert found.learnt
    assert any(code.startswith("overfit.") for code in named(found.findings())), found.rows


def test_another_beginning_in_answering_is_named() -> None:
    (fault,) = examine_layout(cases.case(cases.counting(), faulty=cases.BosBeforeAnsweringAlone)).findings()[:1]
    assert fault.code == "layout.prefix"
    assert "holds 'slot 0' at position 0 in training and '<s>' at position 0 in answering" in fault.says


def test_a_question_that_the_prompt_lost_is_named() -> None:
    found = examine_layout(cases.case(cases.counting(), faulty=cases.CutsThePrompt))
    assert "'Who ?' is not whole" in named(found.findings())["layout.question_lost"].says
    assert examine_layout(cases.case(cases.counting())).findings() == []


@pytest.mark.parametrize("form", ["embeddings", "kv"])
def test_what_is_shown_is_what_the_layout_says_it_makes(form: str) -> None:
    layout = {"question": "{question}", "anchor": "Answer :", "bos_after": form == "kv"}
    compressor = {"kind": "crossattention", "ratios": [2], "form": form}
    case = cases.case(cases.counting(), layout=layout, compressor=compressor)
    seen = examine_layout(case)
    assert seen.findings() == []
    example = case.questions(8)[0]
    slots = sum(segment.slots for segment in case.compressor.plan(5))
    shown = case.layout.show(example.question, example.answers, slots=slots)
    expected = [(one.position, one.token, one.id) for one in shown.training]
    if form == "kv":
        expected = [one for one in expected if one[2] is not None]
        assert seen.cached_slots == slots
    assert [(one.position, one.token, one.id) for one in seen.training] == expected


def test_prompts_of_several_lengths_are_looked_at_where_a_window_slides_over_keys_and_values() -> None:
    counted = cases.counting()
    asked = [type(one)(one.id, one.context, "Who ? " * (1 + row % 3), one.answers) for row, one in enumerate(counted)]
    layout = {"question": "{question}", "anchor": "Answer :", "bos": False, "bos_after": True, "answer_tokens": 9}
    compressor = {"kind": "encoder-tokens", "ratios": [2], "form": "kv", "lora": {"r": 2}}
    case = cases.case(asked, model=mistral(len(words())), layout=layout, compressor=compressor)
    seen = examine_layout(case)
    assert (seen.rows, seen.findings()) == (8, [])


def test_a_compressor_that_attends_to_padding_is_named() -> None:
    compressor = {"kind": "crossattention", "slots": 3, "max_slots": 3}
    case = cases.case(reading.examples(60), compressor=compressor)
    assert "slots.padding" not in named(examine_slots(case).findings())
    case.task.compressor = cases.AttendsToPadding(CrossAttentionConfig(slots=3, max_slots=3), case.model)
    found = examine_slots(case)
    fault = named(found.findings())["slots.padding"]
    assert fault.severity is Severity.FATAL
    assert "attends to padding" in fault.says
    assert min(found.padding_error.values()) > 1e-3
    # A text alone, of whose batch nothing is known, would not show it.
    assert max(found.padding_error.values()) < math.inf


def test_a_question_inside_the_context_is_cut_with_it() -> None:
    inside = [
        type(one)(one.id, f"{one.context} {one.question}", one.question, one.answers) for one in reading.examples(60)
    ]
    warned = named(examine_questions(cases.case(inside)).findings())["questions.inside_context"]
    assert warned.severity is Severity.WARNING
    assert "first tokens at 4× loses 100 %" in warned.says
    assert "last tokens at 4×" in warned.says
    lost = named(examine_questions(cases.case(inside, context_tokens=8)).findings())["questions.inside_context"]
    assert lost.severity is Severity.FATAL
    assert examine_questions(cases.case(reading.examples(60))).findings() == []


def f1_of_sets(prediction: str, references: Sequence[str]) -> float:
    """What an evaluation did that took words for sets."""
    best = 0.0
    for reference in references:
        given, wanted = (set(normalize_answer(text).split()) for text in (prediction, reference))
        common = len(given & wanted)
        best = max(best, 2 * common / (len(given) + len(wanted)) if common else 0.0)
    return best


def test_f1_of_sets_is_named() -> None:
    case = cases.case(reading.examples(60), reading.examples(256))
    assert examine_evaluation(case).findings() == []
    (fault,) = examine_evaluation(case, score=f1_of_sets).findings()
    assert fault.code == "scoring.sets"
    assert "'red red lamp'" in fault.says
    assert "is 1.000 and should be 0.667" in fault.says
    (other,) = examine_evaluation(case, score=lambda said, known: float(said == known[0])).findings()
    assert other.code == "scoring.f1"


WANTED = (10, 11, 12, 13, 14, 15, 16, END)


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        (WANTED, ""),
        ((10, 12, 14, 16, 30, 31), "shifted_twice"),
        ((11, 13, 15, END), "shifted_twice"),
        ((*WANTED[:-1], 17, 18), "endless"),
        (WANTED[:4], "cut"),
        (WANTED[:-1], "cut"),
        (WANTED[1:], "first_lost"),
        ((30, 31, END), "differs"),
        ((END,), "differs"),
        ((), "cut"),
    ],
)
def test_what_comes_back_wrong_is_told_apart(said: tuple[int, ...], fault: str) -> None:
    assert name_fault(WANTED, said, [END]) == fault
