"""A small compression run: its decoder, its recipe, and what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from inlay.data import FactsConfig, facts_tokenizer
from inlay.train.compress import CompressRun
from inlay.train.compress_recipe import CompressRecipe
from inlay.train.trainer import read_metrics
from inlay.train.yaml_recipe import check_recipe

DATA = {"source": "facts", "facts": 2, "questions": 2, "tails": 10, "nouns": 24, "adjectives": 6, "eval_examples": 8}
DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 96,
}
FACTS = FactsConfig.model_validate(DATA)
TRAINER = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 3,
    "disable_tqdm": True,
    "use_cpu": True,
}


def build_decoder() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**DECODER, vocab_size=len(facts_tokenizer(FACTS)), initializer_range=0.2))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder and its tokenizer on disk, as from the hub."""
    directory = tmp_path_factory.mktemp("decoder")
    build_decoder().save_pretrained(directory)
    facts_tokenizer(FACTS).save_pretrained(directory)
    return directory


def recipe(place: Path, trainer: dict[str, Any] | None = None, **sections: Any) -> CompressRecipe:
    return check_recipe(
        CompressRecipe,
        {
            "name": "run",
            "decoder": {"name_or_path": str(place)},
            "compressor": {"kind": "encoder-pool", "ratios": [2, 4], "lora": {"r": 2, "lora_dropout": 0.1}},
            "layout": {"answer_tokens": 4},
            "data": DATA,
            "trainer": TRAINER | (trainer or {}),
            **sections,
        },
    )


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace(".base_layer", "").replace("base_model.model.", ""): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    }


def trained(run: CompressRun) -> dict[str, Tensor]:
    found = dict(run.compressor.named_trainable_parameters())
    found |= {name: p for name, p in run.model.named_parameters() if "lora_" in name and ".default." in name}
    return {name: parameter.detach().clone() for name, parameter in found.items()}


def figures(directory: Path) -> list[dict[str, Any]]:
    kept = ("step", "loss", "learning_rate")
    return [
        {name: value for name, value in line.items() if name in kept or name.startswith("loss/")}
        for line in read_metrics(directory / "metrics.jsonl")
        if "loss" in line
    ]
