"""Gradient norms by parameter group, of one backward that leaves no trace.

A memory learns through its own two tensors, the convolution and the projection of its target. How large their gradient
is says little alone, so it is measured beside that of the down projections they sit on, frozen or not, and of whatever
else is trained. All norms are taken before gradient clipping.

An optimizer step does not care for a gradient's scale, only AdamW's ε does: g / (√v + ε) with ε = 1e-8 halves the step
of a parameter whose gradient has RMS 1e-8 and takes it to nothing below. So norms are told per element too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from inlay.doctor.measuring import chunk_table, on_device_of
from inlay.fastweight import InlayError, Memory
from inlay.fastweight.chunks import ChunkLayout
from inlay.fastweight.layer import Observation
from inlay.fastweight.scan import accumulator_dtype

CONVOLUTION = "convolution"
PROJECTION = "projection"
BASE = "base down projection"
REST = "rest"

Groups = dict[str, list[nn.Parameter]]
"""Parameters by group, in the order they are shown; a group without parameters is left out."""


class GradientError(InlayError, ValueError):
    """A batch or model that has no gradient to measure; the message says why."""


@dataclass(frozen=True)
class GroupNorm:
    """The gradient of one group of parameters.

    Attributes:
        norm: L2 norm over all its elements, before gradient clipping.
        elements: How many they are.
    """

    norm: float
    elements: int

    @property
    def rms(self) -> float:
        """Root of the mean square over the elements."""
        return self.norm / math.sqrt(self.elements)


@dataclass(frozen=True)
class Reading:
    """How far a batch lets the memory be read.

    Attributes:
        chunks: Chunks of the batch, incomplete ones included.
        reading: Those that read an update: every chunk of a document but its first.
        longest: Tokens of the longest document (with ``boundary: carry``, of the longest row).
    """

    chunks: int
    reading: int
    longest: int


@dataclass(frozen=True)
class GradientNorms:
    """One forward and backward in training mode.

    Attributes:
        groups: By name: ``convolution`` and ``projection`` (the memory's own), ``base down projection`` (W0 of the
            memory's layers; absent where it is quantized) and ``rest`` (what else is trained; absent where nothing is).
        loss: The model's own, in nats per token.
        clip_rate: Share of the complete chunks whose update was clipped; None without clipping.
        reading: How far the batch lets the memory be read.
    """

    groups: dict[str, GroupNorm]
    loss: float
    clip_rate: float | None
    reading: Reading

    @property
    def memory(self) -> float:
        """Norm of the memory's gradient, convolution and projection together."""
        return math.hypot(self.groups[CONVOLUTION].norm, self.groups[PROJECTION].norm)

    @property
    def memory_rms(self) -> float:
        """RMS per element of the group that has more: a memory learns if either of its tensors moves."""
        return max(self.groups[name].rms for name in (CONVOLUTION, PROJECTION))

    @property
    def base_rms(self) -> float | None:
        """RMS per element of the down projections' gradient; None where they are quantized."""
        return self.groups[BASE].rms if BASE in self.groups else None


def base_weights(memory: Memory) -> list[nn.Parameter]:
    """W0 of every memory layer, ``[D, F]`` (``[F, D]`` in GPT-2); of an integer dtype where it is quantized."""
    return [cast(nn.Parameter, layer.weight) for layer in memory.layers.values()]


def parameter_groups(model: nn.Module, memory: Memory) -> Groups:
    """The parameters of ``model`` that a memory's learning is judged by, in the groups of :class:`GradientNorms`.

    ``rest`` holds what requires a gradient now; the others are there whether they do or not.
    """
    targets = [layer.target for layer in memory.layers.values()]
    groups: Groups = {
        CONVOLUTION: [target.conv for target in targets],
        PROJECTION: [target.projection for target in targets],
        BASE: [weight for weight in base_weights(memory) if weight.is_floating_point()],
    }
    named = {id(parameter) for group in groups.values() for parameter in group}
    groups[REST] = [p for p in model.parameters() if p.requires_grad and id(p) not in named]
    return {name: group for name, group in groups.items() if group}


def group_norms(groups: Groups, gradients: Mapping[nn.Parameter, Tensor | None] | None = None) -> dict[str, float]:
    """L2 norm of the gradient of each group, with one transfer to the host for all of them.

    Args:
        groups: As :func:`parameter_groups` gives them.
        gradients: By parameter; ``parameter.grad`` when not given.

    Returns:
        By group, those alone in which some parameter has a gradient.
    """
    norms: dict[str, Tensor] = {}
    for name, parameters in groups.items():
        found = [p.grad if gradients is None else gradients[p] for p in parameters]
        present = [gradient for gradient in found if gradient is not None]
        if present:
            norms[name] = _total_norm(present)
    if not norms:
        return {}
    device = next(iter(norms.values())).device
    return dict(zip(norms, torch.stack([norm.to(device) for norm in norms.values()]).tolist(), strict=True))


def gradient_norms(memory: Memory, model: nn.Module, batch: Mapping[str, Tensor]) -> GradientNorms:
    """Measure the gradient of ``batch``, with the memory as it is configured now.

    One forward and backward in training mode, without a cache, in the autocast of the caller. Memory and base down
    projections get a gradient whatever is trained. Modes, ``requires_grad``, ``.grad``, counters and random state are
    afterwards what they were, so that two calls draw the same dropout.

    Args:
        memory: The memory of ``model``.
        model: Gives a loss for ``batch``: a causal LM of transformers, or a PEFT model around one.
        batch: ``input_ids`` and ``labels`` ``[B, T]`` and what else :func:`inlay.data.collate` gives.

    Raises:
        GradientError: The model gives no loss for the batch, no gradient goes through it, or the memory is off.
    """
    inputs = on_device_of(model, batch)
    with _as_in_training(memory, model), _watching(memory) as layouts:
        groups = parameter_groups(model, memory)
        trained = [parameter for group in groups.values() for parameter in group]
        memory.clear_statistics()
        loss = getattr(model(**inputs, use_cache=False), "loss", None)
        if not isinstance(loss, Tensor):
            raise GradientError(f"{type(model).__name__} gave no loss: the batch needs labels, it has {[*batch]}")
        if not layouts:
            raise GradientError("the memory took no part in the forward; measure outside memory.disabled()")
        if not loss.requires_grad:
            raise GradientError(
                f"the loss of {type(model).__name__} has no gradient: reentrant checkpointing passes none on when the "
                "embeddings are frozen (model.enable_input_require_grads(), or use_reentrant: false)"
            )
        gradients = _gradients(loss, trained, reentrant=_is_reentrant(model))
        found = group_norms(groups, dict(zip(trained, gradients, strict=True)))
        return GradientNorms(
            groups={
                name: GroupNorm(found.get(name, 0.0), sum(p.numel() for p in group)) for name, group in groups.items()
            },
            loss=float(loss.detach()),
            clip_rate=_clip_rate(memory),
            reading=_reading(layouts),
        )


@contextmanager
def _as_in_training(memory: Memory, model: nn.Module) -> Iterator[None]:
    """Training mode, a gradient for memory and base down projections, and everything as it was afterwards."""
    wanted = [*memory.parameters(), *base_weights(memory)]
    switched = [p for p in wanted if p.is_floating_point() and not p.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    counters = [(b, b.clone()) for layer in memory.layers.values() for b in layer.statistics.counters()]
    trained_base, session = set(memory.trained_base), memory.open_session
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        memory.open_session = None
        for parameter in switched:
            parameter.requires_grad_(True)
        model.train()
        with torch.random.fork_rng(devices), torch.enable_grad(), warnings.catch_warnings():
            # The memory warns once of training on short sequences or documents. Here that is what is being examined.
            warnings.filterwarnings("ignore", "training on (sequences|documents) of", UserWarning)
            yield
    finally:
        memory.open_session = session
        memory.trained_base.clear()
        memory.trained_base.update(trained_base)
        for parameter in switched:
            parameter.requires_grad_(False)
        for module, mode in modes:  # parents come before their children, whose own mode so wins
            module.train(mode)
        for counter, before in counters:
            counter.copy_(before)


@contextmanager
def _watching(memory: Memory) -> Iterator[list[tuple[ChunkLayout, int, torch.device]]]:
    """Note the chunk grid, rows and device of the forward within, as its first memory layer sees them."""
    layer = next(iter(memory.layers.values()))
    seen: list[tuple[ChunkLayout, int, torch.device]] = []

    def note(observation: Observation) -> None:
        seen.append((observation.layout, observation.z.shape[0], observation.z.device))

    before, layer.observer = layer.observer, note
    try:
        yield seen
    finally:
        layer.observer = before


def _reading(layouts: Iterable[tuple[ChunkLayout, int, torch.device]]) -> Reading:
    chunks = reading = longest = 0
    for layout, rows, device in layouts:
        reads, tokens, _ = chunk_table(layout, rows, device)
        chunks += int((tokens > 0).sum())
        reading += int(((tokens > 0) & (reads > 0)).sum())
        longest = max(longest, int((reads * layout.chunk_size + tokens).max()))
    return Reading(chunks, reading, longest)


def _clip_rate(memory: Memory) -> float | None:
    if not memory.config.clips:
        return None
    counted = [layer.statistics for layer in memory.layers.values()]
    return sum(int(one.clipped) for one in counted) / max(1, sum(int(one.updates) for one in counted))


def _gradients(loss: Tensor, parameters: Sequence[nn.Parameter], *, reentrant: bool) -> list[Tensor | None]:
    """The gradient of each parameter, ``.grad`` left as it is."""
    if not reentrant:
        return list(torch.autograd.grad(loss, list(parameters), allow_unused=True))
    # Reentrant checkpointing cannot be told which gradients are wanted: it accumulates into .grad.
    kept = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        return [parameter.grad for parameter in parameters]
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient


def _is_reentrant(model: nn.Module) -> bool:
    """Whether some block of the model is checkpointed the reentrant way."""
    functions = [
        getattr(module, "_gradient_checkpointing_func", None)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    ]
    return any(getattr(function, "keywords", {}).get("use_reentrant", False) for function in functions)


def _total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Their L2 norm as one vector: a scalar on the first one's device, in float32 or wider."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        alike.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    norms = [
        norm.to(gradients[0].device)
        for (_, dtype), group in alike.items()
        for norm in torch._foreach_norm(group, 2.0, accumulator_dtype(dtype))
    ]
    return torch.linalg.vector_norm(torch.stack(norms))
