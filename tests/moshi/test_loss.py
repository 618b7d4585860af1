"""Moshi's loss in slices, over packed documents, against Kyutai's forward and a loop over tokens."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import inlay
from inlay import FastWeightConfig
from inlay.moshi.inputs import embed, training_steps
from inlay.moshi.loss import LossConfig, moshi_loss_reference, perplexity
from inlay.moshi.model import MoshiForTraining
from tests.closeness import assert_close, relative_error
from tests.moshi.models import CARD, STREAMS, TEXT_CARD, make_codes, make_lm

CONFIG = LossConfig(first_codebook_weight_multiplier=7.0, text_padding_weight=0.3)
EXACT: dict[str, Any] = {"norm": "rms_norm", "dtype": torch.float64}


def padded_codes(batch: int = 2, frames: int = 40) -> Tensor:
    """Codes as data have them: much padding in the text, and some streams silent."""
    codes = make_codes(batch, frames)
    codes[:, 0, ::3] = 3
    codes[:, 0, 1::6] = 0
    codes[0, 2, 5:9] = -1
    return codes


def reference(lm: Any, codes: Tensor, config: LossConfig = CONFIG) -> tuple[Tensor, Tensor]:
    out = lm(codes)
    valid = torch.cat([out.text_mask, out.mask], dim=1)
    padding = (lm.text_padding_token_id, lm.end_of_text_padding_id)
    return moshi_loss_reference(out.text_logits, out.logits, codes, config, text_padding_ids=padding, valid=valid)


@pytest.mark.parametrize("frames_at_once", [7, 40, 64])
def test_loss_and_every_gradient_are_those_of_kyutais_forward(frames_at_once: int) -> None:
    theirs, codes = make_lm(**EXACT).train(), padded_codes()
    ours = MoshiForTraining(copy.deepcopy(theirs), CONFIG, frames_at_once=frames_at_once, queries_at_once=9)
    result, (text, audio) = ours(codes), reference(theirs, codes)
    assert_close(result.text, text, 1e-7, "text")
    assert_close(result.audio, audio, 1e-7, "audio")
    result.loss.backward()
    (text + audio).backward()
    compared = 0
    for (name, mine), right in zip(ours.lm.named_parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (right.grad is None), name
        if right.grad is not None:
            compared += 1
            assert_close(mine.grad, right.grad, 1e-6, name)
    assert compared > 50


def test_what_is_read_are_the_initial_tokens_and_then_the_delayed_codes() -> None:
    lm, codes = make_lm(), make_codes(1, 6)
    steps = training_steps(lm, codes)
    text, semantic, acoustic = steps.read[0, 0], steps.read[0, 1], steps.read[0, 2]
    assert text.tolist() == [TEXT_CARD, *codes[0, 0, :5].tolist()]
    assert semantic.tolist() == [CARD, *codes[0, 1, :5].tolist()]
    assert acoustic.tolist() == [CARD, CARD, *codes[0, 2, :4].tolist()]
    assert steps.targets[0, 2].tolist() == [0, *codes[0, 2, :5].tolist()]
    assert steps.mask[0, 2].tolist() == [False] + [True] * 5
    assert steps.mask.shape == (1, 9, 6)


def test_each_document_of_a_row_begins_as_a_row_begins() -> None:
    lm, codes = make_lm(), make_codes(1, 30)
    documents = torch.tensor([[0] * 11 + [1] + [2] * 14 + [-1] * 4])
    steps = training_steps(lm, codes, documents)
    for start, end in ((0, 11), (11, 12), (12, 26)):
        alone = training_steps(lm, codes[..., start:end])
        for name in ("read", "said", "targets", "mask"):
            assert torch.equal(getattr(steps, name)[..., start:end], getattr(alone, name)), name
    assert (steps.read[..., 26:] == -1).all()
    assert not steps.mask[..., 26:].any()
    assert not embed(lm, steps.read)[:, 26:].any()


@pytest.mark.filterwarnings("ignore:training on sequences of")
@pytest.mark.parametrize("remembers", [False, True], ids=["plain", "memory"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_packed_documents_give_the_loss_and_gradient_of_each_by_itself(remembers: bool, checkpointing: bool) -> None:
    lm = make_lm(**EXACT).train()
    if remembers:
        memory = inlay.attach(lm, FastWeightConfig(layers=[0, 2], chunk_size=4, eta=0.1))
        for parameter in memory.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        memory.train_only("all")
    lm.transformer.checkpointing = checkpointing
    task = MoshiForTraining(lm, CONFIG, frames_at_once=8, queries_at_once=7)
    lengths = [13, 1, 16, 6]
    codes, documents = make_codes(1, 40), torch.tensor([[0] * 13 + [1] + [2] * 16 + [3] * 6 + [-1] * 4])
    codes[..., 36:] = -1
    packed = task(codes, documents)
    nats = torch.cat([task(part).nats for part in codes[..., :36].split(lengths, dim=2)], dim=2)
    assert_close(packed.nats[..., :36], nats, 1e-6, "nats")
    assert not packed.nats[..., 36:].any()
    weights = torch.rand_like(nats)
    parameters = [p for p in lm.parameters() if p.requires_grad]
    ours = torch.autograd.grad((packed.nats[..., :36] * weights).sum(), parameters, allow_unused=True)
    alone = torch.autograd.grad((nats * weights).sum(), parameters, allow_unused=True)
    for mine, right in zip(ours, alone, strict=True):
        if right is not None:
            assert_close(mine, right, 1e-5, "gradient")


def test_carry_reads_the_documents_of_a_row_as_one() -> None:
    lm, codes = make_lm(), make_codes(1, 40)
    documents = torch.tensor([[0] * 20 + [1] * 20])
    reset, carry = MoshiForTraining(lm), MoshiForTraining(lm, boundary="carry")
    assert torch.equal(carry(codes, documents).nats, carry(codes).nats)
    assert relative_error(reset(codes, documents).nats[..., 20:], reset(codes).nats[..., 20:]) > 1e-2
    inlay.attach(lm, FastWeightConfig(layers=[0], chunk_size=8, boundary="carry"))
    assert reset.boundary == "carry"  # the memory's own


def test_padding_changes_nothing_and_a_batch_of_it_costs_nothing() -> None:
    task, codes = MoshiForTraining(make_lm(), CONFIG), padded_codes(2, 40)
    longer = torch.cat([codes, codes.new_full((2, STREAMS, 9), -1)], dim=2)
    documents = torch.tensor([[0] * 40 + [-1] * 9]).expand(2, -1)
    assert_close(task(longer, documents).loss, task(codes).loss, 1e-6, "padded")
    empty = task(torch.full_like(codes, -1), torch.full((2, 40), -1))
    assert float(empty.loss.detach()) == 0.0


def test_a_padded_row_is_kyutais_but_for_what_is_predicted_from_its_padding() -> None:
    """A short window as moshi-finetune pads it: −1 in every stream behind its end."""
    theirs, codes, end = make_lm(**EXACT).train(), padded_codes(2, 40), 27
    codes[1, :, end:] = -1
    ours = MoshiForTraining(copy.deepcopy(theirs), CONFIG)
    documents = torch.where(codes[:, 1] < 0, -1, 0)
    documents[0] = 0
    result = ours(codes, documents)
    out = theirs(codes)
    mask = out.mask.clone()
    assert mask[1, 1:, end - 1].all()  # predicted at step `end`, of the padding
    mask[1, 1:, end - 1] = False
    padding = (theirs.text_padding_token_id, theirs.end_of_text_padding_id)
    text, audio = moshi_loss_reference(
        out.text_logits,
        out.logits,
        codes,
        CONFIG,
        text_padding_ids=padding,
        valid=torch.cat([out.text_mask, mask], dim=1),
    )
    assert_close(result.text, text, 1e-7, "text")
    assert_close(result.audio, audio, 1e-7, "audio")
    result.loss.backward()
    (text + audio).backward()
    for (name, mine), right in zip(ours.lm.named_parameters(), theirs.parameters(), strict=True):
        if right.grad is not None:
            assert_close(mine.grad, right.grad, 1e-6, name)


def test_weights_count_as_the_paper_says() -> None:
    lm, codes = make_lm(), padded_codes()
    nats = MoshiForTraining(lm)(codes).nats.detach()
    steps = training_steps(lm, codes)
    for config in (LossConfig(first_codebook_weight_multiplier=100.0), LossConfig(text_padding_weight=0.0)):
        result = MoshiForTraining(lm, config)(codes)
        text = [
            (float(nats[b, 0, t]), config.text_padding_weight if int(steps.targets[b, 0, t]) in (0, 3) else 1.0)
            for b, t in steps.mask[:, 0].nonzero().tolist()
        ]
        assert result.text.item() == pytest.approx(sum(n * w for n, w in text) / sum(w for _, w in text), rel=1e-5)
        audio = [
            (float(nats[b, k, t]), config.first_codebook_weight_multiplier if k == 1 else 1.0)
            for b, k, t in steps.mask.nonzero().tolist()
            if k > 0
        ]
        assert result.audio.item() == pytest.approx(sum(n * w for n, w in audio) / sum(w for _, w in audio), rel=1e-5)


def test_logits_of_more_frames_than_a_slice_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm().train()
    lengths, cross_entropy = [], torch.nn.functional.cross_entropy

    def counted(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lengths.append(logits.shape[0])
        return cross_entropy(logits, *args, **kwargs)

    monkeypatch.setattr("torch.nn.functional.cross_entropy", counted)
    MoshiForTraining(lm, frames_at_once=8)(make_codes(1, 100)).loss.backward()
    assert max(lengths) == 8
    assert len(lengths) == 2 * 13 * 9  # each slice of each stream, and again in the backward


def test_restore_gives_the_model_its_own_forward_back() -> None:
    lm = make_lm(gradient_checkpointing=True)
    task = MoshiForTraining(lm)
    assert lm.depformer.checkpointing is False
    assert task.restore() is lm
    assert lm.depformer.checkpointing is True
    assert lm.transformer.checkpointing is True
    assert not any("forward" in module.__dict__ for module in lm.modules())


def test_what_does_not_fit_is_refused() -> None:
    task = MoshiForTraining(make_lm())
    with pytest.raises(inlay.InlayError, match=r"17 streams.*got \[1, 8, 5\]"):
        task(torch.zeros(1, 8, 5, dtype=torch.long))
    with pytest.raises(inlay.InlayError, match=r"documents must be \[B, T\] = \[1, 5\]"):
        task(make_codes(1, 5), torch.zeros(1, 6, dtype=torch.long))
    with task.lm.streaming(1), pytest.raises(inlay.InlayError, match="is streaming"):
        task(make_codes(1, 5))


@pytest.mark.parametrize("kind", ["sin", "sin_rope"])
def test_packed_documents_are_refused_where_positions_are_counted_from_the_rows_start(kind: str) -> None:
    lm, codes, alone = (
        make_lm(positional_embedding=kind),
        make_codes(2, 12),
        torch.tensor([[0] * 12, [0] * 7 + [-1] * 5]),
    )
    packed = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    task = MoshiForTraining(lm)
    with pytest.raises(inlay.InlayError, match=r"positional_embedding: sin\).* use data\.packing: cut"):
        task(codes, packed)
    task(codes, alone)
    MoshiForTraining(task.restore(), boundary="carry")(codes, packed)


def test_perplexity_is_e_to_the_nats() -> None:
    assert perplexity(math.log(50)) == pytest.approx(50)
