"""Compression runs before their first step, small enough to be looked at in a second, and parts that are at fault."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.data import QAExample
from inlay.doctor.compress_case import CompressCase
from inlay.softtoken.batches import NO_LABEL, TrainingBatch
from inlay.softtoken.compressors import CrossAttentionCompressor
from inlay.softtoken.pieces import Piece
from inlay.softtoken.prompting import BoundLayout
from inlay.softtoken.tokens import SoftTokens
from inlay.softtoken.wording import Prompt
from inlay.train.compress import build_task
from inlay.train.compress_recipe import CompressRecipe
from inlay.train.yaml_recipe import check_recipe
from tests.evaluate import reading
from tests.softtoken.local import llama, words


def recipe(**sections: Any) -> CompressRecipe:
    """A run on whatever examples it is given: its own data are never read."""
    return check_recipe(
        CompressRecipe,
        {
            "name": "read",
            "decoder": {"name_or_path": "none"},
            "compressor": {"kind": "encoder-pool", "ratios": [4], "lora": {"r": 8}},
            "layout": {"question": "{question}", "anchor": "Answer :", "answer_tokens": 9},
            "data": {"source": "jsonl", "path": "none"},
            **sections,
        },
    )


def case(
    train: Sequence[QAExample],
    held_out: Sequence[QAExample] | None = None,
    *,
    model: Any = None,
    faulty: type[BoundLayout] = BoundLayout,
    **sections: Any,
) -> CompressCase:
    """A run before its first step, around ``model``; around one with random weights when it is None."""
    torch.manual_seed(0)
    run = recipe(**sections)
    decoder = model or llama(len(words()), spread=0.1)
    task = build_task(run, decoder, words())  # type: ignore[arg-type]
    task.layout = faulty(run.layout, words())
    return CompressCase(task.eval(), train, held_out or train, decoder_trained=model is not None)


def counting(rows: int = 8, first: int = 10, length: int = 7) -> list[QAExample]:
    """Contexts of a number, and answers that count on from it: 10 11 12 …"""
    examples = []
    for row in range(rows):
        start = first + row
        answer = " ".join(str(number) for number in range(start, start + length))
        examples.append(QAExample(str(row), f"{3 + row % 6} {start} {3 + row // 6} 4 5", "Who ?", (answer,)))
    return examples


def reads(count: int = 200, **sections: Any) -> CompressCase:
    """A healthy run: a decoder that reads its answers from the context, and enough questions to say so."""
    return case(reading.examples(count), reading.examples(256, seed=2), model=reading.reader(), **sections)


class ShiftedTwice(BoundLayout):
    """Labels shifted by hand, and the model's loss shifts them again."""

    def training(self, *args: Any, **kwargs: Any) -> TrainingBatch:
        batch = super().training(*args, **kwargs)
        labels = batch.labels.roll(-1, dims=1)
        labels[:, -1] = NO_LABEL
        return dataclasses.replace(batch, labels=labels)


class EndUntaught(BoundLayout):
    """The end token stands behind the answer and has no label."""

    def training(self, *args: Any, **kwargs: Any) -> TrainingBatch:
        batch = super().training(*args, **kwargs)
        ends = torch.isin(batch.labels, torch.tensor(self.stop_ids))
        return dataclasses.replace(batch, labels=batch.labels.masked_fill(ends, NO_LABEL))


class BosInTrainingAlone(BoundLayout):
    """The answer was tokenised with its own BOS, which is read in training and never generated."""

    def training(self, model: Any, *args: Any, **kwargs: Any) -> TrainingBatch:
        batch = super().training(model, *args, **kwargs)
        starts = batch.answer_mask.int().argmax(dim=1).tolist()
        bos = model.get_input_embeddings()(torch.tensor([self.tokenizer.bos_token_id]))

        def with_bos(rows: Tensor, value: Tensor) -> Tensor:
            return torch.stack([torch.cat([row[:at], value, row[at:]]) for row, at in zip(rows, starts, strict=True)])

        mask = with_bos(batch.attention_mask, torch.ones(1, dtype=torch.long))
        return dataclasses.replace(
            batch,
            inputs_embeds=with_bos(batch.inputs_embeds, bos),
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            labels=with_bos(batch.labels, torch.tensor([NO_LABEL])),
        )


class BosBeforeAnsweringAlone(BoundLayout):
    """A BOS before the memory that training does not have."""

    def generation(self, model: Any, memory: SoftTokens, questions: Sequence[str] | None) -> Any:
        self._pieces_before = (Piece("bos", (0,)),)
        try:
            return super().generation(model, memory, questions)
        finally:
            self._pieces_before = ()


class CutsThePrompt(BoundLayout):
    """The prompt is cut to its last tokens, and what is asked is cut off with it."""

    def prompt(self, question: str | None = None) -> Prompt:
        whole = super().prompt(question)
        return Prompt(whole.pieces_before, (Piece("anchor", tuple(whole.after[-2:])),))


class AttendsToPadding(CrossAttentionCompressor):
    """Reads padding as if it were text."""

    def compress(self, ids: Tensor, mask: Tensor | None = None, **asked: Any) -> SoftTokens:
        return super().compress(ids, None, **asked)
