"""What a memory costs while a model generates, and whether 10,000 steps stay as quick, small and right as the first.

Two questions, on models of random weights that decode token by token with a KV cache bounded by a sliding window:

* cost: one model with a memory in every sixth layer and the same weights without, taking turns token by token;
* endurance: 10,000 steps of a small model with a memory; its logits are held against one whole forward.
"""

from __future__ import annotations

import copy
import resource
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import Cache, DynamicCache, MistralConfig, MistralForCausalLM, PreTrainedModel

import inlay
from benchmarks.entry import Aim, Entry, Progress
from benchmarks.measure import require_same
from inlay.fastweight.causal_lm import with_cache
from inlay.fastweight.streaming import state_of

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Sizes:
    """Of one model and how long it decodes."""

    width: int
    inner: int
    layers: int
    window: int
    chunk_size: int
    steps: int


COST = Sizes(width=512, inner=1408, layers=12, window=256, chunk_size=256, steps=3 * 256)
ENDURANCE = Sizes(width=64, inner=176, layers=6, window=64, chunk_size=64, steps=10_000)
QUICK_COST = Sizes(width=16, inner=24, layers=6, window=8, chunk_size=8, steps=40)
QUICK_ENDURANCE = Sizes(width=16, inner=24, layers=6, window=8, chunk_size=8, steps=100)


def model_of(sizes: Sizes, device: torch.device) -> PreTrainedModel:
    """The model that decodes, without a memory."""
    model = mistral_of(sizes, sliding_window=sizes.window, max_position_embeddings=2 * sizes.steps)
    return model.eval().to(device)


def mistral_of(sizes: Any, **options: Any) -> MistralForCausalLM:
    """A Mistral of random weights, always the same.

    Args:
        sizes: With ``width``, ``inner`` and ``layers``.
        options: Of ``MistralConfig``.
    """
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=1024,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(1, sizes.width // 64),
        num_key_value_heads=max(1, sizes.width // 64),
        **options,
    )
    return MistralForCausalLM(config)


def with_memory(model: PreTrainedModel, sizes: Sizes) -> PreTrainedModel:
    """The same weights with a memory in every sixth layer, of which the outputs depend visibly."""
    model = copy.deepcopy(model)
    config = inlay.FastWeightConfig(
        layers="every:6", chunk_size=sizes.chunk_size, eta=0.1, init={"normal": 0.1}, normalize_target=True
    )
    inlay.attach(model, config)
    return model


class Decoder:
    """Decodes given tokens one at a time and keeps the logits it is asked to."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache: Cache = DynamicCache(config=model.config)
        self.given = with_cache(model, self.cache)

    def step(self, token: Tensor) -> tuple[float, Tensor]:
        """Seconds and logits ``[1, 1, V]`` of one token ``[1, 1]``."""
        started = time.perf_counter()
        logits = self.model(token, **self.given).logits
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        return time.perf_counter() - started, logits

    def held_bytes(self) -> int:
        """Bytes of the KV cache and of the memory's state."""
        state = state_of(self.cache)
        keys = sum(t.untyped_storage().nbytes() for layer in self.cache.layers for t in (layer.keys, layer.values))
        return keys + (state.nbytes if state is not None else 0)


@torch.no_grad()
def run(quick: bool, device: torch.device, progress: Progress) -> Entry:
    """Measure both.

    Raises:
        NotTheSameError: Decoding and the whole forward disagree; nothing is printed.
    """
    cost_sizes, long_sizes = (QUICK_COST, QUICK_ENDURANCE) if quick else (COST, ENDURANCE)
    total = cost_sizes.steps + long_sizes.steps
    cost = _cost(cost_sizes, device, lambda step: progress(step, total, "decode, with and without a memory"))
    long = _endurance(
        long_sizes, device, lambda step: progress(cost_sizes.steps + step, total, f"{long_sizes.steps:,} decode steps")
    )
    aims = [
        Aim("time per token over the model without a memory", cost["ratio"], 1.15, False, cost["ratio_of_minima"]),
        Aim("commit's cost over its chunk, in times of a token", cost["commit_share"], 0.05, False),
        Aim("time per token, last thousand over second", long["time_ratio"], 1.15, False),
        Aim("bytes held after the last step over after the first chunk", long["bytes_ratio"], 1.02, False),
        Aim("resident memory, last step over a tenth of the way", long["resident_ratio"], 1.02, False),
    ]
    table = Table(title="Decoding, batch 1", title_justify="left")
    for heading in ("", "figure"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = {
        "ms per token, with a memory": f"{1000 * cost['with']:.3f}",
        "ms per token, without": f"{1000 * cost['without']:.3f}",
        "ms of a step that commits a chunk": f"{1000 * cost['commit']:.3f}",
        "error against the whole forward": f"{cost['error']:.1e}",
        f"error after {long_sizes.steps:,} steps": f"{long['error']:.1e}",
        "bytes held, after the first chunk / at the end": f"{long['first_bytes']:,} / {long['last_bytes']:,}",
    }
    for label, figure in rows.items():
        table.add_row(label, figure)
    title = f"Decoding with a memory in every sixth of {cost_sizes.layers} layers, D={cost_sizes.width}"
    return Entry(title, [table], aims, {"cost": cost, "endurance": long})


def _tokens(count: int, device: torch.device) -> Tensor:
    return torch.randint(1024, (1, count), generator=torch.Generator().manual_seed(1)).to(device)


def _cost(sizes: Sizes, device: torch.device, tick: Any) -> dict[str, float]:
    plain = model_of(sizes, device)
    models = {"with": with_memory(plain, sizes), "without": plain}
    ids = _tokens(sizes.steps, device)
    decoders = {name: Decoder(model) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    logits = []
    for t in range(sizes.steps):
        for name, decoder in decoders.items():
            spent, out = decoder.step(ids[:, t : t + 1])
            seconds[name].append(spent)
            if name == "with":
                logits.append(out)
        tick(t + 1)
    whole = models["with"](ids, use_cache=False).logits
    errors = require_same({"logits": torch.cat(logits, 1)}, {"logits": whole}, TOLERANCE, "decode")
    # From the second chunk on, when there is a sum to read; the step after a full chunk commits it.
    later = range(sizes.chunk_size + 1, sizes.steps)
    commits = {t for t in later if t % sizes.chunk_size == 0}
    ordinary = {name: [seconds[name][t] for t in later if t not in commits] for name in models}
    medians = {name: statistics.median(values) for name, values in ordinary.items()}
    commit = statistics.median(seconds["with"][t] for t in commits)
    return {
        **medians,
        "commit": commit,
        "ratio": medians["with"] / medians["without"],
        "ratio_of_minima": min(ordinary["with"]) / min(ordinary["without"]),
        "commit_share": max(0.0, commit - medians["with"]) / sizes.chunk_size / medians["without"],
        "error": errors["logits"],
    }


def _endurance(sizes: Sizes, device: torch.device, tick: Any) -> dict[str, float]:
    model = with_memory(model_of(sizes, device), sizes)
    decoder = Decoder(model)
    ids = _tokens(sizes.steps, device)
    part = sizes.steps // 10
    seconds, tail, first_bytes, early = [], [], 0, 0
    for t in range(sizes.steps):
        spent, out = decoder.step(ids[:, t : t + 1])
        if t % sizes.chunk_size:  # a step that commits is told apart above
            seconds.append((t, spent))
        if t >= sizes.steps - part:
            tail.append(out)
        if t == max(sizes.chunk_size, sizes.window) + 1:
            first_bytes = decoder.held_bytes()
        if t == part:
            early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tick(t + 1)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    whole = model(ids, use_cache=False, logits_to_keep=part).logits
    errors = require_same({"logits": torch.cat(tail, 1)}, {"logits": whole}, TOLERANCE, f"{sizes.steps:,} steps")
    second = statistics.median(spent for t, spent in seconds if part <= t < 2 * part)
    last = statistics.median(spent for t, spent in seconds if t >= sizes.steps - part)
    return {
        "time_ratio": last / second,
        "first_bytes": first_bytes,
        "last_bytes": decoder.held_bytes(),
        "bytes_ratio": decoder.held_bytes() / first_bytes,
        "resident_ratio": resident / early,
        "error": errors["logits"],
    }
