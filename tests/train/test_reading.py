"""A decoder answers from what its fast weights hold of a context, and learns to write what will be asked for."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inlay.fastweight import FastWeightConfig, attach
from inlay.softtoken.layout import PromptLayout
from inlay.train import directory, reading
from inlay.train.compress_data import tokenise_contexts
from inlay.train.directory import RunError
from inlay.train.reading import (
    ReadingRecipe,
    ReadingTask,
    filled,
    load_reading_run,
    no_slots,
    train_reading,
)
from inlay.train.trainer import read_metrics
from inlay.train.weights import save_weights
from inlay.train.yaml_recipe import RecipeError, check_recipe, dump_recipe
from tests.closeness import assert_close
from tests.processes import in_two_processes
from tests.softtoken.local import llama, words
from tests.train.compression import DATA, build_decoder, decoder  # noqa: F401

MEMORY = {"layers": [-1], "chunk_size": 4, "eta": 0.5, "init": "next_token", "normalize_target": True}
LAYOUT = PromptLayout(bos=False, question="{question}", anchor="Answer", answer_tokens=4)
TRAINER = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 3,
    "disable_tqdm": True,
    "use_cpu": True,
}


def task(seed: int = 0, **changes: Any) -> ReadingTask:
    model = llama(len(words()), seed, spread=0.1)
    memory = attach(model, FastWeightConfig.model_validate(MEMORY | changes))
    return ReadingTask(model, memory, LAYOUT.bind(words()))


def recipe(place: Path, **changes: Any) -> ReadingRecipe:
    raw = {
        "name": "run",
        "decoder": {"name_or_path": str(place)},
        "memory": MEMORY,
        "lora": {"r": 2},
        "data": DATA,
        "trainer": TRAINER,
    }
    return check_recipe(ReadingRecipe, raw | {"questions_per_context": 2} | changes)


def test_rows_are_filled_until_their_last_chunk_is_full() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 0, 0, 0], [5, 6, 7, 8, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]).bool()
    wide, real = filled(ids, mask, 4, end=1)
    assert [row[keep].tolist() for row, keep in zip(wide, real, strict=True)] == [
        [5, 6, 7, 8, 9, 1, 1, 1],
        [5, 6, 1, 1],
        [5, 6, 7, 8],
    ]
    short, kept = filled(ids[1:2], mask[1:2], 2, end=1)  # no longer than it needs to be
    assert (short.tolist(), kept.tolist()) == ([[5, 6]], [[True, True]])


def test_answers_are_those_of_the_base_model_with_the_contexts_sum_in_its_weight() -> None:
    """Only the sum goes from reading to answering: neither the cache nor the positions of the context."""
    reader = task(chunk_size=8)
    bare = copy.deepcopy(llama(len(words()), spread=0.1))
    contexts = ["Ada lives in Paris 3 4 5 6 7 8", "Bob lives in Paris 9"]
    with torch.no_grad():
        session = reader.read(*tokenise_contexts(reader.layout, contexts))
        assert session.tokens_read.tolist() == [16, 8]
        batch = reader.layout.training(reader.lm, no_slots(reader.lm, 2), ["Who?", "Who lives?"], ["3", "4 5"])
        assert max(batch.attention_mask.sum(1)) < 8  # nothing of the prompt is committed
        committed = session.copy()
        with committed:
            reader.lm(input_ids=torch.tensor([[3], [3]]), use_cache=False)
        sums = {index: layer.total() for index, layer in committed.state.layers.items()}
        inputs = {name: value for name, value in batch.inputs().items() if name != "labels"}
        with session:
            given = reader.lm(**inputs).logits
        for row in range(2):
            model = copy.deepcopy(bare)
            for index, total in sums.items():
                assert total[row].norm() > 0.1
                model.model.layers[index].mlp.down_proj.weight += MEMORY["eta"] * total[row]
            real = batch.attention_mask[row].bool()
            one = {name: value[row : row + 1] for name, value in inputs.items() if isinstance(value, torch.Tensor)}
            expected = model(**one).logits[0, real]
            assert_close(given[row, real], expected, 1e-4, f"row {row}")
            assert not torch.allclose(expected, bare(**one).logits[0, real], rtol=1e-2)


def test_gradients_reach_what_was_written_through_the_state() -> None:
    reader = task()
    reader.memory.train_only("memory")
    contexts, mask = tokenise_contexts(reader.layout, ["Ada lives in Paris 3 4 5 6", "Bob lives in Paris"])
    loss = reader(contexts, mask, torch.tensor([0, 1, 0]), ["Who?"] * 3, [("3",), ("4",), ("5 6",)])
    loss.backward()
    # Two questions are about the first context, which is read once.
    for name, parameter in reader.memory.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.norm() > 0, name
    projection = next(p for n, p in reader.memory.named_parameters() if n.endswith("projection"))
    assert projection.grad is not None
    flat = int(projection.grad.abs().argmax())
    row, column = divmod(flat, projection.shape[1])
    losses = []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            projection[row, column] += step
            losses.append(reader(contexts, mask, torch.tensor([0, 1, 0]), ["Who?"] * 3, [("3",), ("4",), ("5 6",)]))
            projection[row, column] -= step
    assert float(losses[0] - losses[1]) / 2e-2 == pytest.approx(float(projection.grad[row, column]), rel=0.02)


def test_what_was_read_decides_the_answer_once_it_is_learned() -> None:
    """The same question about two contexts: the prompt is one, so only the memory can tell the answers apart."""
    reader = task()
    reader.memory.train_only("all")
    texts, answers = ["Ada lives in 3 4", "Ada lives in 5 6", "Ada lives in 7 8"], ["3 4", "5 6", "7 8"]
    contexts, mask = tokenise_contexts(reader.layout, texts)
    optimizer = torch.optim.Adam([p for p in reader.parameters() if p.requires_grad], lr=5e-3)
    reader.train()
    for _ in range(60):
        loss = reader(contexts, mask, torch.arange(3), ["Who?"] * 3, [(text,) for text in answers])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
    reader.eval()
    with torch.no_grad():
        assert reader.answer(reader.read(contexts, mask), ["Who?"] * 3) == answers
        swapped = reader.read(contexts.flip(0), mask.flip(0))
        assert reader.answer(swapped, ["Who?"] * 3) == answers[::-1]
        alone = [reader.answer(reader.read(contexts[i : i + 1], mask[i : i + 1]), ["Who?"])[0] for i in range(3)]
        assert alone == answers
        assert len(set(reader.answer(reader.memory.session(3), ["Who?"] * 3))) == 1


def test_a_run_goes_on_where_it_stopped_and_is_loaded_as_it_was(tmp_path: Path, decoder: Path) -> None:  # noqa: F811
    train_reading(recipe(decoder), tmp_path / "whole")
    train_reading(recipe(decoder, trainer=TRAINER | {"max_steps": 3}), tmp_path / "cut")
    with pytest.raises(RunError, match="holds a run already"):
        train_reading(recipe(decoder), tmp_path / "cut")
    with pytest.raises(RunError, match="another recipe"):
        train_reading(recipe(decoder, seed=1), tmp_path / "cut", resume=True)
    train_reading(recipe(decoder), tmp_path / "cut", resume=True)
    whole, cut = load_reading_run(tmp_path / "whole"), load_reading_run(tmp_path / "cut")
    named = dict(whole.task.named_parameters())
    assert named.keys() == dict(cut.task.named_parameters()).keys()
    assert all(torch.equal(named[name], parameter) for name, parameter in cut.task.named_parameters())
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line]
        for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6

    base = build_decoder()
    after = {
        name.replace(".base_layer", "").replace("base_model.model.", ""): parameter
        for name, parameter in whole.task.decoder.named_parameters()
    }
    assert all(torch.equal(after[name], parameter) for name, parameter in base.named_parameters())
    assert any(p.abs().sum() > 0 for n, p in after.items() if "lora_B" in n)
    assert whole.trained == sum(p.numel() for n, p in after.items() if "lora_" in n or "target." in n)
    (tmp_path / "cut" / "finished").unlink()
    with pytest.raises(RunError, match="no finished run"):
        load_reading_run(tmp_path / "cut")


def test_of_two_processes_the_first_writes_for_both(tmp_path: Path, decoder: Path) -> None:  # noqa: F811
    asked = recipe(decoder, trainer=TRAINER | {"max_steps": 2, "per_device_train_batch_size": 2})

    def slowly(*given: Any) -> None:
        time.sleep(0.5)
        save_weights(*given)

    def never(*given: Any) -> None:
        raise AssertionError("both write")

    def work(rank: int) -> None:
        reading.save_weights = never if rank else slowly
        directory.dump_recipe = never if rank else dump_recipe  # as begin_run writes it
        train_reading(asked, tmp_path / "run")
        assert (tmp_path / "run" / "finished").is_file()  # the second waits for it

    in_two_processes(work)
    assert load_reading_run(tmp_path / "run", device="cpu").recipe == asked
    losses = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert losses == [1, 2]


def test_the_decoder_is_loaded_as_the_recipe_says(tmp_path: Path, decoder: Path) -> None:  # noqa: F811
    section = {"name_or_path": str(decoder), "dtype": "bfloat16", "attn_implementation": "eager"}
    train_reading(recipe(decoder, decoder=section, trainer=TRAINER | {"max_steps": 1}), tmp_path / "run")
    lm = load_reading_run(tmp_path / "run", device="cpu").task.lm
    assert lm.get_input_embeddings().weight.dtype == torch.bfloat16
    assert lm.config._attn_implementation == "eager"


def test_a_recipe_names_what_is_wrong(decoder: Path) -> None:  # noqa: F811
    with pytest.raises(RecipeError, match="label_smoothing_factor has no effect"):
        recipe(decoder, trainer={"label_smoothing_factor": 0.1})
    with pytest.raises(RecipeError, match="memry: unknown key; did you mean 'memory'"):
        recipe(decoder, memry={})
    with pytest.raises(RecipeError, match="config gives random weights"):
        recipe(decoder, decoder={"config": {"model_type": "llama"}})
    assert recipe(decoder, decoder=str(decoder)) == recipe(decoder)  # as runs of before have it
