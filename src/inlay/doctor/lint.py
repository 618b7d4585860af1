"""Lint: faults of a recipe that show without running it, and of a model that will not be saved whole.

The checks themselves are in :mod:`inlay.doctor.lint_memory` and :mod:`inlay.doctor.lint_checks`; those of a Moshi
recipe in :mod:`inlay.doctor.moshi_lint`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from inlay.data import Data
from inlay.doctor.findings import Finding, Severity
from inlay.doctor.lint_case import NotChecked, TextCase
from inlay.doctor.lint_checks import CHECKS
from inlay.fastweight import Memory
from inlay.report import Section, Table
from inlay.report.document import Verdict

if TYPE_CHECKING:  # the trainer's callbacks import the doctor
    from inlay.train import Recipe

AnyCase = TypeVar("AnyCase")


@dataclass(frozen=True)
class Outcome:
    """What one check came to.

    Attributes:
        title: What was looked at.
        faults: What is wrong; empty where it is fine or was not checked.
        not_checked: Why it could not be looked at; empty where it was.
    """

    title: str
    faults: tuple[Finding, ...]
    not_checked: str = ""


@dataclass(frozen=True)
class Lint:
    """The checks of one recipe.

    Attributes:
        source: Where the recipe comes from.
        outcomes: One per check, in their order.
    """

    source: str
    outcomes: tuple[Outcome, ...]

    def findings(self) -> list[Finding]:
        """All faults, the worst first."""
        faults = [fault for outcome in self.outcomes for fault in outcome.faults]
        return sorted(faults, key=lambda fault: -fault.severity)

    def section(self) -> Section:
        """A row per check: fine, what is wrong, or why it was not looked at."""
        rows = [
            [outcome.title, "; ".join(fault.says for fault in outcome.faults) or outcome.not_checked or "fine"]
            for outcome in self.outcomes
        ]
        verdicts: list[Verdict] = [
            max(fault.severity for fault in outcome.faults).verdict
            if outcome.faults
            else "neutral"
            if outcome.not_checked
            else "good"
            for outcome in self.outcomes
        ]
        table = Table(["check", "result"], rows, verdicts=verdicts)
        return Section("Lint", f"Faults of {self.source} that show without running it.", [table])


def lint_recipe(recipe: Recipe, *, data: Data | None = None, source: Path | None = None) -> Lint:
    """Look for faults in a recipe without loading its model.

    Args:
        recipe: A checked recipe.
        data: Its data, if they are loaded: their documents' lengths are counted, and evaluation documents are looked
            for among the training documents.
        source: File that the recipe was read from, for the heading.
    """
    return Lint(str(source or recipe.name), run_checks(CHECKS, TextCase(recipe, data)))


def run_checks(checks: Mapping[str, Callable[[AnyCase], Iterable[Finding]]], case: AnyCase) -> tuple[Outcome, ...]:
    """What every check says of ``case``, in their order."""

    def run(title: str, check: Callable[[AnyCase], Iterable[Finding]]) -> Outcome:
        try:
            return Outcome(title, tuple(check(case)))
        except NotChecked as reason:
            return Outcome(title, (), str(reason))

    return tuple(run(title, check) for title, check in checks.items())


def lint_model(memory: Memory, model: nn.Module | None = None) -> list[Finding]:
    """Look for parameters that will be trained but not saved.

    ``memory.save_pretrained`` writes the memory's own parameters and what is trained of the model that it was attached
    to; adapters are left to PEFT. So what hides is what lies outside that model (a head, when the memory was attached
    to the decoder under it) and adapters in a model that is no ``PeftModel`` (transformers' ``add_adapter``).

    Args:
        memory: The attached memory.
        model: The model that is trained, if it is more than the one the memory was attached to.
    """
    trained = model or memory.model
    inner = {id(parameter) for parameter in memory.model.parameters()}
    written = {id(parameter) for parameter in (*memory.parameters(), *memory.base_parameters().values())}
    by_peft = _written_by_peft(trained) | _written_by_peft(memory.model)
    unsaved = [
        (name, id(parameter) in inner)
        for name, parameter in trained.named_parameters()
        if parameter.requires_grad and id(parameter) not in written and parameter.data_ptr() not in by_peft
    ]
    adapters = [name for name, within in unsaved if within]
    outside = [name for name, within in unsaved if not within]
    findings = []
    if outside:
        says = (
            f"{len(outside)} parameters require a gradient but lie outside the {type(memory.model).__name__} that the "
            f"memory was attached to, so they are not saved with it ({outside[0]} is the first)"
        )
        fix = f"attach the memory to the {type(trained).__name__}, or freeze them"
        findings.append(Finding("lint.unsaved", Severity.WARNING, says, fix))
    if adapters:
        says = (
            f"{len(adapters)} parameters of adapters require a gradient; a memory leaves adapters to PEFT, but no "
            f"PeftModel is there to save them ({adapters[0]} is the first)"
        )
        fix = "use peft.get_peft_model in place of add_adapter, or save the adapters with model.save_pretrained"
        findings.append(Finding("lint.unsaved", Severity.WARNING, says, fix))
    return findings


def _written_by_peft(model: nn.Module) -> set[int]:
    """Where the tensors lie that PEFT writes for ``model``; none if it is no ``PeftModel``."""
    if not isinstance(model, PeftModel):
        return set()
    return {
        tensor.data_ptr()
        for adapter in model.peft_config
        for tensor in get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False).values()
    }
