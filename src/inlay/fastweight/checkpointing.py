"""Gradient checkpointing around blocks that hold a memory.

Checkpointing runs blocks again during the backward, when other forwards may have come and gone (a teacher and a
student). So while a forward runs, the checkpointing function of each block with a memory is wrapped: the wrapper
remembers this forward's context and hands X0 through the checkpoint as an input, whose gradient then flows as it
should, with reentrant and non-reentrant checkpointing alike.

Kyutai's transformer calls torch's checkpoint itself, around whole blocks, where nothing can be wrapped. For one forward
its flag is therefore cleared and each block's own forward checkpointed instead, with the same settings.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from inlay.fastweight.context import ContextHolder, ForwardContext
from inlay.fastweight.families import Decoder


def wrap_checkpointing(
    holder: ContextHolder, decoder: Decoder, blocks: Iterable[nn.Module], context: ForwardContext
) -> None:
    """Let the checkpointed ``blocks`` find ``context`` again when the backward recomputes them.

    Args:
        holder: Where the layers look for their context.
        decoder: What runs the blocks.
        blocks: The model's first block and those with a memory.
        context: Of the forward that begins.

    Undone by :func:`unwrap_checkpointing` when the forward ends.
    """
    if decoder.checkpointing is not None:
        if getattr(decoder.module, decoder.checkpointing):
            around = functools.partial(_checkpoint, holder=holder, context=context)
            context.unwrap.append(checkpoint_blocks(decoder.module, decoder.checkpointing, decoder.blocks, around))
        return
    for block in {id(block): block for block in blocks}.values():
        function = block.__dict__.get("_gradient_checkpointing_func")
        if function is None or not getattr(block, "gradient_checkpointing", False):
            continue
        context.unwrap.append(functools.partial(block.__dict__.__setitem__, "_gradient_checkpointing_func", function))
        wrapped = functools.partial(_checkpoint, function, holder=holder, context=context)
        block.__dict__["_gradient_checkpointing_func"] = wrapped


def unwrap_checkpointing(context: ForwardContext) -> None:
    """Give the blocks their own checkpointing function back."""
    while context.unwrap:
        context.unwrap.pop()()


def checkpoint_blocks(
    module: nn.Module, flag: str, blocks: Iterable[nn.Module], around: Callable[..., Any] | None = None
) -> Callable[[], None]:
    """Checkpoint each block's forward from inside, in place of the checkpointing that ``module.flag`` stands for.

    The recomputation sees the context variables of the forward.

    Args:
        module: What runs the blocks. Its flag is cleared.
        flag: The attribute's name.
        blocks: All of its blocks.
        around: Called in place of torch's checkpoint, with it, the block's forward and its arguments.

    Returns:
        What undoes it. Forwards that have begun keep their way of recomputing.
    """
    function = functools.partial(checkpoint, use_reentrant=False, determinism_check="none", preserve_rng_state=False)
    if around is not None:
        function = functools.partial(around, function)
    before: list[tuple[nn.Module, Any]] = []
    for block in blocks:
        before.append((block, block.__dict__.get("forward")))
        block.__dict__["forward"] = functools.partial(_call, function, block.forward)
    setattr(module, flag, False)

    def undo() -> None:
        setattr(module, flag, True)
        for block, forward in before:
            del block.__dict__["forward"]
            if forward is not None:
                block.__dict__["forward"] = forward

    return undo


def _call(function: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    scene = contextvars.copy_context()
    return function(lambda *args, **kwargs: scene.copy().run(forward, *args, **kwargs), *args, **kwargs)


def _checkpoint(
    function: Callable[..., Any],
    block: Callable[..., Any],
    hidden: Tensor,
    *args: Any,
    holder: ContextHolder,
    context: ForwardContext,
    **kwargs: Any,
) -> Any:
    """Checkpoint ``block(hidden, *args)`` with this forward's X0 as one more input."""
    if context.x0 is None:  # older transformers run the first block's hooks inside the checkpoint, which is too late
        context.x0 = hidden
    runs = 0

    def run(x0: Tensor, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal runs
        runs += 1
        with holder.using(replace(context, x0=x0, recomputing=runs > 1)):
            return block(hidden, *args, **kwargs)

    return function(run, context.x0, hidden, *args, **kwargs)
