"""What was measured of both memories, task by task, as JSON, as one table and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.evaluate.intervals import Interval
from inlay.evaluate.memories import FAST_WEIGHTS, FULL_TEXT, NO_CONTEXT, SOFT_TOKENS, WayScores
from inlay.report import Section, Table, Text
from inlay.report.document import Item, Verdict
from inlay.report.jsonfile import plain, write_json
from inlay.report.numbers import MINUS, Cell

_EXPLAINED = (
    "The same contexts written into fast weights and into soft tokens before the same decoder, and the same questions "
    "answered from either, by one layout and greedy decoding. Attention does not see the context while answering: fast "
    "weights have their session's state, soft tokens their slots."
)


@dataclass(frozen=True)
class TaskScores:
    """Both memories on one task.

    Attributes:
        task: Its name.
        questions: Questions asked.
        contexts: Different contexts that they are about.
        context_tokens: Mean tokens of a question's context.
        ways: In the order of the table.
        what: What was trained on each side, in words, by the way's name.
        notes: What keeps the comparison from being one at equal bytes.
    """

    task: str
    questions: int
    contexts: int
    context_tokens: float
    ways: tuple[WayScores, ...]
    what: dict[str, str]
    notes: tuple[str, ...] = ()

    def find(self, name: str, *, control: bool = False) -> WayScores:
        """A way by its name."""
        return next(one for one in self.ways if (one.name, one.control) == (name, control))

    def verdict(self) -> str:
        """Which memory answers better, from how many bytes, and how sure that is."""
        fast, soft, full = self.find(FAST_WEIGHTS), self.find(SOFT_TOKENS), self.find(FULL_TEXT)
        gain = fast.scores.gain(soft.scores).exact_match
        by = _points(gain)
        if gain.low > 0 or gain.high < 0:
            better, worse = (FAST_WEIGHTS, SOFT_TOKENS) if gain.mean > 0 else (SOFT_TOKENS, FAST_WEIGHTS)
            said = f"{better} answer better than {worse} (fast weights {by})"
        else:
            said = f"these questions cannot tell the memories apart (fast weights {by})"
        unread = [name for name in (FAST_WEIGHTS, SOFT_TOKENS) if not self.reads(name)]
        if unread:
            said += f"; {' and '.join(unread)} did not learn to answer from the context within these steps"
        return (
            f"**{self.task}**: {said}. State: {fast.state_bytes:,.0f} bytes of fast weights, "
            f"{soft.state_bytes:,.0f} of soft tokens ({soft.slots:,.1f} slots for {self.context_tokens:,.0f} tokens). "
            f"Full text reaches {100 * full.scores.exact_match:.1f} %."
        )

    def reads(self, name: str) -> bool:
        """Whether a memory's exact match is shown to come from the context: it is above that with another one's."""
        return self.find(name).scores.gain(self.find(name, control=True).scores).exact_match.low > 0

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        gain = self.find(FAST_WEIGHTS).scores.gain(self.find(SOFT_TOKENS).scores)
        return {
            "task": self.task,
            "questions": self.questions,
            "contexts": self.contexts,
            "context_tokens": self.context_tokens,
            "ways": [way.to_json() for way in self.ways],
            "fast_weights_over_soft_tokens": gain.to_json(),
            "trained": self.what,
            "verdict": self.verdict(),
            "notes": [*self.notes],
        }


@dataclass(frozen=True)
class MemoriesEvaluation:
    """Both memories on every task."""

    tasks: tuple[TaskScores, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain types; what is not a finite number is None."""
        return dict(plain({"tasks": [task.to_json() for task in self.tasks]}))

    def write(self, path: str | Path) -> Path:
        """Write :meth:`to_json` to ``path``, whole or not at all."""
        return write_json(self.to_json(), path)

    def section(self) -> Section:
        """The table, what it comes to, and what was trained."""
        told = "\n".join(f"- {task.verdict()}" for task in self.tasks)
        trained = "\n".join(
            f"- **{task.task}, {name}**: {text}" for task in self.tasks for name, text in task.what.items()
        )
        notes = [Text(note, tone="warning") for task in self.tasks for note in task.notes]
        items: list[Item] = [self.table(), Text(told), *notes, Text("Trained, from the same decoder:\n\n" + trained)]
        return Section("Fast weights and soft tokens at equal bytes", _EXPLAINED, items)

    def table(self) -> Table:
        """Task and memory by bytes and scores."""
        rows: list[list[Cell]] = []
        verdicts: list[Verdict] = []
        for task in self.tasks:
            for way in task.ways:
                rows.append(
                    [
                        f"{task.task}: {way.label}",
                        f"{way.state_bytes:,.0f}",
                        f"{way.cache_bytes:,.0f}",
                        _share(way.scores.overall.exact_match),
                        f"{way.nll.mean:.2f} ({way.nll.low:.2f}–{way.nll.high:.2f})",
                    ]
                )
                verdicts.append(_verdict(task, way))
        counts = ", ".join(f"{one.questions:,} about {one.contexts:,} contexts ({one.task})" for one in self.tasks)
        caption = (
            f"Questions: {counts}. State is what is kept of a context (of text its ids, 4 bytes each), cache what its "
            "slots take in the decoder's while it answers, both in bytes. Exact match in per cent, loss in nats per "
            "token, with 95 % intervals from the spread between contexts."
        )
        return Table(["", "state", "cache", "exact match", "nats"], rows, caption, ["left", *("right",) * 4], verdicts)


def _verdict(task: TaskScores, way: WayScores) -> Verdict:
    if way.control or way.name in (FULL_TEXT, NO_CONTEXT):
        return "neutral"
    return "good" if task.reads(way.name) else "bad"


def _share(interval: Interval) -> str:
    return f"{100 * interval.mean:.1f} ({100 * interval.low:.0f}–{100 * interval.high:.0f})"


def _points(interval: Interval) -> str:
    spread = f"95 % interval {100 * interval.low:+.1f} to {100 * interval.high:+.1f}"
    text = f"{100 * interval.mean:+.1f} points of exact match, {spread}"
    return text.replace("-", MINUS)


def ways_in_order(ways: Sequence[WayScores]) -> tuple[WayScores, ...]:
    """Full text first, then each memory with its control, no context last."""
    names = [FULL_TEXT, FAST_WEIGHTS, SOFT_TOKENS, NO_CONTEXT]
    return tuple(sorted(ways, key=lambda way: (names.index(way.name), way.control)))
