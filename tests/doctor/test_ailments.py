"""One recipe for each ailment, and what the doctor says of it; the recipes that learn are called healthy."""

from __future__ import annotations

import functools
import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from inlay.cli import app
from inlay.doctor import Diagnosis
from inlay.doctor.recipes import examine_recipe
from inlay.train import RecipeError, load_recipe

RECIPES = Path(__file__).parents[2] / "src" / "inlay" / "recipes"

VERDICTS = {
    "clipped": (2, "gradient.clip", "max_update_norm: null"),
    "too_short": (2, "reach.never_read", "chunk_size"),
    "exposed": (1, "causality.exposure", "exposure: 0"),
    "overlong_eta": (1, "scale.too_large", "eta: "),
    "out_of_memory": (2, "memory.out_of_memory", "gradient_checkpointing: true"),
}


@functools.cache
def examined(name: str) -> Diagnosis:
    return examine_recipe(load_recipe(RECIPES / f"{name}.yaml"))


@pytest.mark.parametrize("name", VERDICTS)
def test_each_ailment_is_named_with_its_remedy(name: str) -> None:
    exit_code, code, remedy = VERDICTS[name]
    diagnosis = examined(f"ailments/{name}")
    assert diagnosis.exit_code == exit_code
    named = {finding.code: finding for finding in diagnosis.findings if finding.severity == exit_code}
    assert code in named, named
    assert remedy in named[code].fix
    # The other ailments are not seen in it: each recipe has one fault.
    others = {other for _, other, _ in VERDICTS.values()} - {code}
    assert not others & {finding.code for finding in diagnosis.findings}


def test_every_ailment_has_a_verdict() -> None:
    recipes = {path.stem for path in (RECIPES / "ailments").glob("*.yaml")}
    assert {name for name in recipes if not name.startswith("soft_")} == set(VERDICTS)


def test_a_recipe_that_learns_is_healthy() -> None:
    diagnosis = examined("recall")
    assert diagnosis.exit_code == 0, diagnosis.findings
    assert diagnosis.sentence == "nothing stands in the way of learning"


def test_a_model_that_would_not_fit_is_not_built() -> None:
    diagnosis = examined("ailments/out_of_memory")
    assert set(diagnosis.examinations) == {"lint", "memory"}
    assert set(diagnosis.skipped) == {"reach", "gradients", "causality", "scale", "step_size"}


def test_layers_beyond_the_model_end_the_examination_before_it_is_built() -> None:
    diagnosis = examine_recipe(load_recipe(RECIPES / "recall.yaml", ["memory.layers=[7]"]))
    assert diagnosis.exit_code == 2
    assert set(diagnosis.examinations) == {"lint"}


def test_without_a_memory_there_is_nothing_to_examine() -> None:
    with pytest.raises(RecipeError, match="has no memory"):
        examine_recipe(load_recipe(RECIPES / "recall.yaml", ["memory=null"]))


def test_terminal_html_and_json_tell_the_same(tmp_path: Path) -> None:
    diagnosis = examined("ailments/clipped")
    console = Console(record=True, width=200, file=StringIO())
    diagnosis.print(console)
    terminal = " ".join(console.export_text().split())
    figures, report = diagnosis.write(tmp_path)
    content, html = json.loads(figures.read_text()), report.read_text()
    assert content["exit_code"] == 2
    assert set(content["examinations"]) == set(diagnosis.examinations)
    assert content["examinations"]["gradients"]["own"]["clip_rate"] == 1.0
    for finding in content["findings"]:
        assert finding["says"] in terminal
        assert finding["code"] in html
    for section in (examination.section() for examination in diagnosis.examinations.values()):
        assert section.title in terminal
        assert section.title in html


def test_the_command_exits_with_the_verdict_and_writes_the_report(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", str(RECIPES / "ailments/exposed.yaml"), "--output", str(tmp_path)])
    assert result.exit_code == 1, result.output
    assert "causality.exposure" in result.output
    assert (tmp_path / "report.html").is_file()
    assert json.loads((tmp_path / "diagnosis.json").read_text())["verdict"] == "it can learn, with warnings"
