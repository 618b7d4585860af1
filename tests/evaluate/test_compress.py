"""A compressor stands beside what it has to beat: same questions, same layout, same decoding, and only other slots."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from inlay.data import QAExample
from inlay.evaluate import CompressEvaluation, EvaluationError, MethodScores, evaluate_compression
from inlay.evaluate.compress_measuring import answer_losses
from inlay.evaluate.compress_methods import Budget, Ids, circle, cut_to
from inlay.evaluate.squad import squad_scores
from inlay.report import Report, Table, render_report
from inlay.report.console import print_section
from inlay.softtoken.compressors import (
    Compressor,
    EncoderPoolConfig,
    LoraSettings,
    PoolConfig,
    build_compressor,
)
from inlay.softtoken.compressors.pool import PoolCompressor
from inlay.softtoken.tokens import SoftTokens, embed_text
from tests.evaluate import reading
from tests.fastweight.families import hook_counts
from tests.softtoken.local import words

CUTS = ("first tokens", "last tokens", "random span")
SMALL_LORA = LoraSettings(r=2, target_modules=("q_proj", "v_proj"))


class KeepsTheFact(PoolCompressor):
    """What a compressor should learn: its first slot is the fact's own embedding, the others are filler."""

    learns = True

    def compress(
        self, ids: Tensor, mask: Tensor | None = None, *, ratio: int | None = None, slots: int | None = None
    ) -> SoftTokens:
        assert mask is not None
        assert ratio is not None
        facts = [next((int(one) for one in row if int(one) in reading.FACTS), 3) for row in ids]
        counts = torch.tensor([[math.ceil(int(used) / ratio)] for used in mask.sum(1)])
        kept = torch.full((len(ids), int(counts.max())), 3)
        kept[:, 0] = torch.tensor(facts)
        return embed_text(self.lm.model, kept, torch.arange(kept.shape[1]) < counts)


def keeps_the_fact(model: Any, *ratios: int) -> Compressor[Any]:
    return KeepsTheFact(PoolConfig(ratios=ratios or (4,)), model)


def tables(evaluation: CompressEvaluation) -> list[Table]:
    return [item for item in evaluation.sections()[0].items if isinstance(item, Table)]


def found(evaluation: CompressEvaluation, name: str, budget: str = "") -> MethodScores:
    method = evaluation.find(name, budget)
    assert method is not None, f"{name} {budget} is not in {[one.label for one in evaluation.methods]}"
    return method


@pytest.fixture(scope="module")
def evaluation() -> CompressEvaluation:
    model = reading.reader()
    return evaluate_compression(
        model, keeps_the_fact(model, 4, 7), reading.layout(), reading.examples(24), batch_size=9
    )


# What the figures say


def test_full_text_and_a_compressor_that_keeps_the_fact_answer_and_no_context_guesses(
    evaluation: CompressEvaluation,
) -> None:
    for name, budget in (("full text", ""), ("soft tokens", "4×"), ("soft tokens", "7×")):
        method = found(evaluation, name, budget)
        assert method.scores.exact_match == method.scores.f1 == method.first_token.mean == 1
        assert method.nll.mean < 0.1
    for name in ("no context", "another context"):
        method = found(evaluation, name)
        assert method.scores.exact_match < 0.3
        assert method.nll.mean > 1
        assert method.scores.f1 > method.scores.exact_match + 0.3  # every answer ends in Ada


def test_cut_text_answers_where_the_fact_was_not_cut_off() -> None:
    model, layout = reading.reader(), reading.layout()
    for place, right in ((0, "first tokens"), (11, "last tokens")):
        questions = reading.examples(12, length=12, place=place)
        result = evaluate_compression(model, keeps_the_fact(model), layout, questions)
        for cut in CUTS[:2]:
            expected = 1.0 if cut == right else 0.0
            assert found(result, cut, "4×").scores.exact_match == pytest.approx(expected, abs=0.2)


def test_the_question_is_kept_however_much_is_cut() -> None:
    """Bob's answer is the same whatever the context: only a lost question could change it."""
    model = reading.reader()
    result = evaluate_compression(
        model, keeps_the_fact(model, 14), reading.layout(), reading.examples(12, about_bob=True)
    )
    for cut in CUTS:
        method = found(result, cut, "14×")
        assert method.slots == 1
        assert method.scores.exact_match == 1


def test_answers_and_likelihoods_are_those_of_the_plain_sequence(evaluation: CompressEvaluation) -> None:
    """Full text, as ids, without a layout: context, question, anchor, answer, end."""
    model, full = reading.reader(), found(evaluation, "full text")
    for number, one in enumerate(reading.examples(24)[:6]):
        prompt = reading.ids(f"{one.context} {one.question} Answer :")
        answer = [*reading.ids(one.answers[0]), 1]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
            given = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=1)
        scored = logits[len(prompt) - 1 : -1].log_softmax(-1)
        assert full.nats[number] == pytest.approx(-float(sum(scored[i, t] for i, t in enumerate(answer))), abs=1e-5)
        assert full.tokens[number] == 3
        text = words().decode(given[0, len(prompt) :], skip_special_tokens=True)
        assert full.scores.exact_matches[number] == (text == one.answers[0])


def test_loss_per_token_and_first_token_are_means_over_the_questions(evaluation: CompressEvaluation) -> None:
    for method in evaluation.methods:
        assert method.nll.mean == pytest.approx(sum(method.nats) / sum(method.tokens))
        assert method.to_json()["bits_per_token"]["mean"] == pytest.approx(method.nll.mean / math.log(2))
    none = found(evaluation, "no context")
    prompt = torch.tensor([reading.ids("Who ? Answer :")])
    with torch.no_grad():
        guess = int(reading.reader()(input_ids=prompt).logits[0, -1].argmax())
    right = [int(one.answers[0].split()[0]) == guess for one in reading.examples(24)]
    assert none.first_token.mean == pytest.approx(sum(right) / 24)


def test_the_losses_of_a_batch_are_those_of_its_rows_alone() -> None:
    model, layout, questions = reading.reader(), reading.layout(), reading.examples(5)
    texts = [torch.tensor([reading.ids(one.context)]) for one in questions]
    alone = [embed_text(model, text, torch.ones_like(text)) for text in texts]
    answers = [one.answers for one in questions]
    answers[2] = ("10 11 12 13 Ada",)
    batch = answer_losses(model, layout, SoftTokens.cat(alone), [one.question for one in questions], answers)
    for row, memory in enumerate(alone):
        single = answer_losses(model, layout, memory, [questions[row].question], [answers[row]])
        assert batch.nats[row] == pytest.approx(single.nats[0], rel=1e-4)
        assert (batch.tokens[row], batch.first_right[row]) == (single.tokens[0], single.first_right[0])
    assert batch.tokens == [3, 3, 6, 3, 3]


def test_an_untaught_compressor_scores_as_the_untrained_one() -> None:
    model, config = reading.reader(), EncoderPoolConfig(ratios=(4,), lora=SMALL_LORA)
    torch.manual_seed(5)
    compressor = build_compressor(config, model)
    result = evaluate_compression(model, compressor, reading.layout(), reading.examples(6), seed=5)
    soft, untrained, pooled = (found(result, n, "4×") for n in ("soft tokens", "untrained", "mean-pooled"))
    assert soft.nats == pytest.approx(untrained.nats, rel=1e-5)
    assert soft.nats != pytest.approx(pooled.nats, rel=1e-2)


def test_mean_pooled_slots_are_means_of_token_embeddings_at_their_scale(evaluation: CompressEvaluation) -> None:
    model, layout, one = reading.reader(), reading.layout(), reading.examples(24)[0]
    table = model.get_input_embeddings().weight.detach()
    runs = torch.split(table[torch.tensor(reading.ids(one.context))], 4)
    means = torch.stack([run.mean(0) for run in runs])
    scale = table.square().mean().sqrt() / means.square().mean(-1, keepdim=True).sqrt()
    memory = SoftTokens((means * scale).unsqueeze(0), torch.ones(1, len(runs), dtype=torch.bool))
    by_hand = answer_losses(model, layout, memory, [one.question], [one.answers])
    assert found(evaluation, "mean-pooled", "4×").nats[0] == pytest.approx(by_hand.nats[0], rel=1e-4)


def test_saying_that_there_is_no_answer_is_right_where_there_is_none() -> None:
    model = reading.reader()
    layout = reading.layout(unanswerable="40 Ada")
    questions = [replace(one, answers=()) for one in reading.examples(4, about_bob=True)] + reading.examples(4)
    full = found(evaluate_compression(model, keeps_the_fact(model), layout, questions), "full text").scores
    assert full.unanswerable is not None
    assert full.unanswerable.exact_match.mean == 1
    assert full.exact_match == 1


def test_questions_with_and_without_an_answer_are_told_apart_in_the_table() -> None:
    # Who calls every question unanswerable is right on all of these: overall half of them, and no answer is right.
    references, contexts = [("yes",)] * 6 + [()] * 6, range(12)
    silent = squad_scores([""] * 12, references, contexts=contexts)
    one = replace(hand_made("soft tokens", "4×", [False] * 12, 12), scores=silent)
    evaluated = CompressEvaluation(12, 12, 16.0, 8, (one,))
    overall, split, _ = tables(evaluated)
    assert [str(cell).split()[0] for cell in overall.rows[0][1:3]] == ["50.0", "50.0"]
    assert split.columns[1:] == ["answerable: exact match", "F1", "unanswerable: right"]
    assert [str(cell).split()[0] for cell in split.rows[0][1:]] == ["0.0", "0.0", "100.0"]
    assert split.caption.startswith("6 of the questions")
    assert len(tables(hand_made_evaluation(0.5))) == 2  # all of these have an answer


# What it costs


def test_bytes_are_those_counted_by_hand(evaluation: CompressEvaluation) -> None:
    lengths = [len(one.context.split()) for one in reading.examples(24)]
    cut = sum(math.ceil(length / 4) for length in lengths) / 24
    expected = {"full text": sum(lengths) / 24, "no context": 0.0} | dict.fromkeys(("soft tokens", *CUTS), cut)
    for name, slots in expected.items():
        method = found(evaluation, name, "" if name in ("full text", "no context") else "4×")
        assert method.slots == pytest.approx(slots)
        assert method.state_bytes == pytest.approx(slots * reading.SLOT)
        assert method.cache_bytes == pytest.approx(slots * reading.CACHED)
    assert found(evaluation, "soft tokens", "4×").ratio == pytest.approx(sum(lengths) / 24 / cut)


def test_keys_and_values_cost_what_they_take_in_the_cache() -> None:
    model = reading.reader()
    compressor = build_compressor(EncoderPoolConfig(form="kv", ratios=(4,), lora=SMALL_LORA), model)
    result = evaluate_compression(model, compressor, reading.layout(bos=False), reading.examples(4))
    for name in ("soft tokens", "untrained", "mean-pooled"):
        method = found(result, name, "4×")
        assert method.state_bytes == method.cache_bytes == pytest.approx(method.slots * reading.CACHED)


def test_methods_take_turns_and_another_begins_each_batch() -> None:
    model = reading.reader()
    order: list[int] = []

    class Watched(KeepsTheFact):
        def compress(self, *args: Any, ratio: int | None = None, **kwargs: Any) -> SoftTokens:
            order.append(ratio or 0)
            return super().compress(*args, ratio=ratio, **kwargs)

    seen: list[tuple[int, int]] = []
    result = evaluate_compression(
        model,
        Watched(PoolConfig(ratios=(2, 4, 8)), model),
        reading.layout(),
        reading.examples(6),
        batch_size=2,
        baselines=False,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert order == [2, 4, 8, 2, 4, 8, 4, 8, 2, 8, 2, 4]  # the first three are not counted
    assert seen == [(done, 18) for done in range(2, 19, 2)]
    assert [method.name for method in result.methods] == ["soft tokens"] * 3
    for method in result.methods:
        assert min(method.write_seconds, method.prefill_seconds, method.decode_seconds) > 0
        assert method.decode_steps == 3  # two tokens and the end


# What is cut, and who gets whose context


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 40), st.integers(0, 5))
def test_a_cut_is_so_many_neighbouring_tokens(context: list[int], slots: int, seed: int) -> None:
    whole, count = tuple(context), min(slots, len(context))
    first, last, span = (cut_to(kind, lambda _: slots, seed)(whole) for kind in CUTS)
    assert first == whole[:count]
    assert last == whole[-count:]
    assert span in [whole[start : start + count] for start in range(len(whole) - count + 1)]
    assert cut_to("random span", lambda _: slots, seed)(whole) == span


def test_random_spans_begin_everywhere_and_at_another_place_for_another_seed() -> None:
    contexts = [(number, *range(7)) for number in range(200)]
    starts = [[cut_to("random span", lambda _: 3, seed)(one) for one in contexts] for seed in (0, 1)]
    assert {context.index(span[0]) for context, span in zip(contexts, starts[0], strict=True)} >= set(range(1, 6))
    assert starts[0] != starts[1]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=20), st.integers(0, 9))
def test_in_a_circle_of_contexts_nobody_is_next_to_an_equal_one(contexts: list[Ids], seed: int) -> None:
    order = circle(contexts, seed)
    assert sorted(order) == sorted(set(contexts))
    if len(order) > 1:
        assert all(one != other for one, other in zip(order, order[1:] + order[:1], strict=True))


def test_another_context_is_never_the_questions_own() -> None:
    """Two contexts in many words: whoever gets the wrong one answers with the other's fact."""
    model = reading.reader()
    contexts = [f"{filler} {fact}" for filler, fact in (("3 4 5 6 7", 12), ("8 9 3 4 5", 20))]
    questions = [
        QAExample(str(number), contexts[number % 2], "Who ?", (f"{(12, 20)[number % 2]} Ada",)) for number in range(6)
    ]
    swapped = [replace(one, answers=(f"{(20, 12)[number % 2]} Ada",)) for number, one in enumerate(questions)]
    for asked, expected in ((questions, 0.0), (swapped, 1.0)):
        result = evaluate_compression(model, keeps_the_fact(model), reading.layout(), asked, batch_size=4)
        assert found(result, "another context").scores.exact_match == expected


# What is left of it


def state(model: Any) -> dict[str, Any]:
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "modes": [module.training for module in model.modules()],
        "flags": [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        "adapters": sorted(getattr(model, "peft_config", {})),
        "hooks": hook_counts(model),
    }


def assert_same(model: Any, before: dict[str, Any]) -> None:
    after = state(model)
    weights, weights_before = after.pop("weights"), before.pop("weights")
    assert after == before
    assert weights.keys() == weights_before.keys()
    assert all(torch.equal(weights[name], weights_before[name]) for name in weights)


def with_decoder_lora(model: Any) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("wrap", [lambda model: model, with_decoder_lora], ids=["frozen", "decoder LoRA"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(wrap: Callable[[Any], Any], fails: bool) -> None:
    model = wrap(reading.reader())
    settings = LoraSettings(r=2, target_modules=("q_proj", "v_proj"), lora_dropout=0.5)
    compressor = build_compressor(EncoderPoolConfig(ratios=(4,), lora=settings), model)
    model.train()
    next(model.parameters()).requires_grad_(True)
    before, fingerprint = state(model), compressor.fingerprint()

    def progress(done: int, total: int) -> None:
        if fails and done > total / 2:
            raise KeyboardInterrupt

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    try:
        evaluate_compression(model, compressor, reading.layout(), reading.examples(4), batch_size=2, progress=progress)
    except KeyboardInterrupt:
        assert fails
    assert torch.equal(torch.rand(3), expected)
    assert compressor.fingerprint() == fingerprint
    assert_same(model, before)


# What can be said of it


def test_results_say_the_same_in_json_terminal_and_report(evaluation: CompressEvaluation) -> None:
    content = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    assert [one["method"] for one in content["methods"]][:4] == [
        "full text", "no context", "another context", "soft tokens",
    ]  # fmt: skip
    assert content["methods"][1]["ratio"] is None
    assert content["methods"][0]["exact_match"]["mean"] == 1.0
    assert content["gain_over_best_cut"]["4×"]["f1"]["low"] > 0

    console, sections = Console(record=True, width=160, file=io.StringIO()), evaluation.sections()
    for section in sections:
        print_section(console, section)
    page = render_report(Report("Compression", sections=sections))
    for text in (console.export_text(), page):
        assert "At 4× soft tokens have exact match 100.0 %: 100.0 % of full text" in text
        assert "random span" in text
        assert f"{found(evaluation, 'full text').state_bytes:,.0f}" in text
    assert "F1 against the ratio of compression" in page
    assert evaluation.warnings() == []


def hand_made(name: str, budget: str, right: Sequence[bool], questions: int) -> MethodScores:
    """A method that answers these questions right, of as many contexts."""
    references = [("yes",)] * questions
    scores = squad_scores(["yes" if one else "no" for one in right], references, contexts=range(questions))
    nothing = scores.overall.f1
    times = (0.0, 0.0, 0.0, 1.0)
    return MethodScores(name, budget, scores, nothing, nothing, 1.0, 4.0, 1.0, 1.0, *times, (1.0,), (1,))


def hand_made_evaluation(gap: float, questions: int = 40) -> CompressEvaluation:
    rng = random.Random(0)
    cut = [rng.random() < 0.4 for _ in range(questions)]
    soft = [one or rng.random() < gap for one in cut]
    methods = [
        hand_made("full text", "", [True] * questions, questions),
        hand_made("no context", "", [False] * questions, questions),
        hand_made("soft tokens", "4×", soft, questions),
        hand_made("first tokens", "4×", cut, questions),
    ]
    return CompressEvaluation(questions, questions, 16.0, 8, tuple(methods))


def test_a_difference_within_its_interval_is_called_that() -> None:
    clear, small = hand_made_evaluation(0.8), hand_made_evaluation(0.06)
    assert clear.warnings() == []
    (warning,) = small.warnings()
    gain = small.gain("4×")
    assert gain is not None
    assert gain.f1.low <= 0 < gain.f1.mean
    assert "cannot tell from 0" in warning
    assert f"{100 * gain.f1.mean:+.1f}" in warning
    assert "about 40 contexts" in warning


def test_a_decoder_that_does_not_read_its_context_judges_no_compressor() -> None:
    whole = hand_made_evaluation(0.8)
    none = found(whole, "no context")
    blind = replace(whole, methods=(replace(none, name="full text"), *whole.methods[1:]))
    assert "does not read its answers from the context" in blind.warnings()[0]


def test_contexts_too_long_for_the_decoder_leave_full_text_out_and_say_so() -> None:
    model = reading.reader()
    long = reading.examples(2, length=250)
    result = evaluate_compression(model, keeps_the_fact(model), reading.layout(), long)
    assert result.find("full text") is None
    assert "Full text was not measured" in result.notes[0]
    cut = evaluate_compression(model, keeps_the_fact(model), reading.layout(), long, context_tokens=12)
    assert found(cut, "full text").slots == 12


def test_what_cannot_be_evaluated_is_refused() -> None:
    model, layout, questions = reading.reader(), reading.layout(), reading.examples(2)
    with pytest.raises(EvaluationError, match=r"no ratio 16: its ratios are \[4\]"):
        evaluate_compression(model, keeps_the_fact(model), layout, questions, ratios=[4, 16])
    with pytest.raises(EvaluationError, match="'empty' has no token"):
        evaluate_compression(model, keeps_the_fact(model), layout, [replace(questions[0], id="empty", context=" ")])
    with pytest.raises(EvaluationError, match="nothing to evaluate: 0 questions"):
        evaluate_compression(model, keeps_the_fact(model), layout, [])


def test_one_context_alone_has_no_other_and_no_interval() -> None:
    model = reading.reader()
    result = evaluate_compression(model, keeps_the_fact(model), reading.layout(), reading.examples(1) * 2)
    assert result.find("another context") is None
    assert "Another context was not measured" in result.notes[0]
    assert math.isnan(found(result, "full text").nll.low)
    assert result.to_json()["methods"][0]["nats_per_token"]["low"] is None
    assert "about 1 different contexts, too few" in result.warnings()[0]
    assert len(tables(result)) == 2


def test_a_compressor_of_fixed_slots_is_measured_at_them() -> None:
    model = reading.reader()
    compressor = build_compressor(PoolConfig(ratios=(), slots=3), model)
    result = evaluate_compression(model, compressor, reading.layout(), reading.examples(4))
    assert Budget(slots=3).label == "3 slots"
    for name in ("soft tokens", *CUTS):
        assert found(result, name, "3 slots").slots == 3
    assert result.find("untrained", "3 slots") is None  # pooling has nothing to train
