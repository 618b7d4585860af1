"""Documents in, answers out: what ``inlay compress encode`` and ``inlay compress answer`` do.

``encode_documents`` goes on where a killed call stopped. It needs no notes for that: what the store holds already, by
id and by the hash of its text, is left out, and the rest is compressed in the same batches as it would have been, since
batches are cut from the documents in order of length and are stored whole. An encoding that was interrupted then ends
in the same slots, bit for bit, as one that was not.

Whatever can be refused (an id that comes twice, a text that changed, a document that is too long) is refused before the
first document is compressed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from inlay.data import Document
from inlay.softtoken.compressors import Compressor, CompressorError
from inlay.softtoken.errors import LayoutError
from inlay.softtoken.prompting import BoundLayout, in_eval_mode
from inlay.softtoken.store import SHARD_SECONDS, SoftTokenStore, StoredDocument, StoreError, StoreWriter, hash_text
from inlay.softtoken.store_file import StoreHeader

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is in all."""


class Reader(Protocol):
    """A decoder with its compressor and layout, as a finished compression run has them."""

    @property
    def directory(self) -> Path:
        """Where it lies."""

    @property
    def model(self) -> Any:
        """The decoder, a Hugging Face causal LM."""

    @property
    def compressor(self) -> Compressor[Any]:
        """Its compressor."""

    @property
    def layout(self) -> BoundLayout:
        """What stands around the slots."""

    @property
    def context_tokens(self) -> int | None:
        """Tokens behind which contexts were cut in training; None: they were read whole."""


@dataclass(frozen=True)
class EncodeReport:
    """What a call of :func:`encode_documents` did.

    Attributes:
        encoded: Documents compressed, the replaced ones among them.
        replaced: Documents whose old slots were replaced.
        skipped: Documents that were there already.
        cut: Documents compressed of which only the first ``context_tokens`` were read.
        unknown: Tokens compressed that the decoder's tokenizer does not know.
        tokens: Tokens compressed.
        slots: Slots that they became.
        nbytes: Bytes of these slots.
        seconds: How long it took.
    """

    encoded: int
    replaced: int
    skipped: int
    cut: int
    unknown: int
    tokens: int
    slots: int
    nbytes: int
    seconds: float

    def __str__(self) -> str:
        done = f"{self.encoded:,} document{'s' * (self.encoded != 1)} encoded in {self.seconds:,.1f} s"
        notes = [f"{self.replaced:,} of them replaced"] * bool(self.replaced)
        notes += [f"{self.skipped:,} more were there already"] * bool(self.skipped)
        notes += [f"{self.cut:,} cut at the run's context_tokens"] * bool(self.cut)
        notes += [f"{self.unknown:,} of the tokens are unknown to the decoder's tokenizer"] * bool(self.unknown)
        size = f"{self.tokens:,} tokens in {self.slots:,} slots, {self.nbytes / 2**20:,.2f} MiB"
        return "; ".join([done, *notes, *[size] * bool(self.encoded)])


def encode_documents(
    run: Reader,
    documents: Iterable[Document],
    out: str | Path,
    *,
    ratio: int | None = None,
    slots: int | None = None,
    batch_size: int = 8,
    resume: bool = False,
    replace: bool = False,
    shard_seconds: float = SHARD_SECONDS,
    progress: Progress | None = None,
) -> EncodeReport:
    """Compress ``documents`` into the store in the folder ``out``.

    A document is cut where the run's ``context_tokens`` cut the contexts that the compressor was trained on.

    Args:
        run: A loaded compression run.
        documents: Texts under their names, which become their ids in the store. White space at the ends counts.
        out: The store's folder, made if it is not there.
        ratio: Tokens per slot; with neither ``ratio`` nor ``slots``, what the compressor is configured for.
        slots: Fixed number of slots instead.
        batch_size: Documents compressed at a time, of nearly the same length.
        resume: Go on with a store that is there, leaving out what it holds already.
        replace: The same, and replace documents whose text, ratio or number of slots is another than is stored.
        shard_seconds: Most seconds of work that a kill may lose.
        progress: Called with the tokens compressed and the tokens in all.

    Raises:
        StoreError: The store is there and neither ``resume`` nor ``replace`` is given, is of another run, or holds a
            document with another text and ``replace`` is not given; or an id comes twice.
        CompressorError: A document is too long for the compressor or has no tokens, or the ratio is not allowed.
    """
    begun = time.monotonic()
    ratio, slots = run.compressor.budget(ratio, slots)
    planner = _Planner(run, ratio, slots)
    texts = _by_id(documents)
    header = StoreHeader.of(run.model, run.compressor, run.layout, run.directory)
    with StoreWriter(out, header, shard_seconds=shard_seconds) as writer:
        if writer.stored and not (resume or replace):
            raise StoreError(
                f"{out} holds {len(writer.stored):,} documents already. Go on with --resume (resume=True), replace "
                "those that changed with --replace (replace=True), or choose another folder"
            )
        same, changed = planner.compare(texts, writer.stored.values())
        if changed and not replace:
            raise StoreError(
                f"{out} holds {_some(changed)} with another text, ratio or number of slots. Replace what is there with "
                "--replace (replace=True), or choose another folder"
            )
        pending = [planner.plan(name, text) for name, text in texts.items() if name not in same]
        # The longest first: if one does not fit into memory, that shows at once.
        pending.sort(key=lambda one: (-one.note.tokens, one.note.id))
        total, done, nbytes = sum(one.note.tokens for one in pending), 0, 0
        for start in range(0, len(pending), batch_size):
            batch = pending[start : start + batch_size]
            ids = pad_sequence([one.ids for one in batch], batch_first=True)
            mask = pad_sequence([torch.ones(len(one.ids), dtype=torch.bool) for one in batch], batch_first=True)
            with torch.no_grad(), in_eval_mode(run.model), in_eval_mode(run.compressor):
                memory = run.compressor.compress(ids.long(), mask, ratio=ratio, slots=slots)
            writer.add([one.note for one in batch], memory)
            nbytes += memory.nbytes
            done += sum(one.note.tokens for one in batch)
            if progress is not None:
                progress(done, total)
    return EncodeReport(
        encoded=len(pending),
        replaced=len(changed),
        skipped=len(same),
        cut=sum(one.cut for one in pending),
        unknown=sum(one.unknown for one in pending),
        tokens=total,
        slots=sum(one.note.slots for one in pending),
        nbytes=nbytes,
        seconds=time.monotonic() - begun,
    )


def answer(
    run: Reader,
    store: SoftTokenStore,
    questions: Sequence[tuple[str, str]],
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[str]:
    """Answer questions about stored documents, greedily and as the layout says.

    Args:
        run: The run that wrote the store.
        store: The store.
        questions: Pairs of a document's id and a question, in any order.
        batch_size: Questions answered at a time; those with prompts and memories of like length go together.
        progress: Called with the questions answered and the questions in all.

    Returns:
        The answers, in the order of the questions.

    Raises:
        StoreError: The store is of another run, or holds no such document (the nearest ids are named).
        LayoutError: A question is blank, or takes more positions with its slots and answer than the decoder has.
    """
    store.check(run.model, run.compressor, run.layout)
    answers = [""] * len(questions)
    lengths: list[tuple[int, int]] = []
    for name, text in questions:
        try:
            lengths.append((len(run.layout.prompt(text).after), store.find(name).slots))
        except LayoutError as error:
            raise LayoutError(f"question {len(lengths) + 1} of {len(questions)}, about {name!r}: {error}") from error
    order = sorted(range(len(questions)), key=lambda index: lengths[index])
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        memory = store.load([questions[index][0] for index in batch])
        texts = run.layout.answer(run.model, memory, [questions[index][1] for index in batch])
        for index, text in zip(batch, texts, strict=True):
            answers[index] = text
        if progress is not None:
            progress(start + len(batch), len(order))
    return answers


@dataclass(frozen=True)
class _Pending:
    """A document to be compressed."""

    note: StoredDocument
    ids: Tensor
    """`[tokens]` int32: half of what a list takes is too much where all documents wait at once."""
    cut: bool
    """There is more of it than is read."""
    unknown: int
    """How many of its tokens stand for what the tokenizer does not know."""


@dataclass(frozen=True)
class _Planner:
    """What documents will become at one ratio, or with one number of slots."""

    run: Reader
    ratio: int | None
    slots: int | None

    def plan(self, name: str, text: str) -> _Pending:
        """Tokenise a document and count its slots."""
        whole = self.run.layout.context_ids(text)
        ids = whole[: self.run.context_tokens]
        if not ids:
            raise CompressorError(f"{name!r} has no tokens; leave it out")
        try:
            count = self._count(len(ids))
        except CompressorError as error:
            raise CompressorError(f"{name!r}: {error}") from error
        return _Pending(
            StoredDocument(name, hash_text(text), len(ids), count, self.ratio),
            torch.tensor(ids, dtype=torch.int32),
            cut=len(ids) < len(whole),
            unknown=self.run.layout.unknown(ids),
        )

    def compare(self, texts: dict[str, str], stored: Iterable[StoredDocument]) -> tuple[set[str], list[str]]:
        """The ids that are stored just as they would be now, and those that are stored differently."""
        notes = [note for note in stored if note.id in texts]
        same = {
            note.id
            for note in notes
            if note.source == hash_text(texts[note.id])
            and note.ratio == self.ratio
            and note.slots == self._count(note.tokens)
        }
        return same, [note.id for note in notes if note.id not in same]

    def _count(self, tokens: int) -> int:
        segments = self.run.compressor.plan(tokens, ratio=self.ratio, slots=self.slots)
        return sum(segment.slots for segment in segments)


def _by_id(documents: Iterable[Document]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for name, text in documents:
        if name in texts:
            raise StoreError(f"two documents are called {name!r}; ids are unique in a store")
        texts[name] = text
    return texts


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
