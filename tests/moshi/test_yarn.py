"""YaRN against transformers' own, and in Kyutai's attention."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import inlay
from inlay.moshi.attention import use_windowed_attention
from inlay.moshi.yarn import YarnConfig, YarnRotaryEmbedding, apply_yarn, rotate, yarn_frequencies
from tests.closeness import assert_close, relative_error
from tests.moshi.models import make_codes, make_lm, outputs


@pytest.mark.parametrize(
    ("head_dim", "context", "factor", "options"),
    [
        (128, 3000, 2.0, {}),
        (128, 3000, 8.0, {}),
        (128, 3000, 4.5, {"beta_fast": 16.0, "beta_slow": 2.0}),
        (64, 250, 3.0, {"attention_factor": 1.25}),
        (8, 12, 2.0, {}),
        (8, 7, 2.0, {}),
    ],
)
def test_frequencies_and_scaling_are_those_of_transformers(
    head_dim: int, context: int, factor: float, options: dict[str, float]
) -> None:
    rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": context, "rope_theta": 10_000.0}
    config = transformers.LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        max_position_embeddings=round(context * factor),
        rope_parameters=rope | options,
    )
    expected, scaling = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    ours, our_scaling = yarn_frequencies(YarnConfig(factor=factor, **options), head_dim, 10_000.0, context)
    assert_close(ours, expected, 1e-6, "frequencies")
    assert our_scaling == pytest.approx(scaling, rel=1e-12)


def test_pairs_side_by_side_turn_like_transformers_halves() -> None:
    head_dim, frames = 16, 50
    frequencies, scaling = yarn_frequencies(YarnConfig(factor=2.0), head_dim, 10_000.0, 40)
    rope = YarnRotaryEmbedding(frequencies, scaling, interleave=True, max_period=10_000.0)
    q, k = torch.randn(2, 3, frames, head_dim), torch.randn(2, 3, frames, head_dim)
    turned = rotate(rope, q, k, torch.arange(frames).unsqueeze(0))
    angle = torch.arange(frames).unsqueeze(1) * torch.cat([frequencies, frequencies])
    cos, sin = angle.cos() * scaling, angle.sin() * scaling
    order = torch.cat([torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)])  # pairs, as halves
    for ours, x in zip(turned, (q, k), strict=True):
        halves = x[..., order]
        rotated = torch.cat([-halves[..., head_dim // 2 :], halves[..., : head_dim // 2]], dim=-1)
        assert_close(ours[..., order], halves * cos + rotated * sin, 1e-6, "as apply_rotary_pos_emb")


def test_applied_it_widens_the_window_and_is_taken_off_without_a_trace() -> None:
    lm, codes = make_lm(), make_codes(1, 30)
    before, rope = outputs(lm, codes)[1], lm.transformer.rope
    undo = apply_yarn(lm, YarnConfig(factor=2.0))
    assert {layer.self_attn.context for layer in lm.transformer.layers} == {24}
    assert all(layer.self_attn.rope is lm.transformer.rope for layer in lm.transformer.layers)
    theirs = outputs(lm, codes)[1]
    assert relative_error(theirs, before) > 1e-3
    off = use_windowed_attention(lm.transformer, block=5)
    assert_close(outputs(lm, codes)[1], theirs, 1e-5, "in blocks")
    off()
    undo()
    assert lm.transformer.rope is rope
    assert lm.context == 12
    assert torch.equal(outputs(lm, codes)[1], before)


def test_a_stream_of_frames_gives_what_the_whole_forward_gives() -> None:
    lm, codes = make_lm(), make_codes(2, 30)
    apply_yarn(lm, YarnConfig(factor=1.5))
    whole = lm.forward_text(codes)[0]
    with lm.streaming(2), torch.no_grad():
        steps = [lm.forward_text(codes[:, :, t : t + 1])[0] for t in range(30)]
    assert_close(torch.cat(steps, 1), whole, 1e-5, "streaming")


def test_the_cast_of_a_model_does_not_round_its_frequencies() -> None:
    lm = make_lm()
    apply_yarn(lm, YarnConfig(factor=2.0))
    before = lm.transformer.rope.frequencies(8, torch.device("cpu")).clone()
    lm.to(torch.bfloat16)
    assert torch.equal(lm.transformer.rope.frequencies(8, torch.device("cpu")), before)


def test_what_it_cannot_stretch_is_refused() -> None:
    with pytest.raises(inlay.InlayError, match="positions are 'sin'"):
        apply_yarn(make_lm(positional_embedding="sin"), YarnConfig(factor=2.0))
    with pytest.raises(inlay.InlayError, match="original_context"):
        apply_yarn(make_lm(context=None), YarnConfig(factor=2.0))
    lm = make_lm()
    with lm.streaming(1), pytest.raises(inlay.InlayError, match="streaming"):
        apply_yarn(lm, YarnConfig(factor=2.0))
    apply_yarn(lm, YarnConfig(factor=2.0))
    with pytest.raises(inlay.InlayError, match="has YaRN already"):
        apply_yarn(lm, YarnConfig(factor=2.0))
    with pytest.raises(ValueError, match="beta_fast must be above"):
        YarnConfig(factor=2.0, beta_fast=1.0)
    assert yarn_frequencies(YarnConfig(factor=4.0), 8, 1e4, 12)[1] == pytest.approx(0.1 * math.log(4) + 1)
