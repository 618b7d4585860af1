"""Losses summed by document: tokens of one document are no independent measurements, in whichever sequence they lie."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from inlay.evaluate.scoring import Floats, Integers


class DocumentSums:
    """Bits and tokens of each document in each of some parts (quarters of the positions, say), batch by batch."""

    def __init__(self, parts: int) -> None:
        """Begin with no document.

        Args:
            parts: How many there are.
        """
        self.parts = parts
        self._numbers: dict[Hashable, int] = {}
        self._sums, self._counts = np.zeros(0), np.zeros(0, dtype=np.int64)

    def add(
        self,
        bits: Floats,
        used: NDArray[np.bool_],
        part: Integers,
        documents: Integers,
        names: Sequence[Sequence[Hashable]],
    ) -> None:
        """Add a batch of B rows with N places each.

        Args:
            bits: ``[B, N]`` of the token at each place.
            used: ``[B, N]`` whether it counts.
            part: ``[B, N]`` the part that each place lies in, from 0.
            documents: ``[B, N]`` the document of its row that each place lies in, from 0; −1 in none.
            names: For each row a name of each of its documents; what has one name is one document.
        """
        number = np.full(documents.shape, -1, dtype=np.int64)
        for row, its_names in enumerate(names):
            known = np.array([self._numbers.setdefault(name, len(self._numbers)) for name in its_names])
            inside = documents[row] >= 0
            number[row, inside] = known[documents[row, inside]]
        used = used & (number >= 0)
        cell, size = (number * self.parts + part)[used], len(self._numbers) * self.parts
        grown = size - len(self._sums)
        self._sums = np.pad(self._sums, (0, grown)) + np.bincount(cell, bits[used], size)
        self._counts = np.pad(self._counts, (0, grown)) + np.bincount(cell, minlength=size)

    @property
    def sums(self) -> Floats:
        """``[documents, parts]`` bits."""
        return self._sums.reshape(-1, self.parts)

    @property
    def counts(self) -> Integers:
        """``[documents, parts]`` tokens."""
        return self._counts.reshape(-1, self.parts)
