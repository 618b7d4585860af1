"""What a layout makes for training and for generation, against rows put together by hand."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from inlay.softtoken.batches import NO_LABEL
from inlay.softtoken.errors import LayoutError
from inlay.softtoken.layout import PromptLayout
from inlay.softtoken.tokens import SoftTokens
from tests.softtoken.local import llama, words

VOCABULARY = len(words())
WIDTH = 32
KV_HEADS, HEAD = 2, 8
MODEL = llama(VOCABULARY)
BOS, EOS = 0, 1

LAYOUTS = [
    PromptLayout(bos=bos, bos_after=bos_after, question=question, anchor=anchor, eos=eos, chat=chat)
    for bos, bos_after, question, anchor, eos, chat in product(
        (None, True, False),
        (False, True),
        ("Question: {question} ", None),
        ("Answer: ", ""),
        (True, False),
        (False, True),
    )
    if not (chat and bos is not None)
]


def name(layout: PromptLayout) -> str:
    said = {"bos": layout.bos, "after": layout.bos_after, "q": layout.question, "a": layout.anchor, "eos": layout.eos}
    return ("chat " if layout.chat else "") + " ".join(key for key, value in said.items() if value)


def word(*texts: str) -> list[int]:
    return [int(words().convert_tokens_to_ids(text)) for text in texts]


@dataclass
class Rows:
    """Rows of ragged lengths: what is read, what is asked (a list of numbers) and what is answered."""

    memory: SoftTokens
    questions: list[list[int]]
    answers: list[list[int]]

    def spelled(self) -> tuple[list[str], list[str]]:
        def text(rows: list[list[int]]) -> list[str]:
            return [" ".join(str(number) for number in row) for row in rows]

        return text(self.questions), text(self.answers)


def draw(seed: int, *, form: str = "embeddings", shortest: int = 0, rows: int = 4) -> Rows:
    """Four rows; one has the fewest slots, one the most, and behind a row's slots stands NaN."""
    rng = random.Random(seed)
    lengths = [shortest, *(rng.randint(shortest, 4) for _ in range(rows - 2)), 5]
    rng.shuffle(lengths)
    mask = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    torch.manual_seed(seed)
    if form == "embeddings":
        memory = SoftTokens(torch.randn(rows, 5, WIDTH).masked_fill(~mask[..., None], torch.nan), mask)
    else:
        tensors = [
            torch.randn(rows, KV_HEADS, 5, HEAD).masked_fill(~mask[:, None, :, None], torch.nan) for _ in range(4)
        ]
        memory = SoftTokens(None, mask, ((tensors[0], tensors[1]), (tensors[2], tensors[3])))

    def numbers() -> list[list[int]]:
        return [[rng.randint(3, 40) for _ in range(rng.randint(1, 6))] for _ in range(rows)]

    return Rows(memory, numbers(), numbers())


def ids_by_hand(layout: PromptLayout, question: list[int]) -> tuple[list[int], list[int], int]:
    """Before the memory, behind it up to the answer, and the end token, written out."""
    before = [BOS, *word("<|im_start|>", "user")] if layout.chat else [BOS] if layout.bos else []
    behind = [BOS] if layout.bos_after else []
    if layout.question:
        behind += word("Question", ":") + question
    if layout.chat:
        behind += word("<|im_end|>", "<|im_start|>", "assistant")
    behind += word("Answer", ":") if layout.anchor else []
    return before, behind, word("<|im_end|>")[0] if layout.chat else EOS


def in_form(form: str) -> list[PromptLayout]:
    return [layout for layout in LAYOUTS if form == "embeddings" or not (layout.bos or layout.chat)]


CASES = [
    pytest.param(form, layout, id=f"{form} {name(layout)}") for form in ("embeddings", "kv") for layout in in_form(form)
]


@pytest.mark.parametrize(("form", "layout"), CASES)
def test_every_row_is_the_same_prompt_in_training_and_generation_then_answer_and_one_end(
    form: str, layout: PromptLayout
) -> None:
    bound = layout.bind(words())
    table = MODEL.get_input_embeddings().weight.detach()  # type: ignore[operator]
    before, behind, _ = ids_by_hand(layout, [])
    if not behind and (form == "kv" or not before):
        rows = draw(0, form=form)
        with pytest.raises(LayoutError, match="nothing stands before the answer"):
            bound.generation(MODEL, rows.memory, rows.spelled()[0])
        if form == "kv":
            return
    shortest = 0 if before or behind else 1
    rows = draw(LAYOUTS.index(layout), form=form, shortest=shortest)
    questions, answers = rows.spelled()
    training = bound.training(MODEL, rows.memory, questions, answers)
    generation = bound.generation(MODEL, rows.memory, questions)

    slots = rows.memory.slots if form == "kv" else 0
    for batch in (training, generation):
        assert batch.attention_mask[:, :slots].sum(1).tolist() == rows.memory.mask[:, :slots].sum(1).tolist()
    for row, (question, answer) in enumerate(zip(rows.questions, rows.answers, strict=True)):
        before, behind, end = ids_by_hand(layout, question)
        used = rows.memory.mask[row]
        memory = rows.memory.embeddings[row, used] if rows.memory.embeddings is not None else torch.empty(0, WIDTH)
        supervised = [*answer, end] if layout.eos else answer
        prompt = torch.cat([table[before], memory, table[behind]])
        whole = torch.cat([prompt, table[supervised]])
        first = int(used.sum()) if form == "kv" else 0

        # Training: the row begins on the left, padding behind it.
        count = len(whole)
        assert training.attention_mask[row, slots:].tolist() == [1] * count + [0] * (training.labels.shape[1] - count)
        assert torch.equal(training.inputs_embeds[row, :count], whole)
        assert not training.inputs_embeds[row, count:].any()
        assert training.position_ids[row, :count].tolist() == list(range(first, first + count))
        expected = [NO_LABEL] * len(prompt) + supervised
        assert training.labels[row].tolist() == expected + [NO_LABEL] * (training.labels.shape[1] - count)
        assert training.labels[row].tolist().count(end) == (1 if layout.eos else 0)

        # Generation: the very prompt, padding before it.
        padding = generation.inputs_embeds.shape[1] - len(prompt)
        assert generation.attention_mask[row, slots:].tolist() == [0] * padding + [1] * len(prompt)
        assert torch.equal(generation.inputs_embeds[row, padding:], whole[: len(prompt)])
        assert not generation.inputs_embeds[row, :padding].any()
        assert generation.position_ids[row, padding:].tolist() == list(range(first, first + len(prompt)))

    assert training.answer_mask.tolist() == (training.labels != -100).tolist()
    assert training.scored_mask[:, :-1].tolist() == training.answer_mask[:, 1:].tolist()
    assert not training.scored_mask[:, -1].any()
    assert generation.max_new_tokens == layout.answer_tokens
    assert generation.stop_ids == ((word("<|im_end|>")[0], EOS) if layout.chat else (EOS,))


class Follower(nn.Module):
    """A hand-written LM that reads the token given at each position and is sure of the one that ``follows`` it."""

    def __init__(self, follows: dict[int, int]) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.eye(VOCABULARY))
        self.follows = torch.tensor([follows.get(index, 2) for index in range(VOCABULARY)])
        self.config = None

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, inputs_embeds: Tensor, labels: Tensor, **_: Any) -> Tensor:
        """Transformers' own loss, which shifts."""
        given = inputs_embeds.argmax(dim=-1)
        logits = 50 * torch.eye(VOCABULARY)[self.follows[given]]
        return ForCausalLMLoss(logits, labels, VOCABULARY)


@pytest.mark.parametrize("chat", [False, True])
def test_the_label_of_a_position_is_what_follows_the_token_given_before_it(chat: bool) -> None:
    layout = PromptLayout(question=None, anchor="9 ", chat=chat).bind(words())
    model = Follower({number: number + 1 for number in range(9, 16)} | {16: layout.stop_ids[0]})
    mask = torch.tensor([[True, True], [False, False], [True, False]])
    memory = SoftTokens(torch.randn(3, 2, VOCABULARY), mask)
    answers = ["10 11 12 13 14 15 16"] * 3
    batch = layout.training(model, memory, None, answers)
    assert model(**batch.inputs()) < 1e-6

    shifted_twice = batch.inputs() | {"labels": torch.roll(batch.labels, -1, dims=1)}
    assert model(**shifted_twice) > 10
    late = batch.inputs() | {"labels": torch.roll(batch.labels, 1, dims=1)}
    assert model(**late) > 10


def test_gradients_reach_the_slots_in_use_in_either_form() -> None:
    layout = PromptLayout(question="{question} ").bind(words())
    for form in ("embeddings", "kv"):
        rows = draw(3, form=form)
        leaf = rows.memory.embeddings if form == "embeddings" else rows.memory.kv[0][0]  # type: ignore[index]
        assert leaf is not None
        leaf.requires_grad_()
        MODEL(**layout.training(MODEL, rows.memory, *rows.spelled()).inputs()).loss.backward()
        assert leaf.grad is not None
        reached = leaf.grad.abs().sum(-1) > 0
        reached = reached if form == "embeddings" else reached.all(1)
        assert reached.tolist() == rows.memory.mask.tolist()


def test_the_cache_is_a_new_one_for_every_forward() -> None:
    layout = PromptLayout(question="{question} ").bind(words())
    rows = draw(4, form="kv")
    batch = layout.training(MODEL, rows.memory, *rows.spelled())
    with torch.no_grad():
        first = MODEL(**batch.inputs()).loss
        assert torch.equal(MODEL(**batch.inputs()).loss, first)


def test_the_layout_is_shown_as_it_is_trained_and_generated_from() -> None:
    layout = PromptLayout(bos=True, bos_after=True, question="Question: {question} ").bind(words())
    shown = layout.show("Who lives in Paris ?", ["Ada"], slots=2)
    assert [(token.position, token.piece, token.token) for token in shown.training] == [
        (0, "bos", "<s>"),
        (1, "memory", "slot 0"),
        (2, "memory", "slot 1"),
        (3, "bos after", "<s>"),
        *((4 + at, "question", text) for at, text in enumerate(["Question", ":", "Who", "lives", "in", "Paris", "?"])),
        (11, "anchor", "Answer"),
        (12, "anchor", ":"),
        (13, "answer", "Ada"),
        (14, "eos", "</s>"),
    ]
    assert shown.generation == shown.training[:13]

    memory = SoftTokens(torch.randn(1, 2, WIDTH), torch.ones(1, 2, dtype=torch.bool))
    batch = layout.training(MODEL, memory, ["Who lives in Paris ?"], [["Ada"]])
    assert [NO_LABEL if token.label is None else token.label for token in shown.training] == batch.labels[0].tolist()
    assert [token.supervised for token in shown.training] == batch.answer_mask[0].tolist()
    table = MODEL.get_input_embeddings().weight  # type: ignore[operator]
    for token in shown.training:
        if token.id is not None:
            assert torch.equal(batch.inputs_embeds[0, token.position], table[token.id])


def test_what_does_not_go_together_is_refused_with_the_fix() -> None:
    rows = draw(5)
    questions, answers = rows.spelled()
    layout = PromptLayout(question="{question} ").bind(words())
    with pytest.raises(LayoutError, match="3 questions for a memory of 4 rows"):
        layout.generation(MODEL, rows.memory, questions[:3])
    with pytest.raises(LayoutError, match="5 answers for a memory of 4 rows"):
        layout.training(MODEL, rows.memory, questions, [*answers, "7"])
    with pytest.raises(LayoutError, match=r"questions are a list, one a row; got the text 'Who\?': give \['Who\?'\]"):
        layout.generation(MODEL, rows.memory, "Who?")
    with pytest.raises(LayoutError, match="row 0: the question is missing or blank"):
        layout.generation(MODEL, rows.memory, None)
    with pytest.raises(LayoutError, match="row 2: the question is missing or blank"):
        layout.generation(MODEL, rows.memory, [*questions[:2], " ", questions[3]])
    with pytest.raises(LayoutError, match="width 8, the model's embeddings 32"):
        layout.generation(MODEL, SoftTokens(torch.zeros(4, 5, 8), rows.memory.mask), questions)
    endless = PromptLayout(question="{question} ", eos=False).bind(words())
    with pytest.raises(LayoutError, match="row 1: the answer is empty and eos is false"):
        endless.training(MODEL, rows.memory, questions, ["7", "", "7", "7"])


@pytest.mark.parametrize(("flags", "first"), [({"bos": True}, "bos"), ({"chat": True}, "template")])
def test_nothing_can_stand_before_keys_and_values(flags: dict[str, bool], first: str) -> None:
    rows = draw(6, form="kv")
    layout = PromptLayout(question="{question} ", **flags).bind(words())  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match=f"{first} comes before it; set bos: false, bos_after: true and chat: false"):
        layout.generation(MODEL, rows.memory, rows.spelled()[0])


def test_keys_and_values_that_a_forward_would_drop_are_refused() -> None:
    model, rows = llama(VOCABULARY), draw(7, form="kv")
    layout = PromptLayout(question="{question} ").bind(words())
    one_layer = SoftTokens(None, rows.memory.mask, rows.memory.kv[:1])  # type: ignore[index]
    with pytest.raises(LayoutError, match="1 layers, the model has 2"):
        layout.training(model, one_layer, *rows.spelled())
    model.train().gradient_checkpointing_enable()  # type: ignore[operator]
    with pytest.raises(LayoutError, match="lost under gradient checkpointing"):
        layout.training(model, rows.memory, *rows.spelled())
    layout.training(model.eval(), rows.memory, *rows.spelled())


@pytest.mark.parametrize("form", ["embeddings", "kv"])
def test_a_row_that_takes_more_positions_than_the_model_has_is_named_and_not_answered(form: str) -> None:
    layout = PromptLayout(bos=False, question="{question} ", anchor="Answer", answer_tokens=10).bind(words())
    limit = MODEL.config.max_position_embeddings

    def memory(slots: int) -> SoftTokens:
        mask = torch.arange(slots).expand(2, -1) < torch.tensor([[3], [slots]])
        if form == "embeddings":
            return SoftTokens(torch.zeros(2, slots, MODEL.config.hidden_size), mask)
        config = MODEL.config
        shape = (2, config.num_key_value_heads, slots, config.head_dim)
        return SoftTokens(None, mask, ((torch.zeros(shape), torch.zeros(shape)),) * config.num_hidden_layers)

    room = limit - 10 - len(layout.prompt("7").after)
    layout.generate(MODEL, memory(room), ["7", "7"], max_new_tokens=1)
    with pytest.raises(LayoutError, match=rf"row 1: {room + 1} slots, 2 tokens of prompt .* {limit + 1} positions"):
        layout.generate(MODEL, memory(room + 1), ["7", "7"])
    with pytest.raises(LayoutError, match=r"row 0: 3 slots, [0-9]+ tokens of prompt"):
        layout.generate(MODEL, memory(4), ["7 " * limit, "7"])
