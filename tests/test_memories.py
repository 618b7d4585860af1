"""Both memories from one decoder at equal bytes: trained, asked, printed and reported, and not trained again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from inlay.cli import app
from inlay.data import FactsConfig, QAExample, facts_tokenizer
from inlay.evaluate.compress_measuring import AnswerLosses
from inlay.evaluate.memories import FAST_WEIGHTS, FULL_TEXT, NO_CONTEXT, SOFT_TOKENS, Answered, Way, measure_ways
from inlay.evaluate.memories_results import MemoriesEvaluation, TaskScores, ways_in_order
from inlay.evaluate.scoring import EvaluationError
from inlay.softtoken.layout import PromptLayout
from inlay.train.directory import RunError
from inlay.train.memories_recipe import MemoriesRecipe
from inlay.train.yaml_recipe import RecipeError, check_recipe, dump_recipe, read_recipe
from tests.softtoken.local import words

DATA = {"source": "facts", "facts": 4, "questions": 4, "tails": 16, "nouns": 24, "adjectives": 6, "eval_examples": 16}
FACTS = FactsConfig.model_validate(DATA)
WIDTH, INNER, LAYERS, CHUNK = 32, 8, 2, 4


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(facts_tokenizer(FACTS)), hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place)
    facts_tokenizer(FACTS).save_pretrained(place)
    return place


def raw(decoder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "both",
        "lm": {"name_or_path": str(decoder)},
        "tasks": {"facts": {"data": DATA}},
        "fast_weights": {"memory": {"layers": [-1], "chunk_size": CHUNK, "eta": 0.1, "init": "next_token"}},
        "lora": {"r": 2},
        "layout": {"answer_tokens": 4},
        "questions_per_context": 4,
        "trainer": {
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        },
        "evaluate": {"examples": 16, "batch_size": 8},
    } | changes


def inlay(*words: object) -> str:
    result = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_both_are_trained_and_asked_at_equal_bytes_and_only_once(decoder: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(raw(decoder)))
    said = inlay("evaluate", "--memories", path, "--runs", tmp_path)
    figures = json.loads((tmp_path / "both" / "memories.json").read_text())
    ways = {(way["way"], way["another_context"]): way for way in figures["tasks"][0]["ways"]}
    assert set(ways) == {
        (FULL_TEXT, False), (NO_CONTEXT, False), (FAST_WEIGHTS, False), (FAST_WEIGHTS, True), (SOFT_TOKENS, False),
        (SOFT_TOKENS, True),
    }  # fmt: skip
    # The sum, the open chunk with what its target is made from, and two counters.
    held = 4 * (WIDTH * INNER + CHUNK * (INNER + WIDTH)) + 16
    fast, soft, full = (ways[name, False] for name in (FAST_WEIGHTS, SOFT_TOKENS, FULL_TEXT))
    assert fast["state_bytes"] == held
    assert soft["state_bytes"] == 4 * WIDTH * round(held / (4 * WIDTH))
    assert abs(soft["state_bytes"] - held) <= 2 * WIDTH
    assert (fast["cache_bytes"], soft["cache_bytes"]) == (0, soft["slots"] * 4 * 2 * LAYERS * WIDTH)
    assert full["state_bytes"] == pytest.approx(4 * figures["tasks"][0]["context_tokens"])
    assert fast["trained_parameters"] > 0 < soft["trained_parameters"]
    assert said.count("another") >= 2
    assert "bytes of fast weights" in " ".join(said.split())
    report = (tmp_path / "both" / "report.html").read_text()
    assert "Fast weights and soft tokens at equal bytes" in report
    assert "<svg" in report

    runs = [tmp_path / "both" / "facts" / name for name in ("fast-weights", "soft-tokens")]
    before = {file: file.stat().st_mtime_ns for run in runs for file in run.rglob("*") if file.is_file()}
    again = inlay("evaluate", "--memories", tmp_path / "both")
    assert before == {file: file.stat().st_mtime_ns for run in runs for file in run.rglob("*") if file.is_file()}
    assert again.split("figures:")[0].endswith(said.split("figures:")[0][-600:])
    assert json.loads((tmp_path / "both" / "memories.json").read_text()) == figures
    with pytest.raises(RunError, match="another recipe"):
        inlay("evaluate", "--memories", path, "seed=1", "--runs", tmp_path)


def test_bytes_are_equal_in_the_dtype_of_the_decoder(decoder: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.yaml"
    path.write_text(yaml.safe_dump(raw(decoder, lm={"name_or_path": str(decoder), "dtype": "bfloat16"})))
    inlay("evaluate", "--memories", path, "--runs", tmp_path)
    ways = json.loads((tmp_path / "both" / "memories.json").read_text())["tasks"][0]["ways"]
    fast, soft = (next(way for way in ways if way["way"] == name) for name in (FAST_WEIGHTS, SOFT_TOKENS))
    slot = 2 * WIDTH
    assert soft["state_bytes"] == slot * soft["slots"]
    assert abs(soft["state_bytes"] - fast["state_bytes"]) <= slot / 2


@pytest.mark.parametrize("form", ["embeddings", "kv"])
@pytest.mark.parametrize("kind", ["encoder-pool", "encoder-tokens", "crossattention"])
def test_a_comparison_survives_the_round_trip_with_every_kind(tmp_path: Path, kind: str, form: str) -> None:
    sections = {"soft_tokens": {"compressor": {"kind": kind, "form": form}}, "layout": {"bos": False}}
    recipe = check_recipe(MemoriesRecipe, raw(Path("x"), **sections))
    assert recipe.soft_tokens.compressor.kind == kind
    path = tmp_path / "both.yaml"
    path.write_text(dump_recipe(recipe))
    assert read_recipe(MemoriesRecipe, path) == recipe


def test_keys_and_values_are_counted_by_what_the_cache_holds(decoder: Path, tmp_path: Path) -> None:
    kv = {
        "soft_tokens": {"compressor": {"kind": "encoder-pool", "form": "kv"}},
        "layout": {"bos": False, "bos_after": True, "answer_tokens": 4},
        "fast_weights": {"memory": {"layers": "all", "chunk_size": CHUNK, "eta": 0.1, "init": "next_token"}},
    }
    path = tmp_path / "kv.yaml"
    path.write_text(yaml.safe_dump(raw(decoder, **kv)))
    inlay("evaluate", "--memories", path, "--runs", tmp_path)
    ways = json.loads((tmp_path / "both" / "memories.json").read_text())["tasks"][0]["ways"]
    fast, soft = (next(way for way in ways if way["way"] == name) for name in (FAST_WEIGHTS, SOFT_TOKENS))
    slot = 4 * 2 * LAYERS * WIDTH
    assert soft["state_bytes"] == soft["cache_bytes"] == slot * soft["slots"]
    assert soft["slots"] == round(fast["state_bytes"] / slot)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"soft_tokens": {"compressor": {"slots": 4}}}, "slots is set by the comparison"),
        ({"soft_tokens": {"compressor": {"kind": "encoder-pool", "lora": {"r": 2}}}}, "lora is set by the comparison"),
        ({"soft_tokens": {"compressor": {"kind": "pool"}}}, "kind pool learns nothing"),
        ({"tasks": {}}, "tasks: "),
        ({"fast_weights": {"memory": {"chunk": 4}}}, "fast_weights.memory.chunk: unknown key"),
        ({"trainer": {"max_step": 4}}, "did you mean 'max_steps'"),
        ({"lm": {"config": {"model_type": "llama"}}}, "add base, how it is trained first"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused_when_it_is_read(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_recipe(MemoriesRecipe, raw(Path("x")) | change)
    assert message in str(caught.value)


def test_the_recipe_that_comes_along_has_both_tasks() -> None:
    recipe = read_recipe(MemoriesRecipe, Path("src/inlay/recipes/memories.yaml"))
    assert [*recipe.tasks] == ["recall", "facts"]
    for task in recipe.tasks:
        reading, compression = recipe.reading(task, "x"), recipe.compression(task, "x", 35)
        assert (reading.layout, reading.data, reading.trainer) == (
            compression.layout,
            compression.data,
            compression.trainer,
        )
        assert compression.compressor.slots == 35


def answers(texts: dict[str, str], state_bytes: int) -> Any:
    """Says what ``texts`` has for a context's first token."""

    def answer(contexts: Any, examples: Any) -> Answered:
        given = [texts[str(context[0])] for context in contexts]
        losses = AnswerLosses([1.0] * len(given), [2] * len(given), [True] * len(given))
        return Answered(given, losses, state_bytes * len(given), 3 * len(given))

    return answer


def task_of(fast: dict[str, str], soft: dict[str, str], count: int = 30) -> TaskScores:
    """A task whose contexts are the numbers 3 and on, and whose answers are these numbers."""
    layout = PromptLayout(bos=False).bind(words())
    examples = [QAExample(str(n), str(n), "Who?", (str(n),)) for n in range(3, 3 + count)]
    ids = {str(layout.context_ids(str(n))[0]): str(n) for n in range(3, 3 + count)}
    known = {FULL_TEXT: ids, NO_CONTEXT: dict.fromkeys(ids, "Bob")}
    named = [(FULL_TEXT, known[FULL_TEXT]), (NO_CONTEXT, known[NO_CONTEXT])]
    ways = [Way(name, answers(texts, 8)) for name, texts in named]
    for name, texts in ((FAST_WEIGHTS, fast), (SOFT_TOKENS, soft)):
        said = {token: texts.get(number, "Bob") for token, number in ids.items()}
        ways += [Way(name, answers(said, 64), 5, control) for control in (False, True)]
    scores = measure_ways(ways, layout, examples, cache_bytes_per_slot=10, batch_size=7)
    return TaskScores("numbers", count, count, 1.0, ways_in_order(scores), {FAST_WEIGHTS: "a", SOFT_TOKENS: "b"})


def test_the_verdict_says_who_is_better_only_where_it_is_shown_and_who_did_not_learn() -> None:
    right = {str(n): str(n) for n in range(3, 33)}
    half = {str(n): str(n) for n in range(3, 18)}
    better = task_of(half, right)
    assert better.find(SOFT_TOKENS).scores.exact_match == 1
    assert better.find(SOFT_TOKENS, control=True).scores.exact_match == 0  # each is given another one's context
    assert better.find(FAST_WEIGHTS).cache_bytes == 30
    assert "soft tokens answer better than fast weights (fast weights −50.0 points" in better.verdict()
    assert "did not learn" not in better.verdict()
    none = task_of({}, half)
    assert "fast weights did not learn to answer from the context" in none.verdict()
    assert "cannot tell the memories apart" in task_of(half, half).verdict()
    section = MemoriesEvaluation((better, none)).section()
    assert [row[0] for row in section.items[0].rows][:3] == [  # type: ignore[union-attr]
        "numbers: full text",
        "numbers: fast weights",
        "numbers: fast weights, another context",
    ]
    assert list(section.items[0].verdicts)[:3] == ["neutral", "good", "neutral"]  # type: ignore[union-attr]


def test_saying_that_there_is_no_answer_is_right_where_there_is_none() -> None:
    layout = PromptLayout(bos=False).bind(words())
    examples = [QAExample("a", "3", "Who?", ("3",)), QAExample("b", "4", "Who?", ())]
    said = {str(layout.context_ids("3")[0]): "3", str(layout.context_ids("4")[0]): "Unanswerable."}
    (scores,) = measure_ways([Way(FULL_TEXT, answers(said, 8))], layout, examples, cache_bytes_per_slot=10)
    assert scores.scores.unanswerable is not None
    assert scores.scores.unanswerable.exact_match.mean == 1
    assert scores.scores.exact_match == 1


def test_a_control_needs_another_context() -> None:
    with pytest.raises(EvaluationError, match="there is no other one"):
        task_of({}, {}, count=1)
