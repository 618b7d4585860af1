"""How long answers and contexts are in the decoder's tokens, what the recipe's limits cut, and what the decoder's
tokenizer cannot write at all.

An answer that is longer than the budget of new tokens is wrong whatever the model has learnt; a context that is cut may
have lost what is asked. Answers are counted as they are taught, by the layout.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from inlay.data import QAExample
from inlay.data.qa_statistics import SHOWN_LIMITS, TokenLengths
from inlay.doctor.compress_case import CompressCase, percent
from inlay.doctor.findings import Finding, Severity
from inlay.report import Section, Table, bars
from inlay.report.document import Align, Item
from inlay.report.numbers import Cell
from inlay.softtoken.compressors import CompressorError

_FEW_CUT, _MOST_CUT = 0.01, 0.5
_FEW_UNKNOWN = 0.01
_SAMPLES = 3


@dataclass(frozen=True)
class SplitLengths:
    """Lengths of one split, in tokens.

    Attributes:
        name: ``training`` or ``evaluation``.
        questions: Questions of the split.
        counted: How many of them were counted.
        answers: Answers without their end.
        prompts: What stands around the memory before the answer.
        contexts: Contexts, each once.
        answers_cut: Answers that with their end do not fit ``answer_tokens``.
        contexts_cut: Contexts longer than ``context_tokens``.
        stated: Answers whose text stands in their context.
        lost: Those of them whose text no longer stands in what ``context_tokens`` leaves.
        unknown: ``answers``, ``questions`` and ``contexts`` in which something is unknown to the tokenizer.
        unknown_text: The first such thing; empty where there is none.
    """

    name: str
    questions: int
    counted: int
    answers: TokenLengths
    prompts: TokenLengths
    contexts: TokenLengths
    answers_cut: int
    contexts_cut: int
    stated: int
    lost: int
    unknown: dict[str, int]
    unknown_text: str

    @property
    def unknown_shares(self) -> dict[str, float]:
        """``unknown`` as shares."""
        of = {"answers": self.answers.texts, "questions": self.counted, "contexts": self.contexts.texts}
        return {what: number / max(1, of[what]) for what, number in self.unknown.items()}


@dataclass(frozen=True)
class Sample:
    """One answer.

    Attributes:
        question: What is asked.
        answer: The first reference.
        tokens: As taught, end included.
    """

    question: str
    answer: str
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class Lengths:
    """What the limits of a recipe do to its data.

    Attributes:
        splits: Training and evaluation.
        answer_tokens: The budget, end included.
        for_95: Smallest budget that holds at least 95 % of the answers of either split, end included.
        for_99: Likewise 99 %.
        context_tokens: What contexts are cut behind; None for whole ones.
        slots: Slots of the longest context, by ratio (or by ``fixed``).
        longest_row: Positions of the longest context's slots, the longest prompt and the longest answer.
        positions: What the decoder has; None where it does not say.
        refused: Why the compressor cannot read the longest context; empty where it can.
        samples: A short, a middling and the longest answer.
    """

    splits: tuple[SplitLengths, ...]
    answer_tokens: int
    for_95: int
    for_99: int
    context_tokens: int | None
    slots: dict[str, int]
    longest_row: int
    positions: int | None
    refused: str
    samples: tuple[Sample, ...]

    def findings(self) -> list[Finding]:
        """What is cut, and what does not fit."""
        found = [*self._too_long(), *(one for split in self.splits for one in self._cut(split))]
        named: dict[str, Finding] = {}
        for finding in sorted(found, key=lambda one: -one.severity):
            named.setdefault(finding.code, finding)  # of both splits the worse
        return [*named.values()]

    def _cut(self, split: SplitLengths) -> list[Finding]:
        found = []
        share = split.answers_cut / max(1, split.answers.texts)
        if share > _FEW_CUT:
            says = (
                f"{percent(share)} of the {split.name} answers are longer than answer_tokens: {self.answer_tokens} "
                f"leaves room for (the longest takes {split.answers.longest + 1}): they are taught whole, and wrong "
                "however well they are learnt"
            )
            fix = f"layout.answer_tokens: {self.for_99} holds 99 % ({self.for_95} holds 95 %)"
            severity = Severity.FATAL if share > _MOST_CUT else Severity.WARNING
            found.append(Finding("lengths.answers_cut", severity, says, fix))
        lost = split.lost / max(1, split.stated)
        if lost > _FEW_CUT:
            says = (
                f"context_tokens: {self.context_tokens} cuts {percent(split.contexts_cut / split.contexts.texts)} of "
                f"the {split.name} contexts, and {percent(lost)} of the answers that are stated in their context are "
                "not in what is left"
            )
            fix = f"context_tokens: {split.contexts.quantile(0.99)} holds 99 % of the contexts; or null"
            severity = Severity.FATAL if lost > _MOST_CUT else Severity.WARNING
            found.append(Finding("lengths.answers_lost", severity, says, fix))
        shares = {what: share for what, share in split.unknown_shares.items() if share > _FEW_UNKNOWN}
        if shares:
            counted = ", ".join(f"{percent(share)} of the {split.name} {what}" for what, share in shares.items())
            says = (
                f"the decoder's tokenizer does not know everything that is written ({split.unknown_text!r}, say), and "
                f"reads it as one and the same token: so in {counted}"
            )
            if "answers" in shares:
                says += "; such an answer cannot come back, however well it is learnt"
            fix = "the tokenizer that the decoder was trained with, or data in the words that it knows"
            severity = Severity.FATAL if shares.get("answers", 0.0) > _MOST_CUT else Severity.WARNING
            found.append(Finding("lengths.unknown_words", severity, says, fix))
        return found

    def _too_long(self) -> list[Finding]:
        if self.refused:
            fix = "context_tokens, a larger ratio, or compressor.segment_tokens"
            return [Finding("lengths.context_too_long", Severity.FATAL, self.refused, fix)]
        if self.positions is None or self.longest_row <= self.positions:
            return []
        says = (
            f"the longest memory, prompt and answer take {self.longest_row:,} positions and the decoder has "
            f"{self.positions:,}"
        )
        fix = "context_tokens, a larger ratio in compressor.ratios, or a smaller layout.answer_tokens"
        return [Finding("lengths.too_long", Severity.FATAL, says, fix)]

    def section(self) -> Section:
        """Distributions, shares beyond limits, samples."""
        held = f"`answer_tokens: {self.for_99}` would hold 99 % of the answers"
        if self.for_95 < self.for_99:
            held += f" and `answer_tokens: {self.for_95}` 95 %"
        counts = " and ".join(f"{count} slots at {name}" for name, count in self.slots.items())
        told = (
            f"In the decoder's tokens. `answer_tokens` is {self.answer_tokens}, an answer's end included: {held}."
            + f" The longest context gets {counts}." * bool(counts)
        )
        plot = bars(
            {split.name: _histogram(split.answers) for split in self.splits}, unit="answers of so many tokens, %"
        )
        items: list[Item] = [
            self._table(),
            self._limits(),
            plot.figure("Lengths without the end token."),
            self._samples(),
        ]
        return Section("Lengths", told, items)

    def _table(self) -> Table:
        rows: list[list[Cell]] = []
        for split in self.splits:
            for what, lengths in (("answers", split.answers), ("prompts", split.prompts), ("contexts", split.contexts)):
                quantiles = [lengths.quantile(share) for share in (0.5, 0.95, 0.99)]
                rows.append([f"{split.name} {what}", lengths.texts, f"{lengths.mean:.1f}", *quantiles, lengths.longest])
        counted = "; ".join(f"{split.counted:,} of {split.questions:,} {split.name} questions" for split in self.splits)
        align: list[Align] = ["left", *("right",) * 6]
        return Table(["tokens", "texts", "mean", "median", "95 %", "99 %", "longest"], rows, f"Of {counted}.", align)

    def _limits(self) -> Table:
        def row(what: str, share: Callable[[SplitLengths], float]) -> list[Cell]:
            return [what, *(percent(share(split)) for split in self.splits)]

        def cut(split: SplitLengths) -> float:
            return split.answers_cut / max(1, split.answers.texts)

        rows = [
            row(f"answers beyond {limit} tokens", lambda split, limit=limit: split.answers.beyond(limit))  # type: ignore[misc]
            for limit in SHOWN_LIMITS
        ]
        rows.append(row(f"answers that with their end are beyond answer_tokens: {self.answer_tokens}", cut))
        if self.context_tokens is not None:
            what = f"contexts beyond context_tokens: {self.context_tokens}"
            rows.append(row(what, lambda split: split.contexts_cut / max(1, split.contexts.texts)))
            rows.append(row("answers stated in their context and cut off", lambda one: one.lost / max(1, one.stated)))
        for what in ("answers", "questions", "contexts"):
            if any(split.unknown[what] for split in self.splits):
                label = f"{what} with something the tokenizer does not know"
                rows.append(row(label, lambda split, what=what: split.unknown_shares[what]))  # type: ignore[misc]
        align: list[Align] = ["left", *("right",) * 2]
        return Table(["share of", *(split.name for split in self.splits)], rows, align=align)

    def _samples(self) -> Table:
        rows: list[list[Cell]] = [
            [_short(one.question), _short(one.answer), _short(" ".join(one.tokens)), len(one.tokens)]
            for one in self.samples
        ]
        return Table(["question", "answer", "as taught", "tokens"], rows, "A short, a middling and the longest answer.")


def examine_lengths(case: CompressCase) -> Lengths:
    """Count the lengths of both splits."""
    splits = (_count(case, "training", len(case.train)), _count(case, "evaluation", len(case.eval)))
    longest = max(split.contexts.longest for split in splits)
    if case.recipe.context_tokens is not None:
        longest = min(longest, case.recipe.context_tokens)
    slots, refused = _slots(case, longest)
    needed = max(max(split.answers.longest + 1 for split in splits), case.layout.max_new_tokens)
    return Lengths(
        splits=splits,
        answer_tokens=case.layout.max_new_tokens,
        for_95=max(split.answers.quantile(0.95) + 1 for split in splits),
        for_99=max(split.answers.quantile(0.99) + 1 for split in splits),
        context_tokens=case.recipe.context_tokens,
        slots=slots,
        longest_row=max(slots.values(), default=0) + max(split.prompts.longest for split in splits) + needed,
        positions=case.compressor.lm.max_positions,
        refused=refused,
        samples=_samples(case),
    )


def _count(case: CompressCase, name: str, questions: int) -> SplitLengths:
    layout, limit, examples = case.layout, case.recipe.context_tokens, case.counted[name]
    end = int(layout.layout.eos)
    answers = [len(ids) - end for ids in case.answers[name]]
    prompts = [layout.prompt(example.question) for example in examples]
    texts = {
        "answers": [_taught(case, example) for example in examples],
        "questions": [example.question for example in examples],
        "contexts": [*dict.fromkeys(example.context for example in examples)],
    }
    read = {what: _encoded(layout.tokenizer, written) for what, written in texts.items()}
    unknown = {what: _unknown(layout.tokenizer, read[what], texts[what]) for what in texts}
    contexts, encoded = texts["contexts"], read["contexts"]
    kept = {
        text: text if limit is None or len(spans) <= limit else text[: spans[limit - 1][1]]
        for text, spans in zip(contexts, encoded["offset_mapping"], strict=True)
    }
    lengths = [len(ids) for ids in encoded["input_ids"]]
    stated = [one for one in examples if any(answer in one.context for answer in one.answers)]
    return SplitLengths(
        name=name,
        questions=questions,
        counted=len(examples),
        answers=_lengths(answers),
        prompts=_lengths([len(prompt.before) + len(prompt.after) for prompt in prompts]),
        contexts=_lengths(lengths),
        answers_cut=sum(length + 1 > layout.max_new_tokens for length in answers),
        contexts_cut=0 if limit is None else sum(length > limit for length in lengths),
        stated=len(stated),
        lost=sum(not any(answer in kept[one.context] for answer in one.answers) for one in stated),
        unknown={what: len(found) for what, found in unknown.items()},
        unknown_text=next((found[0] for found in unknown.values() if found), ""),
    )


def _encoded(tokenizer: Any, texts: Sequence[str]) -> Any:
    return tokenizer(
        [*texts],
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )


def _unknown(tokenizer: Any, encoded: Any, texts: Sequence[str]) -> list[str]:
    """Of each text that the tokenizer does not know all of, the first thing that it does not."""
    unknown = tokenizer.unk_token_id
    found = []
    for text, ids, spans in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if unknown in ids:
            start, end = spans[ids.index(unknown)]
            found.append(text[start:end])
    return found


def _taught(case: CompressCase, example: QAExample) -> str:
    return example.answers[0] if example.answers else case.layout.layout.unanswerable


def _slots(case: CompressCase, longest: int) -> tuple[dict[str, int], str]:
    """Slots of the longest context by what a step may draw, and why there can be none."""
    counts: dict[str, int] = {}
    for ratio in case.recipe.draws:
        try:
            plan = case.compressor.plan(longest, ratio=ratio)
        except CompressorError as error:
            return counts, str(error)
        counts["a fixed number" if ratio is None else f"{ratio}×"] = sum(segment.slots for segment in plan)
    return counts, ""


def _samples(case: CompressCase) -> tuple[Sample, ...]:
    taught = zip(case.counted["training"], case.answers["training"], strict=True)
    by_length = sorted(taught, key=lambda pair: len(pair[1]))
    last = len(by_length) - 1
    chosen = [by_length[round(place * last / (_SAMPLES - 1))] for place in range(_SAMPLES)]
    spell = case.layout.tokenizer.convert_ids_to_tokens
    return tuple(Sample(one.question, _taught(case, one), tuple(map(str, spell(ids)))) for one, ids in chosen)


def _lengths(lengths: Sequence[int]) -> TokenLengths:
    return TokenLengths(tuple(sorted(Counter(lengths).items())))


def _histogram(lengths: TokenLengths, most: int = 8) -> dict[str, float]:
    """Shares in per cent: by length where there are few, else by equal steps of length."""
    step = -(-max(1, lengths.longest) // most)
    shares: Counter[int] = Counter()
    for length, count in lengths.counts:
        shares[max(0, length - 1) // step] += count
    names = {
        place: str(place + 1) if step == 1 else f"{place * step + 1} to {(place + 1) * step}"
        for place in range(max(shares, default=0) + 1)
    }
    return {name: 100 * shares[place] / max(1, lengths.texts) for place, name in names.items()}


def _short(text: str) -> str:
    return textwrap.shorten(text, 44, placeholder=" …")
