"""Windowed attention against Kyutai's own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from moshi.modules.rope import RotaryEmbedding
from moshi.modules.transformer import StreamingMultiheadAttention
from torch import Tensor

import inlay
from inlay import FastWeightConfig
from inlay.fastweight.checkpointing import checkpoint_blocks
from inlay.moshi.attention import attention_within, document_starts, use_windowed_attention, windowed_attention
from tests.closeness import assert_close, relative_error
from tests.moshi.models import make_codes, make_lm, outputs


def qkv(frames: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(frames)
    return [torch.randn(2, 3, frames, 8, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


def reference(q: Tensor, k: Tensor, v: Tensor, context: int | None, documents: Tensor | None = None) -> Tensor:
    """Query by query and key by key."""
    rows = []
    for t in range(q.shape[2]):
        first = 0 if context is None else max(0, t - context + 1)
        scores = (q[:, :, t : t + 1] @ k[:, :, first : t + 1].mT) / q.shape[-1] ** 0.5
        if documents is not None:
            other = documents[:, first : t + 1] != documents[:, t : t + 1]
            scores = scores.masked_fill(other[:, None, None], -torch.inf)
        rows.append(scores.softmax(-1) @ v[:, :, first : t + 1])
    return torch.cat(rows, 2)


@pytest.mark.parametrize("frames", [1, 7, 12, 13, 63, 257])
@pytest.mark.parametrize("context", [1, 12, 100, None])
@pytest.mark.parametrize("block", [5, 16])
@pytest.mark.parametrize("packed", [False, True])
def test_output_and_gradients_are_those_of_attention_query_by_query(
    frames: int, context: int | None, block: int, packed: bool
) -> None:
    documents = None
    if packed:
        documents = torch.stack([torch.arange(frames) // 11, torch.arange(frames) // 30])
        documents[0, -3:] = -1
    inputs = qkv(frames)
    grad = torch.randn_like(inputs[0])
    out = windowed_attention(*inputs, context, documents=documents, block=block)
    expected = reference(*inputs, context, documents)
    assert_close(out, expected, 1e-12, "output")
    ours, theirs = (torch.autograd.grad(x, inputs, grad) for x in (out, expected))
    for name, mine, right in zip("qkv", ours, theirs, strict=True):
        assert_close(mine, right, 1e-10, f"gradient of {name}")


@pytest.mark.parametrize("frames", [9, 12, 40, 101])
@pytest.mark.parametrize("changes", [{}, {"kv_repeat": 2}, {"context": None}, {"rope": None}], ids=str)
def test_the_module_gives_what_kyutais_gives(frames: int, changes: dict[str, object]) -> None:
    settings = {"causal": True, "context": 12, "rope": RotaryEmbedding(interleave=True)} | changes
    theirs = StreamingMultiheadAttention(16, 2, **settings)
    ours = copy.deepcopy(theirs)

    class Layers(torch.nn.Module):  # what use_windowed_attention asks of a transformer
        layers = ()

    block = torch.nn.Module()
    block.self_attn = ours
    transformer = Layers()
    transformer.layers = [block]
    use_windowed_attention(transformer, block=7)
    x = torch.randn(2, frames, 16)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = ours(a, a, a), theirs(b, b, b)
    assert_close(out, expected, 1e-6, "output")
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(a.grad, b.grad, 1e-5, "input's gradient")
    for (name, mine), right in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_close(mine.grad, right.grad, 1e-5, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_model_gives_kyutais_logits_in_blocks(dtype: torch.dtype) -> None:
    lm, codes = make_lm(dtype=dtype), make_codes(2, 90)
    theirs = outputs(lm, codes)
    use_windowed_attention(lm.transformer, block=16)
    for ours, right in zip(outputs(lm, codes), theirs, strict=True):
        assert_close(ours, right, 1e-5 if dtype == torch.float32 else 2e-2, "logits")


def test_documents_are_attended_to_as_if_each_were_alone() -> None:
    lm = make_lm()
    use_windowed_attention(lm.transformer, block=8)
    x, lengths = torch.randn(1, 50, 16), [13, 1, 25, 11]
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).unsqueeze(0)
    assert document_starts(documents)[0].tolist() == [0] * 13 + [13] + [14] * 25 + [39] * 11
    with attention_within(documents):
        packed = lm.transformer(x)
    alone = torch.cat([lm.transformer(part) for part in x.split(lengths, dim=1)], dim=1)
    assert_close(packed, alone, 1e-6, "packed against alone")
    assert relative_error(lm.transformer(x), alone) > 1e-2


def test_a_checkpointed_backward_sees_the_documents_of_its_forward() -> None:
    x, first, second = torch.randn(1, 30, 16), torch.arange(30) // 10, torch.arange(30) // 7
    gradients = []
    for checkpointing in (False, True):
        lm = make_lm().train()
        use_windowed_attention(lm.transformer, block=8)
        losses = []
        undo = checkpoint_blocks(lm.transformer, "checkpointing", lm.transformer.layers) if checkpointing else None
        for documents in (first, second):
            with attention_within(documents.unsqueeze(0)):
                losses.append(lm.transformer(x).pow(2).mean())
        if undo is not None:
            undo()
        sum(losses).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in lm.transformer.parameters()]))
    assert_close(gradients[1], gradients[0], 1e-6, "gradient")


def test_streaming_and_the_depformer_keep_kyutais_forward() -> None:
    lm, codes = make_lm(), make_codes(1, 30)
    with torch.no_grad():
        with lm.streaming(1):
            before = [lm.forward_text(codes[:, :, t : t + 1])[1] for t in range(30)]
        undo = use_windowed_attention(lm.transformer)
        assert not any("forward" in layer.self_attn.__dict__ for layer in lm.depformer.layers)
        with lm.streaming(1):
            after = [lm.forward_text(codes[:, :, t : t + 1])[1] for t in range(30)]
    assert torch.equal(torch.cat(before), torch.cat(after))
    undo()
    assert not any("forward" in layer.self_attn.__dict__ for layer in lm.transformer.layers)
    with pytest.raises(inlay.InlayError, match="one set of weights"):
        use_windowed_attention(lm.depformer)
    with pytest.raises(inlay.InlayError, match="at least one query"):
        use_windowed_attention(lm.transformer, block=0)


def test_lora_in_the_projections_is_called() -> None:
    from moshi.modules.lora import replace_all_linear_with_lora

    lm, codes = make_lm(), make_codes(1, 40)
    replace_all_linear_with_lora(lm, rank=2, scaling=2.0)
    theirs = outputs(lm, codes)[1]
    use_windowed_attention(lm.transformer, block=8)
    assert_close(outputs(lm, codes)[1], theirs, 1e-5, "with LoRA")


def test_with_a_memory_and_checkpointing_the_gradients_are_kyutais() -> None:
    codes, gradients = make_codes(2, 50), []
    for blocks in (False, True):
        lm = make_lm().train()
        memory = inlay.attach(lm, FastWeightConfig(layers=[1, 3], chunk_size=8, eta=0.1))
        memory.train_only("all")
        lm.transformer.checkpointing = True
        if blocks:
            use_windowed_attention(lm.transformer, block=8)
        audio, text = outputs(lm, codes)
        (F.silu(audio).mean() + F.silu(text).mean()).backward()
        gradients.append(torch.cat([p.grad.flatten() for _, p in lm.named_parameters() if p.grad is not None]))
    assert_close(gradients[1], gradients[0], 1e-5, "gradient")
