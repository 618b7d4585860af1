"""Kyutai's ``LMModel`` with its training loss, for long sequences of codes.

What ``LMModel.forward`` does in one piece is done here so that it fits: attention in blocks, norms and logits in
slices, each document of a sequence begun as a stream begins. For one short document per row it gives the same loss, to
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from moshi.models.lm import LMModel
from torch import Tensor, nn

from inlay.fastweight import Memory, find_memory
from inlay.fastweight.checkpointing import checkpoint_blocks
from inlay.fastweight.errors import InlayError
from inlay.moshi.attention import QUERIES, attention_within, use_windowed_attention
from inlay.moshi.inputs import embed, training_steps
from inlay.moshi.loss import SLICE, LossConfig, MoshiLoss, SliceNats, moshi_loss, uncompiled
from inlay.moshi.norm import use_sliced_norms
from inlay.moshi.weights import is_conditioned

PACKED = (
    "this model adds to a frame its place in the sequence (positional_embedding: sin), so several documents in one "
    "would be learnt at places that a stream does not have: use data.packing: cut, or boundary: carry"
)
"""What is said of packed documents that such a model cannot tell apart."""


class MoshiForTraining(nn.Module):
    """A Moshi whose forward is a loss.

    The language model stays the caller's own. While this module is in use, the attention of its main transformer runs
    in blocks, its norms in slices, and its depformer leaves checkpointing to the loss; :meth:`restore` gives all back.

    Attributes:
        lm: The language model; with its memory, if it has one.
        loss_config: The weights of the loss.

    Args:
        lm: The language model.
        config: The weights of the loss.
        boundary: Whether the documents of a sequence are kept apart (``reset``) or read as one (``carry``): in the
            inputs, in attention and in the memory. With a memory its own is used.
        frames_at_once: Frames whose logits exist at once.
        queries_at_once: Queries in a block of attention.
        most_blocks: See :func:`inlay.moshi.attention.use_windowed_attention`.
        slice_nats: See :func:`inlay.moshi.loss.moshi_loss`.

    Raises:
        InlayError: The model is conditioned, or has attention that cannot run in blocks.
    """

    def __init__(
        self,
        lm: LMModel,
        config: LossConfig | None = None,
        *,
        boundary: Literal["reset", "carry"] = "reset",
        frames_at_once: int = SLICE,
        queries_at_once: int = QUERIES,
        most_blocks: int | None = None,
        slice_nats: SliceNats | None = None,
    ) -> None:
        super().__init__()
        if is_conditioned(lm):
            raise InlayError("this model is conditioned (it has a fuser); training with conditions is not supported")
        self.lm = lm
        self.loss_config = config or LossConfig()
        self._boundary: Literal["reset", "carry"] = boundary
        self._frames_at_once = frames_at_once
        self._slice_nats = slice_nats
        undo_attention = use_windowed_attention(lm.transformer, block=queries_at_once, most_blocks=most_blocks)
        before = lm.depformer.checkpointing if lm.depformer is not None else False
        if lm.depformer is not None:
            lm.depformer.checkpointing = False
        norms = [*lm.transformer.modules()] + [lm.out_norm] * (lm.out_norm is not None)
        self._undo: list[Callable[[], None]] = [undo_attention, use_sliced_norms(norms)]
        if before:
            self._undo.append(lambda: setattr(lm.depformer, "checkpointing", True))

    @property
    def memory(self) -> Memory | None:
        """The memory of the language model."""
        return find_memory(self.lm)

    @property
    def boundary(self) -> Literal["reset", "carry"]:
        """Whether the documents of a sequence are kept apart."""
        memory = self.memory
        return self._boundary if memory is None else memory.config.boundary

    def restore(self) -> LMModel:
        """Give the language model its own attention and checkpointing back. Returns it."""
        while self._undo:
            self._undo.pop()()
        return self.lm

    def forward(self, codes: Tensor, documents: Tensor | None = None) -> MoshiLoss:
        """The loss of a batch.

        Args:
            codes: ``[B, K, T]`` text, Moshi's codebooks, the user's; −1 on padding.
            documents: ``[B, T]`` ids, −1 on padding; None: every row is one document.

        Raises:
            InlayError: Shapes do not fit, or the model is streaming.
        """
        if self.lm.is_streaming:
            raise InlayError("the model is streaming; train outside lm.streaming(…)")
        if documents is not None and documents.shape != codes[:, 0].shape:
            raise InlayError(f"documents must be [B, T] = {[*codes[:, 0].shape]}; got {[*documents.shape]}")
        documents = self.told_apart(documents)
        steps = training_steps(self.lm, codes, documents)
        hidden = self.hidden(embed(self.lm, steps.read), documents)
        return moshi_loss(
            self.lm,
            hidden,
            steps,
            self.loss_config,
            frames_at_once=self._frames_at_once,
            slice_nats=self._slice_nats,
        )

    def hidden(self, x: Tensor, documents: Tensor | None) -> Tensor:
        """The main transformer's normed output ``[B, T, D]`` of embeddings ``x`` ``[B, T, D]``."""
        memory = self.memory
        known = {} if memory is None or documents is None else {"document_ids": documents}
        with attention_within(documents), uncompiled(x.device), self._checkpointing(memory):
            out: Tensor = self.lm.transformer(x, **known)
            return self.lm.out_norm(out) if self.lm.out_norm else out

    @contextmanager
    def _checkpointing(self, memory: Memory | None) -> Iterator[None]:
        """Kyutai's own checkpointing forgets the documents; a memory sees to that, without one it is done here."""
        transformer = self.lm.transformer
        if memory is not None or not transformer.checkpointing:
            yield
            return
        undo = checkpoint_blocks(transformer, "checkpointing", transformer.layers)
        try:
            yield
        finally:
            undo()

    def told_apart(self, documents: Tensor | None) -> Tensor | None:
        """The documents ``[B, T]`` that are told apart; None where every row is one without padding.

        Raises:
            InlayError: A row has several, which this model's positions do not tell apart.
        """
        if documents is None:
            return None
        if self.boundary == "carry":
            documents = documents.clamp(max=0)
        if bool((documents == documents[:, :1]).all() & (documents >= 0).all()):
            return None
        if counts_positions(self.lm) and bool(((documents != documents[:, :1]) & (documents >= 0)).any()):
            raise InlayError(PACKED)
        return documents


def counts_positions(lm: LMModel) -> bool:
    """Whether a frame's place in its row is added to it, so that a document behind another is not as by itself."""
    return lm.transformer.positional_embedding in ("sin", "sin_rope")
