"""What Moshi reads and what it is to predict at each step, for sequences that may hold several documents.

At step s the transformer reads what all streams said at step s − 1, and predicts what they say at step s; the first
step of a document reads the initial tokens. A stream k is delayed by d_k steps (Moshi's acoustic codes by 1): at step s
it says the code of frame s − d_k, and its initial token where that lies before the document.

    step          0     1     2      3
    read          ∅     t0 ∅  t1 a0  t2 a1        text t without a delay, acoustic code a with one
    predicted     t0    t1 a0 t2 a1  t3 a2        (∅ is never predicted)

``LMModel.forward`` does this for one document per row. Here every document of a row begins as a row does there, and so
as a stream begins: nothing of one document is read in the next. Padding reads nothing and is never predicted, nor is
anything predicted from it: the acoustic codes of a document's last frame, which would come one step behind its end, are
left out of the loss whether padding follows or not. moshi-finetune leaves them out of a full window alone; in a padded
one it predicts them from the first padded step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moshi.models.lm import LMModel
from torch import Tensor

from inlay.fastweight.errors import InlayError
from inlay.moshi.attention import document_starts


@dataclass(frozen=True)
class Steps:
    """A batch step by step; K streams, of which Q + 1 are predicted (the text and Moshi's own codebooks).

    Attributes:
        read: ``[B, K, T]`` what the transformer reads; −1 reads nothing.
        said: ``[B, K, T]`` what the streams say at each step, delays included: the depformer's own inputs.
        targets: ``[B, Q + 1, T]`` what is predicted, text first; 0 where nothing is.
        mask: ``[B, Q + 1, T]`` where something is predicted.
    """

    read: Tensor
    said: Tensor
    targets: Tensor
    mask: Tensor


def training_steps(lm: LMModel, codes: Tensor, documents: Tensor | None = None) -> Steps:
    """Lay a batch of codes out step by step.

    Args:
        lm: Says the delays, the initial tokens and how many codebooks are predicted.
        codes: ``[B, K, T]`` text, then Moshi's codebooks, then the user's; −1 where a stream says nothing.
        documents: ``[B, T]`` ids, −1 for padding; None: every row is one document.

    Raises:
        InlayError: The codes are not of this model's streams.
    """
    if codes.dim() != 3 or codes.shape[1] != lm.num_codebooks:
        raise InlayError(
            f"this model has {lm.num_codebooks} streams (text, then {lm.n_q} codebooks), so codes are "
            f"[B, {lm.num_codebooks}, T]; got {[*codes.shape]}"
        )
    batch, streams, length = codes.shape
    step = torch.arange(length, device=codes.device).expand(batch, 1, length)
    start = torch.zeros_like(step) if documents is None else document_starts(documents).unsqueeze(1)
    delays = torch.tensor(lm.delays).to(codes.device, non_blocking=True).view(1, streams, 1)
    initial = torch.full((1, streams, 1), lm.initial_token_id, device=codes.device)
    initial[:, 0] = lm.text_initial_token_id

    frame = step - delays
    began = frame >= start
    said = torch.where(began, codes.gather(2, frame.clamp(min=0)), initial)
    before = said.gather(2, (step - 1).clamp(min=0).expand_as(said))
    read = torch.where(step == start, initial, before)
    if documents is not None:
        padding = (documents < 0).unsqueeze(1)
        read, said = read.masked_fill(padding, lm.zero_token_id), said.masked_fill(padding, lm.zero_token_id)
    predicted = lm.dep_q + lm.audio_offset
    targets = said[:, :predicted]
    mask = began[:, :predicted] & (targets != lm.zero_token_id)
    return Steps(read, said, targets.masked_fill(~mask, 0), mask)


def embed(lm: LMModel, read: Tensor) -> Tensor:
    """The sum of the streams' embeddings ``[B, T, D]`` of ``read`` ``[B, K, T]``, in the order of Kyutai's forward."""
    total: Tensor | None = None
    for book in range(lm.num_audio_codebooks):
        embedding = lm.emb[book](read[:, book + lm.audio_offset])
        total = embedding if total is None else total + embedding
    text: Tensor = lm.text_emb(read[:, 0])
    return text if total is None else total + text
