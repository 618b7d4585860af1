"""Ways to put a context before a frozen decoder: the compressor, and what it has to beat.

A method makes ``SoftTokens`` of contexts and is given nothing else: not the question, which the layout sets behind the
slots and no method can cut off, and not the answer. So methods differ in their slots alone.

Text is cut to the M slots that the compressor has for that very context. What is cut from where is drawn from the seed
and the context, so that all questions about a context are asked about one and the same piece of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from inlay.data import QAExample
from inlay.evaluate.scoring import EvaluationError, device_of
from inlay.softtoken.compressors import BaseCompressorConfig, Compressor, PoolConfig, build_compressor
from inlay.softtoken.prompting import BoundLayout
from inlay.softtoken.tokens import SoftTokens, embed_text

Ids: TypeAlias = tuple[int, ...]
"""A context in the decoder's tokens."""
Write: TypeAlias = Callable[[Sequence[Ids]], SoftTokens]
"""B contexts to a memory of B rows."""

FULL_TEXT = "full text"
NO_CONTEXT = "no context"
OTHER_CONTEXT = "another context"
SOFT_TOKENS = "soft tokens"
UNTRAINED = "untrained"
MEAN_POOLED = "mean-pooled"
FIRST_TOKENS = "first tokens"
LAST_TOKENS = "last tokens"
RANDOM_SPAN = "random span"
CUTS = (FIRST_TOKENS, LAST_TOKENS, RANDOM_SPAN)


@dataclass(frozen=True)
class Budget:
    """How many slots a context gets: one for every ``ratio`` tokens, or ``slots`` whatever its length."""

    ratio: int | None = None
    slots: int | None = None

    @property
    def label(self) -> str:
        """``4×``, or ``16 slots``."""
        return f"{self.slots} slots" if self.ratio is None else f"{self.ratio}×"


@dataclass(frozen=True)
class Method:
    """One way to make soft tokens of contexts.

    Attributes:
        name: One of the names above.
        budget: What its slots are limited to; None for none.
        write: Does it.
    """

    name: str
    budget: Budget | None
    write: Write


def context_ids(layout: BoundLayout, examples: Sequence[QAExample], limit: int | None) -> list[Ids]:
    """The context of each example in tokens, read as plain text and cut behind ``limit`` tokens (None: whole).

    Raises:
        EvaluationError: A context has no token.
    """
    known: dict[str, Ids] = {}
    for example in examples:
        if example.context not in known:
            known[example.context] = tuple(layout.context_ids(example.context, limit))
        if not known[example.context]:
            raise EvaluationError(f"the context of {example.id!r} has no token; leave the example out")
    return [known[example.context] for example in examples]


def budgets_of(config: BaseCompressorConfig, ratios: Sequence[int] | None) -> list[Budget]:
    """The budgets to evaluate: these ratios, or what the compressor is configured for.

    Raises:
        EvaluationError: A ratio is none of the compressor's.
    """
    if ratios is None:
        return [Budget(slots=config.slots)] if config.slots is not None else [Budget(one) for one in config.ratios]
    unknown = [ratio for ratio in ratios if ratio not in config.ratios]
    if unknown:
        raise EvaluationError(
            f"the compressor has no ratio {unknown[0]}: its ratios are {list(config.ratios)}; evaluate at these"
        )
    return [Budget(ratio) for ratio in dict.fromkeys(ratios)]


def circle(contexts: Sequence[Ids], seed: int) -> list[Ids]:
    """The different contexts in a random order; whoever goes round it from one meets all others before that one."""
    distinct = list(dict.fromkeys(contexts))
    random.Random(seed).shuffle(distinct)
    return distinct


def text_writer(model: Any, change: Callable[[Ids], Ids]) -> Write:
    """Writes as plain text what ``change`` makes of a context."""

    def write(contexts: Sequence[Ids]) -> SoftTokens:
        ids, mask = padded_ids([change(context) for context in contexts], device_of(model))
        return embed_text(model, ids, mask)

    return write


def compressing_writer(compressor: Compressor[Any], budget: Budget) -> Write:
    """Writes with ``compressor`` within ``budget``."""

    def write(contexts: Sequence[Ids]) -> SoftTokens:
        ids, mask = padded_ids(contexts, compressor.lm.device)
        return compressor.compress(ids, mask, ratio=budget.ratio, slots=budget.slots)

    return write


def cut_to(kind: str, slots: Callable[[Ids], int], seed: int) -> Callable[[Ids], Ids]:
    """Cuts a context to as many tokens as ``slots`` gives it.

    Args:
        kind: ``first tokens``, ``last tokens``, or ``random span``: neighbouring tokens from a random place on.
        slots: Tokens to keep.
        seed: With the context itself it decides where a random span begins.
    """

    def cut(context: Ids) -> Ids:
        spare = max(0, len(context) - slots(context))
        start = {FIRST_TOKENS: 0, LAST_TOKENS: spare}.get(kind)
        if start is None:
            start = random.Random(f"{seed} {context}").randint(0, spare)
        return context[start : start + len(context) - spare]

    return cut


def text_methods(model: Any, contexts: Sequence[Ids], seed: int) -> list[Method]:
    """Full text, no context, and (if there are two different contexts) the full text of another one."""
    order = circle(contexts, seed)
    other = dict(zip(order, order[1:] + order[:1], strict=True))
    chosen = [
        Method(FULL_TEXT, None, text_writer(model, lambda context: context)),
        Method(NO_CONTEXT, None, text_writer(model, lambda _: ())),
    ]
    if len(order) > 1:
        chosen.append(Method(OTHER_CONTEXT, None, text_writer(model, other.__getitem__)))
    return chosen


def cut_methods(model: Any, compressor: Compressor[Any], budgets: Sequence[Budget], seed: int) -> list[Method]:
    """The text cut in each way to the slots that the compressor has within each budget."""

    def slots_within(budget: Budget) -> Callable[[Ids], int]:
        return lambda context: sum(
            segment.slots for segment in compressor.plan(len(context), ratio=budget.ratio, slots=budget.slots)
        )

    return [
        Method(kind, budget, text_writer(model, cut_to(kind, slots_within(budget), seed)))
        for kind in CUTS
        for budget in budgets
    ]


@contextmanager
def untaught(model: Any, compressor: Compressor[Any], budgets: Sequence[Budget], seed: int) -> Iterator[list[Method]]:
    """Within it: the same compressor without its training, and mean-pooled embeddings.

    Afterwards the model has the modules, adapters and gradient flags of before, and torch's random numbers go on as if
    nothing had been drawn. A compressor that learns nothing has neither to be compared with.
    """
    if not compressor.learns or not budgets:
        yield []
        return
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    built: list[Compressor[Any]] = []
    try:
        with _own_random_numbers(device_of(model), seed):
            for config in (compressor.config, pooling(compressor.config, budgets)):
                built.append(build_compressor(config, model).eval())
        yield [
            Method(name, budget, compressing_writer(one, budget))
            for name, one in zip((UNTRAINED, MEAN_POOLED), built, strict=True)
            for budget in budgets
        ]
    finally:
        for one in built:
            one.detach()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def pooling(config: BaseCompressorConfig, budgets: Sequence[Budget]) -> PoolConfig:
    """Mean pooling in the form, the segments and the budgets of a compressor."""
    return PoolConfig(
        form=config.form,
        ratios=tuple(budget.ratio for budget in budgets if budget.ratio is not None),
        slots=next((budget.slots for budget in budgets if budget.slots is not None), None),
        segment_tokens=config.segment_tokens,
    )


@contextmanager
def _own_random_numbers(device: torch.device, seed: int) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def padded_ids(rows: Sequence[Ids], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, `[B, longest]`, padding behind."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.long, device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device).unsqueeze(1)
    return ids.view(len(rows), longest), torch.arange(longest, device=device) < lengths
