"""Collapse is a loss of information: constant slots raise the alarm, and so do colourful ones that say nothing."""

from __future__ import annotations

import io
import json
import math
import random
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from inlay.evaluate import EvaluationError, examine_collapse
from inlay.evaluate.collapse import found
from inlay.evaluate.collapse_geometry import effective_rank, geometry
from inlay.evaluate.compress_methods import circle
from inlay.report import Report, render_report
from inlay.report.console import print_section
from inlay.report.jsonfile import plain
from inlay.softtoken.compressors import Compressor, EncoderPoolConfig, LoraSettings, PoolConfig, build_compressor
from inlay.softtoken.compressors.pool import PoolCompressor
from inlay.softtoken.tokens import SoftTokens, embed_text
from tests.closeness import assert_close
from tests.evaluate import reading


class Writes(PoolCompressor):
    """Two slots a context: the embeddings of what ``tokens`` makes of it."""

    def tokens(self, context: list[int]) -> list[int]:
        raise NotImplementedError

    def compress(
        self, ids: Tensor, mask: Tensor | None = None, *, ratio: int | None = None, slots: int | None = None
    ) -> SoftTokens:
        assert mask is not None
        rows = torch.tensor([self.tokens(row[used].tolist()) for row, used in zip(ids, mask, strict=True)])
        return embed_text(self.lm.model, rows, torch.ones_like(rows))


class Collapsed(Writes):
    """The same whatever the context."""

    def tokens(self, context: list[int]) -> list[int]:
        return [12, 5]


class Colourful(Writes):
    """Other filler for every context, and never its fact."""

    def tokens(self, context: list[int]) -> list[int]:
        rng = random.Random(str(context))
        return [rng.randint(3, 9), rng.randint(3, 9)]


def plain_text(model: Any) -> Compressor[Any]:
    """A slot for each token: its embedding."""
    return build_compressor(PoolConfig(ratios=(1,), calibrate=False), model)


def nats_by_hand(context: str, question: str, answer: str) -> float:
    """Of the answer and its end, from the plain sequence of ids."""
    prompt, wanted = reading.ids(f"{context} {question} Answer :"), [*reading.ids(answer), 1]
    with torch.no_grad():
        logits = reading.reader()(input_ids=torch.tensor([prompt + wanted])).logits[0].double()
    return -float(logits[len(prompt) - 1 : -1].log_softmax(-1)[range(len(wanted)), wanted].sum())


def test_plain_text_tells_contexts_apart_and_raises_no_alarm() -> None:
    model, questions = reading.reader(), reading.examples(30)
    seen = examine_collapse(model, plain_text(model), reading.layout(), questions)
    assert not seen.alarm
    assert seen.fix == ""
    assert "tell contexts apart" in seen.says
    assert seen.over_wrong.low > 1
    assert seen.over_none.low > 1
    assert seen.candidates == 8
    assert seen.retrieval.mean > 0.6  # sixteen facts for thirty contexts: some candidates have the same one


def test_constant_slots_raise_the_alarm_at_chance_exactly() -> None:
    model, questions = reading.reader(), reading.examples(30)
    seen = examine_collapse(model, Collapsed(PoolConfig(), model), reading.layout(), questions)
    assert seen.alarm
    assert seen.over_wrong.mean == pytest.approx(0, abs=1e-5)
    assert seen.retrieval.mean == pytest.approx(1 / 8)
    assert seen.retrieval.low < 1 / 8 < seen.retrieval.high
    assert seen.slots.cosine_across == pytest.approx(1)
    assert seen.slots.rank_across == pytest.approx(1)
    assert seen.pooled.cosine_across < 0.9
    assert "nearly the same slots" in seen.fix
    assert "compressor.calibrate" in seen.fix


def test_slots_that_differ_and_say_nothing_raise_it_too() -> None:
    model, questions = reading.reader(), reading.examples(60)
    seen = examine_collapse(model, Colourful(PoolConfig(), model), reading.layout(), questions)
    assert seen.alarm
    assert seen.slots.cosine_across < 0.9
    assert "which the decoder does not read" in seen.fix


def test_slots_that_are_alike_and_say_all_do_not() -> None:
    model = reading.reader()
    questions = [
        replace(one, context=f"{'3 ' * 40}{one.answers[0].split()[0]}") for one in reading.examples(40, seed=2)
    ]
    seen = examine_collapse(model, plain_text(model), reading.layout(), questions)
    assert seen.slots.cosine_across > 0.95
    assert not seen.alarm


def test_gains_are_those_of_the_plain_sequences() -> None:
    model, questions = reading.reader(), reading.examples(5)
    seen = examine_collapse(model, plain_text(model), reading.layout(), questions, candidates=3, seed=4)
    texts = {tuple(reading.ids(one.context)): one.context for one in questions}
    order = [texts[ids] for ids in circle([*texts], seed=4)]
    right, wrong, none = [], [], []
    for one in questions:
        place = order.index(one.context)
        right.append(nats_by_hand(one.context, one.question, one.answers[0]))
        others = [order[(place + step) % len(order)] for step in (1, 2)]
        wrong.append(sum(nats_by_hand(other, one.question, one.answers[0]) for other in others) / 2)
        none.append(nats_by_hand("", one.question, one.answers[0]))
    tokens = 3 * len(questions)
    assert seen.right.mean == pytest.approx(sum(right) / tokens, rel=1e-4)
    assert seen.wrong.mean == pytest.approx(sum(wrong) / tokens, rel=1e-4)
    assert seen.none.mean == pytest.approx(sum(none) / tokens, rel=1e-4)
    assert seen.over_wrong.mean == pytest.approx((sum(wrong) - sum(right)) / tokens, rel=1e-4)


def test_those_that_are_equally_likely_share_the_point() -> None:
    nats = np.array([[1.0, 2.0, 3.0], [2.0, 1.0, 3.0], [1.0, 1.0, 3.0], [5.0, 5.0 + 1e-9, 5.0]])
    assert found(nats).tolist() == pytest.approx([1, 0, 1 / 2, 1 / 3])


def test_too_few_contexts_to_tell_are_an_alarm_that_says_so() -> None:
    model, questions = reading.reader(), reading.examples(2)
    seen = examine_collapse(model, plain_text(model), reading.layout(), questions)
    assert seen.alarm
    assert "more than these 2 contexts" in seen.fix


def test_one_context_or_one_candidate_shows_no_collapse() -> None:
    model, layout, questions = reading.reader(), reading.layout(), reading.examples(3)
    with pytest.raises(EvaluationError, match="1 different contexts"):
        examine_collapse(model, plain_text(model), layout, questions[:1] * 4)
    with pytest.raises(EvaluationError, match="1 candidates"):
        examine_collapse(model, plain_text(model), layout, questions, candidates=1)


def test_a_slot_of_keys_and_values_is_compared_by_its_values_and_the_model_is_left_alone() -> None:
    model = reading.reader()
    settings = LoraSettings(r=2, target_modules=("q_proj",))
    compressor = build_compressor(EncoderPoolConfig(form="kv", ratios=(4,), lora=settings), model)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done: list[tuple[int, int]] = []
    seen = examine_collapse(
        model, compressor, reading.layout(), reading.examples(4), progress=lambda *now: done.append(now)
    )
    assert seen.budget == "4×"
    assert done == [(16, 20), (20, 20)]  # four questions of four contexts, and of none
    assert all(module.training for module in model.modules())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_section_holds_the_verdict_the_figures_and_the_map() -> None:
    model, questions = reading.reader(), reading.examples(12)
    seen = examine_collapse(model, Collapsed(PoolConfig(), model), reading.layout(), questions)
    console, section = Console(record=True, width=160, file=io.StringIO()), seen.section()
    print_section(console, section)
    page = render_report(Report("Collapse", sections=[section]))
    for text in (console.export_text(), page):
        assert "it is not shown that the slots say anything" in text.replace("\n", " ")
        assert "right one of 8 found (chance 12.5 %)" in text
    assert "How alike contexts are written at 4×" in page
    content = json.loads(json.dumps(seen.to_json(), allow_nan=False))
    assert content["alarm"] is True
    assert len(content["slots"]["map"]) == 12
    assert content["retrieval"]["mean"] == pytest.approx(1 / 8)


# Likeness


def rows(*lengths: int, width: int = 6, seed: int = 0) -> SoftTokens:
    torch.manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return SoftTokens(torch.randn(len(lengths), max(lengths), width), mask)  # what is behind the mask is no slot


def test_cosines_are_those_of_every_pair() -> None:
    memory = rows(3, 1, 4)
    assert memory.embeddings is not None
    texts = [one[used] for one, used in zip(memory.embeddings, memory.mask, strict=True)]

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(torch.cosine_similarity(a.double(), b.double(), dim=0))

    inside = [[cosine(a, b) for a, b in combinations(text, 2)] for text in texts if len(text) > 1]
    between = [[cosine(a, b) for a, b in zip(one, other, strict=False)] for one, other in combinations(texts, 2)]
    seen = geometry(memory)
    assert seen.cosine_within == pytest.approx(sum(sum(one) / len(one) for one in inside) / 2, abs=1e-5)
    assert seen.cosine_across == pytest.approx(sum(sum(one) / len(one) for one in between) / 3, abs=1e-5)
    assert seen.map[0][2] == seen.map[2][0] == pytest.approx(sum(between[1]) / 3, abs=1e-5)
    assert [seen.map[i][i] for i in range(3)] == pytest.approx([1, 1, 1], abs=1e-5)
    assert seen.rank_within == pytest.approx(sum(effective_rank(text) for text in texts) / 3, abs=1e-5)
    assert seen.rank_across == pytest.approx(effective_rank(torch.stack([text.mean(0) for text in texts])), abs=1e-5)


def test_effective_ranks_worked_by_hand() -> None:
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(4, 3)) == pytest.approx(1, abs=1e-5)
    three_to_one = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(three_to_one)
    assert effective_rank(torch.zeros(2, 2)) == 0


def test_values_of_all_layers_make_a_slot_and_keys_do_not_count() -> None:
    mask = torch.ones(3, 2, dtype=torch.bool)
    values = [torch.randn(3, 2, 2, 4) for _ in range(2)]
    kv = tuple((torch.randn(3, 2, 2, 4), one) for one in values)
    joined = torch.stack([torch.cat([v[:, :, slot].flatten(1) for v in values], -1) for slot in range(2)], dim=1)
    assert_close(
        torch.tensor(geometry(SoftTokens(None, mask, kv)).map),
        torch.tensor(geometry(SoftTokens(joined, mask)).map),
        1e-6,
    )


def test_contexts_of_one_slot_each_have_no_cosine_within() -> None:
    seen = geometry(rows(1, 1))
    assert math.isnan(seen.cosine_within)
    assert plain(vars(seen))["cosine_within"] is None
