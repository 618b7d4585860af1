"""Whether the evaluation asks enough questions for what it is to show, and whether it scores them as SQuAD does.

A share p of n independent questions is known to ±1.96·√(p(1 − p)/n), and a difference of two shares to √2 times that.
Questions about one context are no independent ones: n lies between the contexts and the questions. So a set is called
too small only where even all of its questions would be too few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from inlay.data import QAExample
from inlay.doctor.compress_baselines import Baselines
from inlay.doctor.compress_case import Check, CompressCase, checks_table, faults, percent
from inlay.doctor.findings import Finding, Severity
from inlay.evaluate.scoring import choose
from inlay.evaluate.squad import f1, normalize_answer
from inlay.report import Section

Score = Callable[[str, Sequence[str]], float]
"""A prediction and its references to 0..1."""

CLAIM = 0.10
"""The difference between two methods that an evaluation should be able to show."""

_Z = 1.959964
_LEAST_CLAIM = 0.02
_MOST_EXAMINED = 2000

# Prediction, references, and their F1 worked out by the official script's rules; the last but one as sets: 1.
_BY_HAND: tuple[tuple[str, tuple[str, ...], float], ...] = (
    ("old lanterns", ("old lanterns",), 1.0),
    ("the old lanterns!", ("old lanterns",), 1.0),
    ("lanterns", ("old lanterns",), 2 / 3),
    ("bells", ("old lanterns", "bells"), 1.0),
    ("bells", ("old lanterns",), 0.0),
    ("red red lamp", ("red lamp lamp",), 2 / 3),
)


@dataclass(frozen=True)
class EvaluationSet:
    """What an evaluation can show.

    Attributes:
        questions: Questions that will be asked.
        contexts: Different contexts among them.
        half_width: Half the 95 % interval of a share near one half, if all questions count.
        half_width_contexts: The same if those of a context are answered alike.
        claim: The difference that is to be shown: :data:`CLAIM`, or half of what full text gains over the best cut,
            if that is less.
        difference: Half the 95 % interval of a difference of two methods.
        needed: Questions that would show the claim.
        repeated: Share of the reference answers in which a word comes twice.
        checks: What should hold.
    """

    questions: int
    contexts: int
    half_width: float
    half_width_contexts: float
    claim: float
    difference: float
    needed: int
    repeated: float
    checks: tuple[Check, ...]

    def findings(self) -> list[Finding]:
        """What does not hold."""
        return faults(self.checks)

    def section(self) -> Section:
        """The intervals and the checks."""
        claimed = "" if self.claim == CLAIM else ", half of what full text gains over the best cut,"
        told = (
            f"{self.questions:,} questions about {self.contexts:,} contexts tell an exact match near 50 % to within "
            f"±{_points(self.half_width)} (±{_points(self.half_width_contexts)} if the questions about a context "
            f"are answered alike), and a difference of two methods to within ±{_points(self.difference)} points. "
            f"To show a difference of {_points(self.claim)} points{claimed} takes {self.needed:,} questions."
        )
        return Section("Evaluation", told, [checks_table(self.checks)])


def examine_evaluation(case: CompressCase, baselines: Baselines | None = None, score: Score = f1) -> EvaluationSet:
    """Size and scoring of the recipe's evaluation.

    Args:
        case: Has the evaluation's questions.
        baselines: What was measured of them; None: nothing.
        score: F1 as the evaluation computes it.
    """
    count = min(case.recipe.evaluate.examples, len(case.eval))
    asked = [case.eval[index] for index in choose(len(case.eval), count)]
    contexts = len({example.context for example in asked})
    gap = baselines.gap if baselines is not None else None
    claim = CLAIM if gap is None else min(CLAIM, max(_LEAST_CLAIM, gap / 2))
    needed = math.ceil(2 * (_Z * 0.5 / claim) ** 2)
    difference = _Z * 0.5 * math.sqrt(2 / count)
    references = [case.eval[index] for index in choose(len(case.eval), _MOST_EXAMINED)]
    repeated = _repeated(references)
    checks = (_large_enough(case, count, difference, claim, needed), _scored(score, repeated))
    return EvaluationSet(
        questions=count,
        contexts=contexts,
        half_width=_Z * 0.5 / math.sqrt(count),
        half_width_contexts=_Z * 0.5 / math.sqrt(contexts),
        claim=claim,
        difference=difference,
        needed=needed,
        repeated=repeated,
        checks=checks,
    )


def _large_enough(case: CompressCase, count: int, difference: float, claim: float, needed: int) -> Check:
    title = "it asks enough questions for a difference worth showing"
    if difference <= claim:
        return Check(title, f"{count:,} questions; {needed:,} would do for {_points(claim)} points")
    says = (
        f"{count:,} questions tell two methods apart by ±{_points(difference)} points of exact match (95 % interval): "
        f"a difference of {_points(claim)} points would not show; it takes {needed:,}"
    )
    fix = f"evaluate.examples: {needed}"
    if needed > len(case.eval):
        kind = "data.eval_examples" if case.recipe.data.source == "facts" else "data.eval_fraction or data.eval_path"
        fix += f", and more evaluation data ({kind}; there are {len(case.eval):,} questions)"
    return Check(title, says, Finding("evaluation.too_small", Severity.WARNING, says, fix))


def _scored(score: Score, repeated: float) -> Check:
    title = "F1 counts words as the official SQuAD script does"
    for prediction, references, right in _BY_HAND:
        given = score(prediction, references)
        if abs(given - right) < 1e-9:
            continue
        says = f"F1 of {prediction!r} against {references[0]!r} is {given:.3f} and should be {right:.3f}"
        ours, theirs = (set(normalize_answer(text).split()) for text in (prediction, references[0]))
        if ours == theirs and given == 1.0:
            says += ": words are counted as sets, and one said twice counts once"
        says += f" ({percent(repeated)} of the reference answers say a word twice)"
        code = "scoring.sets" if "as sets" in says else "scoring.f1"
        fix = "score with inlay.evaluate.squad, which counts multisets and takes the best reference"
        return Check(title, says, Finding(code, Severity.WARNING, says, fix))
    return Check(title, f"{len(_BY_HAND)} cases worked by hand agree; {percent(repeated)} of the answers repeat a word")


def _repeated(examples: Sequence[QAExample]) -> float:
    answers = [normalize_answer(answer).split() for example in examples for answer in example.answers]
    return sum(len(set(words)) < len(words) for words in answers) / max(1, len(answers))


def _points(share: float) -> str:
    return f"{100 * share:.1f}"
