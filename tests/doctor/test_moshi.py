"""The doctor on Moshi recipes: its view of the model is the model's own, and each fault of a recipe is named."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from inlay import FastWeightConfig, attach
from inlay.cli import app
from inlay.doctor import examine, moshi_recipes, plan
from inlay.doctor.causality import probe_causality
from inlay.doctor.dry_run import PlanError
from inlay.doctor.findings import Severity
from inlay.doctor.moshi_lint import MoshiCase, lint_moshi
from inlay.doctor.moshi_model import MoshiCausalLM
from inlay.doctor.moshi_recipes import examine_moshi_recipe
from inlay.doctor.plan_report import RecipePlan
from inlay.doctor.recipes import MEASURED
from inlay.evaluate.scoring import logits_of, token_bits
from inlay.moshi.model import MoshiForTraining
from inlay.moshi.toy import write_toy_checkpoint
from inlay.moshi.weights import MoshiCheckpoint, load_checkpoint
from inlay.train.yaml_recipe import RecipeError, dump_recipe
from tests.moshi.runs import SIZES, make_recipe, make_store, make_toy


@pytest.fixture(autouse=True)
def one_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of the recipe's own length alone: each dry run takes seconds."""
    monkeypatch.setattr(plan, "_LENGTHS", (1,))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> MoshiCheckpoint:
    return make_toy(tmp_path_factory.mktemp("doctor") / "toy")


@pytest.fixture(scope="module")
def codes(toy: MoshiCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("doctor") / "codes", toy)


@pytest.fixture(scope="module")
def held(toy: MoshiCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("doctor") / "held", toy, files=2, seed=1)


@pytest.fixture
def model(toy: MoshiCheckpoint) -> Iterator[MoshiCausalLM]:
    task = MoshiForTraining(toy.load_lm())
    attach(task.lm, FastWeightConfig(layers=[0, 2], chunk_size=8, eta=0.1, init="next_token")).train_only("memory")
    yield MoshiCausalLM(task)
    task.restore()


def sound(toy: MoshiCheckpoint, codes: Path, held: Path, **changes: Any) -> Any:
    """A recipe with nothing to find."""
    data = {"train_data": str(codes), "eval_data": str(held), "min_sec": 1.0} | changes.pop("data", {})
    return make_recipe(toy, codes, **{"data": data, "mode": "memory", **changes})


def batch_of(model: MoshiCausalLM) -> dict[str, torch.Tensor]:
    """Two rows: two documents, and one document with padding behind it."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (2, 17, 40), generator=generator)
    documents = torch.zeros(2, 40, dtype=torch.long)
    documents[0, 24:] = 1
    codes[1, :, 30:], documents[1, 30:] = -1, -1
    return model.batch(codes, documents)


def test_the_labels_under_the_logits_are_the_text_loss_of_training(model: MoshiCausalLM) -> None:
    batch = batch_of(model)
    model.eval()
    with torch.no_grad():
        loss = model.task(batch["codes"], batch["document_ids"])
        bits, labelled = token_bits(logits_of(model, batch), batch["labels"])
    assert (torch.from_numpy(labelled) == loss.mask[:, 0, :-1]).all()
    nats = torch.from_numpy(bits) * math.log(2)
    torch.testing.assert_close(nats, loss.nats[:, 0, :-1].double(), rtol=1e-5, atol=1e-5)
    assert model(**batch).loss == loss.loss


def test_a_sound_model_does_not_read_ahead_and_one_that_does_is_named(model: MoshiCausalLM) -> None:
    batch = batch_of(model)
    assert probe_causality(model, batch).findings() == []

    def peek(transformer: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out + 0.1 * out.roll(-1, 1)

    hook = model.task.lm.transformer.register_forward_hook(peek)
    codes = [finding.code for finding in probe_causality(model, batch).findings()]
    hook.remove()
    assert set(codes) == {"causality.leak"}
    with model.task.memory.using(exposure=1.0):  # type: ignore[union-attr]
        codes = [finding.code for finding in probe_causality(model, batch).findings()]
    assert codes == ["causality.exposure"]


def test_the_examined_model_is_left_as_it_was(model: MoshiCausalLM) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    examine(model, batch_of(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_sound_recipe_is_healthy_and_its_model_has_its_attention_back(
    toy: MoshiCheckpoint, codes: Path, held: Path
) -> None:
    diagnosis = examine_moshi_recipe(sound(toy, codes, held))
    assert {*MEASURED, "lint", "memory"} <= diagnosis.examinations.keys()
    assert [f.code for f in diagnosis.findings if f.severity] == []
    assert diagnosis.examinations["reach"].frame_rate == 12.5  # type: ignore[attr-defined]


FAULTS: dict[str, dict[str, Any]] = {
    "lint.never_read": {"memory": {"layers": [0], "chunk_size": 120, "eta": 0.1}},
    "lint.eta": {"memory": {"layers": [0], "chunk_size": 16, "eta": 0.0}},
    "lint.layers": {"memory": {"layers": [10, 20, 30], "chunk_size": 16, "eta": 0.1}},
    "lint.clip": {"memory": {"layers": [0], "chunk_size": 16, "eta": 0.1, "max_update_norm": 1e-5}},
    "lint.exposure": {"memory": {"layers": [0], "chunk_size": 16, "eta": 0.1, "exposure": 1.0}},
    "lint.within_window": {"yarn": {"factor": 10.0}},
    "lint.learning_rate": {"optim": {"lr": 3.0}},
}


@pytest.mark.parametrize("code", FAULTS)
def test_a_fault_of_the_recipe_is_named(code: str, toy: MoshiCheckpoint, codes: Path, held: Path) -> None:
    found = lint_of(sound(toy, codes, held, **FAULTS[code]), toy)
    assert code in found
    assert code not in lint_of(sound(toy, codes, held), toy)


def lint_of(recipe: Any, toy: MoshiCheckpoint) -> dict[str, str]:
    findings = lint_moshi(MoshiCase(recipe, toy, recipe.load_data())).findings()
    return {finding.code: f"{finding.says}; {finding.fix}" for finding in findings}


def test_faults_of_the_data_are_named(toy: MoshiCheckpoint, codes: Path, held: Path, tmp_path: Path) -> None:
    silent = make_store(tmp_path / "silent", toy, words=False)
    close = make_store(tmp_path / "close", toy, period=11)
    assert lint_of(sound(toy, codes, held), toy) == {}
    assert (
        "100.0 % of the training conversations have no word" in lint_of(sound(toy, silent, held), toy)["lint.no_words"]
    )
    assert "the farthest after 11" in lint_of(sound(toy, close, held), toy)["lint.nothing_returns"]
    assert "4 of the 4" in lint_of(sound(toy, codes, codes), toy)["lint.overlap"]
    small = {"layers": [0], "chunk_size": 30, "eta": 0.1}
    tails = sound(toy, codes, held, duration_sec=7.2, data={"min_sec": 0.1}, memory=small)
    assert "data.min_sec: 2.48" in lint_of(tails, toy)["lint.short_documents"]


def test_codes_of_another_mimi_end_the_examination(
    toy: MoshiCheckpoint, codes: Path, held: Path, tmp_path: Path
) -> None:
    other = load_checkpoint(write_toy_checkpoint(tmp_path / "other", sizes=SIZES, seed=1), dtype=torch.float32)
    assert other.mimi_hash != toy.mimi_hash
    foreign = make_store(tmp_path / "foreign", other)
    foreign_held = make_store(tmp_path / "foreign-held", other, files=2, seed=1)
    diagnosis = examine_moshi_recipe(sound(toy, foreign, foreign_held))
    assert diagnosis.exit_code == 2
    assert "encoded with another Mimi" in diagnosis.sentence
    assert set(MEASURED) <= diagnosis.skipped.keys()


def test_layers_that_the_model_has_not_end_the_examination(toy: MoshiCheckpoint, codes: Path, held: Path) -> None:
    memory = {"layers": [10, 20, 30], "chunk_size": 16, "eta": 0.1}
    diagnosis = examine_moshi_recipe(sound(toy, codes, held, memory=memory))
    assert diagnosis.severity is Severity.FATAL
    assert [finding.code for finding in diagnosis.findings] == ["lint.layers"]


def test_a_step_that_does_not_fit_ends_the_examination(
    toy: MoshiCheckpoint, codes: Path, held: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = moshi_recipes.plan_moshi_recipe

    def beyond(recipe: Any, **settings: Any) -> RecipePlan:
        """The recipe's plan, and a budget of which nothing was asked while planning: what would fit takes a minute."""
        assert settings.pop("budget_gb") == 0.001
        return replace(planned(recipe, **settings), budget_bytes=1_000_000)

    monkeypatch.setattr(moshi_recipes, "plan_moshi_recipe", beyond)
    recipe = sound(toy, codes, held, batch_size=1, gradient_checkpointing=True)
    diagnosis = examine_moshi_recipe(recipe, budget_gb=0.001)
    assert diagnosis.exit_code == 2
    assert next(iter(diagnosis.findings)).code == "memory.out_of_memory"
    assert set(MEASURED) <= diagnosis.skipped.keys()


def test_a_recipe_without_a_memory_has_nothing_to_examine(toy: MoshiCheckpoint, codes: Path, held: Path) -> None:
    with pytest.raises(RecipeError, match="has no memory"):
        examine_moshi_recipe(sound(toy, codes, held, memory=None, mode="all"))


def test_the_command_examines_a_moshi_recipe(
    toy: MoshiCheckpoint, codes: Path, held: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PlanError("it does not run without numbers")

    monkeypatch.setattr(moshi_recipes, "plan_moshi_recipe", refuse)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(sound(toy, codes, held)))
    clipped = "memory.max_update_norm=1e-5"
    result = CliRunner().invoke(app, ["doctor", str(path), clipped, "--output", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    content = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert content["exit_code"] == 2
    assert content["skipped"] == {"memory": "it does not run without numbers"}
    assert any(finding["code"].endswith(".clip") for finding in content["findings"])
    assert (tmp_path / "out" / "report.html").is_file()
