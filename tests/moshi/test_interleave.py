"""The text stream against hand-worked cases and against a frame-by-frame reading of the published rules."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from inlay.data.audio import Word
from inlay.moshi.interleave import Interleaver

PAD, EPAD = 3, 0


class Letters:
    """Each letter is a piece: a is 10, b is 11, …"""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") + 10 for letter in text]


def main(text: str, start: float, end: float) -> Word:
    return Word(text, start, end, "SPEAKER_MAIN")


def stream(words: Sequence[Word], frames: int, **options: bool) -> list[int]:
    return Interleaver(Letters(), **options).text_stream(words, frames).tolist()


def reference(words: Sequence[Word], frames: int, *, keep_and_shift: bool) -> list[int]:
    """What moshi-finetune's README and interleaver publish, told frame by frame.

    In frame t the words that have begun before t + 1 come due; each replaces what was still to be said, or with
    keep_and_shift joins its end. If something is to be said, its first piece is; a padding just before becomes the end
    of padding.
    """
    due = sorted((w for w in words if w.speaker == "SPEAKER_MAIN"), key=lambda w: w.start)
    due = [w for w in due if w.end > w.start]
    said: list[int] = []
    to_say: list[int] = []
    for t in range(frames):
        while due and due[0].start * 12.5 < t + 1:
            pieces = Letters().encode(due.pop(0).text.strip())
            to_say = to_say + pieces if keep_and_shift else pieces
        if not to_say:
            said.append(PAD)
            continue
        if said and said[-1] == PAD:
            said[-1] = EPAD
        said.append(to_say.pop(0))
    return said


def test_a_words_pieces_follow_one_per_frame_from_the_frame_it_begins_in() -> None:
    # 0.20 s lies in frame 2 (0.16–0.24 s); three pieces; the padding before ends with 0.
    assert stream([main("abc", 0.20, 0.6)], 8) == [PAD, EPAD, 10, 11, 12, PAD, PAD, PAD]


def test_a_word_in_the_first_frame_has_no_end_of_padding_before_it() -> None:
    assert stream([main("a", 0.0, 0.1)], 3) == [10, PAD, PAD]
    assert stream([main("a", -0.5, 0.1)], 3) == [10, PAD, PAD]


def test_a_word_on_a_frames_border_belongs_to_the_frame_that_begins_there() -> None:
    assert stream([main("a", 0.16, 0.3)], 4) == [PAD, EPAD, 10, PAD]


def test_words_back_to_back_have_no_padding_between() -> None:
    assert stream([main("ab", 0.08, 0.24), main("c", 0.24, 0.4)], 6) == [EPAD, 10, 11, 12, PAD, PAD]


def test_pieces_still_due_when_the_next_word_begins_are_dropped() -> None:
    assert stream([main("abcd", 0.0, 0.2), main("e", 0.16, 0.4)], 5) == [10, 11, 14, PAD, PAD]


def test_or_shift_the_next_word_with_keep_and_shift() -> None:
    words = [main("abcd", 0.0, 0.2), main("e", 0.16, 0.4)]
    assert stream(words, 6, keep_and_shift=True) == [10, 11, 12, 13, 14, PAD]


def test_of_two_words_in_one_frame_the_later_is_said() -> None:
    assert stream([main("a", 0.0, 0.03), main("b", 0.05, 0.1)], 3) == [11, PAD, PAD]
    assert stream([main("a", 0.0, 0.03), main("b", 0.05, 0.1)], 3, keep_and_shift=True) == [10, 11, PAD]


def test_only_the_main_speakers_words_that_last_are_said() -> None:
    words = [Word("x", 0.0, 0.5, "SPEAKER_01"), main("b", 0.16, 0.16), main("c", 0.32, 0.4), main("d", 0.5, 0.4)]
    assert stream(words, 6) == [PAD, PAD, PAD, EPAD, 12, PAD]


def test_the_stream_is_as_long_as_the_audio_and_not_a_frame_longer() -> None:
    """moshi-finetune asks for seconds and is given frames: 12.5 times too much padding behind a short window."""
    assert len(stream([main("abc", 0.0, 0.1)], 2)) == 2
    assert stream([main("abc", 0.0, 0.1), main("d", 9, 9.5)], 2) == [10, 11]
    assert stream([], 0) == []
    assert stream([], 2) == [PAD, PAD]


words = st.lists(
    st.builds(
        lambda text, start, length, speaker: Word(text, start / 50, (start + length) / 50, speaker),
        st.text("abcdef ", max_size=6).map(str.strip),
        st.integers(-5, 200),
        st.integers(-3, 40),
        st.sampled_from(["SPEAKER_MAIN", "SPEAKER_MAIN", "SPEAKER_01"]),
    ),
    max_size=25,
)


@given(words, st.integers(0, 60), st.booleans())
def test_equals_the_published_rules_read_frame_by_frame(words: list[Word], frames: int, shift: bool) -> None:
    made = Interleaver(Letters(), keep_and_shift=shift).text_stream(words, frames)
    assert made.dtype == np.int32
    assert made.tolist() == reference(words, frames, keep_and_shift=shift)
