"""``PromptLayout``: the one place that says what stands around a memory.

    [BOS?] [soft tokens] [BOS-after?] [question?] [anchor] [answer] [EOS]
    └────────────── the prompt ──────────────────────────┘└─ supervised ─┘

Training inputs, labels, mask and positions, the generation prefix, the stop ids and ``max_new_tokens`` are all made
from it, so that training and answering cannot drift apart:

- **The prefix is one.** Training is the prompt and the answer, generation is the prompt; both take it from
  ``BoundLayout.prompt``, tokenised without a look at the answer (``pieces.py`` has the two rules that takes).
- **Labels are not shifted.** The label at a position is the token *at* that position. Transformers' models shift them
  in their loss; shifting by hand as well teaches a model to skip every second token (it answers 10 12 14 16 where it
  was taught 10 11 12 13 14 15 16).
- **The answer ends.** The end token is supervised, once a row, and it is what generation stops at.
- **A row is alone.** Positions count a row's own tokens, and padding is masked and has no label: on the right in
  training, on the left in generation, with the same positions.

In a chat the same holds with the template's text for BOS and EOS: memory and question are the user's, the anchor opens
the assistant's answer, and the template's end of turn closes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from inlay.softtoken.pieces import QUESTION
from inlay.softtoken.prompting import BoundLayout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class PromptLayout(BaseModel):
    """What stands around a memory.

    Spaces at the end of ``question`` and ``anchor`` are tokenised at the beginning of what follows. Special tokens may
    be written into both.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bos: bool | None = None
    """A BOS before the soft tokens. None: what the tokenizer puts before any text by itself, in a chat the template."""

    bos_after: bool = False
    """A BOS behind the soft tokens. Form ``kv`` can only have this one."""

    question: str | None = "\nQuestion: {question}\n"
    """What the question is set into, with ``{question}`` in it; null: questions are left out."""

    anchor: str = "Answer: "
    """What calls for the answer."""

    eos: bool = True
    """Close the answer with EOS (in a chat, with the template's end of turn) and supervise it."""

    chat: bool = False
    """Write memory, question and answer as one turn of the tokenizer's chat template."""

    answer_tokens: int = Field(default=64, ge=1)
    """Most tokens that an answer may take when generated, EOS among them. Training never cuts an answer."""

    unanswerable: str = "unanswerable"
    """The answer where the references are empty."""

    @field_validator("question")
    @classmethod
    def _question_has_its_place(cls, value: str | None) -> str | None:
        if value is not None and value.count(QUESTION) != 1:
            raise ValueError(f"question must hold {QUESTION} once, like 'Question: {QUESTION}\\n'; got {value!r}")
        return value

    @model_validator(mode="after")
    def _a_chat_has_its_own_bos(self) -> PromptLayout:
        if self.chat and self.bos is not None:
            raise ValueError("bos: a chat begins as its template says; leave bos out, or set chat: false")
        return self

    def bind(self, tokenizer: PreTrainedTokenizerFast) -> BoundLayout:
        """This layout in the tokens of ``tokenizer``.

        Raises:
            LayoutError: The tokenizer lacks what the layout asks for (EOS, BOS, a chat template that keeps its
                messages whole, the characters of question and anchor), or is not a fast one.
        """
        return BoundLayout(self, tokenizer)
