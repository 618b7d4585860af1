"""A compression run trains what it says, on every objective and at every ratio."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import LlamaForCausalLM

from inlay.data import FactsConfig, FactsDataset, QAExample, facts_tokenizer, load_qa
from inlay.softtoken.compressors import CompressorError
from inlay.softtoken.errors import LayoutError
from inlay.train.compress import (
    CompressionTask,
    CompressTrainer,
    TrainingError,
    build_task,
    load_compress_run,
    train_compressor,
)
from inlay.train.compress_data import ByContext, ContextCollator
from inlay.train.compress_report import objective_curves, write_compress_report
from inlay.train.directory import RunError
from inlay.train.trainer import read_metrics
from inlay.train.yaml_recipe import RecipeError
from tests.train.compression import DATA, FACTS, base_weights, build_decoder, decoder, figures, recipe, trained

__all__ = ["decoder"]


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


def test_a_loss_that_is_no_number_stops_the_run_and_names_objective_and_step(tmp_path: Path, decoder: Path) -> None:
    with pytest.raises(TrainingError, match=r"objective 'answer' is nan at step \d"):
        train_compressor(recipe(decoder, {"learning_rate": 1e30, "max_grad_norm": 0.0}), tmp_path / "run")
    with pytest.raises(RunError, match="is no run"):
        load_compress_run(tmp_path / "elsewhere")
