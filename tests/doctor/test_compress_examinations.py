"""What is counted and measured before a compressor is trained, against figures worked by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from inlay.data import QAExample
from inlay.doctor.compress import Refused, examine_compression
from inlay.doctor.compress_baselines import LEAST, examine_baselines
from inlay.doctor.compress_baselines import why_not as why_no_baselines
from inlay.doctor.compress_case import CompressCase, ReadBack
from inlay.doctor.compress_evaluation import examine_evaluation
from inlay.doctor.compress_layout import SeenToken, aligned
from inlay.doctor.compress_lengths import examine_lengths
from inlay.doctor.compress_objectives import examine_objectives
from inlay.doctor.compress_overfit import overfit_one_batch
from inlay.doctor.compress_overfit import why_not as why_no_overfit
from inlay.doctor.compress_questions import examine_questions
from inlay.doctor.findings import Finding, Severity
from tests.doctor import compress_cases as cases
from tests.evaluate import reading
from tests.softtoken.local import llama, words


def answers(lengths: Sequence[int]) -> list[QAExample]:
    """One question per length, about a context of ten numbers whose third is stated as the answer begins."""
    return [
        QAExample(str(row), f"3 4 {10 + row % 20} 5 6 7 8 9 3 {4 + row % 5}", "Who ?", (" ".join(["12"] * length),))
        for row, length in enumerate(lengths)
    ]


def codes(findings: Sequence[Finding]) -> dict[str, Finding]:
    return {finding.code: finding for finding in findings}


def test_lengths_are_those_of_the_answers_as_taught() -> None:
    # 90 answers of 2 tokens, 6 of 13, 3 of 33 and one of 65: beyond 12, 32 and 64 are 10, 4 and 1 in a hundred.
    case = cases.case(answers([2] * 90 + [13] * 6 + [33] * 3 + [65]), answers([2] * 10))
    found = examine_lengths(case)
    training, evaluation = found.splits
    assert [training.answers.beyond(limit) for limit in (12, 32, 64)] == [0.10, 0.04, 0.01]
    assert (found.for_95, found.for_99) == (14, 34)  # the end token has a place too
    assert training.answers_cut == 10
    assert evaluation.answers_cut == 0
    assert [sample.tokens[-1] for sample in found.samples] == ["</s>"] * 3
    assert [len(sample.tokens) for sample in found.samples] == [3, 3, 66]
    (cut,) = found.findings()
    assert cut.code == "lengths.answers_cut"
    assert cut.severity is Severity.WARNING
    assert "10 % of the training answers are longer than answer_tokens: 9" in cut.says
    assert cut.fix == "layout.answer_tokens: 34 holds 99 % (14 holds 95 %)"


def test_answers_that_fill_the_budget_with_their_end_are_not_cut() -> None:
    assert examine_lengths(cases.case(answers([8] * 20))).findings() == []
    (cut,) = examine_lengths(cases.case(answers([9] * 20))).findings()
    assert cut.severity is Severity.FATAL
    assert "100 %" in cut.says


def test_what_a_limit_cuts_off_is_counted_by_the_answers_that_are_gone() -> None:
    examples = [
        QAExample(str(row), " ".join([*["3"] * (row % 10), "25", *["4"] * (9 - row % 10)]), "Who ?", ("25",))
        for row in range(40)
    ]
    found = examine_lengths(cases.case(examples, context_tokens=7))
    training = found.splits[0]
    assert (training.contexts_cut, training.contexts.texts) == (10, 10)
    assert (training.stated, training.lost) == (40, 12)  # the fact stands at places 7, 8 and 9 in three of ten
    lost = codes(found.findings())["lengths.answers_lost"]
    assert "30 % of the answers" in lost.says
    assert lost.severity is Severity.WARNING
    assert examine_lengths(cases.case(examples)).findings() == []


def test_what_the_tokenizer_does_not_know_is_named() -> None:
    # words() knows the numbers to 40, and reads 97 and 98 alike.
    known = answers([2] * 60)
    strange = [QAExample(f"x{row}", f"3 4 {11 + row} 98 7", "Who ?", ("97",)) for row in range(40)]
    found = examine_lengths(cases.case([*known, *strange], known))
    assert found.splits[0].unknown == {"answers": 40, "questions": 0, "contexts": 40}
    assert found.splits[1].unknown == {"answers": 0, "questions": 0, "contexts": 0}
    (fault,) = found.findings()
    assert (fault.code, fault.severity) == ("lengths.unknown_words", Severity.WARNING)
    assert "'97'" in fault.says
    assert "in 40 % of the training answers" in fault.says
    assert "cannot come back" in fault.says
    (fatal,) = examine_lengths(cases.case(strange, known)).findings()
    assert fatal.severity is Severity.FATAL
    asked = [QAExample(one.id, one.context, "Which ?", one.answers) for one in known]
    (warned,) = examine_lengths(cases.case(asked)).findings()
    assert warned.severity is Severity.WARNING
    assert "'Which'" in warned.says
    assert "come back" not in warned.says


def test_a_context_that_the_compressor_cannot_read_is_named() -> None:
    compressor = {"kind": "crossattention", "ratios": [4], "max_slots": 2}
    found = examine_lengths(cases.case(answers([2] * 8), compressor=compressor))
    (fault,) = found.findings()
    assert fault.code == "lengths.context_too_long"
    assert fault.severity is Severity.FATAL
    assert "needs 3 slots" in fault.says


def test_a_row_longer_than_the_decoder_is_named() -> None:
    layout = {"question": "{question}", "anchor": "Answer :", "answer_tokens": 250}
    (fault,) = examine_lengths(cases.case(answers([2] * 8), layout=layout)).findings()
    assert fault.code == "lengths.too_long"
    # 3 slots, "Who ? Answer :", and 250 tokens of an answer
    assert "257 positions and the decoder has 256" in fault.says


def test_what_refuses_to_run_is_a_finding_and_ends_nothing() -> None:
    compressor = {"kind": "crossattention", "ratios": [4], "max_slots": 2}
    diagnosis = examine_compression(cases.case(answers([2] * 8), compressor=compressor))
    refused = [one for one in diagnosis.examinations.values() if isinstance(one, Refused)]
    assert {one.name for one in refused} >= {"layout", "slots", "objectives"}
    assert diagnosis.exit_code == 2
    assert "evaluation" in diagnosis.examinations


def test_questions_left_out_leave_one_answer_for_each_context() -> None:
    told = [
        QAExample(f"{row} {name}", f"{3 + row} 4 5", f"{name} ?", (answer,))
        for row in range(6)
        for name, answer in (("Who", "12"), ("Bob", "13"), ("Ada", "13"))
    ]
    found = examine_questions(cases.case(told, layout={"question": None, "anchor": "Answer :"}))
    assert found.contradicted == 18
    assert found.best == pytest.approx(2 / 3)  # "13" is right for two of three
    assert codes(found.findings())["questions.left_out"].severity is Severity.FATAL
    assert examine_questions(cases.case(told)).findings() == []
    alike = [QAExample(one.id, one.context, one.question, ("12",)) for one in told]
    assert examine_questions(cases.case(alike, layout={"question": None, "anchor": "Answer :"})).findings() == []


def test_how_many_questions_a_difference_takes() -> None:
    examples = reading.examples(96)
    found = examine_evaluation(cases.case(examples, examples, evaluate={"examples": 50}))
    assert found.questions == 50
    assert found.half_width == pytest.approx(1.96 * math.sqrt(0.25 / 50), abs=1e-4)
    assert found.difference == pytest.approx(1.96 * math.sqrt(0.5 / 50), abs=1e-4)
    assert found.needed == 193  # ceil(2 · (1.96 · 0.5 / 0.1)²)
    (fault,) = found.findings()
    assert fault.code == "evaluation.too_small"
    assert "evaluate.examples: 193, and more evaluation data" in fault.fix
    assert "there are 96 questions" in fault.fix


def test_a_decoder_that_does_not_read_cannot_judge() -> None:
    held_out = reading.examples(256, seed=2)
    case = cases.case(held_out, held_out, model=llama(len(words())))
    found = examine_baselines(case, seconds=0.0)
    fault = codes(found.findings())["baselines.decoder_does_not_read"]
    assert fault.severity is Severity.FATAL
    assert "decoder.name_or_path" in fault.fix
    # Nothing beside it: what it loses by a cut says nothing, and no claim is made of it.
    assert found.gap is None
    assert [check.title for check in found.checks] == ["the decoder reads its answers from the context"]
    assert examine_evaluation(case, found).needed == 193


def test_text_that_loses_nothing_when_cut_leaves_nothing_to_gain() -> None:
    held_out = reading.examples(32, seed=2)
    compressor = {"kind": "encoder-pool", "ratios": [1], "lora": {"r": 8}}
    case = cases.case(held_out, held_out, model=reading.reader(), compressor=compressor)
    found = examine_baselines(case, seconds=0.0)
    assert found.questions == LEAST
    assert found.gap == 0.0
    assert set(codes(found.findings())) == {"baselines.nothing_to_gain"}
    # Half of that gap is no claim; the least that is worth showing takes more questions than there are.
    assert examine_evaluation(case, found).needed == 4802


def test_what_a_machine_is_too_small_for_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.case(answers([2] * 8))
    assert why_no_overfit(case) == ""
    assert "not trained yet" in why_no_baselines(case)
    monkeypatch.setattr(CompressCase, "parameters", 7_000_000_000)
    assert "7,000 million parameters are too many to train on a CPU" in why_no_overfit(case)
    trained = CompressCase(case.task, case.train, case.eval)
    assert "answer too slowly on a CPU" in why_no_baselines(trained)


def test_time_that_is_up_is_no_fault_of_the_recipe_and_steps_that_are_up_may_be() -> None:
    case = cases.case(answers([2] * 40))
    (finding,) = overfit_one_batch(case, seconds=0.0).findings()
    assert (finding.code, finding.severity) == ("overfit.out_of_time", Severity.HEALTHY)
    done: list[tuple[int, int]] = []
    found = overfit_one_batch(case, steps=2, seconds=math.inf, progress=lambda *at: done.append(at))
    (finding,) = found.findings()
    assert (finding.code, finding.severity) == ("overfit.not_learnt", Severity.WARNING)
    assert done == [(1, 2), (2, 2)]


def test_losses_and_gradients_are_those_of_the_task() -> None:
    objectives = {"answer": 1.0, "first_token": 0.5, "diversity": 0.1}
    case = cases.case(answers([2] * 40), objectives=objectives)
    found = examine_objectives(case)
    batch = case.batch(case.questions(4))
    for part in found.parts:
        case.task.zero_grad()
        loss, _ = case.task(**batch, weights={part.name: 1.0}, ratio=4)
        loss.backward()
        squares = [p.grad.double().square().sum() for p in case.task.parameters() if p.grad is not None]
        assert part.loss == pytest.approx(float(loss.detach()), rel=1e-5)
        assert part.gradient == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-4)
    # "answer" gives a first token a third of its weight (two tokens and their end), "first_token" all of its half.
    assert found.first_share == pytest.approx((1.0 / 3 + 0.5) / 1.5)
    assert found.findings() == []


def test_an_objective_without_an_answer_is_named() -> None:
    case = cases.case(answers([2] * 40), objectives={"answer": 0.0, "diversity": 1.0})
    fault = codes(examine_objectives(case).findings())["objectives.no_answer"]
    assert fault.severity is Severity.FATAL
    assert fault.fix == "objectives.answer: 1.0"


def test_nothing_that_is_trained_is_named() -> None:
    case = cases.case(answers([2] * 40))
    for parameter in case.compressor.trainable_parameters():
        parameter.requires_grad_(False)
    case.task.cues.embeddings["unused"] = torch.nn.Parameter(torch.zeros(32))
    fault = codes(examine_objectives(case).findings())["objectives.no_gradient"]
    assert fault.severity is Severity.FATAL


def test_embeddings_are_read_back_as_their_tokens() -> None:
    table = torch.nn.Embedding.from_pretrained(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))
    ids = torch.tensor([3, 49, 0, 7])
    assert ReadBack(table)(table(ids)) == [3, 49, 0, 7]
    shared = table(ids).clone()
    shared[1, 7] += 1e-3  # the first column alone does not make a token
    assert ReadBack(table)(shared) == [3, None, 0, 7]


def test_both_sequences_stand_in_columns() -> None:
    memory = [SeenToken(at, f"slot {at}", None) for at in range(5)]
    training = [*memory, SeenToken(5, "Answer", 9), SeenToken(6, "bells", 10, "bells"), SeenToken(7, "</s>", 1, "</s>")]
    assert aligned(training, training[:6], width=74).splitlines() == [
        "position   0       1       …         4       5       6      7",
        "training   slot 0  slot 1  (2 more)  slot 4  Answer  bells  </s>",
        "label      ·       ·                 ·       ·       bells  </s>",
        "answering  slot 0  slot 1  (2 more)  slot 4  Answer  →",
    ]
    assert max(map(len, aligned(training, training[:6], width=40).splitlines())) <= 40
