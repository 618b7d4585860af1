"""A recipe is checked when it is read; what is wrong is named with its place and its nearest neighbour."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from inlay.train import Recipe, RecipeError, check_recipe, dump_recipe, load_recipe
from inlay.train.directory import training_arguments

VALID = {
    "name": "x",
    "model": {"config": {"model_type": "llama", "hidden_size": 16}},
    "memory": {"layers": [1], "chunk_size": 8},
    "data": {"task": "text", "source": "python-stdlib", "sequence_length": 64, "tokenizer": {"kind": "bytes"}},
    "mode": "all",
    "trainer": {"max_steps": 2},
}


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("", "modle", "modle: unknown key; did you mean 'mode'?"),
        ("memory", "chunksize", "memory.chunksize: unknown key; did you mean 'chunk_size'?"),
        ("data", "sequence_lenght", "data.sequence_lenght: unknown key; did you mean 'sequence_length'?"),
        ("model", "name_or_pth", "model.name_or_pth: unknown key; did you mean 'name_or_path'?"),
        ("trainer", "max_step", "trainer: unknown key 'max_step'; did you mean 'max_steps'?"),
        ("trainer", "output_dir", "'output_dir' is set by the run"),
        ("evaluate", "blok", "evaluate.blok: unknown key; did you mean 'block'?"),
    ],
)
def test_an_unknown_key_names_its_nearest_neighbour(section: str, key: str, message: str) -> None:
    raw = copy.deepcopy(VALID)
    (raw.setdefault(section, {}) if section else raw)[key] = 1
    with pytest.raises(RecipeError) as error:
        check_recipe(Recipe, raw)
    assert message in str(error.value)


def test_an_unknown_key_of_one_of_several_forms_does_too() -> None:
    for init in {"norml": 0.1}, {"normal": 0.1, "norml": 0.1}:
        with pytest.raises(RecipeError) as error:
            check_recipe(Recipe, VALID | {"memory": {"init": init}})
        assert "memory.init.norml: unknown key; did you mean 'normal'?" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {}}, "give either name_or_path"),
        ({"model": {"config": {"hidden_size": 16}}}, "config needs a model_type"),
        ({"mode": "memory"}, "the model has random weights"),
        ({"memory": None, "mode": "memory", "model": {"name_or_path": "x"}}, "there is no memory"),
        ({"mode": "memory+lora", "model": {"name_or_path": "x"}}, "go together"),
        ({"memory": {"layers": "evry:6"}}, 'layers must be "every:k"'),
        ({"memory": {"conv_kernel": 4}}, "conv_kernel must be odd"),
        ({"memory": {"eta": "small"}}, "memory.eta"),
        ({"data": None}, "data"),
        ({"model": {"config": VALID["model"]["config"] | {"intermediat_size": 8}}}, "did you mean 'intermediate_size'"),
        ({"model": {"config": {"model_type": "lama"}}}, "transformers knows no 'lama'; did you mean 'llama'?"),
        ({"trainer": {"max_steps": "abc"}}, "trainer: max_steps takes a number; got 'abc'"),
        ({"trainer": {"per_device_train_batch_size": 0}}, "per_device_train_batch_size is at least 1; got 0"),
        ({"memory": None, "memory_learning_rate": 0.1}, "memory_learning_rate is set but there is no memory"),
        ({"name": ".."}, "name: "),
    ],
)
def test_a_wrong_value_is_named(change: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=r"no valid recipe") as error:
        check_recipe(Recipe, VALID | change)
    assert message in str(error.value)


def test_a_recipe_without_a_name_is_called_like_its_file(tmp_path: Path) -> None:
    path = tmp_path / "my recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in VALID.items() if k != "name"}))
    assert load_recipe(path).name == "my-recipe"


def test_every_value_can_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in VALID.items() if k != "name"}))
    recipe = load_recipe(path, ["trainer.max_steps=7", "memory.eta=1e-2", "seed=3", "data.tokenizer={kind: bytes}"])
    assert recipe.name == "mine"
    assert recipe.trainer["max_steps"] == 7
    assert recipe.memory is not None
    assert recipe.memory.eta == 0.01
    assert recipe.seed == 3
    assert load_recipe(path, ["memory=null"]).memory is None
    assert load_recipe(path, ["trainer.learning_rate=3e-4"]).trainer["learning_rate"] == 3e-4


@pytest.mark.parametrize("override", ["trainer.max_steps", "=3", "mode.x=3", "memory.eta=[1"])
def test_what_is_no_override_is_refused(tmp_path: Path, override: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(VALID))
    with pytest.raises(RecipeError):
        load_recipe(path, [override])


def test_a_file_that_is_no_recipe_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*none\.yaml"):
        load_recipe(tmp_path / "none.yaml")
    path = tmp_path / "bad.yaml"
    path.write_text("name: x\nmodel: [1\n")
    with pytest.raises(RecipeError, match=r"bad\.yaml:3: no valid YAML"):
        load_recipe(path)
    path.write_text("name: x\ntrainer: {max_steps: 1}\nname: y\n")
    with pytest.raises(RecipeError, match=r"bad\.yaml:3: no valid YAML: 'name' comes twice"):
        load_recipe(path)
    path.write_text("- a\n- b\n")
    with pytest.raises(RecipeError, match="a recipe is a mapping of sections; this file holds a list"):
        load_recipe(path)


def test_a_recipe_survives_the_round_trip(tmp_path: Path) -> None:
    recipe = check_recipe(Recipe, VALID)
    path = tmp_path / "r.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe


COME_ALONG = [path for path in sorted(Path("src/inlay/recipes").glob("*.yaml")) if "\nmodel:" in path.read_text()]


@pytest.mark.parametrize("path", COME_ALONG, ids=lambda p: p.stem)
def test_the_recipes_that_come_along_are_valid(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_a_strategy_may_be_no_without_quotes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    rest = {key: value for key, value in VALID.items() if key != "trainer"}
    path.write_text(yaml.safe_dump(rest) + "trainer: {save_strategy: no, bf16: no}\n")
    assert load_recipe(path).trainer == {"save_strategy": "no", "bf16": False}


def test_what_the_trainer_does_not_take_is_told_in_the_recipes_terms(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"trainer: .*often"):
        training_arguments(tmp_path, 0, {"save_strategy": "often"})


def test_a_name_like_a_number_stays_a_name(tmp_path: Path) -> None:
    path = tmp_path / "1e-3.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in VALID.items() if key != "name"}))
    recipe = load_recipe(path)
    assert recipe.name == "1e-3"
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_counts_are_whole_numbers() -> None:
    recipe = check_recipe(Recipe, VALID | {"trainer": {"max_steps": 1e1, "per_device_train_batch_size": 2.0}})
    assert [type(value) for value in recipe.trainer.values()] == [int, int]
    with pytest.raises(RecipeError, match=r"gradient_accumulation_steps takes a whole number; got 1\.5"):
        check_recipe(Recipe, VALID | {"trainer": {"gradient_accumulation_steps": 1.5}})


def test_a_process_trains_on_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more the Trainer would take ``nn.DataParallel``, which shares a memory's context between threads."""

    class OnTwo(TrainingArguments):
        def __post_init__(self) -> None:
            super().__post_init__()
            self._n_gpu = 2

    monkeypatch.setattr("inlay.train.directory.TrainingArguments", OnTwo)
    assert training_arguments(tmp_path, 0, {}).n_gpu == 1


def test_no_steps_are_refused() -> None:
    with pytest.raises(RecipeError, match="max_steps is 0; say how many, or leave it out to go by num_train_epochs"):
        check_recipe(Recipe, VALID | {"trainer": {"max_steps": 0}})
