"""A diagnosis: every examination of a model or recipe; terminal, HTML and JSON tell the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel

from inlay.doctor.findings import Examination, Finding, Severity
from inlay.report import Headline, Report, Section, Table, Text, write_report
from inlay.report.console import print_section
from inlay.report.jsonfile import plain, write_json

VERDICTS = {
    Severity.HEALTHY: "healthy",
    Severity.WARNING: "it can learn, with warnings",
    Severity.FATAL: "it will not learn",
}
_SUBTITLE = "Why its memory learns or does not."
_COLORS = {Severity.HEALTHY: "green", Severity.WARNING: "yellow", Severity.FATAL: "red"}


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found.

    Attributes:
        subject: What was examined: a recipe's name or a model's class.
        examinations: By name (``reach``, ``gradients``, ``causality``, ``scale``, ``step_size``, ``memory``, ``lint``),
            in the order they are shown.
        skipped: Why an examination was not made, by its name.
        provenance: Versions, device and date, for the report's footer.
    """

    subject: str
    examinations: Mapping[str, Examination]
    skipped: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def findings(self) -> list[Finding]:
        """Of all examinations, the worst first, and what was measured before what was only read off the recipe."""
        found = [finding for examination in self.examinations.values() for finding in examination.findings()]
        return sorted(found, key=lambda finding: (-finding.severity, finding.code.startswith("lint.")))

    @property
    def severity(self) -> Severity:
        """That of the worst finding."""
        return max((finding.severity for finding in self.findings), default=Severity.HEALTHY)

    @property
    def exit_code(self) -> int:
        """0 healthy, 1 warnings, 2 will not learn."""
        return int(self.severity)

    @property
    def sentence(self) -> str:
        """The verdict in one sentence: the worst finding, or that there is none."""
        worst = next((finding for finding in self.findings if finding.severity), None)
        return "nothing stands in the way of learning" if worst is None else worst.says

    def to_json(self) -> dict[str, Any]:
        """Everything in plain JSON types; what is not a finite number is None."""
        content: dict[str, Any] = {
            "subject": self.subject,
            "verdict": VERDICTS[self.severity],
            "exit_code": self.exit_code,
            "findings": [
                {"code": one.code, "severity": one.severity.name.lower(), "says": one.says, "fix": one.fix}
                for one in self.findings
            ],
            "examinations": {name: plain(_adapt(one)) for name, one in self.examinations.items()},
            "skipped": dict(self.skipped),
            "provenance": dict(self.provenance),
        }
        return content

    def write(self, directory: str | Path) -> tuple[Path, Path]:
        """Write ``diagnosis.json`` and ``report.html`` into ``directory``, each whole or not at all; their paths."""
        directory = Path(directory)
        figures = write_json(self.to_json(), directory / "diagnosis.json")
        return figures, write_report(self.report(), directory / "report.html")

    def report(self) -> Report:
        """The same for the HTML report."""
        counts = {level: sum(one.severity == level for one in self.findings) for level in Severity}
        summary = [
            Headline("verdict", VERDICTS[self.severity], self.sentence, self.severity.verdict),
            Headline("will not learn", str(counts[Severity.FATAL]), "findings that must be mended"),
            Headline("warnings", str(counts[Severity.WARNING]), "findings worth a look"),
        ]
        sections = [self._findings_section(), *self._sections]
        if self.skipped:
            rows = [[name, why] for name, why in self.skipped.items()]
            sections.append(Section("Not examined", items=[Table(["examination", "why"], rows)]))
        return Report(f"Doctor: {self.subject}", _SUBTITLE, summary, sections, self.provenance)

    def print(self, console: Console) -> None:
        """Everything but the plots, the findings last, where a terminal is read."""
        for section in self._sections:
            print_section(console, section)
        console.print()
        for name, why in self.skipped.items():
            console.print(f"[dim]not examined: {escape(name)}: {escape(why)}[/]", highlight=False)
        for finding in reversed(self.findings):
            color = _COLORS[finding.severity]
            console.print(f"[{color}]●[/] [bold]{escape(finding.code)}[/]", highlight=False)
            console.print(Padding(escape(finding.says), (0, 0, 0, 2)), highlight=False)
            if finding.fix:
                console.print(Padding(f"[dim]fix:[/] {escape(finding.fix)}", (0, 0, 0, 2)), highlight=False)
        color = _COLORS[self.severity]
        title = f"[bold]{escape(self.subject)}[/]"
        verdict = f"[bold {color}]{VERDICTS[self.severity]}[/]: {escape(self.sentence)}"
        console.print(Panel(verdict, title=title, title_align="left", border_style=color))

    @cached_property
    def _sections(self) -> list[Section]:
        # Drawing their plots takes longer than measuring a small model: once is enough for terminal and report.
        return [examination.section() for examination in self.examinations.values()]

    def _findings_section(self) -> Section:
        if not self.findings:
            return Section("Findings", items=[Text("Nothing was found.")])
        rows = [[one.code, one.says, one.fix] for one in self.findings]
        marks = [one.severity.verdict for one in self.findings]
        return Section("Findings", items=[Table(["code", "what was measured", "what to do"], rows, verdicts=marks)])


def _adapt(examination: Examination) -> Any:
    kind: Any = type(examination)
    return TypeAdapter(kind).dump_python(examination, mode="json")
