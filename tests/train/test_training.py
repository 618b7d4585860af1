"""A run trains what it says, leaves everything in one directory, and goes on exactly after a stop."""

from __future__ import annotations

import json
import shutil
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from inlay.fastweight import MemoryNeverReadError, NonFiniteMemoryError
from inlay.train import (
    InlayTrainer,
    Recipe,
    RecipeError,
    RunError,
    check_recipe,
    load_run,
    read_metrics,
    train,
    write_run_report,
)
from inlay.train.directory import training_arguments, uploads
from tests.processes import in_two_processes

MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def recipe(name: str = "run", trainer: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    raw = {
        "name": name,
        "model": {"config": MODEL},
        "memory": {"layers": [1], "chunk_size": 8, "eta": 0.1, "init": "next_token"},
        "data": {"task": "recall", "sequence_length": 32, "pairs": 4, "keys": 8, "values": 8, "eval_examples": 8},
        "mode": "all",
        "trainer": {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 3,
            "disable_tqdm": True,
            "use_cpu": True,
            **(trainer or {}),
        },
        **sections,
    }
    return check_recipe(Recipe, raw)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in load_run(directory).model.named_parameters()}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk, as from the hub."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(**{k: v for k, v in MODEL.items() if k != "model_type"}, vocab_size=32)
    ).save_pretrained(directory)
    return directory


def test_a_run_leaves_everything_in_its_directory_and_loads_again(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    train(recipe(), directory)
    names = {path.name for path in directory.iterdir()}
    assert {"recipe.yaml", "metrics.jsonl", "tensorboard", "model", "memory", "checkpoint-6"} <= names
    lines = read_metrics(directory / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert any((directory / "tensorboard").iterdir())
    run = load_run(directory)
    assert run.memory is not None
    trained = torch.load(directory / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"]
    assert len(trained) == len(list(run.model.parameters()))
    assert "<svg" in write_run_report(directory).read_text()


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    """As under torchrun: two processes of two sequences make the step of one process of four."""
    steps = {"max_steps": 3, "save_strategy": "no"}
    train(recipe(trainer=steps), tmp_path / "one")
    half = recipe(trainer=steps | {"per_device_train_batch_size": 2})

    def work(rank: int) -> None:
        time.sleep(0.5 * rank)  # the second comes to an empty directory all the same: the first waits for it
        train(half, tmp_path / "two")

    in_two_processes(work)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        assert torch.allclose(two[name], one[name], rtol=1e-4, atol=1e-5), name
    assert len([line for line in read_metrics(tmp_path / "two" / "metrics.jsonl") if "loss" in line]) == 3


def test_a_loaded_run_gives_the_logits_it_had(tmp_path: Path) -> None:
    seen: dict[str, torch.Tensor] = {}
    tokens = torch.arange(32).reshape(1, 32) % 17

    class Remember(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.eval()
            with torch.no_grad():
                seen["logits"] = model(tokens, use_cache=False).logits

    original = InlayTrainer.__init__

    def with_callback(self: InlayTrainer, **kwargs: Any) -> None:
        original(self, **kwargs)
        self.add_callback(Remember)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InlayTrainer, "__init__", with_callback)
        train(recipe(), tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(load_run(tmp_path / "run").model(tokens, use_cache=False).logits, seen["logits"])


@pytest.mark.parametrize("extra", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulation"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, extra: dict[str, Any]) -> None:
    train(recipe(trainer=extra), tmp_path / "whole")

    class StoppedError(Exception):
        pass

    class StopAt5(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:  # between two checkpoints
                raise StoppedError

    original = InlayTrainer.__init__

    def with_callback(self: InlayTrainer, **kwargs: Any) -> None:
        original(self, **kwargs)
        self.add_callback(StopAt5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InlayTrainer, "__init__", with_callback)
        with pytest.raises(StoppedError):
            train(recipe(trainer=extra), tmp_path / "cut")
    with pytest.raises(RunError, match="has not finished"):
        load_run(tmp_path / "cut")
    with pytest.raises(RunError, match="holds a run already"):
        train(recipe(trainer=extra), tmp_path / "cut")
    train(recipe(trainer=extra), tmp_path / "cut", resume=True)

    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    figures = [
        [(line["step"], line["loss"]) for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line]
        for name in ("whole", "cut")
    ]
    assert figures[0] == figures[1]


def test_another_recipe_cannot_be_resumed(tmp_path: Path) -> None:
    train(recipe(), tmp_path / "run")
    with pytest.raises(RunError, match=r"another recipe .* differs in seed: when a run is resumed only trainer may"):
        train(recipe(seed=1), tmp_path / "run", resume=True)


def test_with_and_without_memory_start_from_the_same_weights(tmp_path: Path) -> None:
    frozen = {"learning_rate": 0.0, "max_steps": 1}
    train(recipe(trainer=frozen), tmp_path / "with")
    train(recipe(trainer=frozen, memory=None), tmp_path / "without")
    with_memory, without = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert set(without) < set(with_memory)
    assert all(torch.equal(with_memory[name], without[name]) for name in without)


def test_a_finished_run_can_be_resumed_for_more_steps(tmp_path: Path) -> None:
    train(recipe(), tmp_path / "run")
    train(recipe(trainer={"max_steps": 9}), tmp_path / "run", resume=True)
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert load_run(tmp_path / "run").recipe.trainer["max_steps"] == 9


def test_a_resumed_run_goes_on_by_its_own_learning_rate(tmp_path: Path) -> None:
    steady = {"lr_scheduler_type": "constant", "weight_decay": 0.1}
    train(recipe(trainer=steady), tmp_path / "run")
    later = {"max_steps": 9, "learning_rate": 1e-3, "weight_decay": 0.0}
    train(recipe(trainer=steady | later, memory_learning_rate=None), tmp_path / "run", resume=True)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates == [1e-2] * 6 + [1e-3] * 3
    optimizer = torch.load(tmp_path / "run" / "checkpoint-9" / "optimizer.pt")
    assert {group["weight_decay"] for group in optimizer["param_groups"]} == {0.0}


@pytest.mark.parametrize("mode", ["memory", "memory+layers", "all", "memory+lora"])
def test_each_mode_trains_its_own_parameters_and_saves_them(tmp_path: Path, pretrained: Path, mode: str) -> None:
    sections: dict[str, Any] = {"model": {"name_or_path": str(pretrained)}, "mode": mode}
    if mode == "memory+lora":
        sections["lora"] = {"r": 2}
    train(recipe(**sections), tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert run.memory is not None
    before = dict(LlamaForCausalLM.from_pretrained(pretrained).named_parameters())
    after = run.memory.base_parameters()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    block = {name for name in before if ".layers.1." in name}
    expected = {"memory": set(), "memory+layers": block, "all": set(before), "memory+lora": set()}[mode]
    assert changed == expected
    header = json.loads((tmp_path / "run" / "memory" / "memory.json").read_text())
    assert {n.removeprefix("base.") for n in header["tensors"] if n.startswith("base.")} == expected
    assert (tmp_path / "run" / "adapter").exists() == (mode == "memory+lora")
    moved = dict(run.memory.named_parameters())
    assert not torch.equal(moved["1.projection"], torch.eye(16))
    if mode == "memory+lora":
        assert any(p.abs().sum() > 0 for name, p in run.model.named_parameters() if "lora_B" in name)


def test_the_memory_can_have_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    train(recipe(trainer={"learning_rate": 0.0}, memory_learning_rate=1e-2), tmp_path / "own")
    train(recipe(trainer={"learning_rate": 0.0}), tmp_path / "none")
    own, none = weights(tmp_path / "own"), weights(tmp_path / "none")
    changed = {name for name in own if not torch.equal(own[name], none[name])}
    assert changed == {f"model.layers.1.mlp.down_proj.target.{part}" for part in ("conv", "projection")}


@pytest.mark.parametrize("extra", [{"bf16": True}, {"gradient_checkpointing": True}], ids=["bf16", "checkpointing"])
def test_bf16_and_checkpointing_stay_close_to_the_plain_run(tmp_path: Path, extra: dict[str, Any]) -> None:
    train(recipe(trainer=extra), tmp_path / "extra")
    train(recipe(), tmp_path / "plain")
    figures = [
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line]
        for name in ("extra", "plain")
    ]
    tolerance = 0.02 if "bf16" in extra else 1e-5
    assert figures[0] == pytest.approx(figures[1], rel=tolerance)


def test_evaluation_during_training_is_logged(tmp_path: Path) -> None:
    train(recipe(trainer={"eval_strategy": "steps", "eval_steps": 3}), tmp_path / "run")
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in line]
    assert steps == [3, 6]


def test_a_memory_that_can_never_be_read_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(MemoryNeverReadError, match="longest has 32 tokens and chunk_size is 32"):
        train(recipe(memory={"layers": [1], "chunk_size": 32}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nan_in_the_memory_stops_the_run_and_names_layer_and_step(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteMemoryError, match=r"memory of block 1 .* at step \d"):
        train(recipe(trainer={"learning_rate": 1e30, "max_grad_norm": 0.0}), tmp_path / "run")


def test_a_models_own_frozen_base_is_not_written_to_checkpoints(tmp_path: Path, pretrained: Path) -> None:
    train(recipe(model={"name_or_path": str(pretrained)}, mode="memory"), tmp_path / "run")
    files = {path.name for path in (tmp_path / "run" / "checkpoint-3").rglob("*")}
    assert not {"model.safetensors", "pytorch_model.bin"} & files
    assert "memory.safetensors" in files


def test_text_with_several_documents_in_a_row_trains_with_and_without_memory(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index in range(12):
        (corpus / f"{index}.txt").write_text(f"file {index} says " + "abc " * (5 + index))
    data = {
        "task": "text",
        "source": "files",
        "path": str(corpus),
        "sequence_length": 48,
        "packing": "concatenate",
        "eval_fraction": 0.3,
        "tokenizer": {"kind": "bytes"},
    }
    for name, memory in (("with", {"layers": [1], "chunk_size": 8, "eta": 0.1}), ("without", None)):
        outcome = train(recipe(data=data, memory=memory), tmp_path / name)
        assert outcome["train_loss"] > 0
        assert (tmp_path / name / "tokenizer").is_dir()
        assert load_run(tmp_path / name).data_config.tokenizer.kind == "pretrained"


def cut_off(directory: Path) -> None:
    """As a kill behind the last checkpoint leaves a run."""
    (directory / "finished").unlink()


def test_resumed_at_its_last_step_a_run_takes_no_other(tmp_path: Path) -> None:
    steps = {"lr_scheduler_type": "constant"}
    train(recipe(trainer=steps), tmp_path / "run")
    before = weights(tmp_path / "run")
    cut_off(tmp_path / "run")
    train(recipe(trainer=steps), tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "checkpoint-7").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "run").items())
    with pytest.raises(RunError, match="checkpoint-6 is beyond max_steps: 3"):
        train(recipe(trainer=steps | {"max_steps": 3}), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "finished").is_file()
    assert load_run(tmp_path / "run").recipe.trainer["max_steps"] == 6


def test_resumed_at_its_last_epoch_a_run_takes_no_other(tmp_path: Path) -> None:
    data = {"task": "recall", "sequence_length": 32, "pairs": 4, "keys": 8, "values": 8, "eval_examples": 8}
    epochs = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch"}
    run = recipe(trainer=epochs, data=data | {"train_examples": 8})
    train(run, tmp_path / "run")
    cut_off(tmp_path / "run")
    train(run, tmp_path / "run", resume=True)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    fewer = recipe(trainer=epochs | {"num_train_epochs": 1}, data=data | {"train_examples": 8})
    with pytest.raises(RunError, match="checkpoint-4 is beyond num_train_epochs: 1"):
        train(fewer, tmp_path / "run", resume=True)
    assert load_run(tmp_path / "run").recipe.trainer["num_train_epochs"] == 2


@pytest.mark.parametrize("damage", ["no state", "half a state", "no optimizer", "half an optimizer"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path: Path, damage: str) -> None:
    train(recipe(), tmp_path / "run")
    before = weights(tmp_path / "run")
    cut_off(tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-6" / ("optimizer.pt" if "optimizer" in damage else "trainer_state.json")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    if damage.startswith("no"):
        file.unlink()
    said = StringIO()
    train(recipe(), tmp_path / "run", resume=True, console=Console(file=said, width=1000))
    assert "checkpoint-6" in said.getvalue()
    assert "it is passed over" in said.getvalue()
    assert "checkpoint-3" in said.getvalue().split("resuming from")[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "run").items())


def test_what_kept_no_checkpoint_begins_anew_and_is_not_begun_anew_once_it_has_finished(tmp_path: Path) -> None:
    kept = recipe(trainer={"save_strategy": "no"})
    train(kept, tmp_path / "run")
    with pytest.raises(RunError, match="has finished and kept no checkpoint"):
        train(kept, tmp_path / "run", resume=True)
    cut_off(tmp_path / "run")
    said = StringIO()
    train(kept, tmp_path / "run", resume=True, console=Console(file=said, width=1000))
    assert "no checkpoint in" in said.getvalue()


def test_the_best_model_is_the_one_that_is_kept(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, "greater_is_better": True}
    run = tmp_path / "run"
    train(recipe(trainer=best), run)  # the highest loss, so that the first of the two is the best
    first = load_file(run / "checkpoint-3" / "memory" / "memory.safetensors")
    for resumed in (False, True):
        if resumed:
            run = run.rename(tmp_path / "called anew")
            cut_off(run)
            train(recipe(trainer=best), run, resume=True)
        kept = load_file(run / "memory" / "memory.safetensors")
        assert kept.keys() <= first.keys()
        assert all(torch.equal(tensor, first[name]) for name, tensor in kept.items())
    run = run.rename(tmp_path / "and again")
    train(recipe(trainer=best | {"max_steps": 9}), run, resume=True)
    assert load_file(run / "memory" / "memory.safetensors").keys() == kept.keys()
    for name, tensor in load_file(run / "memory" / "memory.safetensors").items():
        assert torch.equal(tensor, first[name])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"config": MODEL | {"num_attention_heads": 3, "head_dim": None}}}, "model: cannot be built"),
        ({"model": {"config": MODEL, "attn_implementation": "bogus"}}, "model: cannot be built: .*bogus"),
        ({"model": {"name_or_path": "nodir"}}, "cannot load the model nodir"),
        (
            {"model": {"config": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}}},
            "the model has 16 positions .* and sequences have 32 tokens",
        ),
    ],
)
def test_a_model_that_cannot_be_is_named_before_there_is_a_run(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        train(recipe(**sections), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bfloat16_without_a_gpu_has_to_be_asked_for(tmp_path: Path) -> None:
    bf16 = {"max_steps": 1, "bf16": True, "use_cpu": False}
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RecipeError, match=r"no GPU here; to train on the CPU as it is: trainer\.use_cpu=true"):
        train(recipe(trainer=bf16), tmp_path / "run")
    train(recipe(trainer=bf16 | {"use_cpu": True}), tmp_path / "run")


def test_a_streamed_data_set_needs_steps_and_chunks_that_can_be_read(tmp_path: Path) -> None:
    texts = Dataset.from_dict({"text": [f"{n} abcdefgh" * 40 for n in range(40)]})
    texts.to_parquet(str(tmp_path / "data" / "train.parquet"))
    data = {
        "task": "text",
        "source": "dataset",
        "path": str(tmp_path / "data"),
        "streaming": True,
        "sequence_length": 32,
    }
    data |= {"max_eval_sequences": 2, "eval_fraction": 0.5, "tokenizer": {"kind": "bytes"}}
    with pytest.raises(RecipeError, match=r"has no length: say how many steps, trainer\.max_steps"):
        train(recipe(data=data, trainer={"max_steps": -1}), tmp_path / "run")
    memory = {"layers": [1], "chunk_size": 32, "eta": 0.1}
    with pytest.raises(MemoryNeverReadError, match="the longest has 32 tokens and chunk_size is 32"):
        train(recipe(data=data, memory=memory), tmp_path / "run")


def test_lora_on_layers_that_are_not_there_is_refused(tmp_path: Path, pretrained: Path) -> None:
    sections = {"model": {"name_or_path": str(pretrained)}, "lora": {"target_modules": ["nope"]}}
    with pytest.raises(RecipeError, match=r"lora: .*nope"):
        train(recipe(**sections, mode="memory+lora"), tmp_path / "run")


def test_a_run_that_lost_its_model_says_so(tmp_path: Path) -> None:
    train(recipe(trainer={"save_strategy": "no"}), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(RunError, match="has lost its model/"):
        load_run(tmp_path / "run")


def test_data_that_fill_no_batch_are_refused_before_a_run_begins(tmp_path: Path) -> None:
    dropping = {"dataloader_drop_last": True, "per_device_train_batch_size": 100_000}
    data = {"task": "recall", "sequence_length": 32, "pairs": 4, "train_examples": 16, "eval_examples": 8}
    with pytest.raises(
        RunError, match=r"16 sequences fill no batch of 100,000, .*lower trainer.per_device_train_batch"
    ):
        train(recipe(trainer=dropping, data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("gpu", "trainer", "waits_not"),
    [
        (True, {}, True),
        (True, {"use_cpu": True}, False),
        (True, {"dataloader_pin_memory": False}, False),
        (False, {}, False),
    ],
)
def test_batches_go_up_to_a_gpu_without_waiting_where_they_are_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, trainer: dict[str, Any], waits_not: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    chosen = uploads(trainer)
    monkeypatch.undo()
    arguments = training_arguments(tmp_path, 0, chosen)
    assert chosen["dataloader_pin_memory"] == arguments.accelerator_config.non_blocking == waits_not
    assert not training_arguments(tmp_path, 0, {}).accelerator_config.non_blocking
