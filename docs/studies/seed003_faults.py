"""The faults of seed 003 that Inlay's layout, collator and objectives do not let one make, for the study of them.

The seed trained on ``[slots] [BOS] [answer]``, with ``labels[:, target_len:] = answer_ids[:, 1:]``: at each input token
stood the token after it, and transformers shifts labels once more inside its loss. The last slot then learns the
answer's first token, the BOS its second, the first token its *third*: a model that has fitted 10 11 12 13 14 15 16
perfectly answers 10 12 14 16. The BOS came from tokenising the answer; answering began right behind the slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.softtoken.batches import NO_LABEL
from inlay.softtoken.compressors import Compressor
from inlay.softtoken.layout import PromptLayout
from inlay.softtoken.objectives import OBJECTIVES, ObjectiveInputs, read
from inlay.softtoken.prompting import BoundLayout
from inlay.softtoken.tokens import SoftTokens
from inlay.train.compress_trainer import CompressTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Faults:
    """What is wrong with an arm beyond what a recipe can say.

    Attributes:
        shifted_twice: Labels are shifted by hand, and again inside the loss.
        answer_bos: A BOS stands before the answer in training and not when answering.
        question_compressed: The question is compressed along, behind the context; a layout without questions goes
            with it.
        padding_attended: The compressor reads padding like text, on the right in training and on the left when
            answering.
    """

    shifted_twice: bool = False
    answer_bos: bool = False
    question_compressed: bool = False
    padding_attended: bool = False

    def trainer(self) -> type[CompressTrainer]:
        """The Trainer of such an arm: the library's own where nothing is wrong."""
        if self == Faults():
            return CompressTrainer
        return type("FaultyTrainer", (CompressTrainer,), {"objectives": {**OBJECTIVES, "answer": self.answer}})

    def answer(self, inputs: ObjectiveInputs) -> Tensor:
        """The objective ``answer`` with these faults."""
        rows = [ids[mask].tolist() for ids, mask in zip(inputs.contexts, inputs.mask, strict=True)]
        if self.question_compressed:
            rows = [rows[number] for number in inputs.index.tolist()]
        memory = self.write(inputs.compressor, inputs.layout, rows, inputs.questions, inputs.ratio, "right")
        if not self.question_compressed:
            memory = memory.select(inputs.index)
        layout = inputs.layout
        if self.answer_bos:
            layout = _with_bos(layout.layout, layout.tokenizer)
        batch = layout.training(inputs.model, memory, inputs.questions, inputs.answers)
        if self.shifted_twice:
            batch = dataclasses.replace(batch, labels=F.pad(batch.labels[:, 1:], (0, 1), value=NO_LABEL))
        return read(inputs.model, batch, "the prompt").cross_entropy

    def write(
        self,
        compressor: Compressor[Any],
        layout: BoundLayout,
        contexts: Sequence[Sequence[int]],
        questions: Sequence[str],
        ratio: int | None,
        padding: Literal["left", "right"],
    ) -> SoftTokens:
        """The slots of contexts.

        Args:
            compressor: Writes them.
            layout: Has the tokenizer.
            contexts: Ids; as many as questions, where those are compressed along.
            questions: What is asked.
            ratio: Tokens per slot.
            padding: On which side shorter rows are filled up.
        """
        rows = [[*context] for context in contexts]
        if self.question_compressed:
            asked = [layout.context_ids("\n" + question.strip()) for question in questions]
            rows = [[*row, *ids] for row, ids in zip(rows, asked, strict=True)]
        longest = max(map(len, rows))
        gaps = [longest - len(row) for row in rows]
        before = gaps if padding == "left" else [0] * len(rows)
        ids = torch.tensor(
            [[0] * n + row + [0] * (longest - n - len(row)) for n, row in zip(before, rows, strict=True)]
        )
        places = torch.arange(longest)
        starts, lengths = torch.tensor(before).unsqueeze(1), torch.tensor([*map(len, rows)]).unsqueeze(1)
        mask = (places >= starts) & (places < starts + lengths)
        if self.padding_attended:
            mask = torch.ones_like(mask)
        return compressor.compress(ids, mask, ratio=ratio)


@cache
def _with_bos(layout: PromptLayout, tokenizer: PreTrainedTokenizerFast) -> BoundLayout:
    return layout.model_copy(update={"bos_after": True}).bind(tokenizer)
