"""What can be had without training, on a few questions: full text, no context, cut text, mean-pooled embeddings, and
the compressor as it is.

A compressor is judged against these, and through the decoder. One that does not answer from the full text cannot judge;
text that can be cut without loss leaves nothing to gain.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from inlay.doctor.compress_case import Check, CompressCase, Steps, checks_table, faults, percent
from inlay.doctor.compress_overfit import LARGEST
from inlay.doctor.findings import Finding, Severity
from inlay.evaluate.compress import evaluate_compression
from inlay.evaluate.compress_methods import CUTS, FULL_TEXT, NO_CONTEXT, SOFT_TOKENS
from inlay.evaluate.compress_results import CompressEvaluation
from inlay.evaluate.intervals import Interval
from inlay.evaluate.scoring import choose
from inlay.report import Section, Table, Text
from inlay.report.document import Align
from inlay.report.numbers import Cell

QUESTIONS = 64
LEAST = 16
"""Questions that are asked however slow answering is; below, intervals are too wide to say anything."""
SECONDS = 30.0
_NOTHING = 0.02


@dataclass(frozen=True)
class BaselineScores:
    """What one method scored.

    Attributes:
        name: The method, with its budget.
        exact_match: 0 to 1, with its 95 % interval.
        f1: Likewise.
        first_token: Share of right first tokens, likewise.
        nats: Loss of the right answers a token, likewise.
    """

    name: str
    exact_match: Interval
    f1: Interval
    first_token: Interval
    nats: Interval


@dataclass(frozen=True)
class Baselines:
    """What there is before training.

    Attributes:
        questions: Questions asked, evenly spaced over the evaluation data.
        methods: Every method's scores.
        gap: Exact match of full text minus that of the best cut; None without both, and where the decoder does not
            read, since it then says nothing.
        notes: What was not measured, and why.
        checks: What should hold.
    """

    questions: int
    methods: tuple[BaselineScores, ...]
    gap: float | None
    notes: tuple[str, ...]
    checks: tuple[Check, ...]

    def findings(self) -> list[Finding]:
        """What does not hold."""
        return faults(self.checks)

    def section(self) -> Section:
        """A row a method, and the checks."""
        rows: list[list[Cell]] = [
            [one.name, _share(one.exact_match), _share(one.f1), f"{100 * one.first_token.mean:.0f}", one.nats.mean]
            for one in self.methods
        ]
        told = (
            f"{self.questions} evaluation questions through one layout and one greedy decoding. Scores in per cent, in "
            "brackets with 95 % intervals; loss in nats a token."
        )
        align: list[Align] = ["left", *("right",) * 4]
        table = Table(["", "exact match", "F1", "first token", "nats"], rows, align=align)
        notes = [Text(note, tone="note") for note in self.notes]
        return Section("Before training", told, [table, checks_table(self.checks), *notes])


def why_not(case: CompressCase) -> str:
    """Why the baselines are not measured here; empty where they can be."""
    if not case.decoder_trained:
        return (
            "the decoder that decoder.config describes is not trained yet, and random weights answer nothing; `inlay "
            "compress train` trains it first and keeps it, and the doctor then takes it from there"
        )
    if case.compressor.lm.device.type == "cpu" and case.parameters > LARGEST:
        return (
            f"{case.parameters / 1e6:,.0f} million parameters answer too slowly on a CPU: whether the decoder answers "
            "from the full text was not checked; run the doctor on a GPU, or with a small decoder"
        )
    return ""


def examine_baselines(case: CompressCase, *, seconds: float = SECONDS, progress: Steps | None = None) -> Baselines:
    """Answer a few questions in every way that needs no training.

    Args:
        case: What is to be trained; it is left as it is.
        seconds: How long it may take; where more would, 16 questions are asked instead of 64.
        progress: Called with answers given and answers in all.
    """
    began = time.monotonic()
    evaluation = _evaluate(case, LEAST, progress)
    if (time.monotonic() - began) * QUESTIONS / LEAST < seconds:
        evaluation = _evaluate(case, QUESTIONS, progress)
    methods = tuple(
        BaselineScores(
            _name(one.name, one.budget),
            one.scores.overall.exact_match,
            one.scores.overall.f1,
            one.first_token,
            one.nll,
        )
        for one in evaluation.methods
    )
    full = evaluation.find(FULL_TEXT)
    cut = max((one.scores.exact_match for one in evaluation.methods if one.name in CUTS), default=None)
    checks = _checks(case, evaluation)
    reads = all(check.fault is None for check in checks[:1])
    gap = None if full is None or cut is None or not reads else full.scores.exact_match - cut
    if gap is not None and full is not None and evaluation.questions >= LEAST:
        checks.append(_loses(full.scores.overall.exact_match.mean, gap))
    return Baselines(
        questions=evaluation.questions,
        methods=methods,
        gap=gap,
        notes=evaluation.notes,
        checks=tuple(checks),
    )


def _evaluate(case: CompressCase, count: int, progress: Steps | None) -> CompressEvaluation:
    examples = [case.eval[index] for index in choose(len(case.eval), count)]
    return evaluate_compression(
        case.model,
        case.compressor,
        case.layout,
        examples,
        ratios=case.recipe.evaluate.ratios,
        context_tokens=case.recipe.context_tokens,
        batch_size=case.recipe.evaluate.batch_size,
        untrained=False,  # what is examined is untrained itself
        seed=case.recipe.seed,
        progress=progress,
    )


def _checks(case: CompressCase, evaluation: CompressEvaluation) -> list[Check]:
    """That the decoder reads, first, and that it reads as well as it should."""
    full, none = evaluation.find(FULL_TEXT), evaluation.find(NO_CONTEXT)
    if full is None or none is None or evaluation.questions < LEAST:
        return []
    checks = [_reads(case, evaluation)]
    wanted = case.recipe.base.exact_match if case.recipe.base is not None else None
    reached = full.scores.overall.exact_match
    if wanted is not None:
        title = "the decoder answers the full text as well as the recipe wants"
        figures = f"exact match {percent(reached.mean)} ({percent(reached.low)} to {percent(reached.high)})"
        # A decoder out of the cache was asked more questions when it was trained; a few here do not outweigh them.
        trained = case.outcome
        if trained is not None:
            figures += f", {percent(trained.exact_match)} when it was trained"
        fault = None
        if reached.high < wanted and not (trained is not None and trained.reached):
            says = f"full text is answered with {figures}, and base.exact_match is {percent(wanted)}"
            fix = "more max_steps in the last of base.stages, or fewer data.facts"
            fault = Finding("baselines.decoder_short", Severity.WARNING, says, fix)
        checks.append(Check(title, f"{figures}; wanted {percent(wanted)}", fault))
    return checks


def _loses(full: float, gap: float) -> Check:
    title = "cut text loses answers that full text has"
    fault = None
    if gap < _NOTHING:
        says = (
            f"text cut to as many tokens answers as well as the full text (exact match {percent(full)} against "
            f"{percent(max(0.0, full - gap))}): there is nothing for a compressor to gain"
        )
        fix = "larger compressor.ratios, or data whose answers stand anywhere in their contexts"
        fault = Finding("baselines.nothing_to_gain", Severity.WARNING, says, fix)
    return Check(title, f"full text has {100 * gap:.0f} points more than the best cut", fault)


def _reads(case: CompressCase, evaluation: CompressEvaluation) -> Check:
    title = "the decoder reads its answers from the context"
    full, none = evaluation.find(FULL_TEXT), evaluation.find(NO_CONTEXT)
    assert full is not None
    assert none is not None
    gain = full.scores.gain(none.scores).f1
    figures = (
        f"full text has F1 {percent(full.scores.f1)}, no context {percent(none.scores.f1)} (gain, 95 % interval: "
        f"{100 * gain.low:+.0f} to {100 * gain.high:+.0f} points)"
    )
    if gain.low > 0:
        return Check(title, figures)
    says = (
        f"{figures}: the decoder does not answer from what it reads, so nothing that is compressed can be judged by it"
    )
    fix = (
        "decoder.name_or_path: one that answers from full text in this layout (of an instruct model, layout.chat: true)"
    )
    if case.recipe.base is not None:
        fix = "base.stages with more max_steps, or fewer data.facts"
    severity = Severity.WARNING if case.recipe.decoder_lora is not None else Severity.FATAL
    return Check(title, figures, Finding("baselines.decoder_does_not_read", severity, says, fix))


def _name(name: str, budget: str) -> str:
    return f"{'compressor, untrained' if name == SOFT_TOKENS else name} {budget}".strip()


def _share(interval: Interval) -> str:
    return f"{100 * interval.mean:.0f} ({100 * interval.low:.0f}–{100 * interval.high:.0f})"
