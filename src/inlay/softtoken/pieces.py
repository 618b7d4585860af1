"""The text around the memory: cut into pieces once, and each piece tokenised on its own.

Training sees the answer, generation does not. So no token of the prompt may depend on the answer: pieces are tokenised
one by one and their ids joined, never the joined text. That is safe and, done naively, still wrong in two ways.

- **Spaces.** A BPE of the GPT and Llama 3 kind writes a space at the *beginning* of a word: ``Answer: Paris`` is
  ``Answer`` ``:`` ``ĠParis``. Cut behind the space, the anchor ends in a lone ``Ġ`` and the answer begins with a token
  for a word inside another. The rule: **spaces at the end of a piece move to the beginning of the next.**
- **Beginnings.** A SentencePiece-like tokenizer puts a ``▁`` before whatever text it is given, so a piece of its own
  gets a space that is not there, or two. The rule: **a piece is tokenised behind the last character of the piece before
  it, which is then cut off again.** Where the tokenizer merges across that cut, a newline takes the character's place.

For a word-level tokenizer, to which spaces are nothing, both rules change nothing.

A question or an answer is read as plain text: one that spells ``</s>`` does not end the sequence. The layout's own
texts may hold special tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from inlay.softtoken.errors import LayoutError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

QUESTION = "{question}"
_MEMORY_MARK, _QUESTION_MARK, _ANSWER_MARK = "<<inlay:memory>>", "<<inlay:question>>", "<<inlay:answer>>"

# Llama 3's templates write today's date into the prompt unless they are given one: training and answering would differ
# from one day to the next. This is the date they fall back on.
_DATE = "26 Jul 2024"

_SHORT = 256
"""Characters of a text, at most, whose tokens are kept."""

Encoded: TypeAlias = "tuple[tuple[int, ...], tuple[tuple[int, int], ...]]"
"""Token ids, and the characters ``(start, end)`` that each stands for."""


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one origin.

    Attributes:
        name: ``bos``, ``template``, ``bos after``, ``question``, ``anchor``, ``answer`` or ``eos``.
        ids: Its tokens.
    """

    name: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Surroundings:
    """The fixed texts of a layout: ``before`` [memory] ``lead`` [question] ``tail`` [anchor] [answer] ``closing``.

    Without a question there is no ``lead``. ``before`` and ``closing`` are a chat template's.
    """

    before: str
    lead: str
    tail: str
    closing: str


def plain_surroundings(question: str | None) -> Surroundings:
    """Those of a layout without a chat template; ``question`` is its template, with ``{question}`` in it."""
    lead, tail = ("", "") if question is None else question.split(QUESTION)
    return Surroundings("", lead, tail, "")


def chat_surroundings(tokenizer: PreTrainedTokenizerFast, question: str | None) -> Surroundings:
    """Those of one turn as the tokenizer's chat template writes it: memory and question the user's, the answer the
    assistant's.

    The whole turn is rendered once with marks in their places, and cut at them. What the template writes before an
    assistant's answer (an empty block for thinking, say) is therefore in the prompt, for training and generation alike.

    Raises:
        LayoutError: There is no template, it fails, or it drops, escapes, repeats or reorders what the user says.
    """
    if not tokenizer.chat_template:
        raise LayoutError("chat: the tokenizer has no chat template; set chat: false, or use an instruct model's")
    user = _MEMORY_MARK + ("" if question is None else question.replace(QUESTION, _QUESTION_MARK))
    turn = [{"role": "user", "content": user}, {"role": "assistant", "content": _ANSWER_MARK}]
    try:
        text = str(tokenizer.apply_chat_template(turn, tokenize=False, date_string=_DATE))
    except Exception as error:  # whatever a template's author lets it raise
        raise LayoutError(f"chat: the tokenizer's chat template cannot write one turn: {error}") from error
    before, rest = _cut(text, _MEMORY_MARK, "the user's message")
    lead, rest = ("", rest) if question is None else _cut(rest, _QUESTION_MARK, "the question")
    tail, closing = _cut(rest, _ANSWER_MARK, "the assistant's message")
    return Surroundings(before, lead, tail, closing)


def tokenise(tokenizer: PreTrainedTokenizerFast, text: str, *, after: str = "", plain: bool = False) -> list[int]:
    """The ids of ``text`` as it stands behind the text ``after``, of which the last character alone matters.

    Args:
        tokenizer: A fast one; nothing that it puts around a text by itself is added.
        text: A piece. Spaces at its beginning belong to it.
        after: The text of the piece before; empty at a beginning.
        plain: Read what looks like a special token as text.
    """
    if not text or not after:
        return list(_encode(tokenizer, text, plain)[0]) if text else []
    for guard in (after[-1], "\n"):
        ids, spans = _encode(tokenizer, guard + text, plain)
        inside = sum(end <= len(guard) for _, end in spans)
        if all(start >= len(guard) for start, _ in spans[inside:]):
            return list(ids[inside:])
    return list(_encode(tokenizer, text, plain)[0])


def special_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Every id that is a special token, named or only added."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def own_beginning(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What the tokenizer puts before any text by itself: a BOS, nothing, or more."""
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    for start in range(len(ids) - len(text) + 1):
        if ids[start : start + len(text)] == text:
            return list(ids[:start])
    return []


def _encode(tokenizer: PreTrainedTokenizerFast, text: str, plain: bool) -> Encoded:
    # Training lays the same anchors, questions and answers out again and again.
    if len(text) <= _SHORT:
        return _encode_once(tokenizer, len(tokenizer), text, plain)
    return _encode_once.__wrapped__(tokenizer, 0, text, plain)


@functools.lru_cache(maxsize=1 << 15)
def _encode_once(tokenizer: PreTrainedTokenizerFast, known: int, text: str, plain: bool) -> Encoded:
    """``known`` is how many tokens the tokenizer has: with one more it may read a text otherwise.

    It is the tokenizer's backend that reads: what ``tokenizer(text)`` does around it takes several times as long on a
    short text.
    """
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != plain:
        backend.encode_special_tokens = plain
    read = backend.encode(text, add_special_tokens=False)
    return tuple(read.ids), tuple(read.offsets)


def _cut(text: str, mark: str, what: str) -> tuple[str, str]:
    count = text.count(mark)
    if count == 1:
        before, after = text.split(mark)
        return before, after
    fault = "drops or escapes it, or moves it behind what follows it" if count == 0 else f"repeats it {count} times"
    raise LayoutError(
        f"chat: the place of {what} cannot be found in what the tokenizer's chat template writes (it {fault}); set "
        "chat: false and write the turn into question and anchor, or give the tokenizer another template"
    )
