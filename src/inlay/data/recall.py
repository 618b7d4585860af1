"""Key-value recall, generated: does the memory hold what it read?

    filler k7 v3 filler filler k2 v9 ... | ... filler k2 v9 filler ... k7 v3
    pairs in the first half, each once     every key again, in random order; only these values carry a label

Values are drawn independently, so nothing but the pair itself tells the answer. With `min_distance` at least the
attention window, one layer of attention cannot see the pair from its question; several layers can still hand it on.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from torch.utils.data import Dataset

from inlay.data.config import RecallConfig
from inlay.data.packing import NO_LABEL

FILLER = 0


class RecallDataset(Dataset[dict[str, np.ndarray]]):
    """Recall sequences by index, made when asked for; the same (seed, split, index) is always the same sequence.

    Token ids: 0 is filler, then `keys` keys, then `values` values. Items hold `[T]` int64 arrays: `input_ids`,
    `document_ids` (all 0), `attention_mask` (all 1), `position_ids`, `labels` (-100 but for the answers, which stand at
    the value's own place: the model shifts) and `distances` (at each answer, tokens from the pair's value to the key
    that asks; 0 elsewhere).

    Args:
        config: sizes and seed.
        split: "train" or "eval", two streams of random numbers that do not meet.
    """

    def __init__(self, config: RecallConfig, split: Literal["train", "eval"]) -> None:
        self.config = config
        self.split = split

    @property
    def vocab_size(self) -> int:
        """Tokens in all: filler, keys and values."""
        return 1 + self.config.keys + self.config.values

    def __len__(self) -> int:
        return self.config.train_examples if self.split == "train" else self.config.eval_examples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sequence `index`. Raises `IndexError` outside 0..len-1 (negative ones count from the end)."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        config = self.config
        stream = ("train", "eval").index(self.split)
        rng = np.random.default_rng([config.seed, stream, index % len(self)])

        length, half = config.sequence_length, config.sequence_length // 2
        pairs = _places(rng, half, config.pairs, config.alignment)
        questions = half + _places(rng, length - half, config.pairs, config.alignment)
        # The i-th question comes late enough for the i-th pair, so every question has a pair to ask for. Both
        # lists keep steps of 2 or more, and so does their maximum.
        earliest = pairs + 1 + config.min_distance
        questions = np.maximum(questions, earliest + -earliest % config.alignment)
        asked = _match(rng, pairs, questions, config.min_distance)

        keys = 1 + rng.permutation(config.keys)[: config.pairs]
        values = 1 + config.keys + rng.integers(config.values, size=config.pairs)
        input_ids = np.full(length, FILLER, dtype=np.int64)
        input_ids[pairs], input_ids[pairs + 1] = keys, values
        input_ids[questions], input_ids[questions + 1] = keys[asked], values[asked]
        labels = np.full(length, NO_LABEL, dtype=np.int64)
        labels[questions + 1] = values[asked]
        distances = np.zeros(length, dtype=np.int64)
        distances[questions + 1] = questions - (pairs[asked] + 1)
        return {
            "input_ids": input_ids,
            "document_ids": np.zeros(length, dtype=np.int64),
            "labels": labels,
            "attention_mask": np.ones(length, dtype=np.int64),
            "position_ids": np.arange(length, dtype=np.int64),
            "distances": distances,
        }


def _places(rng: np.random.Generator, length: int, count: int, alignment: int) -> np.ndarray:
    """Starts of `count` slots of 2 tokens in `length`, without overlap, every layout equally likely; sorted."""
    if alignment == 2:
        return 2 * np.sort(rng.permutation(length // 2)[:count])
    return np.sort(rng.permutation(length - count)[:count]) + np.arange(count)


def _match(rng: np.random.Generator, pairs: np.ndarray, questions: np.ndarray, min_distance: int) -> np.ndarray:
    """Which pair each question asks for, every permitted order equally likely.

    A later question may ask for all that an earlier one may, so drawing from what is left, first question first, meets
    the same number of choices whatever was drawn: the orders come out uniform, and none ends without a pair.
    """
    left: list[int] = []
    asked = np.empty(len(pairs), dtype=np.int64)
    admitted = 0
    for index, question in enumerate(questions):
        while admitted < len(pairs) and pairs[admitted] + 1 + min_distance <= question:
            left.append(admitted)
            admitted += 1
        asked[index] = left.pop(int(rng.integers(len(left))))
    return asked
