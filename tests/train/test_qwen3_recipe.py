"""recipes/qwen3.yaml as it is, but for where model and data lie and how long it trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from inlay import sliced_loss
from inlay.data import load_data
from inlay.evaluate.suite import evaluate_model
from inlay.train import Recipe, check_recipe, load_recipe, load_run, read_metrics, train
from tests.softtoken.local import byte_level

RECIPE = Path("src/inlay/recipes/qwen3.yaml")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A small Qwen3 and its tokenizer, as from the hub."""
    texts = [f"line {n} of a long text about nothing\n" * 20 for n in range(12)]
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 7, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3Config(vocab_size=512, initializer_range=0.2, tie_word_embeddings=True, **size, **heads)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    byte_level().save_pretrained(tmp_path / "qwen")
    (tmp_path / "books").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "books" / f"{number}.txt").write_text(text)
    return tmp_path


def test_it_trains_a_pretrained_model_on_files_with_the_models_own_tokenizer(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sliced_loss, "LOGITS_AT_ONCE", 512 * 10)
    changes = [f"model.name_or_path={place / 'qwen'}", "data.source=files", f"data.path={place / 'books'}"]
    changes += ["data.sequence_length=64", "data.min_tokens=32", "memory.chunk_size=16", "data.eval_fraction=0.3"]
    changes += ["trainer.max_steps=2", "trainer.save_steps=2", "trainer.logging_steps=1", "trainer.use_cpu=true"]
    changes += ["trainer.disable_tqdm=true", "trainer.warmup_steps=0"]
    recipe = load_recipe(RECIPE, changes)
    assert recipe.data.tokenizer.name_or_path == str(place / "qwen")
    train(recipe, place / "run")
    lines = [line["loss"] for line in read_metrics(place / "run" / "metrics.jsonl") if "loss" in line]
    assert len(lines) == 2
    run = load_run(place / "run", device="cpu")
    assert run.memory is not None
    assert sorted(run.memory.layers) == [0, 6]
    assert (place / "run" / "adapter" / "adapter_config.json").is_file()

    forward = next(module.__dict__["_sliced_loss"] for module in run.model.modules() if "_sliced_loss" in vars(module))
    assert forward.slices(torch.zeros(1, 64))
    evaluation = evaluate_model(run.model, load_data(run.data_config), batch_size=1)
    json.dumps(evaluation.to_json())
    assert set(evaluation.losses) == {"memory", "eta = 0"}


def test_a_tokenizer_that_is_named_is_kept() -> None:
    data = {"task": "text", "source": "python-stdlib", "sequence_length": 64, "tokenizer": {"kind": "bytes"}}
    raw = {"name": "r", "model": {"name_or_path": "some/model"}, "mode": "all", "data": data}
    assert check_recipe(Recipe, raw).data.tokenizer.kind == "bytes"
    del data["tokenizer"]
    assert check_recipe(Recipe, raw).data.tokenizer.name_or_path == "some/model"
