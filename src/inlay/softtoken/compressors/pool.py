"""``pool``: a slot is the mean of its run's token embeddings. Nothing is learned: the baseline of the others."""

from __future__ import annotations

from inlay.softtoken.compressors.base import Compressor
from inlay.softtoken.compressors.config import PoolConfig
from inlay.softtoken.compressors.passages import Passage, Written


class PoolCompressor(Compressor[PoolConfig]):
    """Mean-pooled token embeddings, brought back to the scale that averaging took from them."""

    learns = False

    def room(self, tokens: int, slots: int) -> int:
        """The LM reads nothing."""
        return 0

    def write(self, passage: Passage) -> Written:
        """The calibrated mean of each run."""
        return Written(self.calibrated(passage.runs.mean(passage.embeds)))
