"""A compression run trains what it says, leaves everything in one directory, and goes on exactly after a stop."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from inlay.data import FactsConfig, FactsDataset, QAExample, facts_tokenizer, load_qa
from inlay.softtoken.compressors import CompressorError
from inlay.softtoken.errors import LayoutError
from inlay.train import base_lm
from inlay.train.compress import (
    CompressionTask,
    CompressRun,
    CompressTrainer,
    TrainingError,
    build_task,
    load_compress_run,
    train_compressor,
)
from inlay.train.compress_data import ByContext, ContextCollator, tokenise_contexts
from inlay.train.compress_recipe import CompressRecipe, parse_compress_recipe
from inlay.train.compress_report import objective_curves, write_compress_report
from inlay.train.directory import RunError
from inlay.train.trainer import read_metrics
from inlay.train.yaml_recipe import RecipeError
from tests.processes import in_two_processes

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
    return parse_compress_recipe(
        {
            "name": "run",
            "decoder": {"name_or_path": str(place)},
            "compressor": {"kind": "encoder-pool", "ratios": [2, 4], "lora": {"r": 2, "lora_dropout": 0.1}},
            "layout": {"answer_tokens": 4},
            "data": DATA,
            "trainer": TRAINER | (trainer or {}),
            **sections,
        }
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


def test_thirty_steps_lower_the_answers_loss_and_leave_the_decoder_as_it_was(tmp_path: Path, decoder: Path) -> None:
    few = {"max_steps": 30, "per_device_train_batch_size": 8, "save_strategy": "no"}
    train_compressor(recipe(decoder, few, data=DATA | {"train_examples": 8}), tmp_path / "run")
    losses = [line["loss/answer"] for line in figures(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
    run = load_compress_run(tmp_path / "run")
    before, after = base_weights(LlamaForCausalLM.from_pretrained(decoder)), base_weights(run.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(tensor.abs().sum() > 0 for name, tensor in trained(run).items() if "lora_B" in name)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"recipe.yaml", "metrics.jsonl", "tensorboard", "compressor", "tokenizer", "finished"} <= names
    assert not {"model", "decoder_adapter", "cues.safetensors"} & names


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


def test_each_objective_is_logged_by_itself_and_the_loss_is_their_weighted_sum(tmp_path: Path, decoder: Path) -> None:
    weights = {"answer": 1.0, "first_token": 0.5, "distillation": 2.0}
    evaluating = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    train_compressor(recipe(decoder, evaluating, objectives=weights), tmp_path / "run")
    for line in figures(tmp_path / "run"):
        expected = sum(weight * line[f"loss/{name}"] for name, weight in weights.items())
        assert line["loss"] == pytest.approx(expected, rel=1e-4)
    held_out = objective_curves(tmp_path / "run", "eval_loss/")
    assert {name: steps for name, (steps, _) in held_out.items()} == {name: [2.0] for name in weights}
    report = write_compress_report(tmp_path / "run").read_text()
    assert "distillation" in report
    assert report.count("<svg") >= 2


def test_tensorboard_has_what_metrics_jsonl_has_of_both_stages(tmp_path: Path, decoder: Path) -> None:
    evaluating = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    asked = recipe(decoder, evaluating, pretraining={"max_steps": 2, "continuation": 0.0})
    train_compressor(asked, tmp_path / "run")
    for directory, objective in ((tmp_path / "run", "answer"), (tmp_path / "run" / "pretraining", "reconstruction")):
        events = EventAccumulator(str(directory / "tensorboard"))
        events.Reload()
        for split, prefix in (("train", ""), ("eval", "eval_")):
            tag = f"{split}/loss/{objective}"
            written = [(event.step, event.value) for event in events.Scalars(tag)]
            lines = [line for line in read_metrics(directory / "metrics.jsonl") if f"{prefix}loss/{objective}" in line]
            assert [step for step, _ in written] == [line["step"] for line in lines] != []
            assert [value for _, value in written] == pytest.approx(
                [line[f"{prefix}loss/{objective}"] for line in lines]
            )


def test_one_compressor_is_trained_at_every_ratio(tmp_path: Path, decoder: Path) -> None:
    seen: list[int | None] = []

    class Watching(CompressTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            forward = model.forward

            def noting(*a: Any, **k: Any) -> Any:
                seen.append(k["ratio"])
                return forward(*a, **k)

            model.forward = noting
            try:
                return super().compute_loss(model, inputs, *args, **kwargs)
            finally:
                model.forward = forward

    changes = {"max_steps": 12, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    train_compressor(recipe(decoder, changes), tmp_path / "run", trainer_class=Watching)
    assert seen[::2] == seen[1::2]  # a step has one ratio
    assert set(seen) == {2, 4}


def test_questions_about_one_context_share_its_slots(decoder: Path) -> None:
    data = load_qa(recipe(decoder).data)
    grouped = ByContext(data.eval, 2)
    assert [len(group) for group in grouped] == [2] * 4
    assert [one for group in grouped for one in group] == list(data.eval)
    layout = recipe(decoder).layout.bind(facts_tokenizer(FACTS))
    batch = ContextCollator(layout, 12)(grouped[:3])
    assert batch["contexts"].shape == batch["mask"].shape == (3, 12)
    assert batch["index"].tolist() == [0, 0, 1, 1, 2, 2]
    first = facts_tokenizer(FACTS)(data.eval[0].context)["input_ids"]
    assert batch["contexts"][0].tolist() == first[:12]


def test_every_question_is_in_one_group_wherever_it_stands() -> None:
    examples = [QAExample(str(n), context, f"q{n}", ("a",)) for n, context in enumerate("abacaab")]
    groups = ByContext(examples, 3)
    assert [[one.id for one in group] for group in groups] == [["0", "2", "4"], ["5"], ["1", "6"], ["3"]]
    assert len(ByContext(examples, 1)) == 7
    whole = FactsConfig.model_validate(DATA | {"eval_examples": 7})
    assert [len(group) for group in ByContext(FactsDataset(whole, "eval"), 4)] == [2, 2, 2, 1]


def test_a_frozen_decoder_has_no_dropout_while_its_compressor_trains(decoder: Path) -> None:
    model = build_decoder()
    asked = recipe(decoder, decoder_lora={"r": 2, "lora_dropout": 0.5})
    task: CompressionTask = build_task(asked, model, facts_tokenizer(FACTS))
    task.train()
    training = {name for name, module in task.named_modules() if module.training and "lora" not in name}
    assert not any(name.startswith("decoder.") for name in training)
    assert any(name.startswith("compressor") for name in training)
    dropouts = [module for module in task.modules() if isinstance(module, nn.Dropout)]
    assert dropouts
    assert all(module.training for module in dropouts)
    task.gradient_checkpointing_enable()
    task.train()
    assert model.model.layers[0].training
    assert not model.model.layers[0].self_attn.training
    task.eval()
    assert not any(module.training for module in task.modules())


@pytest.mark.parametrize("extra", [{"bf16": True}, {"gradient_checkpointing": True}], ids=["bf16", "checkpointing"])
def test_bf16_and_checkpointing_stay_close_to_the_plain_run(
    tmp_path: Path, decoder: Path, extra: dict[str, Any]
) -> None:
    few = {"max_steps": 3, "save_strategy": "no", "learning_rate": 1e-3}
    train_compressor(recipe(decoder, few | extra), tmp_path / "extra")
    train_compressor(recipe(decoder, few), tmp_path / "plain")
    losses = [[line["loss"] for line in figures(tmp_path / name)] for name in ("extra", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02 if "bf16" in extra else 1e-5)


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


def test_a_layout_that_does_not_go_with_the_memory_is_refused_before_anything_is_written(
    tmp_path: Path, decoder: Path
) -> None:
    compressor = {"kind": "encoder-pool", "form": "kv"}
    with pytest.raises(LayoutError, match="bos: false, bos_after: true"):
        train_compressor(recipe(decoder, compressor=compressor, layout={"bos": True}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_scheduled_sampling_grows_from_zero_and_is_off_in_evaluation(
    tmp_path: Path, decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, float]] = []
    forward = CompressionTask.forward

    def noted(task: CompressionTask, *args: Any, **kwargs: Any) -> Any:
        seen.append((task.training, kwargs.get("sampling", 0.0)))
        return forward(task, *args, **kwargs)

    monkeypatch.setattr(CompressionTask, "forward", noted)
    few = {"max_steps": 4, "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 4}
    objectives = {"answer": 1.0, "scheduled_sampling": 0.8}
    train_compressor(recipe(decoder, few, objectives=objectives), tmp_path / "run")
    assert [share for training, share in seen if training] == pytest.approx([0.0, 0.2, 0.4, 0.6])
    assert {share for training, share in seen if not training} == {0.0}


def test_a_context_that_is_too_long_is_named_before_anything_is_written(tmp_path: Path, decoder: Path) -> None:
    lines = [
        {"context": "the " * many, "question": "the ?", "answers": "the", "id": f"n{many}"} for many in (9, 300, 12)
    ]
    held = {"context": "the", "question": "the ?", "answers": "the", "id": "held"}
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "held.jsonl").write_text(json.dumps(held))
    data = {"source": "jsonl", "id_field": "id"}
    data |= {"path": str(tmp_path / "train.jsonl"), "eval_path": str(tmp_path / "held.jsonl")}
    with pytest.raises(
        CompressorError, match=r"question n300: a context of 300 tokens .* split or cut it .context_tokens"
    ):
        train_compressor(recipe(decoder, data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train_compressor(recipe(decoder, {"max_steps": 1}, data=data, context_tokens=16), tmp_path / "run")


@pytest.mark.parametrize(
    "sections",
    [
        {"compressor": {"kind": "encoder-pool", "form": "kv"}, "layout": {"bos_after": True}},
        {"compressor": {"kind": "encoder-tokens", "slots": 4}},
        {"compressor": {"kind": "crossattention", "positions": "raw", "calibrate": False}},
        {"compressor": {"kind": "pool"}, "decoder_lora": {"r": 2}},
    ],
    ids=["kv", "fixed slots", "cross-attention", "pool and LoRA"],
)
def test_every_kind_and_form_trains_on_every_objective(tmp_path: Path, decoder: Path, sections: dict[str, Any]) -> None:
    weights = {"answer": 1.0, "distillation": 1.0, "reconstruction": 0.5, "continuation": 0.5, "diversity": 0.1}
    few = {"max_steps": 2, "save_strategy": "no"}
    outcome = train_compressor(recipe(decoder, few, objectives=weights, **sections), tmp_path / "run")
    assert outcome["train_loss"] > 0
    assert load_compress_run(tmp_path / "run").compressor.config.kind == sections["compressor"]["kind"]


def test_a_decoder_that_cannot_be_loaded_is_named_with_what_it_may_be(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot load the decoder .*nowhere(.|\n)*decoder\.name_or_path is a hub id"):
        train_compressor(recipe(tmp_path / "nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_recipe_cannot_be_resumed_and_more_steps_can(tmp_path: Path, decoder: Path) -> None:
    train_compressor(recipe(decoder, {"max_steps": 3}), tmp_path / "run")
    with pytest.raises(RunError, match="another recipe"):
        train_compressor(recipe(decoder, seed=1), tmp_path / "run", resume=True)
    train_compressor(recipe(decoder, {"max_steps": 5}), tmp_path / "run", resume=True)
    assert [line["step"] for line in figures(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_a_loss_that_is_no_number_stops_the_run_and_names_objective_and_step(tmp_path: Path, decoder: Path) -> None:
    with pytest.raises(TrainingError, match=r"objective 'answer' is nan at step \d"):
        train_compressor(recipe(decoder, {"learning_rate": 1e30, "max_grad_norm": 0.0}), tmp_path / "run")
    with pytest.raises(RunError, match="is no run"):
        load_compress_run(tmp_path / "elsewhere")
