"""Moshi's training loss, as in moshi-finetune, without its logits for all frames at once.

Cross-entropy in nats of every predicted token, weighted and divided by the sum of the weights, text and audio apart:

    L = Σ w_text · CE / Σ w_text  +  Σ w_audio · CE / Σ w_audio

    w_text   text_padding_weight for the padding and end-of-padding tokens, else 1
    w_audio  first_codebook_weight_multiplier for Moshi's first (semantic) codebook, else 1

and 0 where nothing is predicted. At T = 32,000 the text logits alone would be 4 GB in float32, and the depformer has
T rows of 8 steps. So hidden states are taken in slices of frames: each makes its logits, keeps the cross-entropy of its
tokens ``[B, 9, frames]``, and makes the rest again in the backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from moshi.utils.compile import no_compile
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from inlay.moshi.inputs import Steps

SLICE = 256
"""Frames whose logits exist at once: 50 MB in float32 for the 7B."""


class LossConfig(BaseModel):
    """The weights of the loss, under moshi-finetune's names."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    first_codebook_weight_multiplier: float = Field(default=1.0, ge=0)
    """Weight of Moshi's first codebook among its eight (100 in the Moshi paper, 1 in moshi-finetune's code)."""

    text_padding_weight: float = Field(default=0.5, ge=0)
    """Weight of padding and end of padding in the text stream."""


@dataclass(frozen=True)
class MoshiLoss:
    """The loss of a batch.

    Attributes:
        loss: Text and audio together, what is trained on.
        text: Mean nats of a text token, weighted.
        audio: Mean nats of an audio token, weighted.
        nats: ``[B, Q + 1, T]`` cross-entropy of each predicted token, text first; 0 where nothing is predicted.
        mask: ``[B, Q + 1, T]`` where something is predicted.
    """

    loss: Tensor
    text: Tensor
    audio: Tensor
    nats: Tensor
    mask: Tensor


SliceNats: TypeAlias = Callable[[LMModel, Tensor, Tensor, Tensor], Tensor]
"""Makes the nats of a slice of frames: see :func:`recomputed_nats`."""


def moshi_loss(
    lm: LMModel,
    hidden: Tensor,
    steps: Steps,
    config: LossConfig,
    *,
    frames_at_once: int = SLICE,
    slice_nats: SliceNats | None = None,
) -> MoshiLoss:
    """The loss of hidden states.

    Args:
        lm: Makes text logits and, with its depformer, audio logits.
        hidden: ``[B, T, D]`` the main transformer's normed output.
        steps: What is predicted.
        config: The weights.
        frames_at_once: Frames of a slice.
        slice_nats: :func:`recomputed_nats`, or what stands in for it.
    """
    of_slice = slice_nats or recomputed_nats
    parts = [
        of_slice(lm, *part)
        for part in zip(
            torch.split(hidden, frames_at_once, 1),
            torch.split(steps.said, frames_at_once, 2),
            torch.split(steps.targets, frames_at_once, 2),
            strict=True,
        )
    ]
    nats = torch.cat(parts, dim=2).masked_fill(~steps.mask, 0)
    weights = token_weights(lm, steps, config)
    text, audio = (_mean(nats[:, at], weights[:, at]) for at in (slice(0, 1), slice(1, None)))
    return MoshiLoss(text + audio, text, audio, nats, steps.mask)


def token_weights(lm: LMModel, steps: Steps, config: LossConfig) -> Tensor:
    """``[B, Q + 1, T]`` float32: what each predicted token counts for."""
    weights = steps.mask.float()
    padding = (steps.targets[:, 0] == lm.text_padding_token_id) | (steps.targets[:, 0] == lm.end_of_text_padding_id)
    weights[:, 0] *= torch.where(padding, config.text_padding_weight, 1.0)
    if weights.shape[1] > 1:
        weights[:, 1] *= config.first_codebook_weight_multiplier
    return weights


def _mean(nats: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean; 0 where there is nothing to weigh, rather than 0/0."""
    total = weights.sum()
    return (nats * weights).sum() / torch.where(total > 0, total, 1.0)


def recomputed_nats(lm: LMModel, hidden: Tensor, said: Tensor, targets: Tensor) -> Tensor:
    """``[B, Q + 1, S]`` cross-entropy in nats, keeping nothing else for the backward.

    Args:
        lm: Makes the logits.
        hidden: ``[B, S, D]``.
        said: ``[B, K, S]`` what the streams say.
        targets: ``[B, Q + 1, S]``.
    """
    if not torch.is_grad_enabled():
        return _slice_nats(lm, hidden, said, targets)
    out: Tensor = checkpoint(
        _slice_nats, lm, hidden, said, targets, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
    )
    return out


def _slice_nats(lm: LMModel, hidden: Tensor, said: Tensor, targets: Tensor) -> Tensor:
    """``[B, Q + 1, S]`` cross-entropy in nats of ``targets`` given ``hidden [B, S, D]`` and what was ``said``."""
    with uncompiled(hidden.device):
        logits = [lm.text_linear(hidden)]
        if lm.depformer is not None:
            logits += lm.forward_depformer_training(said, hidden).unbind(1)
    nats = [
        F.cross_entropy(_single(one).flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
        for one, wanted in zip(logits, targets.unbind(1), strict=True)
    ]
    return torch.stack(nats, dim=1)


def _single(logits: Tensor) -> Tensor:
    """In float32, or as they are if they are finer."""
    return logits if logits.dtype == torch.float64 else logits.float()


@contextmanager
def uncompiled(device: torch.device) -> Iterator[None]:
    """Off CUDA, run Kyutai's small kernels as they are: compiling them there takes longer than it saves."""
    with ExitStack() as stack:
        if device.type != "cuda":
            stack.enter_context(no_compile())
        yield


def perplexity(nats: float) -> float:
    """e^nats, of a mean cross-entropy in nats (moshi-finetune's evaluation takes 2 to that power)."""
    return math.exp(min(nats, 700.0))


def moshi_loss_reference(
    text_logits: Tensor,
    logits: Tensor,
    codes: Tensor,
    config: LossConfig,
    *,
    text_padding_ids: tuple[int, ...],
    valid: Tensor,
) -> tuple[Tensor, Tensor]:
    """Text and audio loss token by token, for one document per row, from the logits of ``LMModel.forward``.

    Args:
        text_logits: ``[B, 1, T, text_card]``.
        logits: ``[B, Q, T, card]``.
        codes: ``[B, K, T]``.
        config: The weights.
        text_padding_ids: Padding and end of padding.
        valid: ``[B, Q + 1, T]`` where the model's output and the code mean something.
    """
    sums, weights = [0.0 * logits.new_zeros(()), 0.0 * logits.new_zeros(())], [0.0, 0.0]
    for row in range(codes.shape[0]):
        for stream in range(logits.shape[1] + 1):
            for frame in range(codes.shape[2]):
                if not valid[row, stream, frame]:
                    continue
                code = int(codes[row, stream, frame])
                one = text_logits[row, 0, frame] if stream == 0 else logits[row, stream - 1, frame]
                weight = 1.0
                if stream == 0 and code in text_padding_ids:
                    weight = config.text_padding_weight
                if stream == 1:
                    weight = config.first_codebook_weight_multiplier
                kind = min(stream, 1)
                sums[kind] = sums[kind] - weight * one.double().log_softmax(-1)[code]
                weights[kind] += weight
    return sums[0] / weights[0], sums[1] / weights[1]
