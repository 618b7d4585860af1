"""``encoder-tokens``: the LM reads the context and then M learned memory tokens, whose last hidden states become slots.

In-context Autoencoder (Ge et al., ICLR 2024), and in form ``kv`` 500xCompressor (Li et al., 2024), which keeps what the
memory tokens leave in the cache of every layer instead of their last hidden states.

The decoder goes on at position M, so the memory tokens' keys must be rotated for positions 0 to M−1, while they are
computed behind n tokens of context. Rotary attention sees distances alone: the pass simply begins at position −n. For
a model with a table of positions (GPT-2) keys carry no rotation and the pass begins at 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay.softtoken.compressors.base import Compressor
from inlay.softtoken.compressors.calibration import Projector
from inlay.softtoken.compressors.config import EncoderTokensConfig
from inlay.softtoken.compressors.passages import Passage, Written
from inlay.softtoken.tokens import left_aligned


class EncoderTokensCompressor(Compressor[EncoderTokensConfig]):
    """Memory tokens behind the context.

    Attributes:
        memory: `[max_slots, D]`, the memory tokens, drawn at the RMS of the embeddings; a segment of M slots uses the
            first M.
        projector: From hidden states to the embedding space; None where form ``kv`` needs none.
    """

    def __init__(self, config: EncoderTokensConfig, model: Any) -> None:
        super().__init__(config, model)
        self.memory = nn.Parameter(torch.randn(config.table_size, self.lm.width) * self.embedding_rms)
        embeds = config.form == "embeddings" or config.segments == "recursive"
        self.projector = Projector(self.lm.width, config.projector_width) if embeds else None
        self.shifts_positions = config.form == "kv" and self.lm.shifts_positions
        self.use_adapter(config.lora)

    @property
    def most_slots(self) -> int | None:
        """The size of the table."""
        return self.config.table_size

    def room(self, tokens: int, slots: int) -> int:
        """The segment and its memory tokens stand in one input."""
        return tokens + slots

    def write(self, passage: Passage) -> Written:
        """One pass over what came before, the segment and its memory tokens."""
        slots = passage.runs.mask
        text = passage.joined()
        memory = self.memory[: slots.shape[1]].to(text.embeds.dtype).expand(len(slots), -1, -1)
        sequence = left_aligned(torch.cat([text.embeds, memory], dim=1), torch.cat([text.mask, slots], dim=1))
        assert sequence.embeddings is not None
        behind = text.mask.sum(1)
        places = (behind.unsqueeze(1) + torch.arange(slots.shape[1], device=slots.device)) * slots
        if self.config.form == "embeddings":
            hidden = self.lm.read(sequence.embeddings, sequence.mask, adapter=self.adapter)
            return Written(self._slots(hidden, places))
        hidden, kv = self.lm.read_keys_values(
            sequence.embeddings,
            sequence.mask,
            places,
            first_position=passage.before - behind if self.shifts_positions else 0,
            adapter=self.adapter,
        )
        return Written(None if self.projector is None else self._slots(hidden, places), kv)

    def _slots(self, hidden: Tensor, places: Tensor) -> Tensor:
        assert self.projector is not None
        at_memory = hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        return self.calibrated(self.projector(at_memory))
