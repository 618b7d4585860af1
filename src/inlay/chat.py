"""A conversation with a finished run: text in, text out, and a memory that outlives the process.

Within one process the KV cache and the memory's state both go on. Between processes only the memory's state does: a
session file of fixed size. What attention sees is bounded as well. Where every layer of the model has a sliding window,
the cache keeps no more than that; elsewhere a cache as long as the window gives way to a new one, begun with the newest
half of its tokens. What is older is in the memory alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from inlay.data import RecallConfig, load_tokenizer
from inlay.fastweight import InlayError, Session
from inlay.fastweight.causal_lm import forward_arguments, with_cache
from inlay.train import Run

PIECE = 512  # tokens read at a time
LONGEST_WAIT = 8  # tokens that may wait for a character to end; more are no character
_MARK = "⁂inlay⁂"


class ChatError(InlayError, ValueError):
    """A run cannot hold the conversation that was asked for; the message says what would."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: An answer's most tokens.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: The likeliest tokens whose probabilities sum to this are the ones drawn from.

    Raises:
        ChatError: A value out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.8
    top_p: float = 0.95

    def __post_init__(self) -> None:
        for name, good, range_ in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not good:
                raise ChatError(f"{name} must be {range_}; got {getattr(self, name)}")

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """The next token, given logits ``[vocabulary]``."""
        if self.temperature == 0:
            return int(logits.argmax())
        values, order = torch.softmax(logits.float().cpu() / self.temperature, -1).sort(descending=True)
        values = values.masked_fill(values.cumsum(-1) - values >= self.top_p, 0)
        return int(order[torch.multinomial(values, 1, generator=generator)])


class Conversation:
    """What was said so far, as the model has it: a KV cache, and the memory's state if the run has a memory.

    Attributes:
        run: The run that answers.
        session: The memory's state; None for a run without a memory.
        window: Tokens that attention sees at most; None where the model's own sliding window bounds it.
    """

    def __init__(
        self, run: Run, session_path: Path | None = None, *, window: int | None = None, seed: int | None = None
    ) -> None:
        """Begin a conversation, or go on with the one in ``session_path`` if that file exists.

        Args:
            run: A run of task text.
            session_path: A file that :meth:`save` wrote, or where one is going to be.
            window: Tokens that attention sees at most, if fewer than the model's own.
            seed: For the same answers again; None for others each time.

        Raises:
            ChatError: The run has no tokenizer, or no memory though a session is asked for.
            CheckpointError: The session's file is damaged or of another run.
        """
        self.run = run
        self.tokenizer = _tokenizer(run)
        if session_path is not None and run.memory is None:
            raise ChatError(
                f"the run in {run.directory} has no memory, so it has no session to keep in {session_path}: leave "
                "--session out, or use a run whose recipe has a memory section"
            )
        if run.memory is None:
            self.session: Session | None = None
        elif session_path is not None and session_path.exists():
            self.session = run.memory.load_session(session_path)
            if self.session.batch_size != 1:
                raise ChatError(f"{session_path} holds {self.session.batch_size} conversations; this takes one")
        else:
            self.session = run.memory.session()
        self.window = self._window(window)
        self._generator = torch.Generator()
        self._generator.manual_seed(seed) if seed is not None else self._generator.seed()
        self._begin()

    def _begin(self) -> None:
        self._cache = DynamicCache(config=self.run.model.config)
        self._cached = 0
        self._recent: deque[int] = deque(maxlen=None if self.window is None else self.window // 2)
        self._unread: list[int] = []
        self._logits: Tensor | None = None

    @property
    def is_new(self) -> bool:
        """Whether nothing has been read, in this process or before."""
        remembered = 0 if self.session is None else int(self.session.tokens_read)
        return not (remembered or self._cached or self._unread)

    def say(
        self,
        text: str,
        sampling: Sampling | None = None,
        *,
        stopped: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[str]:
        """Read ``text`` and answer, a piece of text at a time.

        A tokenizer with a chat template makes it a turn of the user's; without one the answer continues the text. The
        conversation is whole between any two pieces, so the iterator may be left at any time.

        Args:
            text: Of any length: it is read in pieces of bounded size.
            sampling: How tokens are chosen.
            stopped: Asked between forwards; True ends the reading or the answer there.
            progress: Told how many of how many tokens of ``text`` have been read.

        Raises:
            ChatError: There is nothing to answer or continue.
        """
        sampling = sampling or Sampling()
        ids = self._unread + self._encode(text)
        if not ids and self._logits is None:
            raise ChatError("there is nothing to continue yet: give a prompt")
        if not self._read(ids, stopped, progress):
            return
        decoder = PieceDecoder(self.tokenizer)
        for _ in range(sampling.max_new_tokens):
            assert self._logits is not None
            token = sampling.choose(self._logits, self._generator)
            if token in self._ends():
                break
            self._unread = [token]
            if piece := decoder.add(token):
                yield piece
            if stopped() or not self._read(self._unread, stopped):
                break
        if piece := decoder.rest():
            yield piece

    def reset(self) -> None:
        """Forget everything that was said."""
        if self.session is not None:
            self.session.reset()
        self._begin()

    def save(self, path: Path) -> None:
        """Write the memory's state to ``path``; the KV cache is not kept.

        Raises:
            ChatError: The run has no memory.
        """
        if self.session is None:
            raise ChatError(f"the run in {self.run.directory} has no memory, so there is nothing to save")
        self._read(self._unread)
        self.session.save(path)

    @torch.no_grad()
    def _read(
        self,
        ids: list[int],
        stopped: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> bool:
        """Read tokens in pieces. False: stopped before the last of them; the rest is dropped."""
        at = 0
        while at < len(ids):
            if at and stopped():
                return False
            if self._cached == self.window:
                self._slide()
            room = PIECE if self.window is None else min(PIECE, self.window - self._cached)
            piece = ids[at : at + room]
            at += len(piece)
            with self.session or nullcontext():
                self._forward(piece)
            self._recent.extend(piece if self.window is not None else ())
            self._unread = []
            progress(at, len(ids))
        return True

    def _slide(self) -> None:
        """Begin a new cache with the newest tokens of the old one. The memory, which knows them, does not read them."""
        self._cache, self._cached = DynamicCache(config=self.run.model.config), 0
        with self.session.copy() if self.session is not None else nullcontext():
            recent = list(self._recent)
            for at in range(0, len(recent), PIECE):
                self._forward(recent[at : at + PIECE])

    def _forward(self, ids: list[int]) -> None:
        model = self.run.model
        tokens = torch.tensor([ids], device=model.device)
        last = {"logits_to_keep": 1} if "logits_to_keep" in forward_arguments(model) else {}
        output = model(input_ids=tokens, **with_cache(model, self._cache), use_cache=True, **last)
        self._cached += len(ids)
        self._logits = output.logits[0, -1]

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer.chat_template:
            return self.tokenizer(self._turn(text), add_special_tokens=False)["input_ids"]
        ids = self.tokenizer(text, add_special_tokens=self.is_new)["input_ids"]
        if ids and ids[-1] == self.tokenizer.eos_token_id:  # the text does not end here
            ids = ids[:-1]
        if not ids and self.is_new and self.tokenizer.bos_token_id is not None:
            return [self.tokenizer.bos_token_id]
        return ids

    def _turn(self, text: str) -> str:
        """A turn of the user's with all that the template puts between the last answer and the next."""
        turn = [{"role": "user", "content": text}]
        if not self.is_new:
            before = [{"role": "user", "content": "…"}, {"role": "assistant", "content": _MARK}]
            whole = self.tokenizer.apply_chat_template(before + turn, tokenize=False, add_generation_prompt=True)
            _, mark, rest = whole.partition(_MARK)
            if mark:
                return rest
        return self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    def _ends(self) -> set[int | None]:
        """Tokens that end an answer."""
        ends = self.tokenizer.eos_token_id
        if self.run.recipe.model.name_or_path is None:  # made from a bare architecture: its ids are mere defaults
            return {ends}
        configured = getattr(self.run.model.generation_config, "eos_token_id", None)
        return {ends, *(configured if isinstance(configured, list) else [configured])}

    def _window(self, wanted: int | None) -> int | None:
        if wanted is not None and wanted < 2:
            raise ChatError(f"the window must be at least 2 tokens; got {wanted}")
        config = self.run.model.config.get_text_config(decoder=True)
        sliding = DynamicCache(config=config).is_sliding
        if wanted is None and sliding and all(sliding):
            return None
        longest: int | None = getattr(config, "max_position_embeddings", None)
        return min(filter(None, (wanted, longest)), default=None)


class PieceDecoder:
    """Tokens to text as they come; a character is given out when its last byte is there."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._given: list[int] = []  # the tokens given out last, without which a tokenizer might drop a leading space
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is open."""
        self._waiting.append(token)
        text = self._text()
        return "" if text.endswith("\ufffd") and len(self._waiting) < LONGEST_WAIT else self._give(text)

    def rest(self) -> str:
        """What is left when no more tokens come."""
        return self._give(self._text())

    def _text(self) -> str:
        return self._decode(self._given + self._waiting)[len(self._decode(self._given)) :]

    def _give(self, text: str) -> str:
        if self._waiting:
            self._given, self._waiting = self._waiting, []
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _tokenizer(run: Run) -> PreTrainedTokenizerBase:
    if isinstance(run.data_config, RecallConfig):
        raise ChatError(
            f"the run in {run.directory} is of task recall, whose symbols are no text: there is no tokenizer to talk "
            "through. Use a run of task text (inlay evaluate measures recall)"
        )
    return load_tokenizer(run.data_config.tokenizer, [])
