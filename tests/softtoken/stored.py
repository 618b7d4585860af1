"""What the tests of stored soft tokens share: a run, documents, slots, and all bits of a store."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inlay.data import Document
from inlay.softtoken.compressors import (
    Compressor,
    EncoderPoolConfig,
    LoraSettings,
    PoolConfig,
    build_compressor,
)
from inlay.softtoken.layout import PromptLayout
from inlay.softtoken.prompting import BoundLayout
from inlay.softtoken.store import (
    SoftTokenStore,
    StoredDocument,
    StoreHeader,
    hash_text,
)
from inlay.softtoken.tokens import SoftTokens
from tests.softtoken.local import byte_level, llama

WIDTH = 32
HEADER = StoreHeader(
    model={"type": "llama", "width": WIDTH, "weights": "a"},
    compressor={"fingerprint": "b", "config": {"kind": "pool", "ratios": [4]}},
    layout={"anchor": "Answer: ", "answer_tokens": 8},
)


@dataclass(frozen=True)
class Run:
    model: Any
    compressor: Compressor[Any]
    layout: BoundLayout
    context_tokens: int | None = None
    directory: Path = Path("run")


def a_run(*, seed: int = 0, learned: bool = False, **changes: Any) -> Run:
    """A decoder of random weights whose compressor pools; ``learned``: reads with an adapter that does something."""
    model = llama(len(byte_level()), seed)
    torch.manual_seed(1)
    if learned:
        changes["lora"] = LoraSettings(r=2, target_modules=("q_proj", "v_proj"))
    compressor = build_compressor((EncoderPoolConfig if learned else PoolConfig)(**changes), model)
    for name, parameter in compressor.named_trainable_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    layout = PromptLayout(bos=False, bos_after=True, question="{question}\n", answer_tokens=6)
    return Run(model, compressor.eval(), layout.bind(byte_level()))


def texts(count: int, seed: int = 0) -> list[Document]:
    """Documents of 3 to 60 tokens."""
    source = random.Random(seed)
    words = ["Ada", "Bob", "lives", "in", "Paris", "Vienna", "capital", "mother", "born", "1815"]
    return [Document(f"d/{n}.txt", " ".join(source.choices(words, k=source.randint(2, 20)))) for n in range(count)]


def memory_of(lengths: list[int], form: str, dtype: torch.dtype, seed: int = 0) -> SoftTokens:
    """Random slots, with numbers behind the rows' ends that are to be left out."""
    torch.manual_seed(seed)
    rows, slots = len(lengths), max(lengths)
    mask = torch.arange(slots) < torch.tensor(lengths).unsqueeze(1)
    if form == "embeddings":
        return SoftTokens(torch.randn(rows, slots, WIDTH).to(dtype), mask)
    # As some families have them: heads and widths that differ from layer to layer.
    shapes = [(rows, 2, slots, 8), (rows, 1, slots, 16)]
    kv = tuple((torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for shape in shapes)
    return SoftTokens(None, mask, kv)


def notes(lengths: list[int], start: int = 0) -> list[StoredDocument]:
    return [
        StoredDocument(f"é/{start + n}", hash_text(str(start + n)), 4 * length, length, 4)
        for n, length in enumerate(lengths)
    ]


def tensors(memory: SoftTokens) -> list[torch.Tensor]:
    return [memory.embeddings] if memory.embeddings is not None else [t for pair in memory.kv or () for t in pair]


def bits(memory: SoftTokens) -> list[tuple[torch.dtype, list[int], bytes]]:
    """Every bit of a memory of one row."""
    assert memory.rows == 1
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors(memory)]
    return [(tensor.dtype, [*tensor.shape], one) for tensor, one in zip(tensors(memory), raw, strict=True)]


def contents(store: SoftTokenStore) -> dict[str, tuple[StoredDocument, list[Any]]]:
    """Everything in a store but how it is spread over files."""
    return {name: (document, bits(store.load([name]))) for name, document in store.documents.items()}
