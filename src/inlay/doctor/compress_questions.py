"""Whether every question reaches the decoder, in training and in every baseline.

The layout sets the question behind the memory, where nothing can cut it off. It is lost in two other ways: a layout
that leaves it out, so that one prompt has several right answers; and data whose contexts carry the question in their
own text. There it is compressed with the rest, and what cuts a context cuts it: so a baseline of cut text came to be
asked nothing (seed 003).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from inlay.data import FactsDataset, QAExample
from inlay.doctor.compress_case import Check, CompressCase, checks_table, faults, percent, squeezed
from inlay.doctor.findings import Finding, Severity
from inlay.evaluate.compress_methods import CUTS, Budget, cut_to
from inlay.report import Section
from inlay.softtoken.pieces import tokenise

_LOOKED_AT = 512
_INSIDE = 0.05
"""Share of contexts with their question inside, above which it is no accident."""


@dataclass(frozen=True)
class Questions:
    """Where the questions are.

    Attributes:
        looked_at: Questions that were looked at.
        asked: The layout asks them.
        contradicted: Those about a context that is asked something else with another answer as well.
        inside: Those whose text stands in their context.
        lost: Of these, by what cuts the context, those no longer whole in what is left.
        best: Most questions that can be answered right by one answer a context, as a share.
        checks: What should hold.
    """

    looked_at: int
    asked: bool
    contradicted: int
    inside: int
    lost: dict[str, int]
    best: float
    checks: tuple[Check, ...]

    def findings(self) -> list[Finding]:
        """What does not hold."""
        return faults(self.checks)

    def section(self) -> Section:
        """The checks."""
        return Section("Questions", f"Of {self.looked_at:,} training questions.", [checks_table(self.checks)])


def examine_questions(case: CompressCase) -> Questions:
    """Look for questions that the layout leaves out, and for questions inside contexts."""
    examples = _neighbours(case.train)
    by_context: dict[str, list[QAExample]] = defaultdict(list)
    for example in examples:
        by_context[example.context].append(example)
    answers = [[example.answers[:1] for example in asked] for asked in by_context.values()]
    best = sum(max(map(given.count, given)) for given in answers) / len(examples)
    contradicted = sum(len(given) for given in answers if len(set(given)) > 1)
    inside = [one for one in examples if squeezed(one.question) in squeezed(one.context)]
    lost = _lost(case, inside)
    asked = case.layout.layout.question is not None
    checks = (_asked(asked, len(examples), contradicted, best), _inside(len(examples), len(inside), lost))
    return Questions(len(examples), asked, contradicted, len(inside), lost, best, checks)


def _neighbours(examples: Sequence[QAExample]) -> list[QAExample]:
    """Questions with as many others about their contexts as there are."""
    if isinstance(examples, FactsDataset):
        return examples[:_LOOKED_AT]
    chosen = dict.fromkeys(one.context for one in islice(examples, _LOOKED_AT))
    return [one for one in examples if one.context in chosen][: 4 * _LOOKED_AT]


def _lost(case: CompressCase, inside: Sequence[QAExample]) -> dict[str, int]:
    """How many questions are no longer whole in what each cut leaves of their contexts."""
    tokenizer, limit = case.layout.tokenizer, case.recipe.context_tokens
    budget = Budget(case.ratio, case.compressor.config.slots if case.ratio is None else None)

    def slots(context: tuple[int, ...]) -> int:
        plan = case.compressor.plan(len(context), ratio=budget.ratio, slots=budget.slots)
        return sum(segment.slots for segment in plan)

    cuts = {f"{kind} at {budget.label}": cut_to(kind, slots, case.recipe.seed) for kind in CUTS}
    lost = dict.fromkeys([*([] if limit is None else [f"context_tokens: {limit}"]), *cuts], 0)
    for example in inside:
        whole = tuple(tokenise(tokenizer, example.context, plain=True))
        ids_of_question = tokenise(tokenizer, example.question, plain=True)
        asked = squeezed(tokenizer.decode(ids_of_question, clean_up_tokenization_spaces=False))
        kept = whole[:limit]
        left = {f"context_tokens: {limit}": kept} if limit is not None else {}
        left |= {name: cut(kept) for name, cut in cuts.items()}
        for name, ids in left.items():
            text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
            lost[name] += asked not in squeezed(text)
    return lost


def _asked(asked: bool, count: int, contradicted: int, best: float) -> Check:
    title = "every question is asked"
    if asked:
        return Check(title, "the layout sets it behind the memory, in training and in answering, for every method")
    if not contradicted:
        return Check(title, "the layout leaves questions out; no context here is asked for two different answers")
    says = (
        f"the layout leaves questions out (question: null), and {percent(contradicted / count)} of them are about a "
        f"context that is asked for other answers too: no more than {percent(best)} can be right"
    )
    fix = 'layout.question: "\\nQuestion: {question}\\n"'
    return Check(title, says, Finding("questions.left_out", Severity.FATAL, says, fix))


def _inside(count: int, inside: int, lost: dict[str, int]) -> Check:
    title = "no context carries its question"
    if inside <= _INSIDE * count:
        return Check(title, f"{inside} of {count} do")
    figures = ", ".join(f"{name} loses {percent(number / inside)}" for name, number in lost.items())
    by_limit = any(name.startswith("context_tokens") and number for name, number in lost.items())
    says = (
        f"{percent(inside / count)} of the contexts carry their question in their own text, where whatever cuts the "
        f"context cuts it off: {figures}; cut text is then asked nothing, and no baseline to compare with"
    )
    fix = "take the question out of data.context_field and let layout.question set it behind the memory"
    severity = Severity.FATAL if by_limit else Severity.WARNING
    return Check(title, says, Finding("questions.inside_context", severity, says, fix))
