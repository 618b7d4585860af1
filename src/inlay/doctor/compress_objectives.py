"""What the recipe's objectives ask for, measured on one batch: each one's loss, and whether a gradient reaches what is
to be trained.

Cross-entropy of the answers behind right tokens is enough to learn from (seed 003 blamed it, and its labels were at
fault). It hides two things where answers are long: the first token, which no token before it gives away, is then a
small part of the loss; and an answer is learnt behind its right tokens and given behind the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from inlay.doctor.compress_case import Check, CompressCase, checks_table, faults, percent
from inlay.doctor.findings import Finding, Severity
from inlay.evaluate.scoring import evaluating
from inlay.report import Section, Table
from inlay.report.document import Align
from inlay.report.numbers import Cell
from inlay.train.compress_trainer import stages

_ROWS = 4
_LONG = 16
"""Tokens of an answer from which errors on the way count: at 99 % a token, 15 % of such answers have one."""

_SMALL = 1 / 16
"""Share of the loss below which an answer's first token is next to nothing of it."""

_ANSWERS = ("answer", "first_token", "first_k", "distillation")


@dataclass(frozen=True)
class ObjectiveLoss:
    """One objective of one stage.

    Attributes:
        stage: ``pretraining`` or ``training``.
        name: The objective's.
        weight: In the recipe.
        loss: On one batch, before training.
        gradient: Norm of its gradient, unweighted, on everything that is trained.
    """

    stage: str
    name: str
    weight: float
    loss: float
    gradient: float


@dataclass(frozen=True)
class Objectives:
    """What is asked for.

    Attributes:
        parts: Every objective of every stage.
        trained: Numbers that are trained.
        first_share: Share of the answer loss that is the first tokens'.
        answer_tokens: Supervised tokens of an answer, end included, on average.
        long_answer: Tokens that 95 % of the answers do not exceed, end included.
        checks: What should hold.
    """

    parts: tuple[ObjectiveLoss, ...]
    trained: int
    first_share: float
    answer_tokens: float
    long_answer: int
    checks: tuple[Check, ...]

    def findings(self) -> list[Finding]:
        """What does not hold."""
        return faults(self.checks)

    def section(self) -> Section:
        """Loss and gradient by objective, and the checks."""
        rows: list[list[Cell]] = [
            [one.name, one.stage, one.weight, f"{one.loss:.3f}", f"{one.gradient:.3g}"] for one in self.parts
        ]
        align: list[Align] = ["left", "left", "right", "right", "right"]
        told = f"On one batch, before any training; the gradient is on {self.trained:,} numbers that are trained."
        table = Table(["objective", "stage", "weight", "loss", "gradient"], rows, align=align)
        return Section("Objectives", told, [table, checks_table(self.checks)])


def examine_objectives(case: CompressCase) -> Objectives:
    """Compute every objective and its gradient for a few questions. Nothing is changed."""
    examples = case.questions(_ROWS)
    batch = case.batch(examples)
    task = case.task
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    parts: list[ObjectiveLoss] = []
    with evaluating(task), torch.enable_grad():
        for stage in stages(case.recipe):
            for name, weight in stage.weights.items():
                loss, _ = task(**batch, weights={name: 1.0}, ratio=case.ratio)
                norm = _gradient(loss, trained)
                parts.append(ObjectiveLoss(stage.name, name, weight, float(loss.detach()), norm))
    lengths = sorted(map(len, case.answers["training"]))
    mean, long = sum(lengths) / len(lengths), lengths[math.ceil(0.95 * len(lengths)) - 1]
    weights = case.recipe.objectives.weights
    first = _first_share(weights, mean, case.recipe.objectives.k)
    checks = (
        _reached(parts),
        _asked(weights),
        _first(weights, first, mean),
        _own_tokens(case.recipe.objectives.scheduled_sampling, weights, long),
    )
    return Objectives(tuple(parts), sum(p.numel() for p in trained), first, mean, long, checks)


def _gradient(loss: torch.Tensor, trained: Sequence[nn.Parameter]) -> float:
    if not loss.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(loss, [*trained], allow_unused=True)
    squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _first_share(weights: Mapping[str, float], mean: float, k: int) -> float:
    """Of the weight that the objectives on answers put on an answer of ``mean`` tokens, what its first token has.

    Each objective is a mean over its own tokens: ``answer`` over all, ``first_k`` over k, ``first_token`` over one.
    """
    counted = {"answer": max(1.0, mean), "first_k": min(k, max(1.0, mean)), "distillation": min(k, max(1.0, mean))}
    counted["first_token"] = 1.0
    total = sum(weights.get(name, 0.0) for name in counted)
    return sum(weights.get(name, 0.0) / count for name, count in counted.items()) / total if total else 0.0


def _reached(parts: Sequence[ObjectiveLoss]) -> Check:
    title = "a gradient reaches what is trained"
    broken = [one for one in parts if not (math.isfinite(one.loss) and math.isfinite(one.gradient))]
    if broken:
        one = broken[0]
        says = (
            f"{one.stage}: the objective {one.name!r} is {one.loss} with a gradient of {one.gradient} before any step"
        )
        fix = "look for an overflow: decoder.dtype: float32, compressor.calibrate: true"
        return Check(title, says, Finding("objectives.not_finite", Severity.FATAL, says, fix))
    dead = [one for one in parts if one.gradient == 0.0]
    # The diversity of slots that are orthogonal is 0 and has no gradient; what asks for answers or text always has one.
    dead = [one for one in dead if one.name != "diversity"]
    if not dead:
        return Check(title, f"of each of {len(parts)} objectives")
    says = f"{dead[0].stage}: the objective {dead[0].name!r} has no gradient on anything that is trained"
    fix = "see that it reads the compressor's slots, with gradients on and nothing detached"
    return Check(title, says, Finding("objectives.no_gradient", Severity.FATAL, says, fix))


def _asked(weights: Mapping[str, float]) -> Check:
    title = "answers are asked for"
    on = [name for name in _ANSWERS if name in weights]
    if on:
        return Check(title, "by " + ", ".join(on))
    says = f"no objective is about the answers: {', '.join(weights)} alone teach slots that nothing reads for an answer"
    return Check(title, says, Finding("objectives.no_answer", Severity.FATAL, says, "objectives.answer: 1.0"))


def _first(weights: Mapping[str, float], share: float, mean: float) -> Check:
    title = "the first token has its part in the loss"
    figures = f"{percent(share)} of the weight, in answers of {mean:.1f} tokens with their end"
    if share >= _SMALL or not any(name in weights for name in _ANSWERS):
        return Check(title, figures)
    says = (
        f"an answer's first token, which no token before it gives away and all others follow, has {percent(share)} of "
        f"the loss (answers have {mean:.1f} tokens on average, end included)"
    )
    fix = "objectives.first_token: 0.5, or objectives.distillation: 0.5 (over the first k tokens)"
    return Check(title, figures, Finding("objectives.first_token", Severity.WARNING, says, fix))


def _own_tokens(sampling: float, weights: Mapping[str, float], long: int) -> Check:
    title = "answers are practised behind the model's own tokens"
    if long < _LONG:
        wrong = 1 - 0.99**long
        return Check(
            title, f"not needed: 95 % of the answers have at most {long} tokens (at 99 % a token, {percent(wrong)} err)"
        )
    if sampling:
        return Check(title, f"up to {percent(sampling)} of the input tokens by the end of the run")
    wrong = 1 - 0.99**long
    says = (
        f"answers of up to {long} tokens (95 %) are learnt behind right tokens alone and given behind the model's own: "
        f"with 99 % of the tokens right, {percent(wrong)} of such answers have a wrong one on the way"
    )
    fix = "objectives.scheduled_sampling: 0.25"
    return Check(title, says, Finding("objectives.teacher_forcing", Severity.WARNING, says, fix))
