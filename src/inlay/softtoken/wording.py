"""A layout as ids: what stands before and behind the memory, what is taught, and how generated ids read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inlay.softtoken.batches import ShownLayout, ShownToken
from inlay.softtoken.errors import LayoutError
from inlay.softtoken.pieces import (
    Piece,
    chat_surroundings,
    own_beginning,
    plain_surroundings,
    special_ids,
    tokenise,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from inlay.softtoken.layout import PromptLayout


@dataclass(frozen=True)
class Prompt:
    """What stands around the memory up to the answer, the same in training and in generation."""

    pieces_before: tuple[Piece, ...]
    pieces_after: tuple[Piece, ...]

    @property
    def before(self) -> list[int]:
        """Ids before the slots."""
        return [index for piece in self.pieces_before for index in piece.ids]

    @property
    def after(self) -> list[int]:
        """Ids between the slots and the answer."""
        return [index for piece in self.pieces_after for index in piece.ids]


class Wording:
    """A :class:`PromptLayout` in the tokens of one tokenizer.

    Attributes:
        layout: The layout.
        tokenizer: The tokenizer.
        stop_ids: What ends an answer: the end token that is supervised, and EOS.
        max_new_tokens: Most tokens of an answer, its end among them.
    """

    def __init__(self, layout: PromptLayout, tokenizer: PreTrainedTokenizerFast) -> None:
        if not tokenizer.is_fast:
            raise LayoutError(f"{type(tokenizer).__name__} is a slow tokenizer; load it with use_fast=True")
        self.layout = layout
        self.tokenizer = tokenizer
        self.max_new_tokens = layout.answer_tokens
        texts = chat_surroundings(tokenizer, layout.question) if layout.chat else plain_surroundings(layout.question)
        self._texts = texts
        # What an answer stands behind, as the questions do not change it.
        opening = texts.tail + layout.anchor
        self._answer_after = opening.rstrip(" ")
        self._answer_spaces = opening[len(self._answer_after) :]

        for text in (texts.before, texts.lead, texts.tail, layout.anchor):
            self._check_known(text)
        self._pieces_before = self._before()
        self._bos_after = (Piece("bos after", (self._bos("bos_after"),)),) if layout.bos_after else ()
        end = self._end_token()
        self._end = (end,) if layout.eos else ()
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in (end, tokenizer.eos_token_id) if i is not None))

    def prompt(self, question: str | None = None) -> Prompt:
        """The ids around the memory for this question (which a layout without questions does not look at).

        Raises:
            LayoutError: The layout asks for a question and it is missing or blank.
        """
        texts, layout = self._texts, self.layout
        parts = [("template" if layout.chat else "question", texts.tail, False), ("anchor", layout.anchor, False)]
        if layout.question is not None:
            if question is None or not question.strip():
                raise LayoutError(
                    "the question is missing or blank, and the layout asks for one (question: null does not)"
                )
            parts = [("question", texts.lead, False), ("question", question.strip(), True), *parts]
        pieces, after, spaces = [], "", ""
        for name, part, plain in parts:
            text = (spaces + part).rstrip(" ")
            spaces = (spaces + part)[len(text) :]
            pieces.append(Piece(name, tuple(tokenise(self.tokenizer, text, after=after, plain=plain))))
            after = text or after
        return Prompt(self._pieces_before, (*self._bos_after, *(piece for piece in pieces if piece.ids)))

    def context_ids(self, context: str, limit: int | None = None) -> list[int]:
        """The ids of a context as it is read before it is in slots: plain text, without what stands around the memory.

        Args:
            context: The text.
            limit: Tokens behind which it is cut, a recipe's ``context_tokens``; None for none.
        """
        return tokenise(self.tokenizer, context, plain=True)[:limit]

    def unknown(self, ids: Sequence[int]) -> int:
        """How many of these ids stand for text that the tokenizer does not know."""
        return ids.count(self.tokenizer.unk_token_id)

    def answer_ids(self, references: str | Sequence[str]) -> list[int]:
        """The supervised ids of one example: its answer and the end token.

        Args:
            references: One answer, or several of which the first is taught; none of them: the layout's
                ``unanswerable``.

        Raises:
            LayoutError: The tokenizer has no way to write this answer without an end token in it.
        """
        return [index for piece in self._answer(references) for index in piece.ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ``ids`` up to the first stop id, without special tokens and outer spaces."""
        end = next((place for place, index in enumerate(ids) if index in self.stop_ids), len(ids))
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip()

    def show(self, question: str | None, references: str | Sequence[str], slots: int = 4) -> ShownLayout:
        """One example with a memory of ``slots`` slots, token by token as training and generation see it."""
        prompt = self.prompt(question)
        rows: list[tuple[str, str, int | None]] = [
            *self._spelled(prompt.pieces_before),
            *(("memory", f"slot {slot}", None) for slot in range(slots)),
            *self._spelled(prompt.pieces_after),
        ]
        taught = self._spelled(self._answer(references))
        generation = tuple(ShownToken(at, *row, label=None, supervised=False) for at, row in enumerate(rows))
        answer = (ShownToken(at, *row, label=row[2], supervised=True) for at, row in enumerate(taught, len(rows)))
        return ShownLayout((*generation, *answer), generation)

    def _before(self) -> tuple[Piece, ...]:
        if self.layout.chat:
            ids, name = tokenise(self.tokenizer, self._texts.before), "template"
        elif self.layout.bos is None:
            ids, name = own_beginning(self.tokenizer), "bos"
        else:
            ids, name = [self._bos("bos")] if self.layout.bos else [], "bos"
        return (Piece(name, tuple(ids)),) if ids else ()

    def _bos(self, field: str) -> int:
        if self.tokenizer.bos_token_id is None:
            raise LayoutError(f"{field}: the tokenizer has no BOS token; set {field}: false")
        return int(self.tokenizer.bos_token_id)

    def _end_token(self) -> int:
        """The template's end of turn, where that is a special token; EOS otherwise."""
        special = special_ids(self.tokenizer)
        closing = (i for i in tokenise(self.tokenizer, self._texts.closing) if i in special)
        end = next(closing, self.tokenizer.eos_token_id)
        if end is None:
            raise LayoutError("the tokenizer has no EOS token, so no answer could end; set its eos_token")
        return int(end)

    def _check_known(self, text: str) -> None:
        unknown = self.tokenizer.unk_token_id
        if unknown is None or self.tokenizer.unk_token in text:
            return
        if unknown in tokenise(self.tokenizer, text):
            raise LayoutError(
                f"the tokenizer does not know all of {text!r} and would put {self.tokenizer.unk_token} there; write "
                "question and anchor in what it knows"
            )

    def _answer(self, references: str | Sequence[str]) -> tuple[Piece, ...]:
        if not isinstance(references, str):
            references = references[0] if references else self.layout.unanswerable
        text = references.strip()
        ids = tokenise(self.tokenizer, self._answer_spaces + text, after=self._answer_after, plain=True) if text else []
        if forged := set(ids) & set(self.stop_ids):
            end = self.tokenizer.convert_ids_to_tokens(min(forged))
            raise LayoutError(f"the tokenizer reads {end} in the answer {text!r} as its end; take it out of the text")
        return (Piece("answer", tuple(ids)), Piece("eos", self._end))

    def _spelled(self, pieces: Sequence[Piece]) -> list[tuple[str, str, int | None]]:
        return [
            (piece.name, str(self.tokenizer.convert_ids_to_tokens(index)), index)
            for piece in pieces
            for index in piece.ids
        ]
