"""A compression run leaves everything in one directory, is loaded as it was, and goes on exactly after a stop."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, TrainerCallback

from inlay.data import FactsDataset, facts_tokenizer
from inlay.train import base_lm
from inlay.train.compress import CompressTrainer, load_compress_run, train_compressor
from inlay.train.compress_data import tokenise_contexts
from inlay.train.compress_recipe import CompressRecipe
from inlay.train.directory import RunError
from inlay.train.trainer import read_metrics
from tests.processes import in_two_processes
from tests.train.compression import DECODER, FACTS, base_weights, build_decoder, decoder, figures, recipe, trained

__all__ = ["decoder"]


class StoppedError(Exception):
    """A run is cut off."""


class StopAt(TrainerCallback):
    def __init__(self, step: int, stage: str) -> None:
        self.step, self.stage = step, stage

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and Path(args.output_dir).name == self.stage:
            raise StoppedError


def stopping(step: int, stage: str) -> type[CompressTrainer]:
    class Stopping(CompressTrainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.add_callback(StopAt(step, stage))

    return Stopping


def test_nothing_but_what_is_trained_is_written_to_checkpoints(tmp_path: Path, decoder: Path) -> None:
    train_compressor(recipe(decoder, decoder_lora={"r": 2}), tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert not {"model.safetensors", "pytorch_model.bin"} & {path.name for path in checkpoint.rglob("*")}
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert len(state) == len(trained(load_compress_run(tmp_path / "run")))


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["frozen decoder", "decoder LoRA"])
def test_a_loaded_run_answers_as_it_did_before_it_was_saved(
    tmp_path: Path, decoder: Path, lora: dict[str, Any] | None
) -> None:
    examples = FactsDataset(FACTS, "eval")[:8]
    contexts, questions = [one.context for one in examples], [one.question for one in examples]
    seen: dict[str, Any] = {}

    def answered(model: Any, compressor: Any, layout: Any) -> tuple[Tensor, list[str]]:
        memory = compressor.compress(*tokenise_contexts(layout, contexts), ratio=4)
        return memory.embeddings.detach(), layout.answer(model, memory, questions)

    class Remember(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.eval()
            seen["before"] = answered(model.decoder, model.compressor, model.layout)

    class Remembering(CompressTrainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.add_callback(Remember)

    train_compressor(recipe(decoder, decoder_lora=lora), tmp_path / "run", trainer_class=Remembering)
    run = load_compress_run(tmp_path / "run")
    embeddings, answers = answered(run.model, run.compressor, run.layout)
    assert torch.equal(embeddings, seen["before"][0])
    assert answers == seen["before"][1]
    assert len(set(answers)) > 1


SECTIONS: dict[str, dict[str, Any]] = {
    "muon and a curriculum": {
        "muon": 0.01,
        "curriculum": [{"until": 0.5, "ratios": [2]}],
        "train_ratios": [4, 4, 2],
    },
    "accumulation": {"trainer": {"gradient_accumulation_steps": 2}},
    "pretrained": {"pretraining": {"max_steps": 5, "reconstruction": 0.5, "continuation": 0.5}},
    "every objective": {
        "decoder_lora": {"r": 2},
        "objectives": {
            "first_token": 0.5,
            "first_k": 0.5,
            "distillation": 0.5,
            "reconstruction": 0.1,
            "diversity": 0.1,
            "scheduled_sampling": 0.5,
        },
    },
}


@pytest.mark.parametrize(
    ("name", "stage", "step"),
    [
        ("muon and a curriculum", "cut", 5),
        ("accumulation", "cut", 5),
        ("pretrained", "pretraining", 4),
        ("pretrained", "cut", 2),
        ("every objective", "cut", 5),
    ],
)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, decoder: Path, name: str, stage: str, step: int
) -> None:
    asked = recipe(decoder, **SECTIONS[name])
    train_compressor(asked, tmp_path / "whole")
    with pytest.raises(StoppedError):
        train_compressor(asked, tmp_path / "cut", trainer_class=stopping(step, stage))
    with pytest.raises(RunError, match="has not finished"):
        load_compress_run(tmp_path / "cut")
    with pytest.raises(RunError, match="holds a run already"):
        train_compressor(asked, tmp_path / "cut")
    train_compressor(asked, tmp_path / "cut", resume=True)

    whole, cut = trained(load_compress_run(tmp_path / "whole")), trained(load_compress_run(tmp_path / "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert figures(tmp_path / "whole") == figures(tmp_path / "cut")
    if "pretraining" in SECTIONS[name]:
        assert figures(tmp_path / "whole" / "pretraining") == figures(tmp_path / "cut" / "pretraining")


def test_training_starts_from_what_pretraining_left(tmp_path: Path, decoder: Path) -> None:
    before = {"max_steps": 4, "trainer": {"learning_rate": 1e-3}}
    train_compressor(recipe(decoder, {"learning_rate": 0.0}, pretraining=before), tmp_path / "run")
    run = load_compress_run(tmp_path / "run")
    files = [tmp_path / "run" / place / "compressor" / "compressor.json" for place in ("pretraining", ".")]
    pretrained, final = (json.loads(file.read_text())["sha256"] for file in files)
    assert pretrained == final
    steps = figures(tmp_path / "run" / "pretraining")
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    drawn = [[name for name in line if name.startswith("loss/")] for line in steps]
    assert all(names in (["loss/reconstruction"], ["loss/continuation"]) for names in drawn)
    assert (tmp_path / "run" / "cues.safetensors").is_file()
    assert any(tensor.abs().sum() > 0 for name, tensor in trained(run).items() if "lora_B" in name)


def test_the_best_checkpoint_is_what_a_run_ends_with_if_it_asks_for_it(tmp_path: Path, decoder: Path) -> None:
    best = {
        "learning_rate": 3.0,  # each step makes it worse
        "max_grad_norm": 0.0,
        "max_steps": 4,
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "save_total_limit": 4,
        "warmup_steps": 2,
    }
    train_compressor(recipe(decoder, best), tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in line]
    winner = min(lines, key=lambda line: line["eval_loss"])["step"]
    assert winner < 4
    places = [tmp_path / "run" / f"checkpoint-{winner}", tmp_path / "run", tmp_path / "run" / "checkpoint-4"]
    hashes = [json.loads((place / "compressor" / "compressor.json").read_text())["sha256"] for place in places]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_decoder_that_was_trained_here_is_part_of_the_run(
    tmp_path: Path, decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def build_base_lm(asked: CompressRecipe, console: Any) -> Any:
        built.append(asked.name)
        return build_decoder(), facts_tokenizer(FACTS)

    monkeypatch.setitem(sys.modules, "inlay.train.base_lm", SimpleNamespace(build_base_lm=build_base_lm))
    sections: dict[str, Any] = {
        "decoder": {"config": {"model_type": "llama", **DECODER}},
        "base": {"stages": [{"max_steps": 1}]},
        "compressor": {"kind": "encoder-pool", "ratios": [2, 4]},
    }
    with pytest.raises(StoppedError):
        train_compressor(recipe(decoder, **sections), tmp_path / "run", trainer_class=stopping(2, "run"))
    train_compressor(recipe(decoder, **sections), tmp_path / "run", resume=True)
    assert built == ["run"]  # a resumed run has it already
    run = load_compress_run(tmp_path / "run")
    before, after = base_weights(build_decoder()), base_weights(run.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert base_weights(plain).keys() == before.keys()
    assert run.tokenizer.get_vocab() == facts_tokenizer(FACTS).get_vocab()


def test_of_two_processes_the_first_trains_the_decoder_and_writes_for_both(
    tmp_path: Path, decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path / "cache"))
    train_base_lm = base_lm.train_base_lm

    def slowly(asked: CompressRecipe, console: Any) -> Any:
        made = train_base_lm(asked, console)
        time.sleep(0.5)  # the second would be first to save
        return made

    asked = recipe(
        decoder,
        {"max_steps": 2, "save_strategy": "no"},
        decoder={"config": {"model_type": "llama", **DECODER}},
        base={"stages": [{"max_steps": 1}], "batch_size": 4, "eval_examples": 2},
        pretraining={"max_steps": 1},
    )

    def work(rank: int) -> None:
        base_lm.train_base_lm = slowly if rank == 0 else train_base_lm
        train_compressor(asked, tmp_path / "run")
        assert (tmp_path / "run" / "finished").is_file()
        load_compress_run(tmp_path / "run", device="cpu")

    in_two_processes(work)
    (cached,) = (tmp_path / "cache" / "base-lms").iterdir()
    kept, ours = (
        LlamaForCausalLM.from_pretrained(place).state_dict() for place in (cached, tmp_path / "run" / "model")
    )
    assert all(torch.equal(kept[name], weight) for name, weight in ours.items())
    assert [line["step"] for line in figures(tmp_path / "run")] == [1, 2]


def test_another_recipe_cannot_be_resumed_and_more_steps_can(tmp_path: Path, decoder: Path) -> None:
    train_compressor(recipe(decoder, {"max_steps": 3}), tmp_path / "run")
    with pytest.raises(RunError, match="another recipe"):
        train_compressor(recipe(decoder, seed=1), tmp_path / "run", resume=True)
    train_compressor(recipe(decoder, {"max_steps": 5}), tmp_path / "run", resume=True)
    assert [line["step"] for line in figures(tmp_path / "run")] == [1, 2, 3, 4, 5]
