"""Answers: generated back as they were learnt, alone or in a batch, from embeddings or from keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from inlay.fastweight.causal_lm import cache_among, with_cache
from inlay.softtoken.compressors import CompressorError
from inlay.softtoken.errors import LayoutError
from inlay.softtoken.layout import PromptLayout
from inlay.softtoken.tokens import SoftTokens, embed_text
from tests.closeness import assert_close
from tests.softtoken.local import byte_level, gpt2, llama, mistral, words
from tests.softtoken.stored import a_run, texts

ANSWER = "10 11 12 13 14 15 16"
WIDTH = 32


DECODERS = pytest.mark.parametrize("decoder", [llama, gpt2, mistral])


def slots(lengths: list[int], seed: int = 0) -> SoftTokens:
    torch.manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return SoftTokens(torch.randn(len(lengths), max(lengths), WIDTH) * 0.3, mask)


def overfit(model: nn.Module, inputs: Callable[[], dict[str, Any]], steps: int = 50) -> float:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = model(**inputs()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("chat", [False, True])
def test_an_overfitted_answer_comes_back_whole_and_ends(chat: bool) -> None:
    layout = PromptLayout(question="{question} ", chat=chat, answer_tokens=20).bind(words())
    model, memory = llama(len(words()), spread=0.02), slots([3, 1])
    questions, answers = ["Who ?", "Who lives in Paris ?"], [ANSWER, "Ada"]
    assert overfit(model, lambda: layout.training(model, memory, questions, answers).inputs()) < 0.01
    assert layout.answer(model, memory, questions) == answers

    batch = layout.generation(model, memory, questions)
    new = model.generate(**batch.inputs(), do_sample=False)  # type: ignore[operator]
    assert new.shape[1] == 8 < batch.max_new_tokens  # new tokens alone, and the end after seven of them
    assert new[0].tolist() == layout.answer_ids(ANSWER)


def test_the_same_answer_with_labels_shifted_by_hand_comes_back_with_every_second_token_missing() -> None:
    """Seed 003's training: labels shifted once by hand, once more in the model's loss; no end, no anchor."""
    model, memory = llama(len(words()), spread=0.02), slots([3])
    table: Callable[[Tensor], Tensor] = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.tensor([[0, *words()(ANSWER)["input_ids"]]])  # the answer with its own BOS

    def inputs() -> dict[str, Any]:
        assert memory.embeddings is not None
        inputs_embeds = torch.cat([memory.embeddings, table(ids[:, :-1])], dim=1)
        labels = torch.full(inputs_embeds.shape[:2], -100)
        labels[:, 3:] = ids[:, 1:]
        return {"inputs_embeds": inputs_embeds, "labels": labels}

    assert overfit(model, inputs) < 0.01
    bare = PromptLayout(question=None, anchor="", eos=False, answer_tokens=4).bind(words())
    assert bare.answer(model, memory, None) == ["10 12 14 16"]


def greedy(model: nn.Module, embeds: Tensor, steps: int) -> list[int]:
    """Greedy decoding of one row, written out: the whole row read anew for each token, without cache or padding."""
    table: Callable[[Tensor], Tensor] = model.get_input_embeddings()  # type: ignore[operator]
    ids: list[int] = []
    for _ in range(steps):
        best = model(inputs_embeds=embeds, use_cache=False).logits[:, -1].argmax(-1)
        ids.append(int(best))
        embeds = torch.cat([embeds, table(best).unsqueeze(1)], dim=1)
    return ids


@DECODERS
@torch.no_grad()
def test_a_batch_of_ragged_rows_generates_what_each_row_does_alone(decoder: Callable[..., nn.Module]) -> None:
    tokenizer = byte_level()
    model = decoder(len(tokenizer))
    table: Callable[[Tensor], Tensor] = model.get_input_embeddings()  # type: ignore[operator]
    memory = slots([4, 0, 9, 1])
    questions = ["Who?", "Who lives in Paris, and what is the capital of Austria?", "What?", "Who is Bob?"]
    layout = PromptLayout(bos=True, bos_after=True, question="{question}\n", answer_tokens=6).bind(tokenizer)
    batch = layout.generation(model, memory, questions)
    together = model.generate(**batch.inputs() | {"eos_token_id": [-1]}, do_sample=False)  # type: ignore[operator]
    texts = layout.answer(model, memory, questions)
    for row, question in enumerate(questions):
        alone = memory.row(row)
        assert alone.embeddings is not None
        prompt = layout.prompt(question)
        before, after = (table(torch.tensor([ids])) for ids in (prompt.before, prompt.after))
        expected = greedy(model, torch.cat([before, alone.embeddings, after], dim=1), steps=6)
        assert together[row].tolist() == expected
        assert texts[row] == layout.decode(expected)
        assert layout.answer(model, alone, [question]) == [texts[row]]


def run_over(model: nn.Module, memory: SoftTokens) -> SoftTokens:
    """The keys and values that the model leaves behind when it reads each row's slots, alone."""
    rows = []
    for index in range(memory.rows):
        row = memory.row(index)
        if row.slots == 0:
            # No forward takes an empty row: of a row of one slot, none.
            cache = cache_among(model(inputs_embeds=torch.zeros(1, 1, WIDTH), use_cache=True))
            empty = tuple((layer.keys[:, :, :0], layer.values[:, :, :0]) for layer in cache.layers)
            rows.append(SoftTokens(None, row.mask, empty))
            continue
        full = transformers.DynamicCache()  # every position, also where the model keeps a window only
        model(inputs_embeds=row.embeddings, **with_cache(model, full))
        rows.append(SoftTokens(None, row.mask, tuple((layer.keys, layer.values) for layer in full.layers)))
    return SoftTokens.cat(rows)


@DECODERS
@torch.no_grad()
def test_keys_and_values_of_the_slots_answer_as_their_embeddings_do(decoder: Callable[..., nn.Module]) -> None:
    tokenizer = byte_level()
    model = decoder(len(tokenizer))
    memory = slots([4, 0, 9, 1])
    cached = run_over(model, memory)
    questions = ["Who?", "Who lives in Paris, and what is the capital of Austria?", "What?", "Who is Bob?"]
    answers = ["Ada", "Ada Lovelace, and Vienna", "Bob", "a"]
    layout = PromptLayout(bos_after=True, question="{question}\n", answer_tokens=6).bind(tokenizer)
    texts, keys = (layout.training(model, form, questions, answers) for form in (memory, cached))
    logits, cached_logits = (model(**batch.inputs()).logits[batch.scored_mask] for batch in (texts, keys))
    assert torch.equal(keys.labels[keys.answer_mask], texts.labels[texts.answer_mask])
    assert_close(cached_logits, logits, 1e-5, "logits of the answers")
    expected = layout.answer(model, memory, questions)
    for row in range(4):
        assert layout.answer(model, cached.row(row), questions[row : row + 1]) == expected[row : row + 1]
    assert layout.answer(model, cached, questions[:1] * 4) == layout.answer(model, memory, questions[:1] * 4)
    assert layout.answer(model, cached, questions) == expected


@torch.no_grad()
def test_plain_text_in_the_layout_is_the_text_itself() -> None:
    tokenizer = byte_level()
    model = llama(len(tokenizer))
    context = tokenizer("Ada Lovelace lives in Paris.", return_tensors="pt")
    layout = PromptLayout(answer_tokens=8).bind(tokenizer)
    memory = embed_text(model, context["input_ids"], context["attention_mask"])
    text = "Ada Lovelace lives in Paris.\nQuestion: Who?\nAnswer:"
    plain = tokenizer(text, return_tensors="pt")
    new = model.generate(  # type: ignore[operator]
        **{key: plain[key] for key in ("input_ids", "attention_mask")}, max_new_tokens=8, do_sample=False,
        eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    assert layout.answer(model, memory, ["Who?"]) == [layout.decode(new[0, plain["input_ids"].shape[1] :].tolist())]


@torch.no_grad()
def test_answers_are_greedy_and_in_eval_mode_whatever_the_model_came_with() -> None:
    tokenizer = byte_level()
    model, memory = llama(len(tokenizer)), slots([4, 2])
    layout = PromptLayout(answer_tokens=6).bind(tokenizer)
    expected = layout.answer(model, memory, ["Who?"] * 2)
    settings: dict[str, Any] = {"do_sample": True, "temperature": 5.0, "top_p": 0.5, "repetition_penalty": 3.0}
    model.generation_config.update(**settings)  # type: ignore[operator, union-attr]
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.9
    model.train()
    model.lm_head.eval()  # type: ignore[union-attr]
    assert layout.answer(model, memory, ["Who?"] * 2) == expected
    modes = {name: module.training for name, module in model.named_modules()}
    assert [name for name, training in modes.items() if not training] == ["lm_head"]
    assert layout.answer(model, memory, ["Who?"] * 2, max_new_tokens=1) != expected


def test_an_answer_is_read_up_to_the_first_stop_id() -> None:
    layout = PromptLayout(chat=True).bind(byte_level())
    end_of_turn, eos = layout.stop_ids
    ada, bob = (layout.answer_ids(text)[:-1] for text in ("Ada Lovelace", "Bob"))
    for stop in (end_of_turn, eos):
        assert layout.decode([*ada, stop, *bob]) == "Ada Lovelace"
    assert layout.decode(ada + bob) == "Ada Lovelace Bob"
    assert layout.decode([eos, *bob]) == ""


def test_prompts_of_several_lengths_are_answered_together_where_a_window_slides_over_keys_and_values() -> None:
    layout = PromptLayout(bos=False, bos_after=True, question="{question} ", answer_tokens=8).bind(words())
    model = mistral(len(words()))
    torch.manual_seed(3)
    lengths = [5, 2, 7, 4]
    mask = torch.arange(7) < torch.tensor(lengths).unsqueeze(1)
    kv = tuple((torch.randn(4, 2, 7, 8), torch.randn(4, 2, 7, 8)) for _ in range(2))
    memory = SoftTokens(None, mask, kv)
    questions = ["Who ?", "Who lives in Paris ?", "Bob ?", "Ada lives in ?"]
    assert layout.together(model, memory, questions) == [[0, 2], [3], [1]]
    with pytest.raises(LayoutError, match="prompts of one length together"):
        layout.generation(model, memory, questions)
    alone = [layout.generate(model, memory.row(row), [question])[0] for row, question in enumerate(questions)]
    assert layout.generate(model, memory, questions) == alone
    assert layout.answer(model, memory, questions) == [layout.decode(ids) for ids in alone]
    assert len({tuple(ids) for ids in alone}) > 2


@pytest.mark.parametrize("form", ["embeddings", "kv"])
def test_a_compressor_answers_from_memories_with_any_numbers_of_slots(form: str) -> None:
    run = a_run(learned=True, form=form)
    compressor, layout = run.compressor, run.layout
    memories = []
    for _, text in texts(4):
        ids = torch.tensor([layout.context_ids(text)])
        memories.append(compressor.compress(ids).detach())
    assert len({memory.slots for memory in memories}) > 2
    questions = ["Who lives in Paris?", "Ada?", "What is the capital?", "Born in 1815?"]
    alone = [layout.answer(run.model, one, [asked])[0] for one, asked in zip(memories, questions, strict=True)]
    assert compressor.answer(questions, memories, layout) == alone
    assert compressor.answer(questions, SoftTokens.cat(memories), layout) == alone
    # One memory, and several questions about it.
    about_one = [layout.answer(run.model, memories[0], [asked])[0] for asked in questions]
    assert compressor.answer(questions, memories[0], layout) == about_one
    assert len(set(alone + about_one)) > 2
    with pytest.raises(CompressorError, match=r"layout=PromptLayout\(\.\.\.\)\.bind\(tokenizer\)"):
        compressor.answer(questions, memories)
    compressor.layout = layout  # as a loaded run has it
    assert compressor.answer(questions, memories) == alone
    with pytest.raises(LayoutError, match="3 questions for a memory of 4 rows"):
        compressor.answer(questions[:3], memories)
