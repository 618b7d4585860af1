"""``Compressor``: a long context in, a few soft tokens out.

    compress(ids, mask) -> SoftTokens

Rows are packed to their beginning before anything is computed, so the same text gives the same slots whatever stands in
the other rows and wherever its padding was. A row is divided into segments and these into runs (``segments.py``); a
kind of compressor only says how one segment is written (:meth:`Compressor.write`). The slots of all segments are
joined, and in form ``kv`` run once through the LM with the adapter on, at positions 0 to M−1: the decoder goes on at M.

The decoder is frozen and shared. An encoder is its own weights with a LoRA adapter that is on only while it reads; what
is learned besides is float32, whatever the decoder's dtype.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from inlay.softtoken.compressors.adapter import PREFIX, Adapter, adapter_parameters
from inlay.softtoken.compressors.calibration import Calibration, embedding_rms
from inlay.softtoken.compressors.config import BaseCompressorConfig, LoraSettings
from inlay.softtoken.compressors.errors import CompressorError
from inlay.softtoken.compressors.language_model import LanguageModel
from inlay.softtoken.compressors.passages import Passage, Written, unused_zeroed, write_all
from inlay.softtoken.compressors.segments import Segment, divide_by_ratio, divide_by_slots
from inlay.softtoken.compressors.storage import save
from inlay.softtoken.prompting import BoundLayout
from inlay.softtoken.tokens import SoftTokens, packing_order

C = TypeVar("C", bound=BaseCompressorConfig)


class Compressor(nn.Module, Generic[C]):
    """A compressor for one decoder. Made by :func:`build_compressor` or :func:`load_compressor`.

    Attributes:
        config: Its configuration.
        lm: The decoder. No submodule: its weights are not in ``parameters()`` or ``state_dict()``.
        adapter: The LoRA adapter that it reads with; None for kinds without one.
        embedding_rms: RMS of the decoder's embeddings, measured when it was built.
        calibration: What brings slots to that scale.
        layout: What stands around the slots where it answers; a loaded run sets it. None: :meth:`answer` is given one.
    """

    learns: ClassVar[bool] = True
    """Whether there is anything to train."""

    def __init__(self, config: C, model: Any) -> None:
        super().__init__()
        self.config = config
        self.lm = LanguageModel(model)
        self.adapter: Adapter | None = None
        self.layout: BoundLayout | None = None
        self.embedding_rms = embedding_rms(self.lm.embedding)
        self.calibration = Calibration(self.embedding_rms, learned=self.learns)

    @abstractmethod
    def write(self, passage: Passage) -> Written:
        """The slots of one passage, calibrated."""

    @property
    def most_slots(self) -> int | None:
        """Most slots that a segment may get; None for no limit."""
        return self.config.max_slots

    def room(self, tokens: int, slots: int) -> int:
        """Positions that the LM needs to read ``tokens`` of input and write ``slots``."""
        return tokens

    def use_adapter(self, settings: LoraSettings) -> None:
        """Put a LoRA adapter into the decoder, switched off."""
        self.adapter = Adapter(self.lm.model, self.lm.blocks, settings)

    def calibrated(self, slots: Tensor) -> Tensor:
        """Slots at the decoder's scale, or as they are where the configuration says so."""
        return self.calibration(slots) if self.config.calibrate else slots

    def compress(
        self, ids: Tensor, mask: Tensor | None = None, *, ratio: int | None = None, slots: int | None = None
    ) -> SoftTokens:
        """Write contexts into soft tokens.

        Args:
            ids: `[B, S]` token ids.
            mask: `[B, S]`, True (or 1) at tokens; padding may stand anywhere. None: no padding.
            ratio: Tokens per slot, one of ``config.ratios``: a row of n tokens gets ceil(n / ratio) slots.
            slots: Fixed number of slots M; a row of fewer tokens gets one slot per token. With neither, what the
                configuration says.

        Returns:
            Slots in ``config.form`` and the decoder's dtype, on its device.

        Raises:
            CompressorError: Shapes disagree, a row is empty, the ratio is not allowed, or a context is too long.
        """
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(torch.bool)
        if ids.ndim != 2 or ids.shape != mask.shape:
            raise CompressorError(f"ids and mask are [B, S]; got {[*ids.shape]} and {[*mask.shape]}")
        lengths: list[int] = mask.sum(dim=1).tolist()
        empty = [row for row, length in enumerate(lengths) if length == 0]
        if empty or not lengths:
            raise CompressorError(
                f"nothing to compress: the mask has no token in {f'rows {empty[:8]}' if empty else 'no rows'}. For an "
                "example without a context, use soft tokens with no slots"
            )
        plans = [self.plan(length, ratio=ratio, slots=slots) for length in lengths]
        ids, mask = ids.to(self.lm.device), mask.to(self.lm.device)
        order = packing_order(mask)[:, : max(lengths)]
        tokens = ids.gather(1, order) * mask.gather(1, order)  # what stands at padding need not be a token
        memory = write_all(self.lm.embed(tokens), plans, self.write, recursive=self.config.segments == "recursive")
        if self.config.form == memory.form:
            return memory
        assert memory.embeddings is not None
        places = torch.arange(memory.slots, device=mask.device).expand(memory.rows, -1)
        _, kv = self.lm.read_keys_values(memory.embeddings, memory.mask, places, adapter=self.adapter)
        return unused_zeroed(kv, memory.mask)

    def answer(
        self,
        questions: Sequence[str] | None,
        memories: SoftTokens | Sequence[SoftTokens],
        layout: BoundLayout | None = None,
        **generate_kwargs: Any,
    ) -> list[str]:
        """The decoder's answers from soft tokens: one batch, in eval mode and by greedy decoding.

        Args:
            questions: B questions of any lengths; None for a layout without.
            memories: B rows with any numbers of slots, as one memory or as several whose rows stand one below the
                other. A single row is what all questions are about.
            layout: What stands around the slots; the compressor's own when not given.
            generate_kwargs: Passed on to transformers' ``generate``.

        Raises:
            CompressorError: There is no layout.
            SoftTokenError: Memories of different forms or decoders, or none.
            LayoutError: Memories and questions disagree in number, or do not go with the layout.
        """
        layout = layout or self.layout
        if layout is None:
            raise CompressorError(
                "nothing says what stands around these memories; give answer a layout=PromptLayout(...).bind(tokenizer)"
            )
        memory = memories if isinstance(memories, SoftTokens) else SoftTokens.cat(memories)
        if questions is not None and memory.rows == 1:
            memory = memory.select([0] * len(questions))
        return layout.answer(self.lm.model, memory, questions, **generate_kwargs)

    def plan(self, tokens: int, *, ratio: int | None = None, slots: int | None = None) -> tuple[Segment, ...]:
        """How a context of ``tokens`` would be divided; the sum of its segments' ``slots`` is what it costs.

        Raises:
            CompressorError: As :meth:`compress`.
        """
        ratio, slots = self.budget(ratio, slots)
        if ratio is not None:
            segments = divide_by_ratio(tokens, ratio, self.config.segment_tokens)
        else:
            assert slots is not None
            segments = divide_by_slots(tokens, slots, self.config.segment_tokens)
        self._check_room(tokens, segments)
        return segments

    def budget(self, ratio: int | None, slots: int | None) -> tuple[int | None, int | None]:
        """What a call asks for: a ratio or a number of slots, the other being None; with neither, the configuration's.

        Raises:
            CompressorError: Both are given, the ratio is not allowed, or there would be no slot.
        """
        config = self.config
        if ratio is not None and slots is not None:
            raise CompressorError(f"ratio={ratio} and slots={slots} are two ways to say one thing; give one of them")
        if ratio is None and slots is None:
            return (None, config.slots) if config.slots is not None else (config.ratios[0], None)
        if slots is not None and slots < 1:
            raise CompressorError(f"a memory has at least one slot; got slots={slots}")
        if ratio is not None and ratio not in config.ratios:
            raise CompressorError(f"ratio {ratio} is not among the compressor's: config.ratios is {config.ratios}")
        return ratio, slots

    def _check_room(self, tokens: int, segments: Sequence[Segment]) -> None:
        most = max(segment.slots for segment in segments)
        if self.most_slots is not None and most > self.most_slots:
            raise CompressorError(
                f"a context of {tokens:,} tokens needs {most:,} slots in one segment, and there are {self.most_slots}; "
                "use a larger ratio or shorter segments (segment_tokens), or build the compressor with "
                f"max_slots={most} or more"
            )
        before = needed = 0
        for segment in segments:
            earlier = before if self.config.segments == "recursive" else 0
            needed = max(needed, self.room(earlier + segment.tokens, segment.slots))
            before += segment.slots
        limit = self.lm.max_positions
        if limit is not None and max(needed, before) > limit:
            fix = "split or cut it (context_tokens in a recipe), or use "
            fix += "a larger ratio" if before > limit else "a compressor that reads it in segments (segment_tokens)"
            raise CompressorError(
                f"a context of {tokens:,} tokens takes {needed:,} positions in one pass and {before:,} slots, and "
                f"{type(self.lm.model).__name__} has {limit:,} positions; {fix}"
            )

    def named_trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Everything there is to train: the compressor's own parameters, and the adapter's as ``adapter.…``."""
        yield from self.named_parameters()
        if self.adapter is not None:
            for name, parameter in self.adapter.tensors().items():
                yield f"adapter.{name.removeprefix(PREFIX)}", parameter

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The same without names, for an optimizer. Empty for ``pool``."""
        return [parameter for _, parameter in self.named_trainable_parameters()]

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the compressor to ``directory``, without its decoder; :func:`load_compressor` reads it.

        Raises:
            CompressorError: It holds NaN or infinity. Nothing is written.
        """
        save(self, Path(directory))

    def fingerprint(self) -> str:
        """A hash of the configuration and of everything learned: compressors that have it in common are the same."""
        digest = hashlib.sha256(self.config.model_dump_json().encode())
        learned = self.state_dict() | ({} if self.adapter is None else self.adapter.tensors())
        for name, tensor in sorted(learned.items()):
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(name.encode() + raw.numpy().tobytes())
        return digest.hexdigest()

    def detach(self) -> None:
        """Take the adapter out of the decoder, which then has the modules it had before; the compressor is used up."""
        if self.adapter is not None:
            self.adapter.detach()


def freeze(model: nn.Module) -> None:
    """No gradient to the model's own weights; adapters that it has keep theirs."""
    adapters = adapter_parameters(model)
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(False)
