"""Tiny models, and the loss of a token worked out by hand."""

from __future__ import annotations

import math

import torch
import transformers
from torch import Tensor, nn

from inlay.data import RecallDataset

VOCAB = 40


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}


def llama(seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | changes))


def sliding_window(window: int) -> nn.Module:
    """One layer whose attention sees `window` tokens, the present one included."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SIZES | {"num_hidden_layers": 1}, sliding_window=window)
    return transformers.MistralForCausalLM(config)


def bits_by_hand(model: nn.Module, tokens: list[int]) -> list[float]:
    """Bits of tokens 1, 2, …: one at a time, each from a fresh run over what comes before it, in float64."""
    model.eval()
    bits = []
    with torch.no_grad():
        for place in range(1, len(tokens)):
            logits = model(input_ids=torch.tensor([tokens[:place]]), use_cache=False).logits[0, -1].double()
            bits.append(float(logits.logsumexp(0) - logits[tokens[place]]) / math.log(2))
    return bits


class Oracle(nn.Module):
    """Looks up what followed a key where it stood first, if that was within ``sight`` tokens."""

    def __init__(self, dataset: RecallDataset, *, sight: int | None = None) -> None:
        super().__init__()
        self.dataset = dataset
        self.sight = sight

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = torch.zeros(*input_ids.shape, self.dataset.vocab_size)
        for b, row in enumerate(input_ids.tolist()):
            told: dict[int, tuple[int, int]] = {}
            for t, token in enumerate(row[:-1]):
                if 1 <= token <= self.dataset.config.keys:
                    if token not in told:
                        told[token] = (row[t + 1], t + 1)
                    value, place = told[token]
                    if self.sight is None or t - place < self.sight:
                        logits[b, t, value] = 1.0
        return logits


class Guesser(nn.Module):
    """Picks one of the values at random at every position."""

    def __init__(self, dataset: RecallDataset) -> None:
        super().__init__()
        self.dataset = dataset
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = torch.zeros(*input_ids.shape, self.dataset.vocab_size)
        config = self.dataset.config
        logits[..., 1 + config.keys :] = torch.rand(*input_ids.shape, config.values, generator=self.generator)
        return logits
