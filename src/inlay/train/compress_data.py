"""Questions as a compression run reads them: those about one context together, so that it is compressed once.

Compressing a context is most of a step's work, and its slots must serve whatever is asked of them. So an item of the
training data is a context with up to ``questions_per_context`` of its questions, and a batch of C items has C contexts
(fewer where two items share one) and B ≥ C questions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from inlay.data import FactsDataset, QAExample
from inlay.softtoken.prompting import BoundLayout


class ByContext(Sequence[list[QAExample]]):
    """Questions grouped by their context; every question is in one group.

    Args:
        examples: The questions.
        most: Questions in a group at most. A context with more of them has several groups.
    """

    def __init__(self, examples: Sequence[QAExample], most: int) -> None:
        self.examples = examples
        self.groups = [
            members[start : start + most] for members in _contexts(examples) for start in range(0, len(members), most)
        ]

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> list[QAExample]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[QAExample]]: ...
    def __getitem__(self, index: int | slice) -> list[QAExample] | list[list[QAExample]]:
        """The questions of group ``index``, or a list of groups."""
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        return [self.examples[one] for one in self.groups[index]]


def _contexts(examples: Sequence[QAExample]) -> list[Sequence[int]]:
    """Numbers of the questions about each context, contexts in the order in which they are first met."""
    if isinstance(examples, FactsDataset):  # made when asked for: neighbours share a context by construction
        each = examples.config.questions
        return [range(start, min(start + each, len(examples))) for start in range(0, len(examples), each)]
    found: dict[str, list[int]] = defaultdict(list)
    for number, example in enumerate(examples):
        found[example.context].append(number)
    return [*found.values()]


def tokenise_contexts(layout: BoundLayout, contexts: Sequence[str], limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Contexts in the decoder's tokens, read as plain text and without what stands around a memory.

    Args:
        layout: Has the tokenizer.
        contexts: C texts.
        limit: Tokens behind which a context is cut; None for none.

    Returns:
        Ids `[C, S]` int64 and mask `[C, S]` bool, padding on the right.
    """
    rows = [layout.context_ids(context, limit) for context in contexts]
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.tensor([index for row in rows for index in row], dtype=torch.long)
    return ids, mask


class ContextCollator:
    """Groups of questions to the keyword arguments of :class:`~inlay.train.compress_trainer.CompressionTask`.

    Args:
        layout: Has the tokenizer.
        context_tokens: Contexts are cut behind so many tokens; None reads them whole.
    """

    def __init__(self, layout: BoundLayout, context_tokens: int | None) -> None:
        self.layout = layout
        self.context_tokens = context_tokens

    def __call__(self, groups: Sequence[Sequence[QAExample]]) -> dict[str, Any]:
        """`contexts` `[C, S]` and `mask`, each text once; `index` `[B]` of each question's context; B questions and
        their answers."""
        examples = [example for group in groups for example in group]
        numbers: dict[str, int] = {}
        index = [numbers.setdefault(example.context, len(numbers)) for example in examples]
        contexts, mask = tokenise_contexts(self.layout, [*numbers], self.context_tokens)
        return {
            "contexts": contexts,
            "mask": mask,
            "index": torch.tensor(index),
            "questions": [example.question for example in examples],
            "answers": [example.answers for example in examples],
        }
