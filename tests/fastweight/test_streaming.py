"""One memory, however the tokens arrive: whole, prefill and decode, ragged pieces, one at a time, batched or alone."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import inlay
from inlay.fastweight.causal_lm import cache_among, with_cache
from inlay.fastweight.streaming import StateError, state_of
from tests.closeness import assert_close, relative_error
from tests.fastweight.families import BY_NAME

VOCABULARY = 64
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def llama(chunk_size: int = 5, dtype: torch.dtype = torch.float64, **config: Any) -> PreTrainedModel:
    """A tiny model whose memory, in two of three blocks, moves the logits by as much as their own size."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            initializer_range=0.3,
            max_position_embeddings=256,
            pad_token_id=0,
            eos_token_id=None,
            bos_token_id=None,
        )
    )
    settings: dict[str, Any] = {"layers": [0, 2], "chunk_size": chunk_size, "eta": 0.1, "init": {"normal": 0.5}}
    inlay.attach(model, inlay.FastWeightConfig(**settings | config))
    return model.to(dtype).eval()


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def in_pieces(model: PreTrainedModel, ids: Tensor, cuts: list[int], **options: Tensor) -> Tensor:
    """Logits of ``ids`` passed in pieces of ``cuts`` tokens, with one cache."""
    cache, outputs, at = DynamicCache(), [], 0
    for cut in cuts:
        piece = slice(at, at + cut)
        given = {k: v[:, : at + cut] if k == "attention_mask" else v[:, piece] for k, v in options.items()}
        outputs.append(model(ids[:, piece], **with_cache(model, cache), **given).logits)
        at += cut
    return torch.cat(outputs, 1)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """A batch of ragged rows, a chunk size, documents, and a way of cutting it into calls."""
    lengths = draw(st.lists(st.integers(1, 24), min_size=1, max_size=3))
    longest = max(lengths)
    way = draw(st.sampled_from(["whole", "prefill and decode", "ragged pieces", "one at a time"]))
    if way == "whole":
        cuts = [longest]
    elif way == "prefill and decode":
        first = draw(st.integers(1, longest))
        cuts = [first] + [1] * (longest - first)
    elif way == "one at a time":
        cuts = [1] * longest
    else:
        cuts = []
        while sum(cuts) < longest:
            cuts.append(draw(st.integers(1, longest - sum(cuts))))
    return {
        "lengths": lengths,
        "cuts": cuts,
        "chunk_size": draw(st.sampled_from([1, 2, 3, 5, 8, 30])),
        "starts": [draw(st.lists(st.integers(1, longest), max_size=2)) for _ in lengths],
        "dtype": draw(st.sampled_from([torch.float64, torch.float32])),
        "target": draw(st.sampled_from(["embeddings", "hidden"])),
        "boundary": draw(st.sampled_from(["reset", "carry"])),
        "clip": draw(st.sampled_from([None, 0.5])),
        "representation": draw(st.sampled_from(["auto", "dense", "deferred"])),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls())
def test_logits_agree_however_the_tokens_arrive_row_by_row(call: dict[str, Any]) -> None:
    """In pieces and padded on the left, each row of the batch gives what it gives alone, whole and without a cache."""
    lengths, longest = call["lengths"], max(call["lengths"])
    model = llama(
        call["chunk_size"],
        call["dtype"],
        target=call["target"],
        boundary=call["boundary"],
        max_update_norm=call["clip"],
    )
    memory = inlay.find_memory(model)
    assert memory is not None
    memory.representation = call["representation"]
    rows = tokens(len(lengths), longest, call["seed"])
    place = torch.arange(longest)
    documents = torch.stack([torch.bucketize(place, torch.tensor(sorted(row)), right=True) for row in call["starts"]])
    mask = torch.stack([place >= longest - length for length in lengths]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = in_pieces(
        model,
        rows * mask,
        call["cuts"],
        attention_mask=mask,
        position_ids=positions,
        document_ids=documents.masked_fill(mask == 0, -1),
    )
    for index, length in enumerate(lengths):
        row, own = rows[index : index + 1, -length:], documents[index : index + 1, -length:]
        with torch.no_grad():
            alone = model(row, document_ids=own, use_cache=False).logits
        assert_close(together[index : index + 1, -length:], alone, TOLERANCE[call["dtype"]], f"row {index}")


def test_the_memory_matters_in_these_tests() -> None:
    model, ids = llama(), tokens(2, 24)
    memory = inlay.find_memory(model)
    assert memory is not None
    with torch.no_grad():
        remembered = model(ids, use_cache=False).logits
        with memory.disabled():
            plain = model(ids, use_cache=False).logits
    assert torch.equal(remembered[:, :5], plain[:, :5])
    assert relative_error(remembered[:, 5:], plain[:, 5:]) > 0.1


def trained(family: str) -> PreTrainedModel:
    """A tiny model whose memory alone was trained for some steps on sequences that repeat, in float64."""
    made = BY_NAME[family]
    model = made.make().double()
    memory = inlay.attach(model, made.config(chunk_size=4, eta=0.5, init="next_token")).train_only("memory")
    model.train()
    optimizer = torch.optim.AdamW(memory.parameters(), lr=0.05)
    for step in range(8):
        ids = tokens(4, 12, seed=step).repeat(1, 2)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mistral"])
def test_generate_gives_each_prompt_of_a_batch_what_it_gives_alone(family: str) -> None:
    """Mistral's layers slide, so its cache is the sliding-window one; the prompts are padded on the left."""
    model = trained(family)
    options = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0, "eos_token_id": None}
    prompts = [tokens(1, length, seed=length) for length in (3, 9, 14, 5)]
    ids = torch.zeros(4, 14, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        row[14 - prompt.shape[1] :] = prompt[0]
    together = model.generate(ids, attention_mask=(ids > 0).long(), **options)
    memory = inlay.find_memory(model)
    assert memory is not None
    changed = False
    for row, prompt in zip(together, prompts, strict=True):
        mask = torch.ones_like(prompt)
        alone = model.generate(prompt, attention_mask=mask, **options)[0, prompt.shape[1] :]
        whole = model.generate(prompt, attention_mask=mask, use_cache=False, **options)[0, prompt.shape[1] :]
        assert torch.equal(row[14:], alone)
        assert torch.equal(alone, whole)
        with memory.disabled():
            plain = model.generate(prompt, attention_mask=mask, **options)[0, prompt.shape[1] :]
        changed |= not torch.equal(plain, whole)
    assert changed


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 3},
        {"cache_implementation": "static"},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=lambda options: ", ".join(options),
)
def test_every_way_of_generating_gives_what_it_gives_without_a_cache(options: dict[str, Any]) -> None:
    model, prompt = llama(), tokens(2, 7)
    common = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": None} | options

    def generate(**more: Any) -> Tensor:
        torch.manual_seed(0)
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **common | more)

    assert torch.equal(generate(), generate(use_cache=False, cache_implementation=None))


def test_generation_goes_on_from_a_returned_cache() -> None:
    model, prompt = llama(), tokens(1, 7)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, **options)
    first = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=9,
        return_dict_in_generate=True,
        **options,
    )
    rest = model.generate(
        first.sequences,
        attention_mask=torch.ones_like(first.sequences),
        **with_cache(model, cache_among(first)),
        max_new_tokens=11,
        **options,
    )
    assert torch.equal(rest, whole)


def test_prompt_lookup_gives_the_greedy_tokens_while_rollback_stays_in_the_chunk() -> None:
    model, prompt = llama(chunk_size=64), tokens(1, 7)
    never = 10**6  # transformers 5.12 looks drafts up by an end that there must be
    options = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": 0, "eos_token_id": never}
    mask = torch.ones_like(prompt)
    looked_up = model.generate(prompt, attention_mask=mask, prompt_lookup_num_tokens=3, **options)
    greedy = model.generate(prompt, attention_mask=mask, **options)
    assert torch.equal(looked_up[:, : greedy.shape[1]], greedy)  # 5.12 gives a token more, without a memory too


def test_assisted_decoding_gives_the_greedy_tokens_while_rollback_stays_in_the_chunk() -> None:
    model, assistant, prompt = llama(chunk_size=64), llama(chunk_size=64, eta=0.0), tokens(1, 7)
    options = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    assisted = model.generate(prompt, attention_mask=mask, assistant_model=assistant, **options)
    assert torch.equal(assisted, model.generate(prompt, attention_mask=mask, **options))


def test_an_offloaded_cache_carries_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offloading moves keys and values between CUDA and the host; a stand-in takes the place of its CUDA streams."""

    class Stream(nullcontext[None]):
        def wait_stream(self, other: object) -> None:
            pass

    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    model, ids = llama(), tokens(2, 20)
    cache = DynamicCache(config=model.config, offloading=True)
    with torch.no_grad():
        pieces = [model(piece, **with_cache(model, cache)).logits for piece in ids.split([7, 1, 1, 11], 1)]
        assert_close(torch.cat(pieces, 1), model(ids, use_cache=False).logits, 1e-12)


def test_rollback_stays_possible_until_the_next_chunk_begins() -> None:
    model, ids = llama(chunk_size=5), tokens(1, 12)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids[:, :10], **with_cache(model, cache))  # two full chunks; the second is still open
        cache.crop(-4)
        rest = model(ids[:, 6:], **with_cache(model, cache)).logits
        assert_close(rest, model(ids, use_cache=False).logits[:, 6:], 1e-12)
        with pytest.raises(StateError, match="cannot take 4 tokens back: a chunk was committed 2 tokens ago"):
            cache.crop(-4)
        assert cache.get_seq_length() == 12


def test_rows_are_selected_repeated_and_copied_with_the_cache() -> None:
    model, ids = llama(), tokens(2, 20)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = DynamicCache()
        model(ids[:, :13], **with_cache(model, cache))
        copied = pickle.loads(pickle.dumps(copy.deepcopy(cache)))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        rest = model(ids[[1, 0], 13:], **with_cache(model, cache)).logits
        assert_close(rest, whole[[1, 0], 13:], 1e-12)
        assert_close(model(ids[:, 13:], **with_cache(model, copied)).logits, whole[:, 13:], 1e-12)
        cache.reset()
        state = state_of(cache)
        assert state is not None
        assert not state.layers


def test_a_cache_that_the_memory_has_not_read_is_refused() -> None:
    model, ids = llama(), tokens(1, 12)
    memory = inlay.find_memory(model)
    assert memory is not None
    with torch.no_grad():
        cache = DynamicCache()
        with memory.disabled():
            model(ids, **with_cache(model, cache))
        with pytest.raises(StateError, match="holds 12 tokens but the memory has read 0"):
            model(ids, **with_cache(model, cache))
        cache = DynamicCache()
        model(ids, **with_cache(model, cache))
        with memory.disabled():
            model(ids, **with_cache(model, cache))
        with pytest.raises(StateError, match="holds 24 tokens but the memory has read 12"):
            model(ids, **with_cache(model, cache))


def test_after_an_error_the_state_is_not_used_again() -> None:
    model, ids = llama(), tokens(1, 12)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, **with_cache(model, cache))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.model.layers[1], "forward", lambda *a, **k: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids[:, :1], **with_cache(model, cache))
        with pytest.raises(StateError, match="ended in an error"):
            model(ids[:, :1], **with_cache(model, cache))


def test_a_forward_without_a_cache_is_stateless() -> None:
    model, ids = llama(), tokens(1, 12)
    with torch.no_grad():
        first = model(ids, use_cache=False)
        assert torch.equal(first.logits, model(ids, use_cache=False).logits)
        assert torch.equal(first.logits, model(ids).logits)


@torch.no_grad()
def decode(representation: str, ids: Tensor) -> tuple[Tensor, list[int]]:
    """Logits of ``ids`` one token at a time, and the state's bytes after each."""
    model = llama(chunk_size=4)
    memory = inlay.find_memory(model)
    assert memory is not None
    memory.representation = representation
    cache, outputs, sizes = DynamicCache(), [], []
    for t in range(ids.shape[1]):
        outputs.append(model(ids[:, t : t + 1], **with_cache(model, cache)).logits)
        state = state_of(cache)
        assert state is not None
        sizes.append(state.nbytes)
    return torch.cat(outputs, 1), sizes


def test_the_dense_state_does_not_grow_and_does_not_drift_over_many_steps() -> None:
    ids = tokens(1, 240)
    with torch.no_grad():
        whole = llama(chunk_size=4)(ids, use_cache=False).logits
    logits, sizes = decode("dense", ids)
    assert_close(logits, whole, 1e-9)
    assert len(set(sizes)) == 1


def test_the_deferred_state_switches_to_the_sum_where_that_is_smaller() -> None:
    """D=16, F=24: even at 9 tokens, so two chunks of 4 are kept as they are and the third makes the sum."""
    ids = tokens(1, 60)
    dense, dense_sizes = decode("dense", ids)
    switching, sizes = decode("auto", ids)
    deferred, growing = decode("deferred", ids)
    assert_close(switching, dense, 1e-10)
    assert_close(deferred, dense, 1e-10)
    assert max(sizes) == dense_sizes[0]
    assert sizes[11] < dense_sizes[0]
    assert sizes[12] == dense_sizes[0]
    assert growing[-1] > dense_sizes[0]
    with pytest.raises(ValueError, match="representation takes one of"):
        decode("sparse", ids)


@pytest.mark.parametrize("cuts", [[26], [9, 17], [1] * 26])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_history_tells_norm_and_clip_scale_of_each_chunk_in_the_sum(cuts: list[int], clip: float | None) -> None:
    """However the tokens arrive: two rows, one of which begins a document at token 12, chunks of 5."""
    model = llama(chunk_size=5, max_update_norm=clip)
    memory = inlay.find_memory(model)
    assert memory is not None
    memory.representation = "dense"
    documents = torch.zeros(2, 26, dtype=torch.long)
    documents[1, 12:] = 1
    cache = DynamicCache()
    with torch.no_grad():
        for ids, piece in zip(tokens(2, 26).split(cuts, 1), documents.split(cuts, 1), strict=True):
            model(ids, document_ids=piece, **with_cache(model, cache))
    state = state_of(cache)
    assert state is not None
    layer = state.layers[2]
    assert layer.history is not None
    for row, committed in ((0, 5), (1, 2)):
        entries = [entry for entry in layer.history[row] if entry[1] > 0]
        assert len(entries) == committed
        norms, scales = torch.stack(entries).unbind(1)
        assert ((scales < 1) == (clip is not None)).all()
        if clip is not None:
            assert_close(norms, torch.full_like(norms, clip), 1e-6)
        assert layer.sum[row].norm() <= norms.sum() * (1 + 1e-6)
    if len(cuts) == 1:
        first = layer.history[0, 0, 0]
        with torch.no_grad():
            model(tokens(2, 26)[:1, :6], **with_cache(model, one := DynamicCache()))
        alone = state_of(one)
        assert alone is not None
        assert_close(alone.layers[2].sum.norm().float(), first, 1e-6)


def test_gradients_flow_through_the_state_from_call_to_call() -> None:
    """Two calls with a cache and gradients give the gradients of one call over both."""
    model, ids = llama(), tokens(1, 20)
    memory = inlay.find_memory(model)
    assert memory is not None
    parameters = list(memory.parameters())
    whole = torch.autograd.grad(model(ids, use_cache=False).logits.square().mean(), parameters)
    cache = DynamicCache()
    pieces = [
        model(ids[:, :8], **with_cache(model, cache)).logits,
        model(ids[:, 8:], **with_cache(model, cache)).logits,
    ]
    for a, b in zip(torch.autograd.grad(torch.cat(pieces, 1).square().mean(), parameters), whole, strict=True):
        assert_close(a, b, 1e-9)
