"""A tiny decoder that was taught to read: it answers from a context, and without one it can only guess.

A context is filler (the numbers 3 to 9) with one fact in it (10 to 25). "Who ?" asks for the fact; the answer to
"Bob ?" is 40 whatever the context, so only who has read the question gives it.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch

from inlay.data import QAExample
from inlay.softtoken.layout import PromptLayout
from inlay.softtoken.prompting import BoundLayout
from inlay.softtoken.tokens import embed_text
from tests.softtoken.local import llama, words

FACTS = range(10, 26)
SLOT = 32 * 4
"""Bytes of a slot: the decoder's width in float32."""
CACHED = 2 * 2 * 2 * 8 * 4
"""Bytes of a position in its cache: two layers, keys and values, two heads of width 8, in float32."""


def layout(**changes: Any) -> BoundLayout:
    return PromptLayout(**{"question": "{question}", "anchor": "Answer :", "answer_tokens": 6} | changes).bind(words())


def example(
    rng: random.Random, *, length: int | None = None, place: int | None = None, about_bob: bool = False
) -> QAExample:
    """A question about a context of ``length`` tokens with the fact at ``place``."""
    length = length or rng.randint(8, 14)
    text = [str(rng.randint(3, 9)) for _ in range(length)]
    fact = str(rng.choice(FACTS))
    text[rng.randrange(length) if place is None else place] = fact
    answer, question = ("40 Ada", "Bob ?") if about_bob else (f"{fact} Ada", "Who ?")
    return QAExample(f"{rng.random()}", " ".join(text), question, (answer,))


def examples(count: int, seed: int = 1, **changes: Any) -> list[QAExample]:
    rng = random.Random(seed)
    return [example(rng, **changes) for _ in range(count)]


def ids(text: str) -> list[int]:
    return list(words()(text)["input_ids"])


@cache
def _taught() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    rng, bound = random.Random(0), layout()
    model: Any = llama(len(words()), spread=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(110):
        batch = [example(rng, length=rng.randint(1, 14), about_bob=rng.random() < 0.2) for _ in range(24)]
        texts = [ids(one.context) for one in batch]
        rows = torch.tensor([text + [0] * (14 - len(text)) for text in texts])
        memory = embed_text(model, rows, torch.arange(14) < torch.tensor([[len(text)] for text in texts]))
        inputs = bound.training(model, memory, [one.question for one in batch], [one.answers for one in batch]).inputs()
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def reader() -> Any:
    """The decoder, taught (once a process, in about two seconds)."""
    model: Any = llama(len(words()))
    model.load_state_dict(_taught())
    return model
