"""What one forward of the model tells its memory layers: the documents of its tokens, and the embeddings X0.

A memory layer sits deep inside a block and sees only the input of one linear layer. What else it needs is gathered by
hooks on the model, its decoder and the first block into a ``ForwardContext`` that lives for one forward. How a block
that is run again in the backward finds it: :mod:`inlay.fastweight.checkpointing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay.fastweight.chunks import ChunkLayout, check_documents, chunk_layout
from inlay.fastweight.parallel import part_layout
from inlay.fastweight.state import FastWeightState
from inlay.fastweight.stepping import StepState
from inlay.fastweight.streaming import MemoryState

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass
class ForwardContext:
    """One forward of a model with a memory.

    Attributes:
        documents: ``[B, T]`` ids, −1 for padding; None when every row is one document without padding.
        x0: ``[B, T, D]`` what enters the first block.
        mlp_inputs: ``[B, T, D]`` what entered the MLP of a block, until its memory takes it (``target="hidden"``).
        explicit: ``document_ids`` as the caller passed them, if any.
        attention_mask: The 2-D one, if the caller or the model gave one.
        opaque_mask: Whether the caller gave a mask of another kind, from which padding cannot be told.
        running: Depths of the modules that are running, from the outermost on.
        ran: Blocks whose memory has run.
        recomputing: Whether gradient checkpointing is running a block again.
        batch: Rows B.
        tokens: New tokens per row T.
        state: What the rows have read before this forward and will have after it; None for a stateless one.
        appends: Whether every row only adds tokens to its open chunk (decoding), so that the state is written in place.
        commits: Whether some row's open chunk is full and has to be written first.
        steps: The fixed buffers that it goes on from instead, in a model that streams.
        parallel: The ranks that the rows' tokens are spread over; None if they are all here.
    """

    documents: Tensor | None = None
    x0: Tensor | None = None
    mlp_inputs: dict[int, Tensor | None] = field(default_factory=dict)
    explicit: Tensor | None = None
    attention_mask: Tensor | None = None
    opaque_mask: bool = False
    running: list[int] = field(default_factory=list)
    ran: set[int] = field(default_factory=set)
    recomputing: bool = False
    batch: int = 0
    tokens: int = 0
    state: MemoryState | None = None
    appends: bool = False
    commits: bool = False
    steps: StepState | None = None
    parallel: ProcessGroup | None = None
    unwrap: list[Callable[[], None]] = field(default_factory=list)
    _layouts: dict[tuple[int, int, int, torch.device], ChunkLayout] = field(default_factory=dict)

    def layout(self, z: Tensor, chunk_size: int, state: FastWeightState | None = None) -> ChunkLayout:
        """The chunk grid of this forward for inputs ``z`` ``[B, T, F]``, made once and shared by a device's layers."""
        key = (z.shape[0], z.shape[1], chunk_size, z.device)
        if key not in self._layouts:
            documents = None if self.documents is None else self.documents.to(z.device)
            if self.parallel is not None:
                made = part_layout(*key[:3], documents=documents, group=self.parallel, device=z.device)
            else:
                made = chunk_layout(
                    *key[:3],
                    documents=documents,
                    state=state,
                    phases=None if self.state is None or state is None else self.state.phases,
                    device=z.device,
                    keep_last_open=self.state is not None,
                )
            self._layouts[key] = made
        return self._layouts[key]

    def replace_layout(self, layout: ChunkLayout, z: Tensor) -> None:
        """Let the layers use another chunk grid for inputs as ``z`` is."""
        self._layouts[z.shape[0], z.shape[1], layout.chunk_size, z.device] = layout

    @property
    def used_layout(self) -> ChunkLayout | None:
        """The chunk grid that the layers used; None if none has asked for it."""
        return next(iter(self._layouts.values()), None)


class ContextHolder:
    """Holds the context of the forward that is running; each thread runs its own."""

    def __init__(self) -> None:
        self._contexts: dict[int, ForwardContext] = {}

    @property
    def current(self) -> ForwardContext | None:
        """Of this thread's forward; None between forwards."""
        return self._contexts.get(get_ident())

    @current.setter
    def current(self, context: ForwardContext | None) -> None:
        if context is None:
            self._contexts.pop(get_ident(), None)
        else:
            self._contexts[get_ident()] = context

    @contextmanager
    def using(self, context: ForwardContext) -> Iterator[None]:
        """Make ``context`` the current one for a while."""
        before, self.current = self.current, context
        try:
            yield
        finally:
            self.current = before


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor that a module was called with: what it works on, by the custom of every model."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def text_positions(position_ids: Any) -> Tensor | None:
    """``[B, T]`` positions of the tokens in their text; None where there are none, or only an image's (Qwen-VL's
    ``[3, B, T]``). Of its ``[4, B, T]`` the first are the text's."""
    if not isinstance(position_ids, Tensor):
        return None
    if position_ids.dim() == 3 and position_ids.shape[0] == 4:
        return position_ids[0]
    return position_ids if position_ids.dim() == 2 else None


def documents_of(
    batch: int,
    tokens: int,
    *,
    explicit: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Any,
    carry: bool,
    device: torch.device,
    before: Tensor | None = None,
) -> Tensor | None:
    """Document ids ``[B, T]`` of a forward's tokens, −1 for padding; None when every row is one unpadded document.

    ``explicit`` ids win. Without them a row's documents are read off its ``position_ids``, which restart where a packed
    document begins, as transformers' own masks do. Padding is where a 2-D ``attention_mask`` is 0. With ``carry``, all
    of a row counts as one document. ``before`` ``[B]`` are the documents that rows with a state are in: they go on with
    them unless ``explicit`` ids say otherwise.
    """
    positions = text_positions(position_ids)
    if tokens == 1:
        positions = None  # one token begins no second document
    if explicit is None and attention_mask is None and positions is None:
        return None  # without asking the device, as each step of decoding does
    real: Tensor | None = None
    ids: Tensor | None = None  # all of them alike
    if attention_mask is not None:
        if attention_mask.shape[1] < tokens:
            raise ValueError(
                f"attention_mask tells of {attention_mask.shape[1]} tokens and the call has {tokens}; it must be "
                "[B, T], or [B, past + T] where tokens were read before"
            )
        real = attention_mask[:, -tokens:].to(device).bool()
    if explicit is not None:
        check_documents(explicit, batch, tokens, "document_ids")
        ids = explicit.to(device)
        real = ids >= 0 if real is None else real & (ids >= 0)
    elif positions is not None and not carry:
        ids = _packed_documents(positions.to(device).expand(batch, -1), real)
    if carry:
        ids = None
    told = [] if real is None else [real.all()]
    told += [] if ids is None else [(ids == ids[:, :1]).all()]
    regular = not told or bool(torch.stack(told).all() if len(told) > 1 else told[0])
    if regular and (before is None or explicit is None or carry):
        return None
    if ids is None:
        ids = torch.zeros(batch, tokens, dtype=torch.long, device=device)
    if before is not None and explicit is None and not carry:
        ids = ids + before.to(device).clamp(min=0).unsqueeze(1)
    return ids if real is None else torch.where(real, ids, -1)


def _packed_documents(positions: Tensor, real: Tensor | None) -> Tensor:
    """Number the documents of each row: one starts wherever a position does not follow the one before it."""
    if real is None:
        real = torch.ones_like(positions, dtype=torch.bool)
    place = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    last = torch.where(real, place, -1).cummax(1).values
    before = torch.nn.functional.pad(last, (1, 0), value=-1)[:, :-1]
    follows = positions == positions.gather(1, before.clamp(min=0)) + 1
    return (real & ~follows & (before >= 0)).cumsum(1)
