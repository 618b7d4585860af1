"""A transcript's words as a text stream of one token per frame, by the rules that Moshi was fine-tuned with.

The rules are those of moshi-finetune's `Interleaver` (https://github.com/kyutai-labs/moshi-finetune):

- only the main speaker's words, each tokenised by itself, in the order in which they begin; a word that does not last
  is left out;
- a word's pieces stand one per frame from the frame in which it begins; pieces that are still due when the next word
  begins are dropped, or with `keep_and_shift` come first and push the next word back;
- every other frame holds padding, and the last padding before a piece is the end of padding.

There the length of a window's text is asked in seconds and was given in frames. So the text of a short last window ran
on behind its audio as padding, and that padding entered the text loss. Here the length is a number of frames, the
audio's own; what comes behind it is no frame at all.

There a window's text is made of the words that begin in it. Here it is made once for the whole file and then cut, so a
window's first frames hold the pieces of a word that has begun before, and its last one may end the padding before a
word of the next window. Within a file cut at frame 0 the two are the same token for token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from inlay.data.audio import MAIN_SPEAKER, Word

FRAME_RATE = 12.5
"""Frames per second of Mimi and Moshi."""


class TextTokenizer(Protocol):
    """What is asked of a tokenizer: `sentencepiece.SentencePieceProcessor` has it."""

    def encode(self, text: str, /) -> list[int]:
        """The token ids of a text, without BOS and EOS."""
        ...


@dataclass(frozen=True)
class Interleaver:
    """Makes the text stream of a file. The defaults are Moshi's and moshi-finetune's."""

    tokenizer: TextTokenizer
    """Makes a word's pieces."""

    padding_id: int = 3
    """The token of a frame in which no piece is due."""

    end_of_padding_id: int = 0
    """The token in place of padding where the next frame holds a piece."""

    frame_rate: float = FRAME_RATE
    """Frames per second."""

    main_speaker: str = MAIN_SPEAKER
    """Whose words are taken: Moshi's, on the left channel."""

    keep_and_shift: bool = False
    """Keep the pieces that are still due when the next word begins, and shift that word behind them."""

    def text_stream(self, words: Iterable[Word], frames: int) -> np.ndarray:
        """The text token of each frame.

        Args:
            words: The file's transcript, of all speakers, in any order.
            frames: T, the frames of the file's audio.

        Returns:
            `[T]` int32: piece ids, `padding_id` and `end_of_padding_id`.
        """
        stream = np.full(frames, self.padding_id, dtype=np.int32)
        is_piece = np.zeros(frames, dtype=bool)
        for frame, piece in self._placed(words, frames):
            stream[frame] = piece
            is_piece[frame] = True
        stream[:-1][is_piece[1:] & ~is_piece[:-1]] = self.end_of_padding_id
        return stream

    def _placed(self, words: Iterable[Word], frames: int) -> Iterable[tuple[int, int]]:
        spoken = sorted((word for word in words if word.speaker == self.main_speaker), key=lambda word: word.start)
        spoken = [word for word in spoken if word.start < word.end]
        begins = [max(0, math.floor(word.start * self.frame_rate)) for word in spoken]
        free = 0  # the first frame behind the pieces so far
        for word, (begin, next_begin) in zip(spoken, pairwise([*begins, frames]), strict=True):
            pieces = self.tokenizer.encode(word.text.strip())
            first = max(begin, free) if self.keep_and_shift else begin
            last = frames if self.keep_and_shift else min(next_begin, frames)
            yield from zip(range(first, last), pieces, strict=False)
            free = first + len(pieces)
