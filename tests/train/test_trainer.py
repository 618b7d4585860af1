"""A loss is what it is called: per token or per row, however rows fall into batches and over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from inlay.data.packing import NO_LABEL
from inlay.fastweight import FastWeightConfig, attach
from inlay.train import InlayTrainer
from inlay.train.loss_parts import LossPartsTrainer
from inlay.train.trainer import best_checkpoint
from tests.processes import in_two_processes

VOCABULARY = 32
LENGTHS = (2, 12, 3, 11, 4)


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.5,
        )
    )


def rows() -> list[dict[str, Tensor]]:
    """Rows of 12 tokens, the shorter ones padded; the first label of a row is never asked for."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in LENGTHS:
        ids = torch.randint(VOCABULARY, (12,), generator=generator)
        labels = ids.where(torch.arange(12) < length, NO_LABEL)
        made.append({"input_ids": ids, "labels": labels})
    return made


def loss_by_hand() -> float:
    """Nats per token, token by token in float64."""
    net, nats = model().eval(), []
    with torch.no_grad():
        for row, length in zip(rows(), LENGTHS, strict=True):
            scores = net(input_ids=row["input_ids"][None]).logits[0].double().log_softmax(-1)
            nats += [-float(scores[place - 1, row["input_ids"][place]]) for place in range(1, length)]
    return sum(nats) / len(nats)


def arguments(directory: Path, batch_size: int, **others: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(directory),
        per_device_eval_batch_size=batch_size,
        per_device_train_batch_size=batch_size,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **others,
    )


def evaluated(directory: Path, batch_size: int) -> float:
    trainer = InlayTrainer(memory=None, model=model(), args=arguments(directory, batch_size), eval_dataset=rows())
    return float(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_evaluation_loss_is_per_token_whatever_the_batches(tmp_path: Path, batch_size: int) -> None:
    logged: list[dict[str, float]] = []

    class Keep(TrainerCallback):
        def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
            logged.append(dict(logs))

    trainer = InlayTrainer(
        memory=None,
        model=model(),
        args=arguments(tmp_path, batch_size),
        eval_dataset={"held": rows(), "short": rows()[:1]},
        callbacks=[Keep()],
    )
    metrics = trainer.evaluate()
    assert metrics["eval_held_loss"] == pytest.approx(loss_by_hand(), rel=1e-5)
    assert logged[0]["eval_held_loss"] == metrics["eval_held_loss"]
    assert metrics["eval_short_loss"] != metrics["eval_held_loss"]


def test_two_processes_have_the_loss_of_one(tmp_path: Path) -> None:
    """Five rows in batches of two: the last batch is filled up with rows that were there, which count once."""
    in_two_processes(lambda rank: (tmp_path / f"{rank}.txt").write_text(str(evaluated(tmp_path, 2))))
    for rank in (0, 1):
        assert float((tmp_path / f"{rank}.txt").read_text()) == pytest.approx(loss_by_hand(), rel=1e-5)


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, values: Tensor) -> Tensor:
        return self.scale * values.mean()


class MeanTrainer(LossPartsTrainer):
    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = model(inputs["values"])
        self.note_parts(model.training, {"part": loss})
        return loss


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5])
def test_a_short_last_batch_does_not_weigh_as_much_as_a_full_one(tmp_path: Path, batch_size: int) -> None:
    values = [{"values": torch.tensor(float(value))} for value in (1, 2, 3, 4, 90)]
    chosen = arguments(
        tmp_path,
        batch_size,
        num_train_epochs=1,
        learning_rate=0.0,
        logging_steps=-(-5 // batch_size),
        save_strategy="no",
    )
    trainer = MeanTrainer(model=Mean(), args=chosen, train_dataset=values, eval_dataset=values)
    assert trainer.evaluate()["eval_loss/part"] == pytest.approx(20)
    trainer.train()
    assert [line["loss/part"] for line in trainer.state.log_history if "loss/part" in line] == [pytest.approx(20)]


@pytest.mark.parametrize("values", [(1, 2, 3, 4, 90), (1, 2, 90), (90,), (1, 2, 3, 90)])
def test_two_processes_count_each_row_once_in_every_part(tmp_path: Path, values: tuple[int, ...]) -> None:
    """The last batch of two may hold a row and one that was there already, or two that were."""

    def work(rank: int) -> None:
        data = [{"values": torch.tensor(float(value))} for value in values]
        metrics = MeanTrainer(model=Mean(), args=arguments(tmp_path, 2), eval_dataset=data).evaluate()
        (tmp_path / f"{rank}.txt").write_text(f"{metrics['eval_loss']} {metrics['eval_loss/part']}")

    in_two_processes(work)
    for rank in (0, 1):
        figures = [float(figure) for figure in (tmp_path / f"{rank}.txt").read_text().split()]
        assert figures == pytest.approx([sum(values) / len(values)] * 2)


def test_the_best_checkpoint_of_a_renamed_run_is_found_in_its_new_folder(tmp_path: Path) -> None:
    base = model()
    memory = attach(base, FastWeightConfig(layers=[1], chunk_size=4, eta=0.1))
    trainer = InlayTrainer(memory=memory, model=base, args=arguments(tmp_path, 1))
    before = {name: p.detach().clone() for name, p in memory.named_parameters()}
    trainer._save(str(tmp_path / "checkpoint-3"))
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(1.0)
    trainer.state.best_model_checkpoint = "/as/it/was/called/checkpoint-3"
    assert best_checkpoint(trainer.state, trainer.args) == tmp_path / "checkpoint-3"
    trainer._load_best_model()
    assert all(torch.equal(p, before[name]) for name, p in memory.named_parameters())


def test_a_trainer_of_parts_finds_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = MeanTrainer(model=Mean(), args=arguments(tmp_path, 1))
    loaded: list[str] = []
    monkeypatch.setattr(trainer, "_load_from_checkpoint", loaded.append)
    trainer.state.best_model_checkpoint = "/as/it/was/called/checkpoint-3"
    trainer._load_best_model()
    assert loaded == [str(tmp_path / "checkpoint-3")]
