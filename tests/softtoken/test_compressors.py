"""A compressor and its decoder: what is trained, what is left alone, the files, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from pydantic import ValidationError
from torch import Tensor

from inlay.softtoken.compressors import (
    Compressor,
    CompressorError,
    CrossAttentionConfig,
    EncoderPoolConfig,
    LoraSettings,
    PoolConfig,
    build_compressor,
    load_compressor,
)
from inlay.softtoken.compressors import storage as storage_module
from tests.closeness import assert_close
from tests.fastweight.families import BY_NAME, enable_checkpointing, hook_counts, snapshot
from tests.softtoken.compressors import KINDS, TRAINED, adapter_on, built, llama, numbers, padded, tokens

HOOKS_ARE_CHECKPOINTED = "__call__" in vars(transformers.modeling_layers.GradientCheckpointingLayer)
"""As in transformers 5.12. It makes a difference to reentrant checkpointing alone."""


# Training


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize(("kind", "form"), TRAINED)
def test_gradient_reaches_adapter_and_projector_and_not_the_base(
    kind: str, form: str, checkpointing: bool | None
) -> None:
    model = BY_NAME["gpt2"].make().double()  # which, unlike the others, computes nothing in float32
    compressor = built(kind, model, form=form, segment_tokens=16, segments="recursive").double()
    ids, mask = padded([tokens(1, 21)[0], tokens(1, 9, seed=1)[0]], "left")
    weights = torch.randn(numbers(compressor.compress(ids, mask)).shape, dtype=torch.float64)

    def loss() -> Tensor:
        return (numbers(compressor.compress(ids, mask)) * weights).sum()

    named = dict(compressor.named_trainable_parameters())
    directions = {name: torch.randn_like(parameter) for name, parameter in named.items()}
    step = 1e-6
    with torch.no_grad():
        sides = []
        for sign in (1, -2):
            for name, parameter in named.items():
                parameter += sign * step * directions[name]
            sides.append(loss())
        for name, parameter in named.items():
            parameter += step * directions[name]
    slope = (sides[0] - sides[1]) / (2 * step)

    if checkpointing is not None:
        enable_checkpointing(model, reentrant=checkpointing)
        model.train()
    if checkpointing and (form == "kv" or (kind == "encoder-pool" and HOOKS_ARE_CHECKPOINTED)):
        with pytest.raises(CompressorError, match="reentrant"):
            loss()
        return
    loss().backward()
    along = sum((p.grad * directions[name]).sum() for name, p in named.items() if p.grad is not None)
    assert_close(along, slope, 1e-5, "gradient along a direction against finite differences")
    adapter = {id(p) for p in compressor.trainable_parameters()}
    assert all(p.grad is None and not p.requires_grad for p in model.parameters() if id(p) not in adapter)
    if kind.startswith("encoder"):
        reached = {name for name, p in named.items() if p.grad is not None and p.grad.any()}
        assert {"adapter", "projector"} <= {name.split(".")[0] for name in reached}


@pytest.mark.parametrize(("kind", "form"), TRAINED)
def test_the_decoder_is_bit_equal_to_the_base_model(kind: str, form: str) -> None:
    model, ids = llama(), tokens(2, 21)
    with torch.no_grad():
        base = model(ids).logits
    compressor = built(kind, model, form=form)
    compressor.compress(ids)
    assert torch.equal(model(ids).logits, base)

    hooks, before = hook_counts(model), snapshot(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("midway")

    if compressor.adapter is not None:
        handle = model.model.layers[-1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="midway"):
            compressor.compress(ids)
        handle.remove()
    assert hook_counts(model) == hooks
    assert torch.equal(model(ids).logits, base)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())

    compressor.detach()
    assert hook_counts(model) == hook_counts(llama())
    assert torch.equal(model(ids).logits, base)


def test_the_decoders_own_adapter_is_off_while_compressing_and_on_again_after() -> None:
    ids = tokens(2, 21)
    expected = built("encoder-pool", llama()).compress(ids).embeddings
    torch.manual_seed(3)
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    own = {name for name, p in model.named_parameters() if p.requires_grad}
    answer = model(ids).logits
    compressor = built("encoder-pool", model)
    assert torch.equal(model(ids).logits, answer)
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".compressor." not in n} == own
    assert_close(compressor.compress(ids).embeddings, expected, 1e-6)
    assert torch.equal(model(ids).logits, answer)


def test_compressors_that_share_a_model_do_not_touch_each_other() -> None:
    model, ids = llama(), tokens(1, 21)
    first = built("encoder-pool", model)
    alone = first.compress(ids).embeddings
    second = built("encoder-pool", model, seed=2)
    third = built("encoder-tokens", model, seed=3)
    assert [c.adapter.name for c in (first, second, third)] == ["compressor", "compressor-2", "compressor-3"]
    assert torch.equal(first.compress(ids).embeddings, alone)
    assert not torch.equal(second.compress(ids).embeddings, alone)
    second.detach()
    assert torch.equal(first.compress(ids).embeddings, alone)


@torch.no_grad()
def test_slots_have_the_decoders_dtype_and_what_is_learned_is_float32() -> None:
    compressor = built("encoder-pool", llama().bfloat16())
    assert compressor.compress(tokens(1, 21)).embeddings.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in compressor.trainable_parameters()} == {torch.float32}


# Scale


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_slots_begin_at_the_rms_of_the_embeddings(kind: str, family: str) -> None:
    model = BY_NAME[family].make()
    read = model.get_input_embeddings()(torch.arange(64))
    rms = read[read.any(-1)].square().mean().sqrt()
    memory = built(kind, model).compress(tokens(2, 21))
    assert_close(memory.embeddings.square().mean(-1).sqrt(), rms.expand(memory.mask.shape), 1e-4)


def across_contexts(compressor: Compressor[Any]) -> float:
    """Mean cosine of the same slot of different random contexts."""
    slots = F.normalize(compressor.compress(tokens(8, 64)).embeddings, dim=-1)
    cosines = torch.einsum("bmd,cmd->mbc", slots, slots)
    return float((cosines.sum() - cosines.diagonal(dim1=1, dim2=2).sum()) / (cosines.shape[0] * 56))


@torch.no_grad()
def test_seed_003_collapses_and_no_kind_here_does() -> None:
    model = llama()
    table = model.get_input_embeddings().weight
    table *= 0.011 / table.square().mean().sqrt()
    seed = built("crossattention", model, positions="raw", calibrate=False)
    assert across_contexts(seed) > 0.999
    assert seed.compress(tokens(8, 64)).embeddings.square().mean().sqrt() > 10 * 0.011
    for kind in KINDS:
        assert across_contexts(built(kind, model)) < 0.9, kind


# On disk


@pytest.mark.parametrize(("kind", "form"), [*TRAINED, ("pool", "embeddings")])
@torch.no_grad()
def test_saved_and_loaded_it_writes_the_same_slots_bit_for_bit(kind: str, form: str, tmp_path: Path) -> None:
    ids = tokens(2, 21)
    compressor = built(kind, llama(), form=form)
    for parameter in compressor.parameters():
        parameter += 0.1
    compressor.save_pretrained(tmp_path / "c")
    loaded = load_compressor(tmp_path / "c", llama())
    assert torch.equal(numbers(loaded.compress(ids)), numbers(compressor.compress(ids)))
    assert loaded.fingerprint() == compressor.fingerprint()
    assert loaded.config == compressor.config
    assert not [path for path in (tmp_path / "c").iterdir() if path.name.startswith(".")]


def test_peft_reads_its_adapter(tmp_path: Path) -> None:
    compressor = built("encoder-pool", llama())
    compressor.save_pretrained(tmp_path)
    by_peft = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "adapter"))
    ids = tokens(1, 9)
    with adapter_on(compressor):
        assert torch.equal(by_peft(ids).logits, compressor.lm.model(ids).logits)


def test_it_is_refused_for_another_model(tmp_path: Path) -> None:
    built("encoder-pool", llama()).save_pretrained(tmp_path)
    other = llama(seed=7)
    with pytest.raises(CompressorError, match="other weights"):
        load_compressor(tmp_path, other)
    with pytest.raises(CompressorError, match="blocks is 2 there and 3 here"):
        load_compressor(tmp_path, llama(num_hidden_layers=3))
    assert hook_counts(other) == hook_counts(llama())
    load_compressor(tmp_path, llama().bfloat16())


def test_damaged_files_and_failed_saves_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CompressorError, match="holds no compressor"):
        load_compressor(tmp_path, llama())
    compressor = built("encoder-pool", llama())
    compressor.save_pretrained(tmp_path)
    ids = tokens(1, 9)
    before = compressor.compress(ids).embeddings

    def full(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    for parameter in compressor.parameters():
        parameter.data += 1
    with monkeypatch.context() as patch:
        patch.setattr(storage_module, "save_file", full)
        with pytest.raises(OSError, match="disk full"):
            compressor.save_pretrained(tmp_path)
    assert torch.equal(load_compressor(tmp_path, llama()).compress(ids).embeddings, before)

    compressor.projector.up.weight.data[0, 0] = torch.nan
    with pytest.raises(CompressorError, match=r"projector\.up\.weight"):
        compressor.save_pretrained(tmp_path)
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(CompressorError, match="checksum"):
        load_compressor(tmp_path, llama())


# What is refused


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"ratio": 5}, r"ratio 5 .*\(4, 8\)"),
        ({"ratio": 4, "slots": 3}, "two ways"),
        ({"slots": 0}, "at least one slot"),
    ],
)
def test_calls_that_make_no_sense_are_refused(call: dict[str, int], says: str) -> None:
    with pytest.raises(CompressorError, match=says):
        built("pool", llama()).compress(tokens(1, 9), **call)


def test_contexts_that_cannot_be_read_are_refused() -> None:
    mask = torch.ones(3, 9)
    mask[1] = 0
    with pytest.raises(CompressorError, match=r"rows \[1\]"):
        built("pool", llama()).compress(tokens(3, 9), mask)
    with pytest.raises(CompressorError, match=r"\[3, 9\] and \[1, 9\]"):
        built("pool", llama()).compress(tokens(3, 9), torch.ones(1, 9))
    with pytest.raises(CompressorError, match=r"128 positions; split or cut it .*segment_tokens"):
        built("encoder-pool", llama()).compress(tokens(1, 130))
    with pytest.raises(CompressorError, match="128 positions"):
        built("encoder-tokens", llama()).compress(tokens(1, 120))
    built("encoder-pool", llama(), segment_tokens=64).compress(tokens(1, 130))
    built("pool", llama()).compress(tokens(1, 130))
    with pytest.raises(CompressorError, match="max_slots=30"):
        built("encoder-tokens", llama(), max_slots=20).compress(tokens(1, 120))
    with pytest.raises(CompressorError, match="raise slots, or segment_tokens to 11"):
        built("pool", llama(), segment_tokens=8).compress(tokens(1, 32), slots=3)


def test_configurations_that_make_no_sense_are_refused() -> None:
    for changes, says in [
        ({"ratios": ()}, "ratios is empty"),
        ({"ratios": (0,)}, "at least 1"),
        ({"slots": 8, "max_slots": 4}, "raise max_slots"),
        ({"segment_tokens": 20}, "multiple of every ratio"),
        ({"segments": "recursive"}, "segments: concatenate"),
        ({"colour": "red"}, "colour"),
    ]:
        with pytest.raises(ValidationError, match=says):
            PoolConfig(**changes)
    with pytest.raises(ValidationError, match='"layer:k"'):
        CrossAttentionConfig(source="middle")


def test_models_that_cannot_be_read_with_are_refused_and_left_as_they_were() -> None:
    model = llama()
    for config, says in [
        (CrossAttentionConfig(source="layer:9"), "has 2 blocks"),
        (CrossAttentionConfig(heads=5), "must divide"),
        (EncoderPoolConfig(lora=LoraSettings(target_modules=("nothing",))), "no adapter can be put"),
    ]:
        with pytest.raises(CompressorError, match=says):
            build_compressor(config, model)
    assert hook_counts(model) == hook_counts(llama())
    flash = copy.deepcopy(model)
    flash.config._attn_implementation = "flex_attention"
    with pytest.raises(CompressorError, match="sdpa"):
        build_compressor(EncoderPoolConfig(), flash)
