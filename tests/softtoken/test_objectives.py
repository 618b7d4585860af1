"""Objectives give the numbers that their definitions give by hand, and train what they are meant to train."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss

from inlay.fastweight.causal_lm import with_cache
from inlay.softtoken import objectives
from inlay.softtoken.compressors import EncoderPoolConfig, LoraSettings, build_compressor
from inlay.softtoken.cues import Cues, cued
from inlay.softtoken.diversity import SPREAD_FLOOR, likeness
from inlay.softtoken.errors import SoftTokenError
from inlay.softtoken.layout import PromptLayout
from inlay.softtoken.objectives import OBJECTIVES, ObjectiveInputs, Predictions, predictions, read, with_guesses
from inlay.softtoken.tokens import SoftTokens, embed_text
from tests.closeness import assert_close
from tests.softtoken.local import llama, words

QUESTIONS = ["Who lives in Paris ?", "Who ?"]
ANSWERS = [("10 11 12 13",), ("20",)]
CONTEXTS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [30, 31, 32, 33, 34, 0, 0, 0]])
MASK = torch.tensor([[True] * 8, [True] * 5 + [False] * 3])


class Verbatim:
    """A compressor that leaves the text as it is, and notes what it was given."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.masks: list[Tensor] = []

    def compress(self, ids: Tensor, mask: Tensor, *, ratio: int | None = None) -> SoftTokens:
        self.masks.append(mask)
        return embed_text(self.model, ids, mask)


def batch(model: Any, compressor: Any, cues: Cues | None = None, **changes: Any) -> ObjectiveInputs:
    inputs = ObjectiveInputs(
        model=model,
        compressor=compressor,
        layout=PromptLayout(bos=True, answer_tokens=8).bind(words()),
        cues=cues,
        contexts=CONTEXTS,
        mask=MASK,
        index=torch.tensor([0, 1]),
        questions=QUESTIONS,
        answers=ANSWERS,
    )
    return dataclasses.replace(inputs, **changes)


@pytest.fixture
def model() -> Any:
    return llama(len(words()))


def given(probabilities: list[list[float]], labels: list[int], places: list[int]) -> Predictions:
    return Predictions(torch.tensor(probabilities).log(), torch.tensor(labels), torch.tensor(places))


def test_logits_are_aligned_with_labels_as_transformers_aligns_them() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 9, 7), torch.randint(0, 7, (3, 9))
    labels[0, :4] = labels[1, 6:] = labels[2, 1:5] = -100  # row 2 has a label in the first column
    ours = predictions(logits, labels)
    assert_close(ours.cross_entropy, ForCausalLMLoss(logits, labels, vocab_size=7), 1e-6)
    assert ours.places.tolist() == [0, 1, 2, 3, 4, *[1, 2, 3, 4, 5], *[1, 2, 3, 4]]


def test_a_label_is_predicted_from_the_position_before_it() -> None:
    logits = torch.full((1, 4, 5), -100.0)
    logits[0, 1, 3] = logits[0, 2, 4] = 100.0  # position 1 says 3, position 2 says 4
    found = predictions(logits, torch.tensor([[-100, -100, 3, 4]]))
    assert found.labels.tolist() == [3, 4]
    assert float(found.cross_entropy) == 0.0


@pytest.mark.parametrize("layout", [PromptLayout(bos=True), PromptLayout(bos=False, eos=False, question=None)])
def test_reading_a_ragged_batch_gives_the_models_own_loss(model: Any, layout: PromptLayout) -> None:
    memory = embed_text(model, CONTEXTS, MASK)
    sequences = layout.bind(words()).training(model, memory, QUESTIONS, ANSWERS)
    found = read(model, sequences, "")
    assert_close(found.cross_entropy, model(**sequences.inputs()).loss, 1e-6)
    end = [1] if layout.eos else []
    assert found.labels.tolist() == [10, 11, 12, 13, *end, 20, *end]
    assert found.places.tolist() == [*range(4 + len(end)), *range(1 + len(end))]


def test_the_answers_losses_are_means_over_their_tokens() -> None:
    inputs: Any = SimpleNamespace(
        student=given([[0.5, 0.5], [0.25, 0.75], [0.125, 0.875], [0.9, 0.1]], [0, 0, 0, 1], [0, 1, 2, 0]), k=2
    )
    ln2 = math.log(2)
    assert float(objectives.answer(inputs)) == pytest.approx((6 * ln2 + math.log(10)) / 4)
    assert float(objectives.first_token(inputs)) == pytest.approx((ln2 + math.log(10)) / 2)
    assert float(objectives.first_k(inputs)) == pytest.approx((3 * ln2 + math.log(10)) / 3)


def test_distillation_is_kl_of_the_teacher_from_the_student_over_the_first_k_tokens() -> None:
    teacher = given([[0.5, 0.5], [0.8, 0.2]], [0, 0], [0, 1])
    student = given([[0.25, 0.75], [0.1, 0.9]], [0, 0], [0, 1])
    inputs: Any = SimpleNamespace(teacher=teacher, student=student, k=1, temperature=1.0)
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert float(objectives.distillation(inputs)) == pytest.approx(kl)
    # At temperature 2 probabilities become their roots, normalised: 1:1 and 1:√3.
    student_2 = 1 / (1 + math.sqrt(3))
    kl_2 = 0.5 * math.log(0.5 / student_2) + 0.5 * math.log(0.5 / (1 - student_2))
    inputs.temperature = 2.0
    assert float(objectives.distillation(inputs)) == pytest.approx(4 * kl_2)


def test_a_student_that_reads_the_full_text_has_nothing_to_learn_from_its_teacher(model: Any) -> None:
    def distilled(compress: Any) -> float:
        return objectives.distillation(batch(model, SimpleNamespace(compress=compress))).item()

    assert distilled(lambda ids, mask, ratio: embed_text(model, ids, mask)) == pytest.approx(0, abs=1e-6)
    assert distilled(lambda ids, mask, ratio: embed_text(model, ids[:, :3], mask[:, :3])) > 0.1


def test_the_teacher_is_the_base_model_whatever_adapters_are_on_and_has_no_gradient(model: Any) -> None:
    before = batch(model, Verbatim(model)).teacher.logits
    compressor = build_compressor(EncoderPoolConfig(lora=LoraSettings(r=2)), model)
    assert compressor.adapter is not None
    for parameter in compressor.adapter.tensors().values():
        torch.nn.init.normal_(parameter)
    for layer in objectives.tuner_layers(model):  # as if it were the decoder's own
        layer._active_adapter = [compressor.adapter.name]
    inputs = batch(model, compressor)
    assert torch.equal(inputs.teacher.logits, before)
    assert not inputs.teacher.logits.requires_grad
    assert not torch.allclose(batch(model, Verbatim(model)).student.logits, before)


def by_hand(model: Any, rows: list[list[Tensor]], supervised: list[list[int]]) -> Tensor:
    """Mean cross-entropy of the last tokens of each row, one unpadded row at a time."""
    losses = []
    for parts, labels in zip(rows, supervised, strict=True):
        embeds = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        logits = model(inputs_embeds=embeds.unsqueeze(0)).logits[0]
        losses += [F.cross_entropy(logits[len(embeds) - len(labels) - 1 : -1], torch.tensor(labels), reduction="none")]
    return torch.cat(losses).mean()


def test_reconstruction_reads_the_context_behind_its_slots_and_a_cue(model: Any) -> None:
    cues, table = Cues(["reconstruction"], 32, 0.3), model.get_input_embeddings()
    ours = objectives.reconstruction(batch(model, Verbatim(model), cues))
    texts = [CONTEXTS[row][MASK[row]] for row in (0, 1)]
    bos = table(torch.tensor([0]))
    rows = [[bos, table(text), cues["reconstruction"], table(text)] for text in texts]
    assert_close(ours, by_hand(model, rows, [text.tolist() for text in texts]), 1e-5)


def test_continuation_reads_the_second_half_behind_the_slots_of_the_first(model: Any) -> None:
    cues, table, compressor = Cues(["continuation"], 32, 0.3), model.get_input_embeddings(), Verbatim(model)
    ours = objectives.continuation(batch(model, compressor, cues))
    assert compressor.masks[0].sum(1).tolist() == [4, 2]
    halves = [(CONTEXTS[0, :4], CONTEXTS[0, 4:8]), (CONTEXTS[1, :2], CONTEXTS[1, 2:5])]
    bos = table(torch.tensor([0]))
    rows = [[bos, table(first), cues["continuation"], table(second)] for first, second in halves]
    assert_close(ours, by_hand(model, rows, [second.tolist() for _, second in halves]), 1e-5)


def test_a_context_of_one_token_has_nothing_to_continue(model: Any) -> None:
    one = {"contexts": CONTEXTS[:, :1], "mask": MASK[:, :1]}
    inputs = batch(model, Verbatim(model), Cues(["continuation"], 32, 0.3), **one)
    assert objectives.continuation(inputs).item() == 0


def test_a_cue_behind_keys_and_values_is_read_as_behind_the_slots_they_are_of(model: Any) -> None:
    text, cue = embed_text(model, CONTEXTS, MASK), torch.randn(32)
    assert text.embeddings is not None
    cache = DynamicCache(config=model.config)
    model(inputs_embeds=text.embeddings, attention_mask=MASK.long(), **with_cache(model, cache))
    memory = SoftTokens(None, MASK, tuple((layer.keys, layer.values) for layer in cache.layers))
    asked = CONTEXTS.flip(1), MASK.flip(1)
    expected = read(model, cued(model, [], text, cue, *asked), "")
    found = read(model, cued(model, [], memory, cue, *asked), "")
    assert found.labels.tolist() == expected.labels.tolist()
    assert_close(found.logits, expected.logits, 1e-5)
    with pytest.raises(SoftTokenError, match="bos: false"):
        cued(model, [0], memory, cue, *asked)


def test_each_cue_is_trained_by_its_own_objective_alone(model: Any) -> None:
    compressor = build_compressor(EncoderPoolConfig(lora=LoraSettings(r=2)), model)
    cues = Cues(["reconstruction", "continuation"], 32, 0.3)
    for name in ("answer", "reconstruction", "continuation"):
        cues.zero_grad()
        compressor.zero_grad()
        OBJECTIVES[name](batch(model, compressor, cues)).backward()
        trained = [cue for cue, parameter in cues.embeddings.items() if parameter.grad is not None]
        assert trained == ([] if name == "answer" else [name])
        assert compressor.projector.down.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "lora" not in name)


def test_a_guess_is_the_models_own_token_from_the_right_tokens_before_it(model: Any) -> None:
    inputs = batch(model, Verbatim(model))
    sequences = inputs.layout.training(model, inputs.memory, QUESTIONS, ANSWERS)
    guessed = with_guesses(model, sequences, 1.0)
    logits, table = model(**sequences.inputs()).logits, model.get_input_embeddings()
    expected = sequences.inputs_embeds.clone()
    for row, column in sequences.answer_mask.nonzero().tolist():
        expected[row, column] = table(logits[row, column - 1].argmax())
    assert torch.equal(guessed.inputs_embeds, expected)
    assert torch.equal(guessed.labels, sequences.labels)
    assert torch.equal(with_guesses(model, sequences, 0.0).inputs_embeds, sequences.inputs_embeds)


def test_guesses_replace_the_asked_for_share_of_inputs(model: Any) -> None:
    torch.manual_seed(0)
    inputs = batch(model, Verbatim(model), answers=[(" ".join(["3"] * 150),), (" ".join(["4"] * 150),)])
    sequences = inputs.layout.training(model, inputs.memory, QUESTIONS, inputs.answers)
    changed = (with_guesses(model, sequences, 0.25).inputs_embeds != sequences.inputs_embeds).any(-1)
    assert not changed[~sequences.answer_mask].any()
    # 302 draws at 0.25: the standard deviation is 0.025. A guess that is right changes nothing; here hardly one is.
    assert float(changed[sequences.answer_mask].float().mean()) == pytest.approx(0.25, abs=0.08)


def slots(*rows: list[list[float]]) -> SoftTokens:
    longest = max(map(len, rows))
    padded = [row + [[torch.nan] * len(row[0])] * (longest - len(row)) for row in rows]
    mask = torch.tensor([[slot < len(row) for slot in range(longest)] for row in rows])
    return SoftTokens(torch.tensor(padded), mask)


def test_likeness_is_the_worst_where_all_slots_are_one_and_nothing_where_they_are_orthogonal() -> None:
    same = slots([[1.0, 1.0], [2.0, 2.0]], [[3.0, 3.0]])
    assert float(likeness(same)) == pytest.approx(1 + 1 + SPREAD_FLOOR, abs=2e-3)
    # Slots at ±e1, ±e2: orthogonal or opposite; scaled to RMS 1 each dimension is 0 or ±√2 with std 1.
    different = slots([[1.0, 0.0], [0.0, 5.0]], [[-2.0, 0.0]])
    within, between = 0.0, (1 / math.sqrt(26)) ** 2  # the means are (1/2, 5/2) and (−2, 0)
    x = math.sqrt(2) * torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    floor = (SPREAD_FLOOR - x.std(0, correction=0)).clamp(min=0).mean()
    assert float(likeness(different)) == pytest.approx(within + between + float(floor), abs=1e-4)


def test_likeness_of_one_slot_alone_is_its_missing_spread() -> None:
    assert float(likeness(slots([[1.0, 2.0]]))) == pytest.approx(SPREAD_FLOOR, abs=2e-3)


def test_likeness_falls_under_its_gradient() -> None:
    torch.manual_seed(0)
    x = (torch.ones(4, 3, 8) + 0.01 * torch.randn(4, 3, 8)).requires_grad_()
    mask = torch.ones(4, 3, dtype=torch.bool)
    before = likeness(SoftTokens(x, mask)).item()
    for _ in range(100):
        loss = likeness(SoftTokens(x, mask))
        (gradient,) = torch.autograd.grad(loss, x)
        assert torch.isfinite(gradient).all()
        x = (x - gradient).detach().requires_grad_()
    assert before > 2.3
    assert likeness(SoftTokens(x, mask)).item() < 0.5


def test_the_loss_is_the_weighted_sum_and_computes_nothing_else(model: Any) -> None:
    made: dict[str, Any] = {
        "a": lambda _: torch.tensor(2.0, requires_grad=True),
        "b": lambda _: torch.tensor(3.0),
        "c": lambda _: pytest.fail("c has no weight"),
    }
    loss, parts = objectives.weighted_sum(batch(model, None), {"a": 0.5, "b": 2.0}, made)
    assert loss.item() == 7.0
    assert loss.requires_grad
    assert {name: float(value) for name, value in parts.items()} == {"a": 2.0, "b": 3.0}
    assert not parts["a"].requires_grad


def test_a_text_beyond_the_models_positions_is_refused_with_the_fix() -> None:
    model = llama(len(words()))
    model.config.max_position_embeddings = 15
    with pytest.raises(SoftTokenError, match=r"distillation from the full text takes \d+ positions .* has 15"):
        _ = batch(model, Verbatim(model)).teacher
