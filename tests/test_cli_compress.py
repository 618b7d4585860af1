"""``inlay compress``: a run trained, evaluated and put to use from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer import Typer
from typer.testing import CliRunner

from inlay import cli
from inlay.cli_compress import app
from inlay.data import FactsConfig, facts_tokenizer, load_qa
from inlay.demo import recipe_path
from inlay.softtoken.store import SoftTokenStore, StoreError
from inlay.train.compress import load_compress_run
from inlay.train.directory import RunError
from inlay.train.trainer import read_metrics
from inlay.train.yaml_recipe import RecipeError
from tests.softtoken.local import byte_level

DATA = {"source": "facts", "facts": 2, "questions": 2, "tails": 10, "nouns": 24, "adjectives": 6, "eval_examples": 8}
FACTS = FactsConfig.model_validate(DATA)


def inlay(*words: object, app: Typer = app) -> str:
    """What ``inlay compress WORDS`` prints (with ``app=cli.app`` ``inlay WORDS``); its errors are raised."""
    result = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def save_decoder(folder: Path, tokenizer: PreTrainedTokenizerFast, positions: int) -> None:
    """A decoder of random weights, as the hub has them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=positions, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run ``tiny``, trained for two steps on a decoder of random weights."""
    folder = tmp_path_factory.mktemp("runs")
    save_decoder(folder / "decoder", facts_tokenizer(FACTS), positions=96)
    recipe = {
        "name": "untitled",
        "decoder": {"name_or_path": str(folder / "decoder")},
        "compressor": {"kind": "encoder-pool", "ratios": [2, 4], "lora": {"r": 2}},
        "layout": {"answer_tokens": 4},
        "data": DATA,
        "trainer": {"per_device_train_batch_size": 4, "disable_tqdm": True, "use_cpu": True},
        "evaluate": {"examples": 6, "batch_size": 6, "ratios": [4]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    said = inlay("train", folder / "recipe.yaml", "name=tiny", "trainer.max_steps=2", "--runs", folder, app=cli.app)
    assert "report.html" in said.replace("\n", "")
    return folder


@pytest.fixture(scope="module")
def documents(runs: Path) -> Path:
    """Three documents: two files, and a line."""
    contexts = list(dict.fromkeys(example.context for example in load_qa(FACTS).eval))
    (runs / "docs" / "deep").mkdir(parents=True)
    (runs / "docs" / "a.txt").write_text(contexts[0])
    (runs / "docs" / "deep" / "b.txt").write_text(contexts[1])
    (runs / "docs" / "c.jsonl").write_text(json.dumps({"id": "line", "text": contexts[2]}))
    return runs / "docs"


def test_a_run_is_gone_on_with_or_refused_as_any_other(runs: Path) -> None:
    words = ("train", runs / "recipe.yaml", "name=again", "trainer.save_steps=2", "trainer.logging_steps=1")
    inlay(*words, "trainer.max_steps=2", "--runs", runs)
    with pytest.raises(RunError, match="Go on with --resume"):
        inlay(*words, "trainer.max_steps=2", "--runs", runs)
    with pytest.raises(RunError, match="another recipe"):
        inlay(*words, "seed=1", "--runs", runs, "--resume")
    said = inlay(*words, "trainer.max_steps=3", "--runs", runs, "--resume")
    assert "resuming from" in said
    assert "checkpoint-2" in said.replace("\n", "")
    lines = [line["step"] for line in read_metrics(runs / "again" / "metrics.jsonl") if "loss" in line]
    assert lines == [1, 2, 3]
    assert load_compress_run(runs / "again").recipe.trainer["max_steps"] == 3


def test_questions_about_one_context_are_evaluated_without_a_judgement_on_collapse(runs: Path) -> None:
    change = ("data.eval_examples=2", "evaluate.examples=2", "trainer.max_steps=1")
    inlay("train", runs / "recipe.yaml", "name=one", *change, "--runs", runs)
    said = " ".join(inlay("evaluate", runs / "one").split())
    assert "Not measured: all questions are about one context" in said
    content = json.loads((runs / "one" / "evaluation.json").read_text())
    assert content["collapse"] == []
    assert content["questions"] == 2


def test_a_run_is_evaluated_beside_its_baselines_and_reported(runs: Path) -> None:
    said = inlay("evaluate", runs / "tiny", app=cli.app)
    for expected in ("full text", "soft tokens", "Collapse at 4×"):
        assert expected in said
    figures = json.loads((runs / "tiny" / "evaluation.json").read_text())
    assert {one["budget"] for one in figures["methods"] if one["method"] == "soft tokens"} == {"4×"}
    assert [one["budget"] for one in figures["collapse"]] == ["4×"]
    report = (runs / "tiny" / "report.html").read_text()
    assert "soft tokens" in report
    assert "Collapse at 4×" in report


def test_documents_are_encoded_gone_on_with_and_answered_from(runs: Path, documents: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    assert inlay("encode", documents, out, "--run", runs / "tiny", "--ratio", 4).startswith("3 documents encoded in")
    store = SoftTokenStore.open(out)
    assert sorted(store.documents) == ["a.txt", "deep/b.txt", "line"]
    assert {document.ratio for document in store.documents.values()} == {4}
    with pytest.raises(StoreError, match="Go on with --resume"):
        inlay("encode", documents, out, "--run", runs / "tiny", "--ratio", 4)
    assert "0 documents encoded" in inlay("encode", documents, out, "--run", runs / "tiny", "--ratio", 4, "--resume")
    assert "3 of them replaced" in inlay("encode", documents, out, "--run", runs / "tiny", "--slots", 3, "--replace")

    run, store = load_compress_run(runs / "tiny"), SoftTokenStore.open(out)
    asked = [example.question for example in load_qa(FACTS).eval[:3]]
    options = [word for question in asked for word in ("--question", question)]
    said = inlay("answer", out, "--doc", "deep/b.txt", *options)
    expected = run.layout.answer(run.model, store.load(["deep/b.txt"] * 3), asked)
    assert said == "".join(f"{text}\n" for text in expected)
    with pytest.raises(StoreError, match=r"no document 'b.txt'; did you mean 'a.txt' or 'deep/b.txt'\?"):
        inlay("answer", out, "--doc", "b.txt", *options)
    with pytest.raises(StoreError, match="holds 3 documents; say which"):
        inlay("answer", out, *options)


def test_the_one_document_of_a_store_need_not_be_named(runs: Path, documents: Path, tmp_path: Path) -> None:
    inlay("encode", documents / "a.txt", tmp_path / "one", "--run", runs / "tiny")
    example = load_qa(FACTS).eval[0]
    named = inlay("answer", tmp_path / "one", "--doc", "a.txt", "--question", example.question)
    assert inlay("answer", tmp_path / "one", "--question", example.question) == named


def test_a_store_knows_its_run_until_that_moves(runs: Path, documents: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "tiny", tmp_path / "here")
    inlay("encode", documents / "a.txt", tmp_path / "one", "--run", tmp_path / "here")
    asked = ("answer", tmp_path / "one", "--question", load_qa(FACTS).eval[0].question)
    before = inlay(*asked)
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(StoreError, match=r"lay in .*here and is not there; say with --run where it is"):
        inlay(*asked)
    assert inlay(*asked, "--run", tmp_path / "there") == before
    with pytest.raises(RunError, match=r"is no run"):
        inlay(*asked, "--run", tmp_path)

    inlay("encode", documents / "deep", tmp_path / "one", "--run", tmp_path / "there", "--resume")
    assert SoftTokenStore.open(tmp_path / "one").run() == tmp_path / "there"
    assert inlay(*asked, "--doc", "a.txt") == before


def test_words_of_a_question_that_the_tokenizer_does_not_know_are_told(
    runs: Path, documents: Path, tmp_path: Path
) -> None:
    inlay("encode", documents / "a.txt", tmp_path / "one", "--run", runs / "tiny")
    result = CliRunner().invoke(app, ["answer", str(tmp_path / "one"), "--question", "xyzzy [quux]"])
    assert result.exit_code == 0
    assert "of the tokens of 'xyzzy [quux]' are unknown to the decoder's tokenizer" in result.stderr


def test_a_recipe_of_another_kind_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"recall.yaml is a recipe of fast weights in a text model, for .*; here one of soft"
    ):
        inlay("train", recipe_path("recall"), "--runs", tmp_path)


def test_a_run_of_another_kind_is_named_as_such(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe of soft tokens, for .*; here one of fast weights in a text model"):
        inlay("generate", runs / "tiny", "--prompt", "Who?", app=cli.app)
    with pytest.raises(RecipeError, match=r"is a folder, a run's recipe is .*tiny/recipe.yaml"):
        inlay("train", runs / "tiny", app=cli.app)
    with pytest.raises(RecipeError, match=r"recipe of fast weights in a text model, .*; here one of the comparison"):
        inlay("evaluate", "--memories", recipe_path("recall"), app=cli.app)
    with pytest.raises(RunError, match=r"is no run: it has no recipe.yaml; it is a recipe: train it first"):
        load_compress_run(recipe_path("terse"))


def test_what_cannot_run_here_is_told_before_there_is_a_run(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"(?i)fp16"):
        inlay("train", runs / "recipe.yaml", "name=half", "trainer.fp16=true", "trainer.bf16=true", "--runs", tmp_path)
    assert not (tmp_path / "half").exists()


def test_a_run_that_was_moved_is_gone_on_with_where_it_lies(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "tiny", tmp_path / "moved")
    (tmp_path / "moved" / "finished").unlink()
    with pytest.raises(RunError) as told:
        load_compress_run(tmp_path / "moved")
    words = str(told.value).split("inlay train ")[1].split()
    inlay("train", *words, app=cli.app)
    assert load_compress_run(tmp_path / "moved").recipe.name == "moved"


def test_the_recipe_for_a_pretrained_decoder_runs_on_files_of_the_hubs_formats(tmp_path: Path) -> None:
    """recipes/squad.yaml as it is, but for where model and data lie and how long it trains."""
    save_decoder(tmp_path / "decoder", byte_level(), positions=256)
    (tmp_path / "squad").mkdir()
    for split, count in (("train", 8), ("validation", 4)):
        rows = [
            {
                "id": f"{split} {number}",
                "title": f"{split} {number // 2}",
                "context": f"Ada Lovelace, the mother of Bob {split} {number // 2}, was born in 1815.",
                "question": "Who was born in 1815?",
                "answers": {"text": ["Ada Lovelace"], "answer_start": [0]},
            }
            for number in range(count)
        ]
        (tmp_path / "squad" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = [f"decoder.name_or_path={tmp_path / 'decoder'}", f"data.path={tmp_path / 'squad'}"]
    changes += ["pretraining.max_steps=1", "trainer.max_steps=2", "trainer.use_cpu=true", "trainer.disable_tqdm=true"]
    inlay("train", recipe_path("squad"), *changes, "layout.answer_tokens=8", "--runs", tmp_path / "runs")
    inlay("evaluate", tmp_path / "runs" / "squad")
    figures = json.loads((tmp_path / "runs" / "squad" / "evaluation.json").read_text())
    assert figures["questions"] == 4
    assert {one["budget"] for one in figures["methods"] if one["method"] == "soft tokens"} == {"4×", "8×"}
