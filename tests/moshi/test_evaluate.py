"""Evaluating Moshi: loss by position and on returned phrases, against a count token by token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import inlay
from inlay import FastWeightConfig
from inlay.cli import app
from inlay.evaluate.moshi import MoshiEvaluation, evaluate_moshi, measure_moshi
from inlay.evaluate.scoring import EvaluationError
from inlay.moshi.loss import LossConfig
from inlay.moshi.model import MoshiForTraining
from inlay.moshi.sequences import MoshiSequences, SequenceConfig, load_sequences
from inlay.moshi.weights import MoshiCheckpoint
from inlay.report.jsonfile import plain as plain_json
from inlay.train.moshi import train_moshi
from tests.moshi.runs import make_recipe, make_store, make_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> MoshiCheckpoint:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, toy: MoshiCheckpoint) -> Path:
    return make_store(tmp_path_factory.mktemp("codes"), toy, files=3)


def sequences(store: Path, duration_sec: float = 9.6, **options: Any) -> MoshiSequences:
    settings = {"min_sec": 0.5, "packing": "cut"} | options
    config = SequenceConfig(train_data=str(store), eval_data=str(store), **settings)
    return load_sequences(config, duration_sec=duration_sec).eval


def task(toy: MoshiCheckpoint, *, remembers: bool = True) -> MoshiForTraining:
    lm = toy.load_lm()
    if remembers:
        memory = inlay.attach(lm, FastWeightConfig(layers=[0, 2], chunk_size=16, eta=0.1))
        generator = torch.Generator().manual_seed(1)
        for parameter in memory.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return MoshiForTraining(lm, LossConfig(text_padding_weight=0.25))


@pytest.mark.parametrize("packing", ["cut", "concatenate"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_figures_are_those_of_a_count_token_by_token(
    toy: MoshiCheckpoint, store: Path, packing: str, batch_size: int
) -> None:
    data = sequences(store, packing=packing, duration_sec=7.0)  # 88 frames: the last windows are shorter
    model = task(toy)
    measured = measure_moshi(model, data, batch_size=batch_size, returned_after=20)
    sums = {(stream, part): [0.0, 0] for stream in ("text", "audio") for part in ("returned", "other")}
    by_position = np.zeros((2, 88))
    weighted = {"text": [0.0, 0.0], "audio": [0.0, 0.0]}
    with torch.no_grad():
        for row in (data[index] for index in range(len(data))):
            codes, documents, distances = row["codes"], row["documents"], row["return_distances"]
            nats = model(codes[None], documents[None]).nats[0].double()
            for step in range(codes.shape[1]):
                for stream in range(9):
                    frame = step - model.lm.delays[stream]
                    if frame < 0 or documents[frame] != documents[step]:
                        continue
                    code, name = int(codes[stream, frame]), "text" if stream == 0 else "audio"
                    padding = stream == 0 and code in (0, 3)
                    weight = 0.25 if padding else 1.0
                    weighted[name][0] += weight * float(nats[stream, step])
                    weighted[name][1] += weight
                    if padding:
                        continue
                    part = sums[name, "returned" if distances[frame] > 20 else "other"]
                    part[0] += float(nats[stream, step]) / math.log(2)
                    part[1] += 1
                    by_position[int(stream > 0), step] += float(nats[stream, step]) / math.log(2)
    for number, name in enumerate(("text", "audio")):
        loss = measured[name]
        for part in ("returned", "other"):
            bits, count = sums[name, part]
            assert getattr(loss, part).counts.sum() == count > 0
            assert getattr(loss, part).bits == pytest.approx(bits / count, rel=1e-5)
        assert loss.position.sums == pytest.approx(by_position[number], rel=1e-4, abs=1e-4)
        assert loss.position.document_sums.sum() == pytest.approx(by_position[number].sum(), rel=1e-5)
        assert loss.nats == pytest.approx(weighted[name][0] / weighted[name][1], rel=1e-5)
        files = {(piece.store, piece.entry) for row in data.rows for piece in row}
        assert loss.position.documents == len(loss.returned.sums) == len(files)
        assert loss.position.sequences == len(data) != len(files)


def test_a_second_evaluation_gives_the_same_figures(toy: MoshiCheckpoint, store: Path) -> None:
    model, data = task(toy), sequences(store)
    model.train()
    first, second = (evaluate_moshi(model, data).to_json() for _ in range(2))
    assert first == second
    assert model.training
    assert all(module.training for module in model.modules())


def test_eta_0_is_the_model_without_its_memory_and_gains_are_over_it(toy: MoshiCheckpoint, store: Path) -> None:
    data = sequences(store)
    evaluation = evaluate_moshi(task(toy), data)
    plain = evaluate_moshi(task(toy, remembers=False), data)
    assert list(evaluation.variants) == ["memory", "eta = 0"]
    assert list(plain.variants) == ["no memory"]
    off, without = evaluation.variants["eta = 0"], plain.variants["no memory"]
    for stream in ("text", "audio"):
        assert plain_json(off[stream].to_json()) == plain_json(without[stream].to_json())
        gain = evaluation.gain("memory", stream)
        on = evaluation.variants["memory"][stream].returned.bits
        assert gain.mean == pytest.approx(off[stream].returned.bits - on)
        assert abs(gain.mean) > 1e-4
    with pytest.raises(EvaluationError, match="no baseline"):
        plain.gain("no memory", "text")


def test_losses_of_other_sequences_are_not_compared(toy: MoshiCheckpoint, store: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", toy, files=3, seed=9)
    model = task(toy, remembers=False)
    one, two = (measure_moshi(model, sequences(where)) for where in (store, other))
    with pytest.raises(EvaluationError, match="different sequences"):
        MoshiEvaluation(12, 12).add({"one": one, "two": two})


def test_the_command_writes_figures_and_a_report(toy: MoshiCheckpoint, store: Path, tmp_path: Path) -> None:
    train_moshi(make_recipe(toy, store, evaluate={"batch_size": 2}), tmp_path)
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "Loss by position, audio" in result.output
    figures = json.loads((tmp_path / "evaluation.json").read_text())
    assert figures["returned_after_frames"] == 12
    gain = figures["gain_over_baseline"]["memory"]["text"]["returned"]["mean"]
    on, off = (figures["variants"][v]["text"]["returned_phrases"]["bits_per_token"] for v in ("memory", "eta = 0"))
    assert gain == pytest.approx(off - on)
    report = (tmp_path / "report.html").read_text()
    assert "Returned phrases" in report
    assert "Loss by position, text" in report
