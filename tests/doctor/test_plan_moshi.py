"""The plan of a Moshi recipe's training step, run without its numbers, is held against the allocator."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moshi.models import loaders
from torch import Tensor
from transformers import LlamaConfig
from typer.testing import CliRunner

from benchmarks.measure import extra_bytes
from inlay.cli import app
from inlay.doctor import plan as plan_module
from inlay.doctor import plan_moshi as plan_moshi_module
from inlay.doctor.dry_run import PlanError, TrainingStep, dry_run
from inlay.doctor.plan import RecipePlan, plan_step
from inlay.doctor.plan_moshi import MoshiSubject, model_sizes, plan_moshi_recipe, training_step
from inlay.doctor.plan_step import materialised_bytes
from inlay.fastweight import FastWeightConfig
from inlay.moshi.model import MoshiForTraining
from inlay.moshi.toy import ToySizes, write_toy_checkpoint
from inlay.moshi.weights import MoshiCheckpoint, load_checkpoint
from inlay.train.moshi import build_moshi
from inlay.train.moshi_recipe import MoshiRecipe, load_moshi_recipe
from inlay.train.yaml_recipe import RecipeError, dump_recipe
from tests.moshi.runs import make_recipe

SIZES = ToySizes(dim=64, num_layers=3, num_heads=2, context=64, card=16, depformer_dim=16, depformer_layers=1)
LORA = {"enable": True, "rank": 4}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> MoshiCheckpoint:
    return load_checkpoint(write_toy_checkpoint(tmp_path_factory.mktemp("toy"), sizes=SIZES), dtype=torch.float32)


def recipe_of(toy: MoshiCheckpoint, **changes: Any) -> MoshiRecipe:
    memory = {"layers": [0, 2], "chunk_size": 64, "eta": 0.1}
    return make_recipe(toy, Path("codes"), **{"memory": memory, "duration_sec": 120.0, **changes})


CASES: dict[str, dict[str, Any]] = {
    "memory alone": {"mode": "memory", "gradient_checkpointing": False},
    "memory and LoRA, checkpointing": {"mode": "memory+lora", "lora": LORA, "gradient_checkpointing": True},
    "all, one row": {"mode": "all", "batch_size": 1, "gradient_checkpointing": False},
    "all, checkpointing, rows of two conversations": {
        "mode": "all",
        "data": {"train_data": "codes", "eval_data": "codes", "min_sec": 1.0, "packing": "concatenate"},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_the_predicted_peak_is_the_measured_one(case: str, toy: MoshiCheckpoint) -> None:
    recipe = recipe_of(toy, **CASES[case])
    step = replace(training_step(recipe)[0], device="cpu")
    assert recipe.memory is not None
    predicted = dry_run(MoshiSubject(recipe, toy.lm_config), recipe.memory, step).peak.total
    assert predicted == pytest.approx(measured_bytes(recipe, toy, step), rel=0.02)


def test_walking_a_few_slices_and_blocks_is_as_good_as_walking_all(
    toy: MoshiCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(toy, mode="all", batch_size=1, memory={"layers": [1], "chunk_size": 64, "eta": 0.1})
    assert recipe.memory is not None
    step = replace(training_step(recipe)[0], tokens=520)  # three slices, nine blocks
    wide = MoshiSubject(recipe, toy.lm_config | {"text_card": 8000})  # so that the peak is among the slices
    few = dry_run(wide, recipe.memory, step)
    monkeypatch.setattr(plan_moshi_module, "_SLICES", 10**6)
    monkeypatch.setattr(plan_moshi_module, "_BLOCKS", 10**6)
    assert dry_run(wide, recipe.memory, step) == few
    assert few.peak.scope.kind == "head"


def measured_bytes(recipe: MoshiRecipe, toy: MoshiCheckpoint, step: TrainingStep) -> int:
    """Peak bytes of the second of two training steps, everything that is held included."""
    lm, _ = build_moshi(recipe, toy)
    task = MoshiForTraining(lm, recipe.loss)
    trained = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    codes = torch.randint(0, 16, (step.batch_size, 17, step.tokens))
    documents = torch.arange(step.tokens).expand(step.batch_size, -1) // (step.document_tokens or step.tokens)

    def update() -> list[Tensor]:
        task(codes, documents).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return []

    update()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    held = [*lm.parameters(), *lm.buffers(), *states, codes, documents]
    before = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    return sum(before.values()) + extra_bytes(update, torch.device("cpu"))


def test_moshi_7b_is_planned_with_all_its_weights() -> None:
    options = ["mode=memory", "lora.enable=false", "memory.layers=[10, 20, 30]"]
    recipe = load_moshi_recipe("src/inlay/recipes/moshi.yaml", options)
    step, _ = training_step(recipe)
    assert (step.tokens, step.gradient_checkpointing, step.dtype) == (32_000, True, "bfloat16")
    assert recipe.memory is not None
    sizes = dict(loaders._lm_kwargs)
    trace = dry_run(MoshiSubject(recipe, sizes), recipe.memory, replace(step, tokens=2000))
    assert trace.shapes == ((4096, 11264),) * 3
    assert materialised_bytes(trace, recipe.memory, step) == 3 * 125 * 4096 * 11264 * 4
    with torch.device("meta"):
        lm = loaders.LMModel(**{key: value for key, value in sizes.items() if key != "device"}, dtype=torch.bfloat16)
    weights = sum(parameter.nbytes for parameter in lm.parameters())
    assert weights > 15e9
    memory = 3 * 4 * (4096**2 + 5 * 4096)  # projection and convolution, in float32
    assert trace.peak.held[0] == pytest.approx(weights + memory, rel=1e-5)
    assert trace.peak.total < 20e9


def test_what_does_not_fit_is_mended_in_the_recipes_own_terms() -> None:
    plan = plan_of_a_small_step(budget_gb=0.01)
    assert plan.longest is not None
    assert plan.longest.seconds == plan.longest.tokens / 12.5
    (finding,) = plan.findings()
    assert finding.code == "memory.out_of_memory"
    assert "batch_size: 1" in finding.fix
    assert f"duration_sec: {plan.longest.seconds:g}" in finding.fix
    assert "data.sequence_length" not in finding.fix


def test_no_sequence_longer_than_a_recipe_may_ask_for_is_planned() -> None:
    plan = plan_of_a_small_step(budget_gb=100.0)
    assert plan.longest is not None
    assert plan.longest.tokens == 1536
    assert [cost.tokens for cost in plan.lengths] == [512, 1024, 1536]


def plan_of_a_small_step(budget_gb: float) -> RecipePlan:
    """Of a text model, which is quick, in a Moshi recipe's terms."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    step = TrainingStep(1024, batch_size=4, dtype="float32", mode="all", device="cpu")
    return plan_step(
        config,
        FastWeightConfig(layers=[1], chunk_size=64),
        step,
        budget_gb=budget_gb,
        frame_rate=12.5,
        changes={"batch_size: 1": replace(step, batch_size=1)},
        length_key="duration_sec",
        most_tokens=1536,
    )


def test_a_recipe_without_a_memory_has_nothing_to_plan(toy: MoshiCheckpoint) -> None:
    with pytest.raises(RecipeError, match="has no memory to plan"):
        plan_moshi_recipe(recipe_of(toy, memory=None, mode="all"))


def test_the_sizes_of_a_folder_are_its_own_and_a_missing_one_is_named(toy: MoshiCheckpoint, tmp_path: Path) -> None:
    sizes, assumptions = model_sizes(toy.source)
    assert (sizes["dim"], sizes["num_layers"], assumptions) == (64, 3, [])
    with pytest.raises(PlanError, match="no such folder"):
        model_sizes(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(PlanError, match="holds list, not an object"):
        model_sizes(str(tmp_path))


def test_the_command_plans_a_moshi_recipe(
    toy: MoshiCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe_of(toy, duration_sec=20.0)))
    monkeypatch.setattr(plan_module, "_LENGTHS", (1,))
    result = CliRunner().invoke(app, ["plan", "memory", str(path), "mode=all"])
    assert result.exit_code == 0, result.output
    assert "2 × 250 tokens" in result.output
    path.write_text(json.dumps({"name": "x", "moshi_paths": {"hf_repo": "x"}}))
    with pytest.raises(RecipeError, match="hf_repo: unknown key; did you mean 'hf_repo_id'"):
        CliRunner().invoke(app, ["plan", "memory", str(path)], catch_exceptions=False)
