"""The study of seed 003: every arm runs, and each fault does what the study says it does."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from inlay.data import FactsConfig, facts_tokenizer
from inlay.fastweight import InlayError
from inlay.softtoken.compressors import CrossAttentionConfig, build_compressor
from inlay.softtoken.layout import PromptLayout
from inlay.softtoken.objectives import ObjectiveInputs
from inlay.train.compress_recipe import CompressRecipe
from inlay.train.compress_trainer import CompressTrainer
from inlay.train.yaml_recipe import check_recipe
from tests.softtoken.local import llama, words

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "studies"))
study: Any = importlib.import_module("seed003")
Faults: Any = importlib.import_module("seed003_faults").Faults

DATA = {"source": "facts", "facts": 2, "questions": 2, "tails": 10, "nouns": 24, "adjectives": 6, "eval_examples": 8}
FACTS = FactsConfig.model_validate(DATA)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> CompressRecipe:
    """A recipe with a decoder of random weights on disk."""
    place = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(facts_tokenizer(FACTS)), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=96, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place)
    facts_tokenizer(FACTS).save_pretrained(place)
    return check_recipe(
        CompressRecipe,
        {
            "name": "base",
            "decoder": {"name_or_path": str(place)},
            "compressor": {
                "kind": "encoder-pool",
                "form": "kv",
                "residual": True,
                "ratios": [4, 8, 2],
                "lora": {"r": 2},
            },
            "layout": {"answer_tokens": 16},
            "data": DATA,
            "questions_per_context": 2,
            "curriculum": [{"until": 0.5, "ratios": [2, 4]}],
            "train_ratios": [4, 4, 8],
            "muon": 0.01,
            "trainer": {
                "per_device_train_batch_size": 4,
                "disable_tqdm": True,
                "use_cpu": True,
                "save_strategy": "no",
                "logging_steps": 2,
            },
            "evaluate": {"examples": 8, "batch_size": 8},
        },
    )


def test_every_arm_runs_and_is_not_run_again(base: CompressRecipe, tmp_path: Path) -> None:
    console = Console(file=StringIO(), width=200)
    content = study.study(base, tmp_path, console, steps=2)
    every = [*study.cumulative(base), *study.objectives(base), *study.alone(base)]
    arms = [arm.name for arm in every]
    assert [one["arm"] for title in list(content)[-3:] for one in content[title]] == arms
    assert [one["arm"] for one in content["bounds"]] == ["full text", "no context", "first tokens 4×"]
    for arm in every:
        result = json.loads((tmp_path / study.slug(arm.name) / "result.json").read_text())
        assert result["questions"] == 8
        assert len(result["examples"]) == 8
        trained = (tmp_path / study.slug(arm.name) / "metrics.jsonl").is_file()
        assert trained == (arm.weights_of is None)
    assert json.loads((tmp_path / "ablation.json").read_text())["steps"] == 2

    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "ablation.json"}
    assert study.study(base, tmp_path, console, steps=2) == content
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "ablation.json"}
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(name in said for name in arms)


def test_nothing_is_compared_before_the_decoder_answers_from_full_text(base: CompressRecipe, tmp_path: Path) -> None:
    raw = base.model_dump(mode="json", exclude_defaults=True)
    stages = {"stages": [{"facts": 2, "max_steps": 1}], "batch_size": 4, "eval_examples": 4}
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "max_position_embeddings": 128}
    untaught = check_recipe(CompressRecipe, raw | {"decoder": {"config": config}, "base": stages})
    with pytest.raises(InlayError, match=r"answers 0\.0 % from full text, and arms are compared from 95 % on"):
        study.study(untaught, tmp_path, Console(file=StringIO()), steps=2)
    assert not (tmp_path / "seed-003").exists()


def test_what_a_recipe_does_not_do_has_no_arm(base: CompressRecipe) -> None:
    plain = check_recipe(
        CompressRecipe,
        base.model_dump(mode="json", exclude_defaults=True)
        | {"compressor": {"kind": "encoder-pool", "ratios": [4, 8]}, "curriculum": [], "train_ratios": None}
        | {"muon": None},
    )
    *_, before, last = study.cumulative(plain)
    assert (before.name, last.name) == ("+ the recipe's answer budget", "+ encoder-pool")
    recipe = study.recipe_of(last, plain, "x", 9, 4)
    assert recipe.compressor == plain.compressor.model_copy(update={"ratios": (4,)})


def test_each_arm_has_one_fault_less_and_the_last_is_the_recipe(base: CompressRecipe) -> None:
    recipes = [study.recipe_of(arm, base, "x", 9, 4) for arm in study.cumulative(base)]
    first, last = recipes[0], recipes[-1]
    assert (first.layout.anchor, first.layout.question, first.layout.eos, first.layout.answer_tokens) == (
        "",
        None,
        False,
        12,
    )
    assert first.compressor.model_dump(include={"kind", "positions", "calibrate"}) == {
        "kind": "crossattention", "positions": "raw", "calibrate": False,
    }  # fmt: skip
    same = ("layout", "compressor", "curriculum", "train_ratios", "muon")
    assert [getattr(last, key) for key in same] == [getattr(base, key) for key in same]
    assert (first.compressor.ratios, first.curriculum, first.train_ratios, first.muon) == ((4,), (), None, None)
    assert study.cumulative(base)[-1].faults == Faults()
    assert study.cumulative(base)[-1].faults.trainer() is CompressTrainer
    keys = [
        (recipe.model_dump_json(exclude={"name"}), arm.faults)
        for recipe, arm in zip(recipes, study.cumulative(base), strict=True)
    ]
    assert len(set(keys)) == len(keys)
    pretrained = next(study.recipe_of(arm, base, "x", 9, 4) for arm in study.objectives(base) if arm.pretrained)
    assert pretrained.pretraining is not None
    assert pretrained.pretraining.max_steps + pretrained.trainer["max_steps"] == 9


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        (Faults(shifted_twice=True, answer_bos=True), "10 12 14 16"),
        (Faults(shifted_twice=True), "11 13 15"),
        (Faults(), "10 11 12 13 14 15 16"),
    ],
    ids=["the seed's", "without its BOS", "none"],
)
def test_a_model_that_fits_labels_shifted_twice_skips_every_second_token(faults: Any, expected: str) -> None:
    """Nothing stands between slots and answer, as in the seed; all weights are trained, to near-zero loss."""
    answer, model = "10 11 12 13 14 15 16", llama(len(words()), spread=0.02)
    torch.manual_seed(0)
    compressor = build_compressor(CrossAttentionConfig(ratios=(2,)), model)
    model.requires_grad_(True)
    layout = PromptLayout(bos=False, question=None, anchor="", eos=faults == Faults(), answer_tokens=7).bind(words())
    contexts = torch.tensor([layout.context_ids("Ada lives in Paris 3 4")])
    inputs = ObjectiveInputs(
        model=model, compressor=compressor, layout=layout, cues=None, contexts=contexts,
        mask=torch.ones_like(contexts, dtype=torch.bool), index=torch.tensor([0]), questions=["?"], answers=[answer],
        ratio=2,
    )  # fmt: skip
    optimizer = torch.optim.Adam([*model.parameters(), *compressor.parameters()], lr=3e-3)
    for _ in range(100):
        loss = faults.answer(replace(inputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    with torch.no_grad():
        memory = faults.write(compressor, layout, contexts.tolist(), ["?"], 2, "left")
    given = layout.answer(model, memory, ["?"])[0]
    assert given.split()[: len(expected.split())] == expected.split()


def test_slots_are_written_with_the_faults_and_without_them(base: CompressRecipe) -> None:
    model = LlamaForCausalLM.from_pretrained(base.decoder.name_or_path)
    layout = base.layout.bind(facts_tokenizer(FACTS))
    torch.manual_seed(0)
    compressor = build_compressor(CrossAttentionConfig(ratios=(4,)), model).eval()
    rows, asked = [[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15]], ["the", "the"]
    with torch.no_grad():
        plain = compressor.compress(torch.tensor([rows[1]]), ratio=4)
        right, left = (Faults().write(compressor, layout, rows, asked, 4, side) for side in ("right", "left"))
        bad_right, bad_left = (
            Faults(padding_attended=True).write(compressor, layout, rows, asked, 4, side) for side in ("right", "left")
        )
        with_question = Faults(question_compressed=True).write(compressor, layout, rows, asked, 4, "right")
    for memory in (right, left):
        assert memory.lengths.tolist() == [2, 1]
        torch.testing.assert_close(memory.embeddings[1, :1], plain.embeddings[0], rtol=1e-4, atol=1e-6)
    assert bad_right.lengths.tolist() == bad_left.lengths.tolist() == [2, 2]
    assert not torch.allclose(bad_right.embeddings[1], bad_left.embeddings[1], rtol=1e-2)
    assert with_question.lengths.tolist() == [3, 1]  # the question's token is the context's ninth
