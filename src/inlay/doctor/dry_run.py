"""One training step without memory or time: the model itself runs, on tensors that have shapes but no numbers.

What is built is what the run would build (the architecture from its config, LoRA adapters, the memory, the optimizer),
and what runs is what ``inlay train`` runs: forward, with the loss in slices, backward, clipping, optimizer step. The
step is in the middle of a run: the optimizer has its states already, gradients are made anew.

It runs as on the CPU, also when a step on CUDA is asked for: no CUDA is needed to plan for one. Where CUDA's kernels
need more, ``_hidden_on_cuda`` adds it.
"""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeAlias

import torch
from accelerate.utils.operations import convert_to_fp32
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from inlay.doctor.plan_allocations import Allocations, Moment, Scope
from inlay.fastweight import FastWeightConfig, InlayError, Memory, TrainMode, attach
from inlay.fastweight.layer import FastWeightProjection
from inlay.sliced_loss import slice_loss

Dtype = Literal["float32", "bfloat16", "float16"]
Optimizer = Literal["adamw", "adamw_torch", "sgd"]

_ALIGNED = 128
"""CUDA's flash attention rounds lengths up to so many tokens."""

_CHUNKS = 4
"""Chunks that a dry run walks: the first, the last, and some between."""


class PlanError(InlayError, RuntimeError):
    """A step that cannot be planned; the message says why."""


@dataclass(frozen=True)
class TrainingStep:
    """A training step, as the recipe's sections say it.

    Attributes:
        tokens: Tokens per row T.
        batch_size: Rows B.
        dtype: Of the base weights. The memory's own parameters are float32.
        autocast: What products are computed in under mixed precision (``bf16: true``); None without.
        mode: What is trained.
        gradient_checkpointing: Keep only what enters each block, and run it again in the backward.
        lora: Fields of PEFT's ``LoraConfig``, for ``memory+lora``.
        optimizer: ``adamw`` (fused, transformers' default), ``adamw_torch`` (not fused) or ``sgd``.
        accumulate: Gradients of earlier micro-batches are there already (``gradient_accumulation_steps`` above 1).
        document_tokens: Rows are packed with documents of so many tokens; None: one document fills a row.
        padded: A row of the batch ends in padding.
        device: Whose kernels run.
    """

    tokens: int
    batch_size: int = 1
    dtype: Dtype = "bfloat16"
    autocast: Literal["bfloat16", "float16"] | None = None
    mode: TrainMode = "memory"
    gradient_checkpointing: bool = False
    lora: Mapping[str, Any] | None = None
    optimizer: Optimizer = "adamw"
    accumulate: bool = False
    document_tokens: int | None = None
    padded: bool = False
    device: Literal["cuda", "cpu"] = "cuda"

    @property
    def computes_in(self) -> Dtype:
        """Dtype of the products."""
        return self.autocast or self.dtype


@dataclass(frozen=True)
class Trace:
    """A dry run.

    Attributes:
        peak: The moment at which most is held.
        shapes: (D, F) of each memory layer.
    """

    peak: Moment
    shapes: tuple[tuple[int, int], ...]


class Subject(Protocol):
    """What a dry run builds and trains."""

    def skeleton(self, step: TrainingStep) -> nn.Module:
        """The model on the meta device, in training mode, with the step's checkpointing."""
        ...

    def equip(self, model: nn.Module, memory: FastWeightConfig, step: TrainingStep) -> Memory:
        """Give a skeleton its tensors and its memory, and choose what is trained. Runs among fake tensors."""
        ...

    def batch(self, step: TrainingStep) -> dict[str, Tensor]:
        """What the data give."""
        ...

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """As the Trainer computes it, within the step's autocast; nothing else of the output outlives the call."""
        ...


Model: TypeAlias = PreTrainedModel | PreTrainedConfig | Subject
"""What is planned for: only the architecture counts."""


def dry_run(model: Model, memory: FastWeightConfig, step: TrainingStep, *, plain: bool = False) -> Trace:
    """Run ``step`` on tensors without numbers.

    Args:
        model: Its architecture is what counts; a live model is not touched.
        memory: The memory.
        step: What to run.
        plain: Leave the memory out: the same parameters of the base are trained. In mode ``memory`` nothing is, but the
            backward runs as far down as it would for the memory.

    Raises:
        PlanError: The model's forward needs numbers that a dry run does not have (which expert a token is routed to),
            or other inputs than tokens.
        AttachError: The memory does not fit the model.
    """
    subject = CausalLm(model) if isinstance(model, PreTrainedModel | PreTrainedConfig) else model
    hidden = functools.partial(_hidden_on_cuda if step.device == "cuda" else _hidden_on_cpu, step)
    allocations = Allocations(hidden)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # of sequences shorter than a chunk, of deprecated names: told elsewhere
        skeleton = subject.skeleton(step)
        with FakeTensorMode(allow_non_fake_inputs=True), allocations:
            try:
                with allocations.booked_as("weights"):
                    shapes = _watch(subject.equip(skeleton, memory, step), plain, allocations)
                if plain:
                    gc.collect()  # the memory that was taken off is held by nothing but itself
                _run(subject, skeleton, step, allocations)
            except RuntimeError as error:
                name = type(skeleton).__name__
                raise PlanError(f"{name} does not run without numbers, so no plan: {error}") from error
    assert allocations.peak is not None
    return Trace(allocations.peak, shapes)


@dataclass(frozen=True)
class CausalLm:
    """A causal LM of transformers, with PEFT's adapters if the step has them."""

    source: PreTrainedModel | PreTrainedConfig

    def skeleton(self, step: TrainingStep) -> nn.Module:
        """See :class:`Subject`."""
        dtype = getattr(torch, step.dtype)
        base: PreTrainedModel
        with torch.device("meta"):
            if isinstance(self.source, PreTrainedModel):
                base = type(self.source)._from_config(self.source.config, dtype=dtype)
            else:
                base = AutoModelForCausalLM.from_config(self.source, dtype=dtype)
            base.train()
            slice_loss(base, stand_in=Skipped.apply)
            if step.gradient_checkpointing:
                getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
            if step.lora is None:
                return base
            return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **step.lora))

    def equip(self, model: nn.Module, memory: FastWeightConfig, step: TrainingStep) -> Memory:
        """See :class:`Subject`."""
        model.to_empty(device="cpu")
        next(module for module in model.modules() if isinstance(module, PreTrainedModel)).tie_weights()
        return attach(model, memory).train_only(step.mode)

    def batch(self, step: TrainingStep) -> dict[str, Tensor]:
        """What :func:`inlay.data.collate` gives: documents of one length, or one per row, with or without padding."""
        place = torch.arange(step.tokens).repeat(step.batch_size, 1)
        documents = place // (step.document_tokens or step.tokens)
        batch = {
            "input_ids": torch.zeros_like(place),
            "labels": torch.zeros_like(place),
            "document_ids": documents,
            "position_ids": place % (step.document_tokens or step.tokens),
            "attention_mask": torch.ones_like(place),
        }
        if step.padded:
            for name, value in {"labels": -100, "document_ids": -1, "position_ids": 0, "attention_mask": 0}.items():
                batch[name][:, -1] = value
        if bool((documents > 0).any()):
            del batch["attention_mask"]
        return batch

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """As ``Trainer`` and accelerate compute it."""
        output = model(**batch, use_cache=False)
        if torch.is_autocast_enabled("cpu"):
            output = convert_to_fp32(output)
        loss: Tensor = output.loss
        return loss


class Skipped(torch.autograd.Function):
    """In place of a slice's logits: what it leaves behind, nats and on the way back the gradient of its hidden states.

    Of many slices a dry run makes the first ones alone. The others need the same memory, and the backward comes to the
    first ones last, when most is held.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor) -> Tensor:
        """Zeros of the shape of ``targets``."""
        ctx.save_for_backward(hidden)
        return torch.zeros(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Something of the shape of ``hidden``."""
        (hidden,) = ctx.saved_tensors
        return torch.empty_like(hidden), None


def _watch(memory: Memory, plain: bool, allocations: Allocations) -> tuple[tuple[int, int], ...]:
    """Watch the parts of the model; (D, F) of each memory layer. ``plain`` takes the memory off again."""
    layers = dict(memory.layers)
    for index, block in enumerate(memory.decoder.blocks):
        allocations.watch(block, Scope(index, "blocks"))
        for name, part in block.named_children():
            if "attn" in name or "attention" in name:
                allocations.watch(part, Scope(index, "attention"))
    if plain:
        memory.detach()
    for index, layer in layers.items():
        if plain:
            site = memory.decoder.site(index)
            called = site.projection if site.replaced is None else site.replaced  # Kyutai's gating calls no projection
            called.register_forward_hook(_require_gradient)
        else:
            layer.register_forward_pre_hook(_shorten)
            allocations.watch(layer, Scope(index, "memory"))
    return tuple((layer.out_features, layer.in_features) for layer in layers.values())


def _run(subject: Subject, model: nn.Module, step: TrainingStep, allocations: Allocations) -> None:
    """The step, after the update of the step before it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def note(parameter: Tensor) -> None:
        assert parameter.grad is not None
        allocations.book([parameter.grad], "gradients")

    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
    batch = subject.batch(step)
    optimizer = _optimizer(trained, step)

    def update() -> None:
        allocations.phase = "optimizer"
        with allocations.booked_as("optimizer"):
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            if optimizer is not None:
                optimizer.step()

    with allocations.booked_as("gradients"):  # of the step before, which made the optimizer's states
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
    update()
    if not step.accumulate:
        model.zero_grad()

    allocations.peak = None
    allocations.phase = "forward"
    mixed = nullcontext() if step.autocast is None else torch.autocast("cpu", dtype=getattr(torch, step.autocast))
    with mixed:
        loss = subject.loss(model, batch)
    allocations.phase = "backward"
    loss.backward()  # type: ignore[no-untyped-call]
    del loss
    update()


def _shorten(layer: FastWeightProjection, args: tuple[Tensor]) -> None:
    """Let the scan walk a few chunks only: each needs the same memory, and none is kept."""
    context, (z,) = layer.holder.current, args
    if context is None or layer.config.clips:
        return  # clipping counts the chunks
    layout = context.layout(z, layer.config.chunk_size)
    if layout.chunks > _CHUNKS:
        kept = [*range(_CHUNKS - 1), layout.chunks - 1]
        resets, writes = (tuple(flags[n] for n in kept) for flags in (layout.resets, layout.writes))
        context.replace_layout(replace(layout, chunks=_CHUNKS, resets=resets, writes=writes), z)


def _require_gradient(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.requires_grad_()


def _optimizer(parameters: list[nn.Parameter], step: TrainingStep) -> torch.optim.Optimizer | None:
    if not parameters:
        return None
    if step.optimizer == "sgd":
        return torch.optim.SGD(parameters)
    return torch.optim.AdamW(parameters, fused=True)  # the other forms read their step counts


def _hidden_on_cpu(step: TrainingStep, operator: Any, args: tuple[Any, ...], scope: Scope) -> int:
    """Bytes that the CPU's kernels need beyond their results."""
    pointwise = torch.Tag.pointwise in operator.tags and len(args) > 1 and isinstance(args[1], Tensor)
    if pointwise and args[0].dtype != args[1].dtype:
        common = torch.result_type(args[0], args[1])  # operands of another dtype are copied to it as a whole
        return sum(tensor.numel() * common.itemsize for tensor in args[:2] if tensor.dim() and tensor.dtype != common)
    if operator is torch.ops.aten._fused_adamw_.default and step.optimizer == "adamw_torch":
        return max(second.nbytes for second in args[3])  # the root of one parameter's second moment at a time
    return 0


def _hidden_on_cuda(step: TrainingStep, operator: Any, args: tuple[Any, ...], scope: Scope) -> int:
    """Bytes that CUDA's kernels need beyond their results, or that the memory's code makes on CUDA alone."""
    half = step.computes_in != "float32"
    if operator is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        query = args[1]
        rows, heads, tokens, width = query.shape
        aligned = rows * heads * _round_up(tokens, _ALIGNED)
        return 4 * aligned * (1 + (_round_up(width, 32) if half else 0))  # Σ dO∘O, and dQ summed in float32
    if operator is torch.ops.aten.baddbmm_.default and scope.kind == "memory" and step.computes_in == "bfloat16":
        target, _, right = args[:3]  # the scan multiplies in bfloat16 and adds the product in float32
        return 2 * (target.numel() + right.numel())
    if operator is torch.ops.aten._fused_adamw_.default and step.optimizer == "adamw_torch":
        return sum(second.nbytes for second in args[3])  # "foreach": the roots of all second moments at once
    return 0


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
