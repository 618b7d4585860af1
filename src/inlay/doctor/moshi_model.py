"""Kyutai's Moshi as the doctor's examinations know a model: a causal LM over frames.

At step s Moshi reads what all streams said at step s − 1 and predicts what they say at step s. So a *token* of the
examinations is what one step reads, ``[K]`` codes; the logits of step s are those of the text, and what they
are to say is the label of step s + 1, which reads it. The loss is that of the training: text and audio, with the
recipe's weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from inlay.data.packing import NO_LABEL
from inlay.evaluate.scoring import device_of
from inlay.moshi.inputs import embed, training_steps
from inlay.moshi.model import MoshiForTraining
from inlay.moshi.sequences import MoshiSequences, collate_sequences


class MoshiCausalLM(nn.Module):
    """A :class:`~inlay.moshi.model.MoshiForTraining` that is called as a causal LM of transformers is.

    Args:
        task: The language model with its loss.
    """

    def __init__(self, task: MoshiForTraining) -> None:
        super().__init__()
        self.task = task

    def batch(self, codes: Tensor, documents: Tensor) -> dict[str, Tensor]:
        """What the examinations take, of a batch of :func:`inlay.moshi.sequences.collate_sequences`.

        Args:
            codes: ``[B, K, T]``.
            documents: ``[B, T]`` ids, −1 on padding.

        Returns:
            ``input_ids`` ``[B, T, K]`` what each step reads, ``labels`` ``[B, T]`` the text that the step before is to
            predict, ``document_ids`` ``[B, T]``, and ``codes``, which make the loss.
        """
        steps = training_steps(self.task.lm, codes, self.task.told_apart(documents))
        predicted = steps.targets[:, 0].masked_fill(~steps.mask[:, 0], NO_LABEL)
        labels = F.pad(predicted[:, :-1], (1, 0), value=NO_LABEL)  # transformers' convention: a label is not shifted
        return {"input_ids": steps.read.mT, "labels": labels, "document_ids": documents, "codes": codes}

    def sample(self, sequences: MoshiSequences, rows: int, seed: int) -> dict[str, Tensor]:
        """Such a batch of ``rows`` sequences, drawn by ``seed``, where the model is."""
        chosen = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))[:rows].tolist()
        batch = collate_sequences([sequences[index] for index in chosen])
        device = device_of(self)
        return self.batch(batch["codes"].to(device), batch["documents"].to(device))

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        codes: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int = 0,
        use_cache: bool = False,
    ) -> CausalLMOutput:
        """Of ``codes`` the training loss, without logits; without them the text logits ``[B, T, text_card]``.

        Args:
            input_ids: ``[B, T, K]`` what each step reads; the loss reads ``codes`` alone.
            labels: Not used: the loss knows its targets from ``codes``.
            document_ids: ``[B, T]``.
            codes: ``[B, K, T]``.
            position_ids: Not used: attention keeps documents apart by their ids.
            logits_to_keep: Logits of the last positions alone; 0 for all.
            use_cache: Not used: nothing is cached.
        """
        if codes is not None:
            return CausalLMOutput(loss=self.task(codes, document_ids).loss)
        lm: Any = self.task.lm
        hidden = self.task.hidden(embed(lm, input_ids.mT), self.task.told_apart(document_ids))
        return CausalLMOutput(logits=lm.text_linear(hidden[:, -logits_to_keep:]))
