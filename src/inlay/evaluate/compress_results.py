"""What was measured of a compressor and its baselines, as JSON, as tables and as a section of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inlay.evaluate.compress_methods import CUTS, FULL_TEXT, MEAN_POOLED, NO_CONTEXT, SOFT_TOKENS, UNTRAINED
from inlay.evaluate.compress_scores import MethodScores
from inlay.evaluate.intervals import Interval
from inlay.evaluate.squad import ScoreIntervals
from inlay.report import Plot, Section, Series, Table, Text, line_plot
from inlay.report.document import Align, Item, Verdict
from inlay.report.jsonfile import plain
from inlay.report.numbers import MINUS, MISSING, Cell, short

_EXPLAINED = (
    "Every method makes slots of the same contexts; question, layout and greedy decoding are the same for all, and "
    "the question is never cut. Cuts and compressor have equally many slots for each context."
)

_FEW = 10


@dataclass(frozen=True)
class CompressEvaluation:
    """A compressor beside its baselines, on the same questions.

    Attributes:
        questions: Questions asked.
        contexts: Different contexts that they are about.
        context_tokens: Mean tokens of a question's context.
        batch_size: Questions answered at a time.
        methods: In the order of the tables.
        notes: What was not measured, and why.
    """

    questions: int
    contexts: int
    context_tokens: float
    batch_size: int
    methods: tuple[MethodScores, ...]
    notes: tuple[str, ...] = ()

    @property
    def budgets(self) -> list[str]:
        """The budgets that the compressor was measured at."""
        return [method.budget for method in self.methods if method.name == SOFT_TOKENS]

    def find(self, name: str, budget: str = "") -> MethodScores | None:
        """A method by name and budget; None where it was not measured."""
        return next((one for one in self.methods if (one.name, one.budget) == (name, budget)), None)

    def best_cut(self, budget: str) -> MethodScores | None:
        """Of the text cut to this budget in several ways, the one with the best F1 on these very questions.

        That choice favours the cut: what soft tokens gain over it, they gain over each.
        """
        cuts = [cut for kind in CUTS if (cut := self.find(kind, budget)) is not None]
        return max(cuts, key=lambda cut: cut.scores.f1, default=None)

    def gain(self, budget: str) -> ScoreIntervals | None:
        """What soft tokens gain over the best cut, paired by context; None without both."""
        soft, cut = self.find(SOFT_TOKENS, budget), self.best_cut(budget)
        return None if soft is None or cut is None else soft.scores.gain(cut.scores)

    def summary(self) -> list[str]:
        """How the compressor stands to full text and to the best cut, one sentence a budget."""
        full = self.find(FULL_TEXT)
        said = []
        for budget in self.budgets:
            soft, cut = self.find(SOFT_TOKENS, budget), self.best_cut(budget)
            assert soft is not None
            exact = soft.scores.exact_match
            sentence = f"At {budget} soft tokens have exact match {_percent(exact)}"
            if full is not None and full.scores.exact_match:
                reached = full.scores.exact_match
                sentence += f": {_percent(exact / reached)} of full text's {_percent(reached)}"
            if cut is not None and cut.scores.exact_match:
                beaten = cut.scores.exact_match
                sentence += f", {short(exact / beaten, 2)} times the {_percent(beaten)} of the best cut ({cut.name})"
            said.append(sentence + ".")
        return said

    def warnings(self) -> list[str]:
        """Why the figures do not show what they seem to."""
        said = []
        if self.contexts < _FEW:
            said.append(
                f"These questions are about {self.contexts:,} different contexts, too few for their spread to say how "
                f"sure a figure is: take {_FEW} at the very least, and hundreds to compare."
            )
        full, none = self.find(FULL_TEXT), self.find(NO_CONTEXT)
        if full is not None and none is not None and not full.scores.gain(none.scores).f1.low > 0:
            said.append(
                f"Full text (F1 {_percent(full.scores.f1)}) is not shown to answer better than no context "
                f"({_percent(none.scores.f1)}): this decoder does not read its answers from the context, so a "
                "compressor cannot be judged by it. Use a decoder that answers from full text, or train it to first."
            )
        for budget in self.budgets:
            gain, cut = self.gain(budget), self.best_cut(budget)
            if gain is None or cut is None or gain.f1.low > 0 or gain.f1.high < 0:
                continue
            half = gain.f1.half
            enough = ""
            if gain.f1.mean and math.isfinite(half):
                needed = float(f"{self.contexts * (half / gain.f1.mean) ** 2:.1e}")
                enough = f" A difference of this size takes about {needed:,.0f} contexts."
            said.append(
                f"At {budget} soft tokens and the best cut ({cut.name}) differ by {_points(gain.f1)} points of F1, "
                f"which these {self.questions:,} questions about {self.contexts:,} contexts cannot tell from 0.{enough}"
            )
        return said

    def to_json(self) -> dict[str, Any]:
        """Everything in plain JSON types; what is not a finite number is None."""
        gains = {budget: self.gain(budget) for budget in self.budgets}
        return plain(
            {
                "questions": self.questions,
                "contexts": self.contexts,
                "context_tokens": self.context_tokens,
                "batch_size": self.batch_size,
                "methods": [method.to_json() for method in self.methods],
                "gain_over_best_cut": {budget: gain.to_json() for budget, gain in gains.items() if gain is not None},
                "notes": [*self.notes],
                "summary": self.summary(),
                "warnings": self.warnings(),
            }
        )

    def sections(self) -> list[Section]:
        """One section: what it comes to, F1 against ratio, answers and cost."""
        told = "\n".join(f"- {one}" for one in self.summary())
        warned = [Text(one, tone="warning") for one in self.warnings()]
        noted = [Text(one, tone="note") for one in self.notes]
        tables = [self._answers(), *self._with_and_without(), self._cost()]
        items: list[Item] = [Text(told), *warned, self.plot().figure(), *tables, *noted]
        return [Section("Soft tokens and baselines", _EXPLAINED, items)]

    def plot(self) -> Plot:
        """F1 against tokens per slot, for the compressor, mean pooling and the best cut, from full text at 1."""
        soft = [self.find(SOFT_TOKENS, budget) for budget in self.budgets]
        lines = [
            _line(SOFT_TOKENS, soft),
            _line("cut text (best)", [self.best_cut(budget) for budget in self.budgets]),
            _line(MEAN_POOLED, [self.find(MEAN_POOLED, budget) for budget in self.budgets]),
        ]
        widest = 1.05 * max((one.ratio for one in soft if one is not None), default=2.0)
        levels = [
            Series(name, [1.0, (1 + widest) / 2, widest], [100 * method.scores.f1] * 3, muted=True)
            for name in (FULL_TEXT, NO_CONTEXT)
            if (method := self.find(name)) is not None
        ]
        return line_plot(
            [*(line for line in lines if line is not None), *levels],
            xlabel="tokens per slot",
            ylabel="F1, % (shaded: 95 % interval)",
            title="F1 against the ratio of compression",
        )

    def _answers(self) -> Table:
        rows: list[list[Cell]] = [
            [
                method.label,
                _share(method.scores.overall.exact_match),
                _share(method.scores.overall.f1),
                f"{100 * method.first_token.mean:.1f}",
                f"{method.nll.mean:.3f}",
                f"{method.nll.mean / math.log(2):.3f}",
            ]
            for method in self.methods
        ]
        caption = (
            f"{self.questions:,} questions about {self.contexts:,} contexts. Scores in per cent, in brackets with 95 % "
            "intervals from the spread between contexts; loss in nats and bits per token, of the first reference and "
            "its end."
        )
        pairs = [[self.find(name, budget) for name in (UNTRAINED, MEAN_POOLED)] for budget in self.budgets]
        if any(one is not None and other is not None and one.nll == other.nll for one, other in pairs):
            caption += (
                " Untrained, this compressor writes mean-pooled embeddings (residual: true): those rows are equal."
            )
        columns = ["", "exact match", "F1", "first token", "nats", "bits"]
        align: list[Align] = ["left", *("right",) * 5]
        return Table(columns, rows, caption, align, verdicts=[self._verdict(method) for method in self.methods])

    def _with_and_without(self) -> list[Table]:
        """The questions with an answer and those without, each by themselves; nothing where all have one.

        A method that always says there is no answer is right on all of the latter.
        """
        rows: list[list[Cell]] = []
        unanswerable = None
        for method in self.methods:
            answerable, unanswerable = method.scores.answerable, method.scores.unanswerable
            if unanswerable is None:
                return []
            known = [MISSING] * 2 if answerable is None else [*map(_share, (answerable.exact_match, answerable.f1))]
            rows.append([method.label, *known, _share(unanswerable.exact_match)])
        without = unanswerable.questions if unanswerable is not None else 0
        caption = f"{without:,} of the questions have no answer in their context: it is right to say so."
        columns = ["", "answerable: exact match", "F1", "unanswerable: right"]
        return [Table(columns, rows, caption, ["left", "right", "right", "right"])]

    def _cost(self) -> Table:
        rows: list[list[Cell]] = [
            [
                method.label,
                f"{method.slots:,.1f}",
                f"{method.state_bytes:,.0f}",
                f"{method.cache_bytes:,.0f}",
                *(f"{1000 * s:,.2f}" for s in (method.write_seconds, method.prefill_seconds, method.decode_seconds)),
                f"{method.decode_steps:g}",
            ]
            for method in self.methods
        ]
        caption = (
            "Of a context: slots, bytes of the slots as the decoder reads them (state: embeddings, or keys and values) "
            "and of what they take in its cache, where both compare. Text can be kept as ids and embedded anew: 4 "
            f"bytes a token, {4 * self.context_tokens:,.0f} for full text. Times in milliseconds a question, batches "
            f"of {self.batch_size}, medians; decode lasts for as many steps as the longest answer of a batch."
        )
        columns = ["", "slots", "state", "cache", "write", "prefill", "decode", "steps"]
        return Table(columns, rows, caption, ["left", *("right",) * 7])

    def _verdict(self, method: MethodScores) -> Verdict:
        """Soft tokens are good where they are shown to beat the best cut, bad where it is shown to beat them."""
        gain = self.gain(method.budget) if method.name == SOFT_TOKENS else None
        if gain is None or not (gain.f1.low > 0 or gain.f1.high < 0):
            return "neutral"
        return "good" if gain.f1.mean > 0 else "bad"


def _line(name: str, methods: Sequence[MethodScores | None]) -> Series | None:
    there = sorted((one for one in methods if one is not None), key=lambda one: one.ratio)
    if not there:
        return None
    f1 = [one.scores.overall.f1 for one in there]
    band = ([100 * one.low for one in f1], [100 * one.high for one in f1])
    return Series(name, [one.ratio for one in there], [100 * one.mean for one in f1], band)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _share(interval: Interval) -> str:
    if not math.isfinite(interval.low):
        return f"{100 * interval.mean:.1f}"
    return f"{100 * interval.mean:.1f} ({100 * interval.low:.0f}–{100 * interval.high:.0f})"


def _points(interval: Interval) -> str:
    spread = f" (95 % interval {100 * interval.low:+.1f} to {100 * interval.high:+.1f})"
    return (f"{100 * interval.mean:+.1f}" + spread * math.isfinite(interval.half)).replace("-", MINUS)
