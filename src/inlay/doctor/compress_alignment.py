"""Which token each position is taught to predict: the next one, or, labels shifted twice, the one after it.

Two looks, which share nothing:

- **The batch itself.** Each embedding is looked up in the decoder's table; the label at a position must be the token
  *at* that position.
- **A model that copies.** A hand-written model reads a row and is sure, at every position, of the token that stands d
  places on. Whatever computes the loss, the d for which it is zero is what it teaches: 1 is a language model, 2 is
  labels shifted by hand and once more in the loss, 0 is copying the input. This is asked of transformers' own loss and
  of the objectives that a run is trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput

from inlay.doctor.compress_case import Check, CompressCase, ReadBack, checks_table, faults
from inlay.doctor.findings import Finding, Severity
from inlay.report import Section, Table
from inlay.report.document import Align
from inlay.report.numbers import Cell
from inlay.softtoken.batches import NO_LABEL
from inlay.softtoken.objectives import read

DISTANCES = (0, 1, 2, 3)
"""How far on the model that copies may look."""

_ROWS = 4
_SURE = 50.0  # a logit among zeros: a loss of exp(−50) a token where it is right and of 50 where it is wrong
_ZERO = 1e-3
_FIX = (
    "give labels unshifted (the label at a position is the token at that position): the model's loss shifts them, and "
    "nothing else should"
)
_TAUGHT = {
    0: "to say the token it is given (labels are shifted back)",
    2: "to skip every second token (labels are shifted by hand and once more in the loss): of 10 11 12 13 14 it says "
    "10 12 14",
    3: "to skip two tokens in three (labels are shifted three times)",
}


@dataclass(frozen=True)
class Alignment:
    """What the labels of a batch teach.

    Attributes:
        tokens: Supervised tokens that were looked at.
        at_place: By d, share of the labels that are the token d places on from their own; d = 0 is right.
        losses: By what computes the loss, the loss in nats a token of a model that is sure of the token d places on.
        checks: What should hold.
    """

    tokens: int
    at_place: dict[int, float]
    losses: dict[str, dict[int, float]]
    checks: tuple[Check, ...]

    def findings(self) -> list[Finding]:
        """What does not hold."""
        return faults(self.checks)

    def section(self) -> Section:
        """The losses of the model that copies, by distance, and the checks."""
        told = (
            "What a hand-written model loses, in nats a token, that is sure of the token d places on. Zero is taught."
        )
        rows: list[list[Cell]] = [[f"{d} on", *(one[d] for one in self.losses.values())] for d in DISTANCES]
        align: list[Align] = ["left", "right", "right"]
        table = Table(["it says the token", *self.losses], rows, align=align)
        return Section("Label alignment", told, [table, checks_table(self.checks)])


def examine_alignment(case: CompressCase) -> Alignment:
    """Find out what the labels of a real batch teach."""
    batch = case.batch(case.questions(_ROWS))
    memory = case.memory(batch)
    with torch.no_grad():
        training = case.layout.training(case.model, memory, batch["questions"], batch["answers"])
    back = ReadBack(case.compressor.lm.embedding)
    tokens = [[-1 if one is None else one for one in back(row)] for row in training.inputs_embeds]
    ids = torch.tensor(tokens, device=training.labels.device)
    # Padding is zero and reads as a token whose embedding is; nothing is supervised there.
    supervised = training.labels != NO_LABEL
    count = int(supervised.sum())
    at_place = {
        d: float((_ahead(ids, d) == training.labels)[supervised].float().mean()) if count else 0.0
        for d in (-1, *DISTANCES)
    }

    def loss_of(compute: Callable[[nn.Module], Tensor]) -> dict[int, float]:
        with torch.no_grad():
            return {d: float(compute(Copier(case.model, ids, d))) for d in DISTANCES}

    losses = {
        "transformers' loss": loss_of(lambda copier: copier(**training.inputs()).loss),
        "inlay's objectives": loss_of(lambda copier: read(copier, training, "the prompt").cross_entropy),
    }
    checks = (_labels(count, at_place), *(_distance(name, found) for name, found in losses.items()))
    return Alignment(count, at_place, losses, checks)


class Copier(nn.Module):
    """A hand-written causal LM that has read the row to its end and is sure of the token some places on.

    Args:
        model: Whose vocabulary and configuration it has.
        ids: `[B, T]`, the tokens of the rows; negative for none.
        ahead: How many places on.
    """

    def __init__(self, model: Any, ids: Tensor, ahead: int) -> None:
        super().__init__()
        self.config = model.config
        self.vocabulary = int(model.get_input_embeddings().num_embeddings)
        self.says = _ahead(ids, ahead)

    def forward(
        self, inputs_embeds: Tensor, labels: Tensor | None = None, logits_to_keep: int = 0, **_: Any
    ) -> CausalLMOutput:
        """Logits `[B, T, vocabulary]`, and transformers' loss where there are labels. -0 keeps every position."""
        says = self.says[:, -logits_to_keep:]
        logits = torch.zeros(*says.shape, self.vocabulary, device=says.device)
        logits.scatter_(2, says.clamp(min=0).unsqueeze(-1), _SURE)
        loss = None if labels is None else ForCausalLMLoss(logits, labels, self.vocabulary)
        return CausalLMOutput(loss=loss, logits=logits)


def _ahead(ids: Tensor, places: int) -> Tensor:
    """`[B, T]`, at each position the token ``places`` on; -1 beyond the ends."""
    moved = ids.roll(-places, dims=1)
    if places > 0:
        moved[:, -places:] = -1
    elif places < 0:
        moved[:, :-places] = -1
    return moved


def _labels(count: int, at_place: dict[int, float]) -> Check:
    title = "each label is the token at its own position"
    if not count:
        says = "no token of the batch is supervised: nothing is learned"
        return Check(title, says, Finding("alignment.nothing", Severity.FATAL, says, _FIX))
    if at_place[0] == 1.0:
        return Check(title, f"so for {count} of {count} supervised tokens")
    best = max(at_place, key=lambda d: at_place[d])
    wrong = round((1 - at_place[0]) * count)
    says = f"{wrong} of {count} labels are not the token at their own position"
    if best and at_place[best] > at_place[0]:
        says += f"; {round(at_place[best] * count)} are the token {abs(best)} place{'s' * (abs(best) > 1)} "
        says += "on" if best > 0 else "back"
    return Check(title, says, Finding("alignment.labels", Severity.FATAL, says, _FIX))


def _distance(name: str, losses: dict[int, float]) -> Check:
    title = f"the next token is taught ({name})"
    taught = [d for d, loss in losses.items() if loss < _ZERO]
    if 1 in taught:
        return Check(title, f"a model that says the next token has loss {losses[1]:.2g}")
    if not taught:
        nearest = min(losses, key=lambda d: losses[d])
        says = (
            f"{name}: a model that is sure of the next token has a loss of {losses[1]:.1f} nats a token; the lowest, "
            f"{losses[nearest]:.1f}, has one that says the token {nearest} on"
        )
        return Check(title, says, Finding("alignment.distance", Severity.FATAL, says, _FIX))
    says = f"{name} teaches {_TAUGHT[taught[0]]}"
    code = "alignment.shifted_twice" if taught[0] == 2 else "alignment.distance"
    return Check(title, says, Finding(code, Severity.FATAL, says, _FIX))
