"""Where every token of a batch stands in its row's chunk grid.

Each row has its own grid: padding does not count, a new document starts a new chunk, and a row that continues from a
state starts in the middle of its open chunk. The scan wants none of that, only chunks of C slots side by side. This
module computes the map between the two once per forward; every memory layer of the model shares it.

    row        p p a a a a a b b b           (p padding, documents a and b, C = 4)
    packed     a a a a | a . . . | b b b .   resets before chunks 0 and 2; only chunk 0 is complete and written

When the grid is already regular (one document per row, no padding: the training case) nothing is moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.fastweight.state import NO_DOCUMENT, FastWeightState


def check_documents(documents: object, batch: int, tokens: int, name: str = "documents") -> None:
    """Make sure that ``documents`` is ``[B, T]`` of whole numbers.

    Raises:
        ValueError: It is not; calls it ``name``.
    """
    expected = f"{name} must be a tensor [B, T] = [{batch}, {tokens}] of integers"
    if not isinstance(documents, Tensor):
        raise ValueError(f"{expected}; got {type(documents).__name__}")
    if documents.shape != (batch, tokens) or documents.is_floating_point() or documents.is_complex():
        raise ValueError(f"{expected}; got {documents.dtype} {[*documents.shape]}")


@dataclass(frozen=True)
class ChunkLayout:
    """The chunk grid of one call.

    Attributes:
        chunk_size: Tokens per chunk C.
        tokens: Tokens per row T of the call.
        chunks: Chunks per row N in the packed form (rows with fewer are empty at the end).
        source: ``[B, N·C]`` where each packed slot comes from, an index into the row's ``C`` buffered and then ``T``
            new tokens, or ``C + T`` for an empty slot. None when packed and unpacked order are the same.
        target: ``[B, T]`` packed slot of each token, ``N·C`` for padding. None like ``source``.
        resets: ``[N, B]`` bool, rows whose sum is emptied before the chunk; None where no row's is.
        writes: ``[N, B]`` bool, rows whose chunk is complete, so that its Δ is added.
        phase: ``[B]`` tokens in each row's open chunk after the call.
        document: ``[B]`` the document each row is in after the call.
        phases: ``phase`` on the host.
        read: Real tokens that each row gets by the call, on the host.
        written: Chunks of each row that are complete, on the host.
    """

    chunk_size: int
    tokens: int
    chunks: int
    source: Tensor | None
    target: Tensor | None
    resets: tuple[Tensor | None, ...]
    writes: tuple[Tensor | bool, ...]
    phase: Tensor
    document: Tensor
    phases: tuple[int, ...]
    read: tuple[int, ...]
    written: tuple[int, ...]

    @property
    def aligned(self) -> bool:
        """Whether packed and unpacked order are the same."""
        return self.source is None

    def flags(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """``resets`` and ``writes`` as tensors, ``[B, N]`` bool each."""

        def column(flag: Tensor | bool | None) -> Tensor:
            return flag if isinstance(flag, Tensor) else torch.full((batch,), bool(flag), device=device)

        resets, writes = (torch.stack([column(flag) for flag in flags], 1) for flags in (self.resets, self.writes))
        return resets, writes

    def committed(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The chunks of this call that are in their row's sum after it, ``[B, N]`` bool, and the rows whose sum was
        emptied on the way, ``[B]`` bool."""
        resets, writes = self.flags(batch, device)
        emptied_later = (resets.flip(1).cumsum(1).flip(1) - resets.long()) > 0
        return writes & ~emptied_later, resets.any(1)

    def pack(self, tokens: Tensor, buffered: Tensor | None = None) -> Tensor:
        """``[B, T, ·]`` tokens (after the ``[B, C, ·]`` buffered ones, if any) in chunk order ``[B, N·C, ·]``.

        Empty slots are zero, so they add nothing to any Δ. Of an aligned layout: the tokens as they are, ``[B, T, ·]``.
        """
        if self.source is None:
            return tokens
        batch, _, channels = tokens.shape
        if buffered is None:
            buffered = tokens.new_zeros(batch, self.chunk_size, channels)
        rows = torch.cat([buffered.to(tokens.dtype), tokens, tokens.new_zeros(batch, 1, channels)], dim=1)
        return rows.gather(1, self.source.unsqueeze(-1).expand(-1, -1, channels))

    def unpack(self, packed: Tensor) -> Tensor:
        """The call's tokens ``[B, T, ·]`` out of ``[B, N·C, ·]``; zero for padding."""
        if self.target is None:
            return packed
        rows = F.pad(packed, (0, 0, 0, 1))
        return rows.gather(1, self.target.unsqueeze(-1).expand(-1, -1, packed.shape[-1]))

    def open_chunk(self, packed: Tensor) -> Tensor:
        """Each row's open chunk ``[B, C, ·]`` out of packed tokens, zero from the row's phase on."""
        size = self.chunk_size
        if self.source is None:
            last = packed[:, (self.chunks - 1) * size :]
            last = F.pad(last, (0, 0, 0, size - last.shape[1]))
        else:
            grid = packed.view(packed.shape[0], self.chunks, size, -1)
            used = (self.source.view(-1, self.chunks, size)[..., 0] < size + self.tokens).sum(1)
            index = (used - 1).clamp(min=0).view(-1, 1, 1, 1).expand(-1, 1, size, grid.shape[-1])
            last = grid.gather(1, index).squeeze(1)
        is_open = torch.arange(size, device=packed.device) < self.phase.unsqueeze(1)
        return last * is_open.unsqueeze(-1)


def chunk_layout(
    batch: int,
    tokens: int,
    chunk_size: int,
    *,
    documents: Tensor | None = None,
    state: FastWeightState | None = None,
    phases: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    keep_last_open: bool = False,
) -> ChunkLayout:
    """The chunk grid of a call of ``batch`` rows and ``tokens`` new tokens each.

    Args:
        batch: Rows B.
        tokens: New tokens per row T.
        chunk_size: Tokens per chunk C.
        documents: ``[B, T]`` integer ids, −1 for padding. A token whose id differs from the last real token's starts a
            document. None: every row goes on with the document it is in.
        state: Where each row stands; None: nowhere yet.
        phases: The state's, if the host knows them: then its device is not asked.
        device: Where the map is wanted; that of ``documents`` or ``state`` when there is one.
        keep_last_open: Leave each row's last chunk open even if it is full, so that its phase is C and the next call
            commits it.
    """
    if state is not None and documents is None and phases is None:
        phases = state.phase.tolist()
    if documents is None and (phases is None or not any(phases)):
        return _regular_layout(batch, tokens, chunk_size, state, device, keep_last_open)

    if state is None:
        assert documents is not None
        before = torch.full((batch,), NO_DOCUMENT, dtype=torch.long, device=documents.device)
        phase = torch.zeros_like(before)
    else:
        before, phase = state.document, state.phase
    if documents is None:
        before = before.clamp(min=0)
        documents = before.unsqueeze(1).expand(batch, tokens)
    documents = documents.long()
    slots = torch.arange(chunk_size, device=documents.device).expand(batch, -1)
    ids = torch.cat([torch.where(slots < phase.unsqueeze(1), before.unsqueeze(1), NO_DOCUMENT), documents], dim=1)
    return _ragged_layout(ids, before, tokens, chunk_size, keep_last_open)


def longest_document(documents: Tensor) -> int:
    """Tokens of the longest document in ids ``[B, T]``, −1 for padding."""
    starts, _ = _starts(documents, torch.full_like(documents[:, 0], NO_DOCUMENT))
    number = torch.where(documents >= 0, starts.cumsum(1), 0)  # of each token's document within its row, from 1
    tokens = torch.zeros(len(number), number.shape[1] + 1, dtype=torch.long, device=documents.device)
    return int(tokens.scatter_add_(1, number, torch.ones_like(number))[:, 1:].max())


def _starts(ids: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Of ids ``[B, N]``, −1 where there is no token: which tokens start a document, and the place of the last token up
    to each place (−1: none yet), ``[B, N]`` both. ``before`` ``[B]`` are the documents that the rows were in.
    """
    # The id of the last real token before each one: carried along over padding by its position.
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    last = torch.where(ids >= 0, place, -1).cummax(1).values
    previous = F.pad(last, (1, 0), value=-1)[:, :-1]
    previous_id = torch.where(previous >= 0, ids.gather(1, previous.clamp(min=0)), before.unsqueeze(1))
    return (ids >= 0) & (ids != previous_id), last


def _regular_layout(
    batch: int,
    tokens: int,
    chunk_size: int,
    state: FastWeightState | None,
    device: torch.device | str | None,
    keep_last_open: bool,
) -> ChunkLayout:
    chunks = max(1, -(-tokens // chunk_size))
    rest = tokens - (chunks - 1) * chunk_size
    written = rest == chunk_size and not keep_last_open
    where = state.document.device if state is not None else device
    document = torch.zeros(batch, dtype=torch.long, device=where)
    if state is not None:
        document = state.document if tokens == 0 else state.document.clamp(min=0)
    phase = torch.full((batch,), 0 if written else rest, dtype=torch.long, device=where)
    writes = (*(True,) * (chunks - 1), written)
    return ChunkLayout(
        chunk_size=chunk_size,
        tokens=tokens,
        chunks=chunks,
        source=None,
        target=None,
        resets=(None,) * chunks,
        writes=writes,
        phase=phase,
        document=document,
        phases=(0 if written else rest,) * batch,
        read=(tokens,) * batch,
        written=(sum(writes),) * batch,
    )


def _ragged_layout(ids: Tensor, before: Tensor, tokens: int, chunk_size: int, keep_last_open: bool) -> ChunkLayout:
    """The grid of rows given as ids ``[B, C + T]`` (buffered tokens, then new ones), −1 where there is no token."""
    batch, length = ids.shape
    real = ids >= 0
    rank = real.cumsum(1) - 1  # of a real token among its row's real tokens
    place = torch.arange(length, device=ids.device).expand(batch, -1)
    starts, last = _starts(ids, before)
    first = torch.where(starts, rank, 0).cummax(1).values
    within = rank - first  # position within the document (or within what this call knows of it)
    opens = real & (within % chunk_size == 0)
    chunk = opens.cumsum(1) - 1
    count = opens.sum(1)

    chunks = max(1, int(count.max()))
    slots = chunks * chunk_size
    packed = torch.where(real, chunk * chunk_size + within % chunk_size, slots)
    source = torch.full((batch, slots + 1), length, dtype=torch.long, device=ids.device)
    source.scatter_(1, packed, place.contiguous())
    source = source[:, :slots].contiguous()
    filled = (source < length).view(batch, chunks, chunk_size).sum(-1)
    resets = torch.zeros(batch, chunks + 1, dtype=torch.bool, device=ids.device)
    resets.scatter_(1, torch.where(opens, chunk, chunks), starts)
    resets = resets[:, :chunks]

    newest = (count - 1).clamp(min=0).unsqueeze(1)
    phase = torch.where(count > 0, filled.gather(1, newest).squeeze(1), 0)
    full = filled == chunk_size
    if keep_last_open:
        full.scatter_(1, newest, False)
    else:
        phase = phase % chunk_size
    final = last[:, -1]
    document = torch.where(final >= 0, ids.gather(1, final.clamp(min=0).unsqueeze(1)).squeeze(1), before)
    target = packed[:, chunk_size:].contiguous()
    regular = torch.arange(chunk_size, chunk_size + slots, device=ids.device)[:tokens]
    # One transfer to the host: what the loop over chunks asks, and how the rows stand.
    same = (source[:, :tokens] == regular).all() if slots - chunk_size < tokens <= slots else real.new_zeros(())
    by_chunk, by_row = [resets.any(0), full.all(0), full.any(0)], [phase, real[:, chunk_size:].sum(1), full.sum(1)]
    asked = [same.view(1), *by_chunk, *by_row]
    told = torch.cat([answer.long() for answer in asked]).tolist()
    (aligned,), some_reset, all_full, some_full, phases, read, written = _split(told, [len(one) for one in asked])
    return ChunkLayout(
        chunk_size=chunk_size,
        tokens=tokens,
        chunks=chunks,
        source=None if aligned else source,
        target=None if aligned else target,
        resets=tuple(resets[:, n] if some else None for n, some in enumerate(some_reset)),
        writes=tuple(
            True if every else (full[:, n] if some else False)
            for n, (every, some) in enumerate(zip(all_full, some_full, strict=True))
        ),
        phase=phase,
        document=document,
        phases=phases,
        read=read,
        written=written,
    )


def _split(values: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """``values`` in pieces of these lengths."""
    ends = [*accumulate(lengths)]
    return [tuple(values[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
