"""A batch of a few questions learnt by heart: it must then be generated back, token for token.

Nothing else tests the whole way at once: compressor, layout, labels and loss on the way in; prefix, cache, stop ids and
decoding on the way out. And it has a theorem behind it: where the likeliest token is the right one at every place of a
row, given the right ones before it, greedy decoding gives that row. So a batch that is learnt and not generated back
shows that training and answering are of different things, and *how* the answer differs says which:

    every second token          labels were shifted twice
    right, and then more        the end is not supervised
    right, and then cut         answer_tokens is too few
    anything else               what stands before the answer differs

What is trained is what the recipe trains. A decoder with random weights is trained along, for through one that has
learnt nothing there is little to be learnt. All weights are put back afterwards.
"""

from __future__ import annotations

import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.data import QAExample
from inlay.doctor.compress_case import CompressCase, Steps
from inlay.doctor.findings import Finding, Severity
from inlay.evaluate.scoring import evaluating
from inlay.report import Section, Table, Text, training_curves
from inlay.report.document import Item
from inlay.softtoken.objectives import OBJECTIVES, ObjectiveInputs, answer

ROWS = 4
STEPS = 300
SECONDS = 30.0
LARGEST = 150_000_000
"""Numbers in a model that is still trained on a CPU."""

_RATE = 6e-3
_LOOK_EVERY = 5
_LEARNT = 0.05  # nats a token: far below ln 2, where the likeliest token is in doubt
_LOOKS = 3

_FAULTS = {
    "shifted_twice": (
        "skips every second token: labels are shifted by hand and once more in the loss",
        "give labels unshifted; the model's loss shifts them",
    ),
    "endless": (
        "goes on behind the answer: its end is not supervised, or is none of the stop ids",
        "layout.eos: true, and the end token's own label in the batch",
    ),
    "cut": ("is cut off by the budget of new tokens", "layout.answer_tokens: {needed} or more"),
    "first_lost": (
        "lacks the answer's first token: nothing taught it to follow the prompt",
        "supervise the answer from its first token on, and put no token before it in training alone",
    ),
    "differs": (
        "is another one, though every token of it is learnt: training and answering see different things before it "
        "(a token, a position, a mask)",
        "see Layout and Slots; take both batches from one BoundLayout",
    ),
}


@dataclass(frozen=True)
class Recited:
    """One row after it was learnt.

    Attributes:
        wanted: The answer's tokens and its end, as taught.
        said: What was generated up to its first stop id.
        fault: A key of the faults that are told apart; empty where the two are equal.
    """

    wanted: tuple[str, ...]
    said: tuple[str, ...]
    fault: str


@dataclass(frozen=True)
class Overfit:
    """A batch learnt by heart.

    Attributes:
        steps: Optimizer steps it took, or was given.
        seconds: Wall clock.
        losses: Nats a token, step by step.
        right: Share of the tokens that are the likeliest ones at the end, given the right ones before them.
        decoder_too: The decoder was trained along, as its weights are random.
        rows: What was generated; empty where the batch was not learnt.
        needed: Tokens that the longest answer takes with its end.
        out_of_time: The time was up before the steps were.
    """

    steps: int
    seconds: float
    losses: tuple[float, ...]
    right: float
    decoder_too: bool
    rows: tuple[Recited, ...]
    needed: int
    out_of_time: bool

    @property
    def learnt(self) -> bool:
        """Whether every token came to be the likeliest."""
        return bool(self.rows)

    @property
    def trained(self) -> str:
        """What was trained, in words."""
        return "compressor and decoder (its weights are random)" if self.decoder_too else "what the recipe trains"

    def findings(self) -> list[Finding]:
        """What the recited rows, or the loss, show."""
        if not self.learnt:
            says = (
                f"one batch of {ROWS} questions was not learnt by heart in {self.steps} steps: the loss went from "
                f"{self.losses[0]:.2f} to {self.losses[-1]:.2f} nats a token, and {100 * self.right:.0f} % of the "
                "tokens are right; so it is not shown that answers come back"
            )
            if self.out_of_time:
                says += f" (the time was up after {self.seconds:.0f} s, which says nothing of the recipe)"
                return [Finding("overfit.out_of_time", Severity.HEALTHY, says, "a faster device, or a smaller decoder")]
            fix = (
                "see Objectives and Slots for a gradient or a scale that is off; a smaller compressor.ratios or more "
                "compressor.lora.r gives more room"
            )
            return [Finding("overfit.not_learnt", Severity.WARNING, says, fix)]
        counted = Counter(row.fault for row in self.rows if row.fault)
        found = []
        for fault, count in counted.most_common():
            row = next(row for row in self.rows if row.fault == fault)
            what, fix = _FAULTS[fault]
            says = (
                f"one batch was learnt (loss {self.losses[-1]:.3f}), and in {count} of {len(self.rows)} rows what is "
                f"generated {what} ({_spelled(row.said)!r} for {_spelled(row.wanted)!r})"
            )
            found.append(Finding(f"overfit.{fault}", Severity.FATAL, says, fix.format(needed=self.needed)))
        return found

    def section(self) -> Section:
        """What was taught and what came back, and the loss."""
        told = (
            f"{ROWS} questions learnt by heart, training {self.trained}: {self.steps} steps in {self.seconds:.0f} s, "
            f"loss {self.losses[0]:.2f} to {self.losses[-1]:.3f} nats a token. All weights are put back."
        )
        steps = [float(step) for step in range(1, len(self.losses) + 1)]
        curve = training_curves({"one batch": (steps, [*self.losses])}, title="Learning one batch", window=1)
        items: list[Item] = []
        if self.learnt:
            rows = [[_spelled(row.wanted), _spelled(row.said)] for row in self.rows]
            marks: Any = ["bad" if row.fault else "good" for row in self.rows]
            items.append(Table(["taught", "generated"], rows, align=["left", "left"], verdicts=marks))
        else:
            items.append(Text("It was not learnt within the budget, so nothing was generated.", tone="warning"))
        return Section("One batch by heart", told, [*items, curve.figure("Cross-entropy of the answers.")])


def why_not(case: CompressCase) -> str:
    """Why the batch cannot be learnt here; empty where it can."""
    if case.compressor.lm.device.type == "cpu" and case.parameters > LARGEST:
        return (
            f"{case.parameters / 1e6:,.0f} million parameters are too many to train on a CPU within seconds: that a "
            "batch learnt by heart is generated back was not checked; run the doctor on a GPU, or with a small decoder"
        )
    return ""


def overfit_one_batch(
    case: CompressCase, *, steps: int = STEPS, seconds: float = SECONDS, progress: Steps | None = None
) -> Overfit:
    """Learn a few questions by heart and generate their answers.

    Args:
        case: What is trained.
        steps: Most optimizer steps.
        seconds: Most seconds to train for.
        progress: Called after each step.
    """
    examples = _ragged(case)
    batch = case.batch(examples)
    losses: list[float] = []
    rows: list[Recited] = []
    right, looks = 0.0, 0
    began = time.monotonic()
    with _given_back(case) as parameters:
        optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=0.0)
        for step in range(1, steps + 1):
            loss, right = _learn(case, batch, parameters, optimizer)
            losses.append(loss)
            if progress is not None:
                progress(step, steps)
            late = step == steps or time.monotonic() - began > seconds
            if right == 1.0 and (loss < _LEARNT or late) and (step % _LOOK_EVERY == 0 or late):
                # The loss was measured before the step, and the step changes the weights: look at what there is now.
                with torch.no_grad():
                    _, right = _loss(case, batch)
                if right == 1.0:
                    rows = _recite(case, batch)
                    looks += 1
                    if not any(row.fault for row in rows) or looks == _LOOKS:
                        break
            if late:
                break
    needed = max(len(case.layout.answer_ids(example.answers)) for example in examples)
    return Overfit(
        steps=len(losses),
        seconds=time.monotonic() - began,
        losses=tuple(losses),
        right=right,
        decoder_too=not case.decoder_trained,
        rows=tuple(rows),
        needed=needed,
        out_of_time=len(losses) < steps and not rows,
    )


def _ragged(case: CompressCase) -> list[QAExample]:
    """A few questions about different contexts, with answers from the shortest to the longest of a handful."""
    by_length = sorted(case.questions(4 * ROWS), key=lambda one: len(case.layout.answer_ids(one.answers)))
    last = len(by_length) - 1
    return [by_length[round(place * last / max(1, ROWS - 1))] for place in range(min(ROWS, len(by_length)))]


def _learn(
    case: CompressCase, batch: dict[str, Any], parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[float, float]:
    """One step on the answers alone; the loss before it, and the share of tokens that were the likeliest."""
    with torch.enable_grad():
        loss, right = _loss(case, batch)
        gradients = torch.autograd.grad(loss, [*parameters], allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None
    return float(loss.detach()), right


def _loss(case: CompressCase, batch: dict[str, Any]) -> tuple[Tensor, float]:
    """The loss of the answers, and the share of their tokens that are the likeliest ones."""
    seen: list[float] = []

    def noted(inputs: ObjectiveInputs) -> Tensor:
        said = inputs.student
        seen.append(float((said.logits.argmax(-1) == said.labels).float().mean()))
        return answer(inputs)

    objectives = {**OBJECTIVES, "answer": noted}
    loss, _ = case.task(**batch, weights={"answer": 1.0}, objectives=objectives, ratio=case.ratio)
    return loss, seen[0]


def _recite(case: CompressCase, batch: dict[str, Any]) -> list[Recited]:
    """Generate every row's answer and compare it with what was taught."""
    layout = case.layout
    generated = layout.generate(case.model, case.memory(batch), batch["questions"])
    spell = layout.tokenizer.convert_ids_to_tokens
    rows = []
    for said, references in zip(generated, batch["answers"], strict=True):
        wanted = layout.answer_ids(references)
        if not set(wanted) & set(layout.stop_ids):
            wanted = [*wanted, layout.stop_ids[0]]  # what an answer should end with, taught or not
        fault = name_fault(wanted, said, layout.stop_ids)
        rows.append(Recited(tuple(map(str, spell(wanted))), tuple(map(str, spell(said))), fault))
    return rows


def name_fault(wanted: Sequence[int], said: Sequence[int], stop_ids: Sequence[int]) -> str:
    """How what was generated differs from an answer that had been learnt; empty where it does not.

    Args:
        wanted: The answer and its end.
        said: What was generated, its end included if it ended.
        stop_ids: What ends an answer.
    """
    if list(said) == list(wanted):
        return ""
    content = list(wanted[:-1])
    ended = bool(said) and said[-1] in stop_ids
    if list(said[: len(content)]) == content and not ended:
        return "endless" if len(said) > len(content) else "cut"
    if not ended and list(said) == content[: len(said)]:
        return "cut"
    if list(said) == list(wanted[1:]):
        return "first_lost"
    for skipping in (list(wanted[::2]), list(wanted[1::2])):
        if len(wanted) > 2 and list(said[: len(skipping)]) == skipping:
            return "shifted_twice"
    return "differs"


@contextmanager
def _given_back(case: CompressCase) -> Iterator[list[nn.Parameter]]:
    """Within it, eval mode and the parameters to train; afterwards every weight, flag and mode is what it was."""
    task = case.task
    known = {id(parameter): parameter for parameter in task.parameters()}
    flags = {key: parameter.requires_grad for key, parameter in known.items()}
    try:
        if not case.decoder_trained:
            for parameter in known.values():
                parameter.requires_grad_(parameter.is_floating_point())
        trained = [parameter for parameter in known.values() if parameter.requires_grad]
        before = [parameter.detach().clone() for parameter in trained]
        try:
            with evaluating(task):
                yield trained
        finally:
            with torch.no_grad():
                for parameter, value in zip(trained, before, strict=True):
                    parameter.copy_(value)
    finally:
        for key, parameter in known.items():
            parameter.requires_grad_(flags[key])


def _spelled(tokens: Sequence[str]) -> str:
    return textwrap.shorten(" ".join(tokens), 88, placeholder=" …") or "nothing"
