"""The layout token by token, read back out of the very tensors that training and answering are given.

Nothing is taken on the layout's word: an embedding is looked up in the decoder's table to see which token it is, the
training sequence is compared with what generation starts from, and what stands behind that is compared with the answer.
A token that stands in training alone, an end that is not taught and a question that was cut off are seen so, whoever
put the tensors together.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.cells import cell_len
from torch import Tensor

from inlay.data import QAExample
from inlay.doctor.compress_case import Check, CompressCase, ReadBack, checks_table, faults, squeezed
from inlay.doctor.findings import Finding, Severity
from inlay.report import Code, Section, Text
from inlay.softtoken.batches import NO_LABEL, GenerationBatch, TrainingBatch
from inlay.softtoken.pieces import special_ids, tokenise

_ROWS = 8
_WIDTH = 78
_SLOTS_SHOWN = 3


@dataclass(frozen=True)
class SeenToken:
    """One position of a sequence.

    Attributes:
        position: Its position id.
        token: As the tokenizer spells it; ``slot 0``, … for what is no token.
        id: Its id; None for a slot.
        label: The spelling of its label; empty where nothing is supervised.
    """

    position: int
    token: str
    id: int | None
    label: str = ""


@dataclass(frozen=True)
class SeenLayout:
    """What training and answering see.

    Attributes:
        rows: Rows of the batch that was looked at.
        training: The first row as it is trained on.
        generation: What answering it starts from.
        cached_slots: Slots that stand in the cache (form ``kv``) and in neither sequence.
        stop: The tokens that end an answer.
        answer_tokens: Most tokens of an answer.
        checks: What should hold of every row.
    """

    rows: int
    training: tuple[SeenToken, ...]
    generation: tuple[SeenToken, ...]
    cached_slots: int
    stop: tuple[str, ...]
    answer_tokens: int
    checks: tuple[Check, ...]

    def findings(self) -> list[Finding]:
        """What does not hold."""
        return faults(self.checks)

    def section(self) -> Section:
        """The two sequences, one below the other, and the checks."""
        ended = " or ".join(f"`{token}`" for token in self.stop)
        cached = f" {self.cached_slots} slots stand in the cache, before position {self.cached_slots}." * bool(
            self.cached_slots
        )
        told = (
            f"One question, read back from the tensors of its batch. Answering ends at {ended} or behind "
            f"{self.answer_tokens} tokens.{cached}"
        )
        return Section(
            "Layout", told, [Code(aligned(self.training, self.generation)), checks_table(self.checks), _legend()]
        )


def examine_layout(case: CompressCase) -> SeenLayout:
    """Look at a batch of real questions as training and as generation get it."""
    examples = case.questions(_ROWS)
    batch = case.batch(examples)
    memory = case.memory(batch)
    with torch.no_grad():
        training = case.layout.training(case.model, memory, batch["questions"], batch["answers"])
        batches = [
            (rows, case.layout.generation(case.model, memory.select(rows), [batch["questions"][row] for row in rows]))
            for rows in case.layout.together(case.model, memory, batch["questions"])
        ]
    generation = batches[0][1]
    back = ReadBack(case.compressor.lm.embedding)
    places = {row: (one, at) for rows, one in batches for at, row in enumerate(rows)}
    rows = [_Row.read(case, back, training, row, *places[row]) for row in range(len(examples))]
    checks = (
        _prefix(rows),
        _behind(case, rows, examples),
        _end(case, rows),
        _question(case, rows, examples),
        _anchor(case, rows),
    )
    spelled = case.layout.tokenizer.convert_ids_to_tokens
    return SeenLayout(
        rows=len(rows),
        training=tuple(rows[0].training),
        generation=tuple(rows[0].generation),
        cached_slots=int(memory.lengths[0]) if memory.form == "kv" else 0,
        stop=tuple(_printable(str(spelled(index))) for index in generation.stop_ids),
        answer_tokens=generation.max_new_tokens,
        checks=checks,
    )


@dataclass(frozen=True)
class _Row:
    """One row read back, and the vectors it was read from."""

    training: list[SeenToken]
    generation: list[SeenToken]
    trained_vectors: Tensor
    started_vectors: Tensor
    labels: list[int]
    stop_ids: tuple[int, ...]

    @property
    def behind(self) -> list[SeenToken]:
        """Training's tokens behind as many as generation starts from."""
        return self.training[len(self.generation) :]

    @staticmethod
    def read(
        case: CompressCase, back: ReadBack, training: TrainingBatch, row: int, generation: GenerationBatch, at: int
    ) -> _Row:
        """Row ``row`` of training, which is row ``at`` of generation."""
        trained, positions, labels = _real(training, row, training.labels)
        started, places, _ = _real(generation, at)
        spell = case.layout.tokenizer.convert_ids_to_tokens

        def seen(vectors: Tensor, where: list[int], taught: list[int]) -> list[SeenToken]:
            tokens, slots = [], 0
            for index, position, label in zip(back(vectors), where, taught, strict=True):
                name = f"slot {slots}" if index is None else _printable(str(spell(index)))
                slots += index is None
                said = "" if label == NO_LABEL else _printable(str(spell(label)))
                tokens.append(SeenToken(position, name, index, said))
            return tokens

        return _Row(
            seen(trained, positions, labels),
            seen(started, places, [NO_LABEL] * len(places)),
            trained,
            started,
            [label for label in labels if label != NO_LABEL],
            generation.stop_ids,
        )


def _real(
    batch: TrainingBatch | GenerationBatch, row: int, labels: Tensor | None = None
) -> tuple[Tensor, list[int], list[int]]:
    """Vectors, positions and labels of a row's own places, padding left out."""
    length = batch.inputs_embeds.shape[1]
    used = batch.attention_mask[row, -length:].bool()
    taught = torch.full_like(used, NO_LABEL, dtype=torch.long) if labels is None else labels[row]
    return batch.inputs_embeds[row, used], batch.position_ids[row, used].tolist(), taught[used].tolist()


def _prefix(rows: Sequence[_Row]) -> Check:
    title = "training begins with what answering starts from"
    for number, row in enumerate(rows):
        count = len(row.generation)
        where = [token.position for token in row.training[:count]] == [token.position for token in row.generation]
        if where and torch.equal(row.trained_vectors[:count], row.started_vectors):
            continue
        place = next(
            (
                at
                for at, (one, other) in enumerate(zip(row.training, row.generation, strict=False))
                if (one.position, one.token) != (other.position, other.token)
                or not torch.equal(row.trained_vectors[at], row.started_vectors[at])
            ),
            min(len(row.training), count),
        )
        trained, started = (_at(tokens, place) for tokens in (row.training, row.generation))
        says = (
            f"training and answering part before the answer: place {place} of row {number} holds {trained} in training "
            f"and {started} in answering"
        )
        fix = "take both from one BoundLayout: layout.training and layout.generation of the same layout"
        return Check(title, says, Finding("layout.prefix", Severity.FATAL, says, fix))
    return Check(title, f"equal in {len(rows)} of {len(rows)} rows, vector by vector and position by position")


def _at(tokens: Sequence[SeenToken], place: int) -> str:
    return f"{tokens[place].token!r} at position {tokens[place].position}" if place < len(tokens) else "nothing"


def _behind(case: CompressCase, rows: Sequence[_Row], examples: Sequence[QAExample]) -> Check:
    title = "behind it stands the answer and nothing else"
    special = special_ids(case.layout.tokenizer) - {case.layout.tokenizer.unk_token_id}
    for row, example in zip(rows, examples, strict=True):
        foreign = [token for token in row.behind if token.id in special - set(row.stop_ids)]
        if foreign:
            token = foreign[0]
            untaught = token.id not in row.labels
            says = (
                f"{token.token!r} stands at position {token.position}, between the prompt and the answer, in training "
                + ("alone: answering never gets it" if untaught else "and is taught as part of the answer")
            )
            fix = "tokenise answers without special tokens (layout.answer_ids does), or set layout.bos_after: true"
            return Check(title, says, Finding("layout.only_in_training", Severity.FATAL, says, fix))
        ids = [token.id for token in row.behind if token.id not in row.stop_ids]
        text = case.layout.decode([index for index in ids if index is not None])
        wanted = example.answers[0] if example.answers else case.layout.layout.unanswerable
        if None in ids or not _alike(case, text, wanted):
            says = f"behind the prompt training has {text!r} where the answer is {wanted!r}"
            fix = "let layout.answer_ids tokenise the answer, whole and without special tokens"
            return Check(title, says, Finding("layout.answer", Severity.FATAL, says, fix))
    return Check(title, f"so in {len(rows)} of {len(rows)} rows")


def _end(case: CompressCase, rows: Sequence[_Row]) -> Check:
    title = "the end of the answer is supervised"
    taught = sum(any(label in row.stop_ids for label in row.labels) for row in rows)
    if taught == len(rows):
        return Check(title, f"by a token that answering stops at, in {taught} of {len(rows)} rows")
    says = (
        f"the end token is supervised in {taught} of {len(rows)} rows: a model that never learns to end fills all "
        f"{case.layout.max_new_tokens} tokens of an answer, and no answer is exact"
    )
    fix = "" if case.layout.layout.eos else "layout.eos: true"
    fix = fix or "give the end token its label: labels are the ids of answer and end token at their own places"
    return Check(title, says, Finding("layout.eos", Severity.FATAL, says, fix))


def _question(case: CompressCase, rows: Sequence[_Row], examples: Sequence[QAExample]) -> Check:
    title = "answering starts with the whole question in sight"
    if case.layout.layout.question is None:
        return Check(title, "the layout leaves questions out, see Questions")
    for row, example in zip(rows, examples, strict=True):
        ids = [token.id for token in row.generation if token.id is not None]
        if _as_read(case, example.question) not in squeezed(
            case.layout.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        ):
            says = f"the question {_short(example.question)!r} is not whole in what answering starts from"
            fix = "cut contexts (context_tokens), never the prompt"
            return Check(title, says, Finding("layout.question_lost", Severity.FATAL, says, fix))
    return Check(title, f"found in {len(rows)} of {len(rows)} rows")


def _anchor(case: CompressCase, rows: Sequence[_Row]) -> Check:
    title = "something calls for the answer"
    last = rows[0].generation[-1] if rows[0].generation else None
    if last is not None and last.id is not None:
        return Check(title, f"the first token is predicted from {last.token!r}")
    says = (
        "nothing stands between the memory and the answer: its first token is predicted from the last slot, which must "
        "stand for context and call for an answer at once"
    )
    fix = 'layout.anchor: "Answer: " (and a question, or layout.bos_after: true)'
    return Check(title, says, Finding("layout.no_anchor", Severity.WARNING, says, fix))


def aligned(training: Sequence[SeenToken], generation: Sequence[SeenToken], width: int = _WIDTH) -> str:
    """Both sequences and the labels, a column per position, in lines of at most ``width`` cells."""
    names = ["position", "training", "label", "answering"]
    columns: list[list[str]] = []
    longest = max(len(training), len(generation))
    slots = [at for at, token in enumerate(training) if token.id is None]
    hidden = set(slots[_SLOTS_SHOWN - 1 : -1]) if len(slots) > _SLOTS_SHOWN else set()
    for at in range(longest):
        if at in hidden:
            if at - 1 not in hidden:
                columns.append(["…", f"({len(hidden)} more)", "", f"({len(hidden)} more)"])
            continue
        one = training[at] if at < len(training) else None
        other = generation[at] if at < len(generation) else None
        place = str((one or other).position) if one or other else ""  # type: ignore[union-attr]
        columns.append(
            [
                place,
                one.token if one else "",
                (one.label or "·") if one else "",
                other.token if other else ("→" if at == len(generation) else ""),
            ]
        )
    left = max(map(len, names)) + 2
    lines: list[str] = []
    block: list[list[str]] = []
    used = left

    def flush() -> None:
        for row, name in enumerate(names):
            cells = "".join(_fill(column[row], _cells(column) + 2) for column in block)
            lines.append((name.ljust(left) + cells).rstrip())
        lines.append("")

    for column in columns:
        if block and used + _cells(column) + 2 > width:
            flush()
            block, used = [], left
        block.append(column)
        used += _cells(column) + 2
    flush()
    return "\n".join(lines).rstrip()


def _cells(column: Sequence[str]) -> int:
    return max(map(cell_len, column))


def _fill(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))


def _legend() -> Text:
    return Text(
        "A label stands at the place of its own token: the model's loss shifts labels, nothing else does. `·` is not "
        "supervised, `→` is where answering goes on by itself."
    )


def _printable(token: str) -> str:
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in token)


def _alike(case: CompressCase, text: str, wanted: str) -> bool:
    return squeezed(text) in (squeezed(wanted), _as_read(case, wanted))


def _as_read(case: CompressCase, text: str) -> str:
    """``text`` as it comes back from its tokens: a tokenizer may normalise it, or not know a word."""
    tokenizer = case.layout.tokenizer
    return squeezed(tokenizer.decode(tokenise(tokenizer, text, plain=True), clean_up_tokenization_spaces=False))


def _short(text: str) -> str:
    return textwrap.shorten(text, 60, placeholder=" …")
