"""Training Moshi from a recipe: modes, files, resuming, what is refused."""

from __future__ import annotations

import json
import math
import shutil
import wave
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from moshi.models.lm import LMModel
from rich.console import Console
from transformers import TrainingArguments
from typer.testing import CliRunner

from inlay import MemoryNeverReadError
from inlay.cli import app
from inlay.data.problems import DataError
from inlay.doctor.moshi_lint import MoshiCase, lint_moshi
from inlay.moshi.checkpoint import save_finetuned
from inlay.moshi.lora import LoraConfig, add_lora, lora_layers
from inlay.moshi.model import MoshiForTraining
from inlay.moshi.sequences import MoshiSequences
from inlay.moshi.weights import MoshiCheckpoint, load_checkpoint
from inlay.train.directory import RunError
from inlay.train.kinds import recipe_kind
from inlay.train.moshi import build_moshi, checkpoint_config, load_moshi_run, refuse_other_codes, train_moshi
from inlay.train.moshi_recipe import MoshiRecipe, load_moshi_recipe
from inlay.train.moshi_report import evaluate_moshi_run
from inlay.train.moshi_trainer import MoshiTrainer
from inlay.train.trainer import read_metrics
from inlay.train.yaml_recipe import RecipeError, check_recipe, dump_recipe
from tests.closeness import assert_close
from tests.moshi.runs import make_recipe, make_store, make_toy
from tests.processes import in_two_processes

LORA = {"enable": True, "rank": 2}
MODES: dict[str, dict[str, Any]] = {
    "memory": {"mode": "memory"},
    "memory+layers": {"mode": "memory+layers"},
    "memory+lora": {"mode": "memory+lora", "lora": LORA},
    "lora": {"mode": "lora", "lora": LORA, "memory": None},
    "all": {"mode": "all"},
    "plain": {"mode": "all", "memory": None},
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> MoshiCheckpoint:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, toy: MoshiCheckpoint) -> Path:
    return make_store(tmp_path_factory.mktemp("codes"), toy)


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_what_it_says_and_leaves_it_to_be_loaded(
    mode: str, toy: MoshiCheckpoint, store: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(toy, store, **MODES[mode])
    chosen, _ = build_moshi(recipe, toy)
    before = {name: p.detach().clone() for name, p in chosen.named_parameters()}
    trains = {name for name, p in chosen.named_parameters() if p.requires_grad}
    train_moshi(recipe, tmp_path)
    run = load_moshi_run(tmp_path, device="cpu")
    after = dict(run.lm.named_parameters())
    assert after.keys() == before.keys()
    changed = {name for name, p in after.items() if not torch.equal(p, before[name])}
    drawn = {name for name in before if ".lora_A" in name}  # another draw than the run's own
    assert changed - drawn <= trains
    kinds = {".target." in name: True for name in changed}
    assert kinds.get(True, False) == (run.memory is not None)
    if mode == "memory":
        assert all(".target." in name for name in changed)
    if "lora" in mode:
        assert {name for name in trains if ".lora_B" in name} <= changed
    if mode == "memory+layers":
        assert any(name.startswith("transformer.layers.2.self_attn") for name in changed)
        assert not any(name.startswith("transformer.layers.1.") for name in changed)
    if mode in ("all", "plain"):
        assert {"text_emb.weight", "depformer_emb.0.weight", "linears.0.weight"} <= changed
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss/text"] + line["loss/audio"], rel=1e-3)
        assert ("memory/sum_norm" in line) == (run.memory is not None)


@pytest.mark.parametrize("mode", ["memory", "memory+lora", "plain"])
def test_a_checkpoint_with_adapters_of_its_own_is_trained_with_them_fused(
    mode: str, toy: MoshiCheckpoint, store: Path, tmp_path: Path
) -> None:
    lm, adapted = toy.load_lm(), tmp_path / "adapted"
    add_lora(lm, LoraConfig(enable=True, rank=3))
    for layer in lora_layers(lm):
        torch.nn.init.normal_(layer.lora_B.weight, std=0.3)
    save_finetuned(tmp_path / "own", lm.requires_grad_(False), checkpoint_config(toy))
    shutil.copytree(toy.source, adapted)
    shutil.copy(tmp_path / "own" / "lora.safetensors", adapted)
    config = json.loads((tmp_path / "own" / "config.json").read_text()) | {"lora_name": "lora.safetensors"}
    (adapted / "config.json").write_text(json.dumps(config))
    base = load_checkpoint(adapted, dtype=torch.float32)
    codes = torch.randint(16, (1, 17, 20), generator=torch.Generator().manual_seed(0))

    def said(model: LMModel) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(codes).text_logits

    assert_close(said(base.load_lm()), said(lm), 1e-5)
    recipe = make_recipe(base, store, **MODES[mode] | {"max_steps": 1, "optim": {"lr": 1e-9}})
    train_moshi(recipe, tmp_path / "run")
    run = load_moshi_run(tmp_path / "run", device="cpu")
    assert len(list(lora_layers(run.lm))) == (len(list(lora_layers(lm))) if "lora" in mode else 0)
    assert_close(said(run.lm), said(lm), 1e-5)


def test_the_loss_falls_on_a_batch_seen_again_and_again(toy: MoshiCheckpoint, store: Path, tmp_path: Path) -> None:
    train_moshi(make_recipe(toy, store, mode="all", max_steps=25, batch_size=4), tmp_path)
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(("mode", "muon"), [("memory+lora", None), ("all", 0.02)])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    mode: str, muon: float | None, toy: MoshiCheckpoint, store: Path, tmp_path: Path
) -> None:
    changes = MODES[mode] | {"max_steps": 4, "ckpt_freq": 2, "num_microbatches": 2, "batch_size": 1}
    changes |= {"optim": {"lr": 1e-2, "muon": muon}}
    recipe = make_recipe(toy, store, **changes)
    train_moshi(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for name in ("checkpoint-4", "moshi"):
        shutil.rmtree(tmp_path / "stopped" / name)
    (tmp_path / "stopped" / "finished").unlink()
    with pytest.raises(RunError, match="has not finished"):
        load_moshi_run(tmp_path / "stopped")
    with pytest.raises(RunError, match="holds a run already"):
        train_moshi(recipe, tmp_path / "stopped")
    train_moshi(recipe, tmp_path / "stopped", resume=True)
    whole, resumed = (dict(load_moshi_run(tmp_path / name).lm.named_parameters()) for name in ("whole", "stopped"))
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name
    one, other = (
        [line for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line and line["step"] > 2]
        for name in ("whole", "stopped")
    )
    assert [line["loss"] for line in one] == [line["loss"] for line in other]

    (tmp_path / "stopped" / "finished").unlink()  # behind the last checkpoint
    train_moshi(recipe, tmp_path / "stopped", resume=True)
    assert not (tmp_path / "stopped" / "checkpoint-5").exists()
    again = dict(load_moshi_run(tmp_path / "stopped").lm.named_parameters())
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("shuffle", [False, True])
def test_without_shuffle_sequences_are_read_in_order(
    shuffle: bool, toy: MoshiCheckpoint, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    item = MoshiSequences.__getitem__
    monkeypatch.setattr(MoshiSequences, "__getitem__", lambda self, index: (read.append(index), item(self, index))[1])
    recipe = make_recipe(toy, store, duration_sec=4.8, max_steps=1, batch_size=8)
    train_moshi(recipe.model_copy(update={"data": recipe.data.model_copy(update={"shuffle": shuffle})}), tmp_path)
    assert sorted(read) == list(range(8))
    assert (read == sorted(read)) is not shuffle


def test_a_run_that_does_not_evaluate_needs_no_data_for_it(toy: MoshiCheckpoint, store: Path, tmp_path: Path) -> None:
    data = {"train_data": str(store), "eval_fraction": 0.0, "min_sec": 1.0}
    recipe = make_recipe(toy, store, data=data, max_steps=1)
    train_moshi(recipe, tmp_path / "run")
    lint_moshi(MoshiCase(recipe, toy, recipe.load_data())).findings()  # looks through what there is
    with pytest.raises(DataError, match=r"no evaluation sequence in the held-out share \(eval_fraction 0.0\)"):
        evaluate_moshi_run(tmp_path / "run", device="cpu")
    with pytest.raises(DataError, match="no evaluation sequence"):
        train_moshi(make_recipe(toy, store, data=data, do_eval=True), tmp_path / "other")


def test_microbatches_average_their_gradients(toy: MoshiCheckpoint, store: Path, tmp_path: Path) -> None:
    weights = []
    for batch_size, num_microbatches in ((2, 1), (1, 2)):
        # Rows without padding and equal weights everywhere, so that the mean of means is the mean.
        changes = {"batch_size": batch_size, "num_microbatches": num_microbatches, "text_padding_weight": 1.0}
        directory = tmp_path / f"{batch_size}"
        train_moshi(make_recipe(toy, store, mode="all", max_steps=2, **changes), directory)
        weights.append(torch.cat([p.flatten() for p in load_moshi_run(directory).lm.parameters()]))
    assert torch.allclose(weights[0], weights[1], atol=2e-4)


def test_bfloat16_trains_float32_weights_on_a_bfloat16_base(toy: MoshiCheckpoint, store: Path, tmp_path: Path) -> None:
    recipe = make_recipe(toy, store, param_dtype="bfloat16", **MODES["memory+lora"])
    half = load_checkpoint(toy.source, dtype=torch.bfloat16)
    lm, _ = build_moshi(recipe, half)
    assert {p.dtype for p in lm.parameters() if p.requires_grad} == {torch.float32}
    assert lm.text_emb.weight.dtype == torch.bfloat16
    train_moshi(recipe, tmp_path)
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    assert load_moshi_run(tmp_path, device="cpu").lm.text_linear.lora_A.weight.dtype == torch.bfloat16


def test_schedule_and_evaluation_are_moshi_finetunes(toy: MoshiCheckpoint, store: Path, tmp_path: Path) -> None:
    changes = {"max_steps": 10, "do_eval": True, "eval_freq": 5, "optim": {"lr": 1e-3, "pct_start": 0.3}}
    train_moshi(make_recipe(toy, store, **changes), tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    rates = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=10, pct_start=0.3)
    expected = []
    for _ in range(10):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        if len(expected) < 10:
            schedule.step()
    logged = [rates[step] for step in sorted(rates)]
    assert logged[1:9] in (pytest.approx(expected[1:9]), pytest.approx(expected[2:10]))
    evaluated = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [5, 10]
    for line in evaluated:
        assert line["eval_perplexity/text"] == pytest.approx(math.exp(line["eval_loss/text"]))


@pytest.mark.parametrize(("steps", "share"), [(20, 0.05), (2, 0.5)])
def test_a_rise_that_would_end_with_the_first_step_is_none(steps: int, share: float, tmp_path: Path) -> None:
    task = torch.nn.Linear(1, 1)
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=steps, learning_rate=1e-3, report_to="none")
    trainer = MoshiTrainer(checkpoint_config={}, pct_start=share, memory=None, model=task, args=arguments)
    trainer.create_optimizer_and_scheduler(steps)
    rates = []
    for _ in range(steps - 1):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates == sorted(rates, reverse=True)
    assert 5e-4 <= rates[0] * 1.001 <= 1.001e-3


def test_a_run_is_gone_on_with_for_more_steps_at_another_rate(
    toy: MoshiCheckpoint, store: Path, tmp_path: Path
) -> None:
    optim = {"lr": 1e-3, "pct_start": 0.3}
    train_moshi(make_recipe(toy, store, max_steps=4, ckpt_freq=2, optim=optim), tmp_path)
    later = {"max_steps": 8, "ckpt_freq": 4, "optim": {"lr": 5e-4, "pct_start": 0.3}, "max_norm": 0.5}
    train_moshi(make_recipe(toy, store, **later), tmp_path, resume=True)
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "metrics.jsonl") if "learning_rate" in line]
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-4, total_steps=8, pct_start=0.3)
    expected = []
    for _ in range(7):
        optimizer.step()
        schedule.step()
        expected.append(schedule.get_last_lr()[0])
    assert len(rates) == 8
    assert rates[4:7] in (pytest.approx(expected[3:6]), pytest.approx(expected[4:7]))
    with pytest.raises(RunError, match=r"differs in mode: when a run is resumed only .*max_steps.* may change"):
        train_moshi(make_recipe(toy, store, **later, mode="all"), tmp_path, resume=True)
    for optim in ({"muon": 0.02}, {"memory_lr": 1e-3}):  # whose state would not fit
        with pytest.raises(RunError, match=f"differs in optim.{next(iter(optim))}:"):
            train_moshi(make_recipe(toy, store, **later | {"optim": optim}), tmp_path, resume=True)
    with pytest.raises(RunError, match=r"differs in trainer.optim:"):
        train_moshi(make_recipe(toy, store, **later, trainer={"optim": "adafactor"}), tmp_path, resume=True)
    assert load_moshi_run(tmp_path, device="cpu").recipe.max_steps == 8


def test_norms_are_not_decayed_and_any_optimizer_of_the_trainer_goes(
    toy: MoshiCheckpoint, store: Path, tmp_path: Path
) -> None:
    lm = build_moshi(make_recipe(toy, store, mode="all"), toy)[0]
    task = MoshiForTraining(lm)
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=9, optim="adafactor", report_to="none")
    trainer = MoshiTrainer(checkpoint_config={}, pct_start=0.5, memory=None, model=task, args=arguments)
    decayed = trainer.get_decay_parameter_names(task)
    assert any(name.endswith("linear_in.weight") for name in decayed)
    assert not [name for name in decayed if name.endswith("alpha")]
    trainer.create_optimizer_and_scheduler(9)
    task.restore()


def test_the_command_trains_a_moshi_recipe_and_writes_its_report(
    toy: MoshiCheckpoint, store: Path, tmp_path: Path
) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(dump_recipe(make_recipe(toy, store)))
    assert recipe_kind(path) == "moshi"
    assert load_moshi_recipe(path) == make_recipe(toy, store)
    result = CliRunner().invoke(app, ["train", str(path), "max_steps=2", "--runs", str(tmp_path / "runs")])
    assert result.exit_code == 0, result.output
    report = (tmp_path / "runs" / "toy" / "report.html").read_text()
    assert "Training loss" in report
    assert "The memory while training" in report
    assert json.loads((tmp_path / "runs" / "toy" / "moshi" / "memory.json").read_text())["model"]["type"] == "LMModel"

    with wave.open(str(tmp_path / "in.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(24_000)
        file.writeframes(bytes(2 * 24_000))
    talk = [
        "moshi",
        "run",
        str(tmp_path / "in.wav"),
        str(tmp_path / "out.wav"),
        "--run",
        str(tmp_path / "runs" / "toy"),
    ]
    result = CliRunner().invoke(app, [*talk, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "memory: 0 chunks of 16 frames" in result.output  # 13 frames were heard
    result = CliRunner().invoke(app, [*talk, "--checkpoint", toy.source])
    assert "give --run alone" in str(result.exception)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"durations_sec": 3}, "durations_sec: unknown key; did you mean 'duration_sec'"),
        ({"full_finetuning": False}, "full_finetuning: .*mode says what is trained; false is mode: lora"),
        ({"save_adapters": True, "overwrite_run_dir": True}, "save_adapters: .*take it out\n.*never written over"),
        ({"wandb": {"project": "x"}}, "wandb: .*trainer: {report_to: wandb}"),
        ({"moshi_paths": {"mimi_path": "x"}}, "moshi_paths.mimi_path: .*one folder.*moshi_paths.hf_repo_id"),
        ({"lora": {"rang": 3}}, "lora.rang: unknown key; did you mean 'rank'"),
        ({"data": {"train_date": "x"}}, "data.train_date: unknown key; did you mean 'train_data'"),
        ({"memory": None}, "mode is 'memory' but there is no memory"),
        ({"mode": "memory+lora"}, r"lora.enable is false"),
        ({"lora": {"enable": True}}, r"lora.enable is true"),
        ({"mode": "lora", "lora": {"enable": True}}, "but there is a memory"),
        ({"trainer": {"learning_rate": 1}}, "'learning_rate' has a setting of its own: optim.lr"),
        ({"optim": {"muon": 0.02, "memory_lr": 0.01}}, "take memory_lr out, or muon"),
        ({"optim": {"muon": 0.02}, "trainer": {"optim": "adafactor"}}, "take optim out of trainer, or muon out"),
        ({"trainer": {"learning_rat": 1}}, "unknown key 'learning_rat'"),
        ({"data": {"train_data": "x", "duration_sec": 3}}, "data.duration_sec: unknown key"),
        (
            {"data": {"train_data": "x", "min_sec": 10}, "duration_sec": 5},
            "data.min_sec 10.0 is longer than duration_s",
        ),
        ({"duration_sec": 3000}, "duration_sec: Input should be less than or equal to 2560"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, Any], message: str) -> None:
    raw = {"name": "x", "moshi_paths": {}, "memory": {"layers": [0]}, "data": {"train_data": "x"}}
    with pytest.raises(RecipeError, match=message):
        check_recipe(MoshiRecipe, raw | changes)


def test_codes_of_another_mimi_and_documents_of_one_chunk_are_refused(
    toy: MoshiCheckpoint, store: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(store, other)
    for path in other.glob("*.json"):
        path.write_text(path.read_text().replace(toy.tokenizer_hash, "0" * 64))
    with pytest.raises(DataError, match=r"encoded with another text tokenizer.*inlay moshi encode DATA OUT --weights"):
        train_moshi(make_recipe(toy, other), tmp_path / "run")
    with pytest.raises(MemoryNeverReadError, match="no document is longer than a chunk"):
        train_moshi(make_recipe(toy, store, memory={"layers": [0], "chunk_size": 120}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_q": 8}, "has 16 streams of codes, .* reads 8: it cannot be trained on these conversations"),
        ({"card": 8}, "has 16 codes in a codebook, .* reads 8"),
        ({"existing_text_padding_id": 1}, "has 3 as the text's padding, .* reads 1"),
    ],
)
def test_a_model_of_other_streams_is_refused(
    changes: dict[str, Any], message: str, toy: MoshiCheckpoint, store: Path
) -> None:
    other = replace(toy, lm_config=toy.lm_config | changes)
    with pytest.raises(DataError, match=message):
        refuse_other_codes(make_recipe(toy, store).load_data(), other)


def test_packed_documents_are_refused_before_a_run_where_positions_are_counted(
    toy: MoshiCheckpoint, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inlay.train.moshi.counts_positions", lambda lm: True)
    data = {"train_data": str(store), "eval_data": str(store), "min_sec": 1.0, "packing": "concatenate"}
    with pytest.raises(DataError, match=r"use data\.packing: cut, or boundary: carry"):
        train_moshi(make_recipe(toy, store, data=data, duration_sec=15.0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_recipe_that_comes_along_is_valid() -> None:
    recipe = load_moshi_recipe(Path("recipes/moshi.yaml"))
    assert recipe.frames == 32_000
    assert yaml.safe_load(dump_recipe(recipe))["moshi_paths"] is not None


def test_two_processes_train_what_one_trains(toy: MoshiCheckpoint, store: Path, tmp_path: Path) -> None:
    """As under torchrun: two processes of one sequence each make the step of one process of two microbatches."""
    changes: dict[str, Any] = MODES["memory+lora"] | {"batch_size": 1, "gradient_checkpointing": True}
    train_moshi(make_recipe(toy, store, num_microbatches=2, **changes), tmp_path / "one")
    recipe = make_recipe(toy, store, **changes)
    in_two_processes(lambda rank: train_moshi(recipe, tmp_path / "two"))
    one, two = (dict(load_moshi_run(tmp_path / name).lm.named_parameters()) for name in ("one", "two"))
    for name in one:
        assert_close(two[name].float(), one[name].float(), 1e-5, name)
    logged = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in logged]
    assert len(losses[1]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_memory_that_its_clip_keeps_from_learning_is_told_of_as_the_doctor_does(
    toy: MoshiCheckpoint, store: Path, tmp_path: Path
) -> None:
    memory = {"layers": [0, 2], "chunk_size": 16, "eta": 1e-3, "max_update_norm": 1e-7, "init": {"normal": 0.1}}
    console = Console(file=StringIO(), width=150)
    recipe = make_recipe(toy, store, memory=memory, max_steps=4)
    train_moshi(recipe, tmp_path / "run", console=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "The memory does not learn" in said
    assert "clip" in said[said.index("The memory does not learn") :]


def test_a_runs_own_recipe_can_be_given_again_with_another_length(
    toy: MoshiCheckpoint, store: Path, tmp_path: Path
) -> None:
    data = {"train_data": str(store), "eval_data": str(store)}  # min_sec follows
    recipe = make_recipe(toy, store, data=data)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_moshi_recipe(path) == recipe
    shorter = load_moshi_recipe(path, ["duration_sec=4.8", "seed=3"])
    assert (shorter.frames, shorter.seed) == (60, 3)
    assert set(shorter.load_data().train_statistics.rows) == {(60,)}
