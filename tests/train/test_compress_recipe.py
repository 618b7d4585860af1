"""A compression recipe is checked when it is read; what is wrong is named with its place and the fix."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from inlay.data import FactsConfig
from inlay.train.compress_recipe import CompressRecipe, load_compress_recipe
from inlay.train.compress_trainer import stages
from inlay.train.yaml_recipe import RecipeError, check_recipe, dump_recipe

VALID: dict[str, Any] = {
    "name": "x",
    "decoder": {"config": {"model_type": "llama", "hidden_size": 16}},
    "base": {"stages": [{"facts": 2, "max_steps": 5}, {"facts": 8, "max_steps": 9}]},
    "compressor": {"kind": "encoder-pool", "ratios": [4, 8]},
    "layout": {"anchor": "Answer: "},
    "data": {"source": "facts", "facts": 8},
    "objectives": {"answer": 1.0},
    "trainer": {"max_steps": 2},
}
PRETRAINED = {"decoder": {"name_or_path": "some/model"}, "base": None}


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("", "objectve", "objectve: unknown key; did you mean 'objectives'?"),
        ("decoder", "confg", "decoder.confg: unknown key; did you mean 'config'?"),
        ("base", "exact_mach", "base.exact_mach: unknown key; did you mean 'exact_match'?"),
        ("compressor", "ratio", "compressor.ratio: unknown key; did you mean 'ratios'?"),
        ("data", "fact", "data.facts.fact: unknown key; did you mean 'facts'?"),
        ("layout", "ancor", "layout.ancor: unknown key; did you mean 'anchor'?"),
        ("objectives", "anser", "objectives.anser: unknown key; did you mean 'answer'?"),
        ("trainer", "max_step", "trainer: unknown key 'max_step'; did you mean 'max_steps'?"),
        ("trainer", "seed", "'seed' is set by the run"),
        ("evaluate", "exampels", "evaluate.exampels: unknown key; did you mean 'examples'?"),
    ],
)
def test_an_unknown_key_names_its_nearest_neighbour(section: str, key: str, message: str) -> None:
    raw = copy.deepcopy(VALID)
    (raw.setdefault(section, {}) if section else raw)[key] = 1
    with pytest.raises(RecipeError) as error:
        check_recipe(CompressRecipe, raw)
    assert message in str(error.value)


def test_an_unknown_key_in_a_list_is_named_with_its_neighbour() -> None:
    with pytest.raises(RecipeError, match=r"base\.stages\.0\.max_step: unknown key; did you mean 'max_steps'\?"):
        check_recipe(CompressRecipe, VALID | {"base": {"stages": [{"max_steps": 1, "max_step": 2}]}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": None}, "add base, how it is trained first"),
        ({"decoder": {"name_or_path": "x"}}, "give decoder.config, or take base out"),
        ({"data": {"source": "squad", "path": "x.json"}}, "base trains on generated facts; data.source is 'squad'"),
        ({"data": {"source": "facts", "facts": 6}}, "base.stages end at 8 facts and data.facts is 6"),
        ({"objectives": {"answer": 0.0}}, "every objective has weight 0"),
        ({"objectives": {"scheduled_sampling": 1.5}}, "objectives.scheduled_sampling"),
        ({"pretraining": {"max_steps": 1, "reconstruction": 0, "continuation": 0}}, "pretraining: null"),
        ({"pretraining": {"max_steps": 1, "trainer": {"max_steps": 2}}}, "max_steps is the section's own"),
        ({"pretraining": {"max_steps": 1, "trainer": {"learning_rat": 2}}}, "did you mean 'learning_rate'"),
        ({"trainer": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor has no effect"),
        ({"trainer": {"accelerator_config": {"dispatch_batches": True}}}, "batches cannot be cut"),
        (
            {"pretraining": {"max_steps": 1, "trainer": {"label_smoothing_factor": 0.1}}},
            "pretraining.trainer: label_smoothing_factor has no effect",
        ),
        ({"compressor": {"kind": "pool"}}, "kind pool learns nothing"),
        (
            {"compressor": {"form": "kv"}, "trainer": {"gradient_checkpointing": True}},
            "form kv is lost under gradient_checkpointing",
        ),
        (
            {
                "compressor": {"form": "kv"},
                "pretraining": {"max_steps": 1, "trainer": {"gradient_checkpointing": True}},
                "trainer": {"gradient_checkpointing": False},
            },
            "take it out of pretraining.trainer",
        ),
        (
            {
                "compressor": {"form": "kv"},
                "pretraining": {"max_steps": 1, "trainer": {"gradient_checkpointing": False}},
                "trainer": {"gradient_checkpointing": True},
            },
            "take it out of trainer",
        ),
        ({"evaluate": {"ratios": [4, 16]}}, "evaluate.ratios: [16] not among compressor.ratios [4, 8]"),
        ({"layout": {"question": "no place"}}, "layout.question"),
        ({"train_ratios": [4, 2]}, "train_ratios: [2] not among compressor.ratios [4, 8]"),
        ({"curriculum": [{"until": 0.5, "ratios": [1]}]}, "curriculum.0.ratios: [1] not among compressor.ratios"),
        (
            {"curriculum": [{"until": 0.5, "ratios": [4]}, {"until": 0.5, "ratios": [8]}]},
            "stages end at [0.5, 0.5]; each ends later than the one before",
        ),
        ({"compressor": {"slots": 4}, "train_ratios": [4]}, "compressor.slots fixes the slots"),
        ({"muon": 0.01, "trainer": {"optim": "sgd"}}, "take optim out of trainer"),
        (
            {"muon": 0.01, "pretraining": {"max_steps": 1, "trainer": {"optim": "sgd"}}},
            "take optim out of pretraining.trainer",
        ),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=r"no valid recipe") as error:
        check_recipe(CompressRecipe, VALID | change)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {},
        PRETRAINED,
        {"compressor": {"kind": "encoder-tokens", "slots": 8, "lora": {"target_modules": ["q_proj"]}}},
        {"compressor": {"kind": "crossattention"}},
        {"compressor": {"kind": "pool"}, "decoder_lora": {"r": 4}},
        {"pretraining": {"max_steps": 7, "trainer": {"learning_rate": 0.1}}, "evaluate": {"ratios": [8]}},
    ],
)
def test_a_recipe_survives_the_round_trip(tmp_path: Path, change: dict[str, Any]) -> None:
    recipe = check_recipe(CompressRecipe, VALID | change)
    path = tmp_path / "r.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_compress_recipe(path) == recipe


def test_every_value_can_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in VALID.items() if key != "name"}))
    changes = ["objectives.distillation=5e-1", "compressor.ratios=[16]", "pretraining={max_steps: 3}"]
    recipe = load_compress_recipe(path, changes)
    assert recipe.name == "mine"
    assert recipe.objectives.weights == {"answer": 1.0, "distillation": 0.5}
    assert recipe.draws == (16,)
    assert load_compress_recipe(path, ["compressor={slots: 4}"]).draws == (None,)


def test_the_curriculum_says_what_the_first_steps_draw_from_and_train_ratios_the_rest() -> None:
    curriculum = [{"until": 0.1, "ratios": [4]}, {"until": 0.25, "ratios": [4, 8]}]
    recipe = check_recipe(CompressRecipe, VALID | {"curriculum": curriculum, "train_ratios": [8, 8, 4]})
    drawn = [recipe.draws_at(share) for share in (0.0, 0.09, 0.1, 0.24, 0.25, 1.0)]
    assert drawn == [(4,), (4,), (4, 8), (4, 8), (8, 8, 4), (8, 8, 4)]
    assert check_recipe(CompressRecipe, VALID).draws_at(0.0) == (4, 8)


def test_a_compressor_of_no_kind_is_the_default_one() -> None:
    assert check_recipe(CompressRecipe, VALID | {"compressor": {"ratios": [2]}}).compressor.kind == "encoder-pool"


def test_a_stage_of_the_curriculum_is_the_runs_data_with_fewer_facts() -> None:
    recipe = check_recipe(CompressRecipe, VALID)
    assert recipe.base is not None
    assert isinstance(recipe.data, FactsConfig)
    assert [stage.data(recipe.data).facts for stage in recipe.base.stages] == [2, 8]


def test_pretraining_draws_its_objectives_in_their_shares_and_training_takes_all() -> None:
    objectives = {"answer": 1.0, "distillation": 0.5}
    recipe = check_recipe(CompressRecipe, VALID | {"pretraining": {"max_steps": 1}, "objectives": objectives})
    before, training = stages(recipe)
    rng = random.Random(0)
    drawn = [before.step(rng) for _ in range(1000)]
    assert all(list(weights.values()) == [1.0] for weights in drawn)
    share = sum("reconstruction" in weights for weights in drawn) / 1000
    assert share == pytest.approx(0.2, abs=0.04)  # three standard deviations
    assert training.step(rng) == objectives
    assert [stage.name for stage in stages(check_recipe(CompressRecipe, VALID))] == ["training"]


def test_the_recipe_of_a_plain_run_needs_little() -> None:
    recipe = CompressRecipe.model_validate(
        {"name": "x", "decoder": {"name_or_path": "m"}, "data": {"source": "squad", "path": "train.json"}}
    )
    assert recipe.objectives.weights == {"answer": 1.0}
    assert recipe.draws == (4, 8)


COME_ALONG = [path for path in sorted(Path("src/inlay/recipes").glob("*.yaml")) if "\ndecoder:" in path.read_text()]


@pytest.mark.parametrize("path", COME_ALONG, ids=lambda p: p.stem)
def test_the_recipes_that_come_along_are_valid(path: Path) -> None:
    assert load_compress_recipe(path).name == path.stem
