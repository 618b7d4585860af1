"""What a compressor's slot is made of, and what it does not depend on."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from inlay.fastweight.causal_lm import cache_among, with_cache
from inlay.softtoken.compressors import Compressor, EncoderPoolConfig, build_compressor
from inlay.softtoken.compressors.segments import Runs, divide_by_ratio, divide_by_slots
from tests.closeness import assert_close
from tests.fastweight.families import BY_NAME
from tests.softtoken.compressors import (
    ALL,
    HEAD,
    HEADS,
    KINDS,
    KV_HEADS,
    TRAINED,
    WIDTH,
    adapter_on,
    built,
    llama,
    numbers,
    padded,
    tokens,
)

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt-neox", "phi3", "gemma3", "olmo2", "qwen3-moe"]


# What a slot does not depend on


@pytest.mark.parametrize(
    ("kind", "form", "segments"),
    [(kind, form, {}) for kind, form in ALL]
    + [(kind, form, {"segment_tokens": 8, "segments": "recursive"}) for kind, form in TRAINED]
    + [(kind, "kv", {"segment_tokens": 8}) for kind in ("encoder-tokens", "pool")],
)
@torch.no_grad()
def test_the_same_text_gives_the_same_slots_whatever_its_batch_mates_and_padding(
    kind: str, form: str, segments: dict[str, Any]
) -> None:
    compressor = built(kind, llama(), form=form, **segments)
    text, short, long = tokens(1, 21)[0], tokens(1, 3, seed=1)[0], tokens(1, 38, seed=2)[0]
    for call in ({"ratio": 4}, {"slots": 5}):
        alone = compressor.compress(text.unsqueeze(0), **call)
        for texts, side in [([short, text, long], "right"), ([long, text], "left")]:
            memory = compressor.compress(*padded(texts, side), **call)
            assert_close(numbers(memory.row(1)), numbers(alone), 1e-5, f"{call}, {side}")
            assert not numbers(memory)[~memory.mask].any()


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
@pytest.mark.parametrize("form", ["embeddings", "kv"])
@pytest.mark.parametrize("kind", ["encoder-pool", "encoder-pool-bidirectional", "encoder-tokens"])
@torch.no_grad()
def test_neither_do_they_in_other_families(kind: str, form: str, family: str) -> None:
    compressor = built(kind, BY_NAME[family].make(), form=form)
    text = tokens(1, 21)[0]
    memory = compressor.compress(*padded([text, tokens(1, 30, seed=1)[0]], "left"))
    assert_close(numbers(memory.row(0)), numbers(compressor.compress(text.unsqueeze(0))), 1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["encoder-pool", "encoder-pool-bidirectional"])
@torch.no_grad()
def test_nor_does_a_slot_depend_on_the_attention_implementation(kind: str, attention: str) -> None:
    ids, mask = padded([tokens(1, 21)[0], tokens(1, 9, seed=1)[0]], "right")
    memories = [built(kind, llama(attn_implementation=a)).compress(ids, mask) for a in (attention, "sdpa")]
    assert_close(numbers(memories[0]), numbers(memories[1]), 1e-5)


@torch.no_grad()
def test_appending_text_keeps_the_slots_of_full_runs_where_attention_is_causal() -> None:
    text = tokens(1, 32)
    compressor = built("encoder-pool", llama())
    assert_close(compressor.compress(text).embeddings[:, :5], compressor.compress(text[:, :20]).embeddings, 1e-5)


# How many slots there are, and of what


def test_runs_are_of_the_ratio_with_the_rest_in_the_last_or_nearly_equal() -> None:
    assert [s.runs for s in divide_by_ratio(10, 4)] == [(4, 4, 2)]
    assert [(s.start, s.runs) for s in divide_by_ratio(21, 4, 8)] == [(0, (4, 4)), (8, (4, 4)), (16, (4, 1))]
    assert [s.runs for s in divide_by_slots(11, 3)] == [(4, 4, 3)]
    assert [s.runs for s in divide_by_slots(2, 3)] == [(1, 1)]
    assert [(s.start, s.runs) for s in divide_by_slots(11, 5, 4)] == [(0, (2, 2)), (4, (2, 2)), (8, (3,))]


def test_runs_as_tensors() -> None:
    runs = Runs.of([*divide_by_ratio(5, 2), *divide_by_slots(3, 1)], torch.device("cpu"))
    assert runs.mask.tolist() == [[True, True, True], [True, False, False]]
    assert runs.last.tolist() == [[1, 3, 4], [2, 0, 0]]
    assert runs.centres().tolist() == [[0.5, 2.5, 4.0], [1.0, 0.0, 0.0]]
    x = torch.tensor([[1.0, 3.0, 5.0, 7.0, 11.0], [1.0, 2.0, 6.0, 9.0, 9.0]]).unsqueeze(-1)
    assert runs.mean(x).squeeze(-1).tolist() == [[2.0, 6.0, 11.0], [3.0, 0.0, 0.0]]


@pytest.mark.parametrize(("kind", "form"), [*TRAINED, ("pool", "embeddings")])
@torch.no_grad()
def test_one_compressor_serves_several_ratios_and_fixed_numbers(kind: str, form: str) -> None:
    compressor = built(kind, llama(), form=form, ratios=(4, 8, 16), segment_tokens=16)
    ids, mask = padded([tokens(1, 33)[0], tokens(1, 7)[0]], "right")
    for ratio in (4, 8, 16):
        assert compressor.compress(ids, mask, ratio=ratio).lengths.tolist() == [-(-33 // ratio), -(-7 // ratio)]
    assert compressor.compress(ids, mask, slots=10).lengths.tolist() == [10, 7]
    assert compressor.compress(ids, mask).lengths.tolist() == [9, 2]
    assert sum(segment.slots for segment in compressor.plan(33, ratio=8)) == 5


@torch.no_grad()
def test_pool_is_the_mean_embedding_of_each_run_at_the_scale_of_embeddings() -> None:
    model = llama()
    compressor = built("pool", model)
    ids = tokens(1, 10)
    table = model.get_input_embeddings().weight
    means = torch.stack([table[ids[0, a:b]].mean(0) for a, b in [(0, 4), (4, 8), (8, 10)]])
    expected = means / means.square().mean(1, keepdim=True).sqrt() * table.square().mean().sqrt()
    assert_close(compressor.compress(ids).embeddings[0], expected, 1e-6)
    assert compressor.trainable_parameters() == []


# encoder-pool


def uncalibrated(compressor: Compressor[Any]) -> Compressor[Any]:
    """What comes out of the last block's pooled rows, as it is."""
    compressor.projector = nn.Identity()
    return compressor


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_runs_of_one_token_are_what_the_last_block_makes_of_each_token(family: str) -> None:
    model = BY_NAME[family].make()
    compressor = uncalibrated(built("encoder-pool", model, ratios=(1,), calibrate=False))
    text, other = tokens(1, 21)[0], tokens(1, 13, seed=1)[0]
    ids, mask = padded([text, other], "right")
    memory = compressor.compress(ids, mask)

    outputs: list[Tensor] = []
    handle = compressor.lm.blocks[-1].register_forward_hook(
        lambda _, __, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    with adapter_on(compressor):
        for row in (text, other):
            model(input_ids=row.unsqueeze(0), use_cache=False)
    handle.remove()
    for row, output in enumerate(outputs):
        assert_close(memory.row(row).embeddings, output, 1e-5, f"row {row}")


def effective(layer: Any) -> Tensor:
    """W + (alpha / r) B A of a LoRA layer, W of another."""
    if not isinstance(layer, peft.tuners.lora.LoraLayer):
        return layer.weight
    a, b = layer.lora_A["compressor"].weight, layer.lora_B["compressor"].weight
    return layer.base_layer.weight + 32 / 2 * b @ a


def rotated(x: Tensor, places: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary embedding of `[H, T, d]` written out pair by pair."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = places.to(x.dtype) * base ** (-2 * i / x.shape[-1])
        a, b = x[..., i], x[..., i + half]
        out[..., i], out[..., i + half] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return out


def rms_norm(x: Tensor, norm: Any) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight


def block_by_hand(block: Any, hidden: Tensor, runs: list[tuple[int, int]] | None, *, causal: bool) -> Tensor:
    """A Llama block on `[T, D]` with loops for its attention: its output, or with ``runs`` that of the pooled rows."""
    tokens_ = len(hidden)
    places = torch.arange(tokens_)
    normed = rms_norm(hidden, block.input_layernorm)
    attention = block.self_attn
    q, k, v = (normed @ effective(p).T for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    residual = hidden
    if runs is not None:
        q = torch.stack([q[a:b].mean(0) for a, b in runs])
        residual = torch.stack([hidden[a:b].mean(0) for a, b in runs])
        places = torch.tensor([b - 1 for _, b in runs])
    q = rotated(q.view(-1, HEADS, HEAD).transpose(0, 1), places)
    k = rotated(k.view(-1, KV_HEADS, HEAD).transpose(0, 1), torch.arange(tokens_))
    v = v.view(-1, KV_HEADS, HEAD).transpose(0, 1)
    rows = []
    for row, place in enumerate(places.tolist()):
        seen = place + 1 if causal else tokens_
        heads = []
        for head in range(HEADS):
            shared = head // (HEADS // KV_HEADS)
            weights = (k[shared, :seen] @ q[head, row] / HEAD**0.5).softmax(0)
            heads.append(weights @ v[shared, :seen])
        rows.append(torch.cat(heads))
    hidden = residual + torch.stack(rows) @ effective(attention.o_proj).T
    inner = rms_norm(hidden, block.post_attention_layernorm)
    mlp = block.mlp
    gated = F.silu(inner @ effective(mlp.gate_proj).T) * (inner @ effective(mlp.up_proj).T)
    return hidden + gated @ effective(mlp.down_proj).T


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@torch.no_grad()
def test_encoder_pool_is_what_its_definition_gives_by_hand(attention: str) -> None:
    model = llama().double()
    kind = "encoder-pool" if attention == "causal" else "encoder-pool-bidirectional"
    compressor = built(kind, model).double()
    ids = tokens(1, 10)
    memory = compressor.compress(*padded([ids[0], tokens(1, 17, seed=1)[0]], "left"))

    hidden = model.get_input_embeddings()(ids)[0]
    for block in model.model.layers[:-1]:
        hidden = block_by_hand(block, hidden, None, causal=attention == "causal")
    pooled = block_by_hand(model.model.layers[-1], hidden, [(0, 4), (4, 8), (8, 10)], causal=attention == "causal")
    projector = compressor.projector
    normed = pooled / pooled.square().mean(-1, keepdim=True).sqrt() * projector.norm.weight
    projected = F.gelu(normed @ projector.up.weight.T) @ projector.down.weight.T
    expected = projected / projected.square().mean(-1, keepdim=True).sqrt()
    expected = expected * model.get_input_embeddings().weight.square().mean().sqrt()
    assert_close(memory.row(0).embeddings[0], expected, 1e-6)


@pytest.mark.parametrize("form", ["embeddings", "kv"])
def test_a_residual_encoder_pool_begins_as_mean_pooled_embeddings(form: str) -> None:
    ids = tokens(2, 11)
    written = {}
    for kind, more in (("encoder-pool", {"residual": True}), ("pool", {})):
        config = KINDS[kind](form=form, **more)
        written[kind] = numbers(build_compressor(config, llama()).compress(ids, ratio=4)).detach()
    assert_close(written["encoder-pool"], written["pool"], 1e-6)


def test_and_its_projector_has_a_gradient_from_the_first_step_on() -> None:
    compressor = build_compressor(EncoderPoolConfig(residual=True), llama())
    memory = compressor.compress(tokens(2, 11), ratio=4)
    memory.embeddings[..., 0].sum().backward()
    assert compressor.projector.down.weight.grad.abs().sum() > 0


# encoder-tokens


@torch.no_grad()
def test_encoder_tokens_are_last_hidden_states_of_memory_tokens_behind_the_context() -> None:
    model = llama()
    compressor = uncalibrated(built("encoder-tokens", model, calibrate=False))
    ids = tokens(1, 10)
    memory = compressor.compress(*padded([ids[0], tokens(1, 17, seed=1)[0]], "left"))
    sequence = torch.cat([model.get_input_embeddings()(ids), compressor.memory[None, :3]], dim=1)
    with adapter_on(compressor):
        expected = model.model(inputs_embeds=sequence).last_hidden_state[:, 10:]
    assert_close(memory.row(0).embeddings, expected, 1e-5)


@torch.no_grad()
def test_keys_of_memory_tokens_are_rotated_for_where_the_decoder_finds_them() -> None:
    model = llama()
    compressor = built("encoder-tokens", model, form="kv", segment_tokens=8)
    ids = tokens(1, 14)
    memory = compressor.compress(*padded([tokens(1, 5, seed=1)[0], ids[0]], "left"))

    unrotated: dict[str, Tensor] = {}
    attentions = [block.self_attn for block in model.model.layers]
    handles = [
        module.register_forward_hook(lambda _, __, output, key=f"{layer}.{name}": unrotated.update({key: output}))
        for layer, attention in enumerate(attentions)
        for name, module in (("k", attention.k_proj), ("v", attention.v_proj))
    ]
    expected: list[list[Tensor]] = [[] for _ in range(4)]
    with adapter_on(compressor):
        for start, end, first in [(0, 8, 0), (8, 14, 2)]:
            text = model.get_input_embeddings()(ids[:, start:end])
            model.model(inputs_embeds=torch.cat([text, compressor.memory[None, :2]], dim=1))
            for layer in range(2):
                k, v = (unrotated[f"{layer}.{name}"][0, -2:].view(2, KV_HEADS, HEAD).transpose(0, 1) for name in "kv")
                expected[2 * layer].append(rotated(k, torch.arange(first, first + 2)))
                expected[2 * layer + 1].append(v)
    for handle in handles:
        handle.remove()
    found = [tensor[0] for pair in memory.row(1).kv for tensor in pair]
    for actual, parts in zip(found, expected, strict=True):
        assert_close(actual, torch.cat(parts, dim=1), 1e-5)


# form kv


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "qwen3"])
@torch.no_grad()
def test_keys_and_values_of_other_kinds_are_what_reading_the_slots_leaves_in_the_cache(family: str) -> None:
    model = BY_NAME[family].make()
    ids, mask = padded([tokens(1, 21)[0], tokens(1, 9, seed=1)[0]], "right")
    slots = built("encoder-pool", model).compress(ids, mask)
    compressor = built("encoder-pool", model, form="kv")
    memory = compressor.compress(ids, mask)
    for row in range(2):
        with adapter_on(compressor):
            cache = cache_among(model(inputs_embeds=slots.row(row).embeddings, use_cache=True))
        for (keys, values), layer in zip(memory.row(row).kv, cache.layers, strict=True):
            assert_close(keys, layer.keys, 1e-5)
            assert_close(values, layer.values, 1e-5)


@torch.no_grad()
def test_pooled_slots_say_the_same_to_the_decoder_in_both_forms() -> None:
    model = llama()
    ids, question = tokens(1, 21), tokens(1, 5, seed=1)
    slots, kv = (built("pool", model, form=form).compress(ids) for form in ("embeddings", "kv"))
    after = model.get_input_embeddings()(question)
    whole = model(inputs_embeds=torch.cat([slots.embeddings, after], dim=1)).logits[:, slots.slots :]
    cache = transformers.DynamicCache()
    for layer, (keys, values) in enumerate(kv.kv):
        cache.update(keys, values, layer)
    assert_close(model(inputs_embeds=after, **with_cache(model, cache)).logits, whole, 1e-5)


# Segments


@pytest.mark.parametrize(("kind", "form"), [(k, f) for k, f in ALL if f == "embeddings"])
@torch.no_grad()
def test_concatenated_segments_are_read_alone(kind: str, form: str) -> None:
    compressor = built(kind, llama(), segment_tokens=8)
    ids = tokens(1, 21)
    parts = [compressor.compress(part).embeddings for part in ids.split(8, dim=1)]
    assert_close(compressor.compress(ids).embeddings, torch.cat(parts, dim=1), 1e-5)


@torch.no_grad()
def test_recursive_segments_read_the_slots_before_them() -> None:
    model = llama()
    compressor = built("encoder-tokens", model, segment_tokens=8, segments="recursive")
    ids = tokens(1, 21)
    slots = torch.zeros(1, 0, WIDTH)
    with adapter_on(compressor):
        for part in ids.split(8, dim=1):
            count = -(-part.shape[1] // 4)
            sequence = torch.cat([slots, model.get_input_embeddings()(part), compressor.memory[None, :count]], dim=1)
            hidden = model.model(inputs_embeds=sequence).last_hidden_state[:, -count:]
            slots = torch.cat([slots, compressor.calibration(compressor.projector(hidden))], dim=1)
    assert_close(compressor.compress(ids).embeddings, slots, 1e-5)


@pytest.mark.parametrize(("kind", "form"), TRAINED)
def test_what_came_before_reaches_the_last_segment_only_where_it_is_recursive(kind: str, form: str) -> None:
    ids = tokens(2, 24)
    ids[:, 8:] = ids[0, 8:]  # rows differ in their first segment alone
    for segments, same in (("concatenate", True), ("recursive", False)):
        compressor = built(kind, llama(), form=form, segment_tokens=8, segments=segments)
        last = numbers(compressor.compress(ids)).detach()[:, -2:]
        if form == "kv" and kind != "encoder-tokens":
            continue  # slots read those before them when they are turned into keys and values
        assert torch.allclose(last[0], last[1], atol=1e-6) is same
