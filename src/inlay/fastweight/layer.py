"""The module that takes the place of a down projection: ``FastWeightLinear``, ``FastWeightConv1D``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from inlay.fastweight.chunks import ChunkLayout
from inlay.fastweight.clip import clip_targets, update_norms
from inlay.fastweight.config import FastWeightConfig
from inlay.fastweight.context import ContextHolder, ForwardContext, first_tensor
from inlay.fastweight.deferred import break_even, products_after
from inlay.fastweight.families import projection_shape
from inlay.fastweight.parallel import sum_before
from inlay.fastweight.scan import ScanPlan, add_product, in_rows, operand, scan
from inlay.fastweight.state import FastWeightState
from inlay.fastweight.streaming import StateError
from inlay.fastweight.target import TargetGenerator

Representation = Literal["auto", "dense", "deferred"]


class Statistics(nn.Module):
    """Counters of one layer, kept on its device so that counting never waits for it.

    They move with the model but are no buffers: those of the first process would be put over all others' at each step
    of data parallelism.

    Attributes:
        updates: Complete chunks seen while clipping is on.
        clipped: Those that clipping shortened.
        nonfinite: Whether a training forward gave NaN or infinity.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.updates = torch.zeros((), dtype=torch.long, device=device)
        self.clipped = torch.zeros((), dtype=torch.long, device=device)
        self.nonfinite = torch.zeros((), dtype=torch.bool, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Statistics:
        """What ``to`` and its like do to every tensor of a module."""
        self.updates, self.clipped, self.nonfinite = map(fn, self.counters())
        return self

    def counters(self) -> tuple[Tensor, Tensor, Tensor]:
        """All of them."""
        return self.updates, self.clipped, self.nonfinite

    def count(self, scale: Tensor, writes: tuple[Tensor | bool, ...]) -> None:
        """Count the complete chunks of a forward, given the scales ``[B, N]`` that clipping chose."""
        written = torch.stack(
            [w if isinstance(w, Tensor) else torch.full_like(scale[:, 0], w, dtype=torch.bool) for w in writes], dim=1
        )
        self.clipped += ((scale < 1) & written).sum()
        self.updates += written.sum()

    def watch(self, output: Tensor) -> None:
        """Note whether the output of a forward holds NaN or infinity, in one pass over it and without a copy."""
        if output.numel():
            self.nonfinite |= ~torch.isfinite(torch.stack(torch.aminmax(output))).all()  # NaN comes out of both

    def clear(self) -> None:
        """Start counting anew."""
        for counter in self.counters():
            counter.zero_()


@dataclass(frozen=True)
class Observation:
    """What one layer did in one forward, detached.

    Attributes:
        z_packed: ``[B, T', F]`` inputs of the down projection in chunk order (zero in empty slots).
        v_packed: ``[B, T', D]`` targets in chunk order, clipped if clipping is on.
        scale: ``[B, N]`` what clipping multiplied each chunk's targets with; None without clipping.
        layout: Which slot is which token, where sums are emptied, which chunks are complete.
        z: ``[B, T, F]`` the inputs as they came.
        output: ``[B, T, D]`` the layer's output.
    """

    z_packed: Tensor
    v_packed: Tensor
    scale: Tensor | None
    layout: ChunkLayout
    z: Tensor
    output: Tensor


class FastWeightProjection(nn.Module):
    """A down projection whose weight grows with what it has read.

    It stands where the original module stood and shares that module's parameters under their own names, so that the
    model's ``state_dict`` keeps its keys and gains ``target.conv`` and ``target.projection``. The original module is
    kept, called for its part of the output, and given back by ``Memory.detach``. Made by :meth:`around`, as a subclass
    of what the original is, so that tools which ask (PEFT) know it for one and its weight for what shape it has.

    Attributes:
        index: The block it belongs to.
        target: Convolution and projection of the target.
        statistics: What the layer counts on its device while it runs.
        observer: Called with the :class:`Observation` of each forward while it is set (the doctor's), outside autograd;
            not for decode steps, nor when checkpointing runs a forward again.
        representation: How its state holds what is committed: the ``dense`` sum, ``deferred`` products, or (``auto``)
            products until the sum is cheaper. Read when a state begins.
    """

    weight: Tensor

    @staticmethod
    def around(base: nn.Module, index: int, config: FastWeightConfig, holder: ContextHolder) -> FastWeightProjection:
        """The memory layer of block ``index`` in place of ``base``, an ``nn.Linear`` or transformers' ``Conv1D``."""
        kind = FastWeightConv1D if isinstance(base, Conv1D) else FastWeightLinear
        return kind(base, index, config, holder)

    def __init__(self, base: nn.Module, index: int, config: FastWeightConfig, holder: ContextHolder) -> None:
        nn.Module.__init__(self)
        # One dictionary for both, so that whatever moves or replaces a parameter of one does so for the other.
        self.__dict__["_parameters"] = base._parameters
        self.__dict__["_buffers"] = base._buffers
        self._modules.update(base._modules)
        self.__dict__["base"] = base
        self.out_features, self.in_features = projection_shape(base)
        self.index = index
        self.config = config
        self.holder = holder
        self.enabled = True
        weight = next(base.parameters())
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.target = TargetGenerator(self.out_features, config, dtype=dtype, device=weight.device)
        self.train(base.training)
        self.representation: Representation = "auto"
        self.statistics = Statistics(weight.device)
        self.observer: Callable[[Observation], None] | None = None

    def configure(self, config: FastWeightConfig) -> None:
        """Run by another configuration, on the same parameters."""
        self.config = config
        self.target.chunk_size = config.chunk_size
        self.target.normalize = config.normalize_target

    def train(self, mode: bool = True) -> FastWeightProjection:
        """Set training mode, of the original module too."""
        super().train(mode)
        self.__dict__["base"].train(mode)
        return self

    def memory_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The memory's own parameters by name: ``conv`` ``[D, K]`` and ``projection`` ``[D, D]``."""
        return self.target.named_parameters()

    def base_norm(self) -> Tensor:
        """‖W0‖ (Frobenius), without a dimension, in float32 (float64 for float64); NaN where W0 is held quantized."""
        weight = self.weight.detach()
        if not weight.is_floating_point():
            return torch.full((), float("nan"), device=weight.device)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return torch.linalg.vector_norm(weight, dtype=wide)  # without a copy of it in that dtype

    def forward(self, z: Tensor) -> Tensor:
        """``[B, T, F]`` to ``[B, T, D]``, in the dtype the original module gives."""
        if not self.enabled:
            return self.__dict__["base"](z)
        return self._forward(z)

    @torch.compiler.disable
    def _forward(self, z: Tensor) -> Tensor:
        context = self.holder.current
        if context is None:
            raise RuntimeError(
                f"the memory of block {self.index} was called outside a forward of its model, so it cannot know the "
                "token embeddings and documents. Call the model (or its decoder); to checkpoint blocks, use "
                "model.gradient_checkpointing_enable() rather than torch.utils.checkpoint around them; leave what "
                "holds a memory out of PEFT's modules_to_save, which runs a copy"
            )
        if z.dim() == 2 and len(z) == context.batch * context.tokens:  # OPT's blocks put the rows of a batch together
            return self._forward(z.reshape(context.batch, context.tokens, -1)).flatten(0, 1)
        if z.dim() != 3:
            raise ValueError(f"the memory of block {self.index} expects [B, T, F]; got {[*z.shape]}")
        x = self._source(context, z)
        context.ran.add(self.index)
        if context.steps is not None:
            return context.steps.read(self, z, x)
        return self._apply_memory(z, x, context)

    def _source(self, context: ForwardContext, z: Tensor) -> Tensor:
        """What the target is made from, ``[B, T, D]``."""
        x = context.mlp_inputs.pop(self.index, None) if self.config.target == "hidden" else context.x0
        if x is None:
            raise RuntimeError(f"the memory of block {self.index} was not given {self.config.target!r} for its target")
        if x.shape != (*z.shape[:2], self.out_features):
            raise ValueError(
                f"target={self.config.target!r} has shape {[*x.shape]} at block {self.index}, but the memory needs "
                f"[B, T, D] = {[*z.shape[:2], self.out_features]}"
                + (". Try target='hidden'" if self.config.target == "embeddings" else "")
            )
        return x.to(z.device)

    def _apply_memory(self, z: Tensor, x: Tensor, context: ForwardContext) -> Tensor:
        state = self._state(z, context)
        if state is not None and context.appends:
            return self._append(z, x, state, context.commits)
        base = self.__dict__["base"]
        layout = context.layout(z, self.config.chunk_size, state)
        z_packed = layout.pack(z, None if state is None else state.z)
        x_packed = layout.pack(x, None if state is None else state.x)
        v, scale = self._targets(z_packed, x_packed)
        if scale is not None and not context.recomputing:
            self.statistics.count(scale, layout.writes)
        exposure = self.config.exposure if self.training else 0.0
        plan = ScanPlan(layout, self.config.eta, exposure, final_sum=context.state is not None, rounded=True)
        initial = None if state is None else state.total()
        if context.parallel is not None:
            initial = sum_before(z_packed, v, layout, context.parallel)
        if layout.aligned and _is_plain_linear(base):
            out, total = scan(z_packed, v, initial, plan, weight=base.weight, bias=base.bias)
        else:
            slow = base(z)
            fast, total = scan(z_packed, v, initial, plan)
            out = (slow.to(fast.dtype) + layout.unpack(fast)).to(slow.dtype)
        if total is not None and context.state is not None:
            opened = layout.open_chunk(z_packed), layout.open_chunk(x_packed)
            products = None
            if self._defers(state, (layout.chunks - 1) * layout.chunk_size):
                products = products_after(None if state is None else state.products, z_packed, v, layout)
                total = total.new_zeros(z.shape[0], 0, 0)
            after = FastWeightState(
                total, layout.phase, layout.document, *opened, products, None if state is None else state.history
            )
            context.state.layers[self.index] = after
            chunks, emptied = layout.committed(z.shape[0], z.device)
            with torch.no_grad():
                norms = update_norms(z_packed, v, self.config.chunk_size) * chunks
                after.log(norms, torch.where(chunks, 1.0 if scale is None else scale, 0.0), emptied)
        if self.training:
            self.statistics.watch(out.detach())
        if self.observer is not None and not context.recomputing:
            with torch.no_grad():
                seen = None if scale is None else scale.detach()
                self.observer(Observation(z_packed.detach(), v.detach(), seen, layout, z.detach(), out.detach()))
        return out

    def _state(self, z: Tensor, context: ForwardContext) -> FastWeightState | None:
        """What this layer has read before; None if nothing, or in a stateless forward."""
        state = None if context.state is None else context.state.layers.get(self.index)
        if state is not None and state.batch_size != z.shape[0]:
            raise StateError(
                f"the memory's state is of {state.batch_size} rows, this call has {z.shape[0]}; "
                "select or repeat its rows first"
            )
        if state is not None and state.z.is_inference() and not torch.is_inference_mode_enabled():
            assert context.state is not None  # what inference_mode made cannot be written in place outside it
            state = context.state.layers[self.index] = state.clone()
        return state

    def _defers(self, before: FastWeightState | None, committed: int) -> bool:
        """Whether the state after a call that commits so many tokens is better kept as products."""
        if torch.is_grad_enabled() or (before is not None and before.products is None):
            return False
        if self.representation != "auto":
            return self.representation == "deferred"
        used = 0 if before is None or before.products is None else before.products.used
        return used + committed <= break_even(self.out_features, self.in_features)

    def _append(self, z: Tensor, x: Tensor, state: FastWeightState, commits: bool) -> Tensor:
        """Decode: tokens that stay within the open chunk read the sum as it is and wait in the buffers. In place."""
        if commits:
            self._commit(state)
        slow = self.__dict__["base"](z)
        with torch.autocast(z.device.type, enabled=False):
            if state.products is not None:
                fast = state.products.read(z)
            else:
                fast = torch.bmm(z.to(state.sum.dtype), state.sum.mT)
            out = torch.add(slow.to(fast.dtype), fast, alpha=self.config.eta).to(slow.dtype)
        slots = (state.phase.unsqueeze(1) + torch.arange(z.shape[1], device=z.device)).unsqueeze(-1)
        state.z.scatter_(1, slots.expand(z.shape), z.to(state.z.dtype))
        state.x.scatter_(1, slots.expand(x.shape), x.to(state.x.dtype))
        state.phase = state.phase + z.shape[1]  # not in place: the layers share the tensor that their layout gave
        return out

    def _commit(self, state: FastWeightState) -> None:
        """Write the chunks that are full into their rows' sums, in place."""
        full = state.phase == self.config.chunk_size
        v, scale = self._targets(state.z, state.x)
        if scale is not None:
            self.statistics.count(scale, (full,))
        v = in_rows(v, full)
        norms = update_norms(state.z, v, self.config.chunk_size)
        state.log(norms * full.unsqueeze(1), full.unsqueeze(1) * (1.0 if scale is None else scale))
        with torch.autocast(state.z.device.type, enabled=False):
            if state.products is not None and not self._defers(state, self.config.chunk_size):
                state.sum, state.products = state.products.total(), None
            if state.products is not None:
                state.products.append(state.z * full.view(-1, 1, 1), v)
            else:
                add_product(state.sum, operand(v).mT, operand(state.z), 1.0)
        for buffer in (state.z, state.x):
            buffer.masked_fill_(full.view(-1, 1, 1), 0)
        state.phase = state.phase.masked_fill(full, 0)

    def _targets(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Targets ``[B, T', D]`` of tokens in chunk order, clipped if so configured, and the scales of the clipping."""
        v = self.target(x).to(z.dtype)
        return self._clip(z, v) if self.config.clips else (v, None)

    def _clip(self, z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        limit: float | Tensor
        if self.config.max_update_norm is not None:
            limit = self.config.max_update_norm
        else:
            assert self.config.max_update_ratio is not None
            limit = self.config.max_update_ratio * self.base_norm()
        return clip_targets(z, v, self.config.chunk_size, limit)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"block={self.index}, in_features={self.in_features}, out_features={self.out_features}"


class FastWeightLinear(FastWeightProjection, nn.Linear):
    """In the place of an ``nn.Linear``: weight ``[D, F]``."""


class FastWeightConv1D(FastWeightProjection, Conv1D):
    """In the place of transformers' ``Conv1D`` (GPT-2): weight ``[F, D]``."""

    __repr__ = nn.Module.__repr__


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether calling ``module`` is ``F.linear`` with its weight and nothing else: no subclass, hook or offloading."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(module) is nn.Linear and "forward" not in module.__dict__ and not any(getattr(module, h) for h in hooks)


@torch.compiler.disable
def capture_mlp_input(
    layer: FastWeightProjection, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """A forward pre-hook of the MLP for ``target="hidden"``: note its input ``[B, T, D]``."""
    context = layer.holder.current
    if context is not None:
        context.mlp_inputs[layer.index] = first_tensor(args, kwargs)
