"""A conversation with Moshi, frame by frame: it hears and speaks at once.

One frame is 80 ms: Mimi turns the user's samples into codes, ``LMGen`` takes a step, Mimi turns Moshi's codes into
samples. What comes out for a frame is what a listener would hear just after it.

As in Kyutai's own inference the first frame of a conversation is stepped twice. What enters at the very first step lies
in the past and is replaced by initial tokens, so the frame would otherwise not be heard.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor

from inlay.fastweight.errors import InlayError
from inlay.fastweight.memory import attach_pretrained
from inlay.moshi.checkpoint import load_finetuned
from inlay.moshi.commits import Commit, CommitLog
from inlay.moshi.lm_gen import MemoryLMGen
from inlay.moshi.loss import uncompiled
from inlay.moshi.session import load_session, save_session
from inlay.moshi.streaming import stream_of
from inlay.moshi.weights import CONFIG_NAME, is_conditioned, load_checkpoint

Samples = NDArray[np.float32]


class DuplexError(InlayError, ValueError):
    """This model cannot hold a conversation, or this recording cannot be heard; the message says why."""


@dataclass(frozen=True)
class Voice:
    """How Moshi's tokens are drawn; what is None is the checkpoint's own setting, or ``LMGen``'s.

    Attributes:
        temp: Temperature of the audio tokens; 0 takes the likeliest.
        temp_text: Temperature of the text tokens; 0 takes the likeliest.
        top_k: Audio tokens are drawn from so many likeliest.
        top_k_text: Text tokens too.
        seed: For the same answer again, of a conversation that begins; None: another one each time.
    """

    temp: float | None = None
    temp_text: float | None = None
    top_k: int | None = None
    top_k_text: int | None = None
    seed: int | None = None

    def settings(self) -> dict[str, Any]:
        """Arguments of ``LMGen``."""
        return {name: value for name, value in asdict(self).items() if value is not None and name != "seed"}


@dataclass
class Moshi:
    """The three parts of a Moshi that talks.

    Attributes:
        lm: In eval mode, with its memory if it has one.
        mimi: The codec.
        text_tokenizer: Of the text stream.
        source: Where they come from, for reports.
        gen_config: Arguments of ``LMGen`` that the checkpoint brings.
    """

    lm: LMModel
    mimi: MimiModel
    text_tokenizer: SentencePieceProcessor
    source: str = ""
    gen_config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        who = self.source or "this model"
        if self.lm.dep_q == 0:
            raise DuplexError(f"{who} only listens (its dep_q is 0): it has no voice to answer with")
        if is_conditioned(self.lm):
            raise DuplexError(f"{who} wants conditions (it has a fuser), which a conversation does not give")
        pieces, tokens = self.text_tokenizer.get_piece_size(), self.lm.text_card
        if pieces < tokens:
            raise DuplexError(
                f"{who} speaks {tokens:,} text tokens, its tokenizer knows {pieces:,}: it is another model's"
            )

    @property
    def frame_size(self) -> int:
        """Samples in a frame: 1,920."""
        return int(self.mimi.frame_size)


@dataclass(frozen=True)
class Reply:
    """What one frame brought.

    Attributes:
        samples: ``[frame_size]`` float32, Moshi's voice; silence where it has not begun.
        text: What it says, empty in most frames.
        milliseconds: Wall-clock time that the frame took, commits included.
        commits: Chunks that the memory wrote.
    """

    samples: Samples
    text: str
    milliseconds: float
    commits: list[Commit]


class Duplex:
    """A conversation with Moshi that is open while ``with duplex:`` lasts, one frame after the other.

    Attributes:
        moshi: Who listens and speaks.
        lm_gen: Kyutai's generator, with the commits between its steps.
        log: The memory's commits; None without a memory.
    """

    def __init__(self, moshi: Moshi, *, voice: Voice | None = None, session: str | Path | None = None) -> None:
        """Make it ready.

        Args:
            moshi: Its two models must not be streaming.
            voice: How tokens are drawn.
            session: Go on from this file if it exists.
        """
        self.moshi = moshi
        self.voice = voice or Voice()
        self.log: CommitLog | None = None
        self._session = None if session is None else Path(session)
        self.lm_gen = MemoryLMGen(moshi.lm, **dict(moshi.gen_config) | self.voice.settings())
        self._open = ExitStack()
        self._text = _Pieces(moshi.text_tokenizer, {moshi.lm.text_padding_token_id, moshi.lm.end_of_text_padding_id})

    def __enter__(self) -> Duplex:
        """Begin, or go on from the session.

        Raises:
            CheckpointError: The session is damaged or of another model.
        """
        with ExitStack() as stack:
            stack.enter_context(self.moshi.mimi.streaming(1))
            stack.enter_context(self.lm_gen.streaming(1))
            if self._session is not None and self._session.exists():
                load_session(self._session, self.lm_gen, self.moshi.mimi)
            elif self.voice.seed is not None:
                torch.manual_seed(self.voice.seed)
            stream = stream_of(self.moshi.lm)
            if stream is not None and stream.steps is not None:
                self.log = CommitLog(self.moshi.lm, frame_rate=self.moshi.mimi.frame_rate)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.close()

    @property
    def frames(self) -> int:
        """Steps taken since the conversation began, in earlier sessions too."""
        state = self.lm_gen._streaming_state
        return 0 if state is None else int(state.offset_cpu)

    @torch.no_grad()
    def hear(self, samples: Samples) -> Reply:
        """Hear one frame of the user's voice, ``[frame_size]`` float32 in −1…1 at Mimi's rate, and answer.

        Raises:
            DuplexError: It is no such frame. Nothing was heard.
        """
        if samples.dtype != np.float32 or samples.shape != (self.moshi.frame_size,):
            fix = {
                "i": f"; divide by {2 ** (8 * samples.dtype.itemsize - 1):,} as float32",
                "f": "; use .astype(np.float32)",
            }
            raise DuplexError(
                f"a frame is [{self.moshi.frame_size}] float32 samples in -1…1, not {[*samples.shape]} {samples.dtype}"
                + (fix.get(samples.dtype.kind, "") if samples.dtype != np.float32 else "")
            )
        with uncompiled(self.moshi.lm.device):  # Kyutai's small kernels: on a CPU compiling them takes a minute
            return self._hear(samples)

    def _hear(self, samples: Samples) -> Reply:
        began = time.perf_counter()
        mimi, device = self.moshi.mimi, self.moshi.lm.device
        codes = mimi.encode(torch.from_numpy(samples).to(device).view(1, 1, -1))
        if self.frames == 0:
            self.lm_gen.step(codes)
        tokens = self.lm_gen.step(codes)
        spoken, text = np.zeros(self.moshi.frame_size, np.float32), ""
        if tokens is not None:
            spoken = mimi.decode(tokens[:, 1:])[0, 0].float().cpu().numpy()
            text = self._text.add(int(tokens[0, 0, 0]))
        commits = [] if self.log is None else self.log.observe((time.perf_counter() - began) * 1000)
        return Reply(spoken, text, (time.perf_counter() - began) * 1000, commits)

    def save(self, path: str | Path) -> None:
        """Write the conversation to ``path``, to go on from it in another process."""
        save_session(path, self.lm_gen, self.moshi.mimi)


def load_moshi(
    source: str | Path,
    *,
    finetuned: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> Moshi:
    """A Moshi that talks, of a checkpoint and what was trained on top of it.

    Args:
        source: A folder with the files of ``kyutai/moshiko-pytorch-bf16``, or a repository of the hub.
        finetuned: What :func:`~inlay.moshi.checkpoint.save_finetuned` wrote (adapters, memory), or
            ``Memory.save_pretrained`` (a memory alone); None for Moshi as it is.
        device: Where it runs.
        dtype: Of the language model's weights. Kyutai's 7B are 15 GB in bfloat16, and twice that in float32.

    Raises:
        MoshiWeightsError: There is no such checkpoint.
        CheckpointError: What was trained is damaged or of another model.
        DuplexError: The model cannot hold a conversation.
    """
    checkpoint = load_checkpoint(source, device=device, dtype=dtype)
    if finetuned is None or not (Path(finetuned) / CONFIG_NAME).is_file():
        lm = checkpoint.lm
        if finetuned is not None:
            attach_pretrained(lm, finetuned)
    else:
        lm, _ = load_finetuned(checkpoint, finetuned)
    return Moshi(lm, checkpoint.mimi, checkpoint.text_tokenizer, str(source), checkpoint.info.lm_gen_config)


class _Pieces:
    """Text out of the text stream's tokens, whose letters may come in bytes."""

    def __init__(self, tokenizer: SentencePieceProcessor, silent: set[int]) -> None:
        self._tokenizer = tokenizer
        self._silent = silent
        self._bytes = b""

    def add(self, token: int) -> str:
        """The text that ``token`` completes."""
        if token in self._silent:
            return ""
        piece: str = self._tokenizer.id_to_piece(token)
        if self._tokenizer.is_byte(token):
            self._bytes += bytes([int(piece[1:-1], 16)])
            try:
                text, self._bytes = self._bytes.decode(), b""
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    return ""
                text, self._bytes = "\N{REPLACEMENT CHARACTER}", b""
            return text
        broken, self._bytes = "\N{REPLACEMENT CHARACTER}" if self._bytes else "", b""
        if self._tokenizer.is_control(token):
            return broken
        return broken + piece.replace("▁", " ")
