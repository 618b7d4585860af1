"""Every check fires on a recipe with its fault, is silent once that is mended, and on the recipes that come along."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import TypeAdapter
from safetensors import safe_open
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from inlay import FastWeightConfig, attach
from inlay.data import Data, load_data
from inlay.doctor.findings import Severity
from inlay.doctor.lint import Lint, lint_model, lint_recipe
from inlay.doctor.lint_checks import CHECKS
from inlay.fastweight.memory import TrainMode
from inlay.report import Report, render_report
from inlay.train import Recipe, check_recipe, load_recipe
from inlay.train.weights import save_weights
from tests.fastweight.families import BY_NAME

LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
SOUND: dict[str, Any] = {
    "name": "x",
    "model": {"config": LLAMA},
    "memory": {"layers": [1], "chunk_size": 16, "eta": 0.01},
    "data": {"task": "text", "source": "python-stdlib", "sequence_length": 128, "tokenizer": {"kind": "bytes"}},
    "mode": "all",
    "trainer": {"max_steps": 10, "learning_rate": 1e-3},
}
SHIPPED = [Path("src/inlay/recipes") / f"{name}.yaml" for name in ("recall", "stdlib")]


def recipe(**changes: Any) -> Recipe:
    """The sound recipe with values changed by their paths, e.g. ``memory__eta=0``."""
    raw = copy.deepcopy(SOUND)
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = raw
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return check_recipe(Recipe, raw)


def codes(lint: Lint) -> list[str]:
    return [finding.code for finding in lint.findings()]


def outcome(lint: Lint, title: str) -> str:
    """Why a check was not made; empty if it was."""
    return next(o.not_checked for o in lint.outcomes if o.title == title)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_recipes_that_come_along_are_sound(path: Path) -> None:
    assert lint_recipe(load_recipe(path)).findings() == []


def test_the_recall_recipe_is_sound_with_its_data() -> None:
    sound = load_recipe("src/inlay/recipes/recall.yaml")
    lint = lint_recipe(sound, data=load_data(sound.data))
    assert lint.findings() == []
    assert outcome(lint, "Short documents") == ""


STREAM = {
    "data__source": "dataset",
    "data__path": "x",
    "data__streaming": True,
    "data__max_eval_sequences": 4,
}
FATAL, WARNING = Severity.FATAL, Severity.WARNING
FAULTS: list[tuple[str, Severity, dict[str, Any], dict[str, Any], str]] = [
    # code, severity, the fault, what mends it, what the sentence says
    ("never_read", FATAL, {"memory__chunk_size": 128}, {"memory__chunk_size": 18}, "128 tokens are not longer"),
    ("never_read", FATAL, {"memory__chunk_size": 200, "memory__boundary": "carry"}, {"memory__chunk_size": 18}, "200"),
    ("few_chunks", WARNING, {"memory__chunk_size": 64}, {"data__sequence_length": 512}, "hold 2 chunks of 64"),
    ("layers", FATAL, {"memory__layers": [1, 3]}, {"memory__layers": [1, 2]}, "indices run from 0 to 2"),
    ("layers", FATAL, {"memory__layers": [1, -2]}, {"memory__layers": "every:2"}, "names a block twice"),
    ("eta", FATAL, {"memory__eta": 0}, {"memory__eta": 3e-4}, "multiplied by 0"),
    ("clip", FATAL, {"memory__max_update_norm": 1e-5}, {"memory__max_update_norm": 1}, "at most 1.8e-06 of"),
    ("clip", FATAL, {"memory__max_update_ratio": 1e-7}, {"memory__max_update_ratio": None}, "max_update_ratio: 1e-07"),
    (
        "clip",
        FATAL,
        {"memory__max_update_norm": 0.005, "trainer__bf16": True},
        {"trainer__bf16": False},
        "bfloat16 rounds off what is below 2.0e-03",
    ),
    ("exposure", WARNING, {"memory__exposure": 0.5}, {"memory__exposure": 0}, "15 tokens that come after it"),
    (
        "half_weights",
        WARNING,
        {"model__dtype": "bfloat16", "trainer__learning_rate": 1e-5},
        {"model__dtype": "float32", "trainer__bf16": True},
        "around 0.1 are 4.9e-04 apart",
    ),
    ("half_weights", FATAL, {"model__dtype": "float16"}, {"model__dtype": "float32"}, "cannot hold less than 6e-08"),
    (
        "steps",
        FATAL,
        {"trainer__max_steps": -1, "trainer__num_train_epochs": 0},
        {"trainer__num_train_epochs": 1},
        "nothing is trained",
    ),
    ("steps", FATAL, {**STREAM, "trainer__max_steps": -1}, {"trainer__max_steps": 5}, "has to be told its steps"),
    ("learning_rate", FATAL, {"trainer__learning_rate": 0}, {"trainer__learning_rate": 1e-3}, "nothing is learnt"),
    ("learning_rate", WARNING, {"memory_learning_rate": 3.0}, {"memory_learning_rate": 3e-3}, "about that in each"),
    (
        "overlap",
        WARNING,
        {"data__source": "dataset", "data__path": "x", "data__eval_split": "train"},
        {"data__eval_split": "test"},
        "both read the split train of x",
    ),
    (
        "contexts",
        WARNING,
        {"evaluate": {"block": 32, "contexts": [32, 128]}},
        {"evaluate": {"block": 32, "contexts": [32, 96]}},
        "asks for 160 tokens",
    ),
]


def test_the_sound_recipe_is_sound() -> None:
    assert lint_recipe(recipe()).findings() == []


@pytest.mark.parametrize(("code", "severity", "fault", "mended", "says"), FAULTS)
def test_a_fault_is_found_and_nothing_once_it_is_mended(
    code: str, severity: Severity, fault: dict[str, Any], mended: dict[str, Any], says: str
) -> None:
    (finding,) = lint_recipe(recipe(**fault)).findings()
    assert (finding.code, finding.severity) == (f"lint.{code}", severity)
    assert says in finding.says
    assert finding.fix
    assert lint_recipe(recipe(**fault | mended)).findings() == []


@pytest.mark.parametrize(("tokens", "share"), [(1_875, "1.6e-08"), (32_000, "2.9e-07")])
def test_the_clip_of_the_moshi_port_is_found_however_long_the_sequence(tokens: int, share: str) -> None:
    """Frobenius norm 1e-5, D = 4,096, C = 256, η = 3e-4: 8 chunks, and 125, which would not have helped."""
    config = {"model_type": "llama", "hidden_size": 4096, "initializer_range": 0.02}
    memory = {"layers": [1], "chunk_size": 256, "eta": 3e-4, "max_update_norm": 1e-5}
    (finding,) = lint_recipe(recipe(model={"config": config}, memory=memory, data__sequence_length=tokens)).findings()
    assert finding.code == "lint.clip"
    assert f"at most {share} of its layer's output" in finding.says


def test_several_faults_are_told_worst_first() -> None:
    lint = lint_recipe(recipe(memory__exposure=1, memory__eta=0, memory__layers=[9]), source=Path("my/run.yaml"))
    assert codes(lint) == ["lint.layers", "lint.eta", "lint.exposure"]
    assert TypeAdapter(Lint).validate_json(TypeAdapter(Lint).dump_json(lint)) == lint
    page = render_report(Report("Lint", sections=[lint.section()]))
    assert "my/run.yaml" in page
    assert "not checked: the data are not loaded" in page


def test_what_cannot_be_known_is_not_called_fine(tmp_path: Path) -> None:
    unknown = {"model": {"name_or_path": str(tmp_path)}, "memory__layers": [99], "memory__max_update_norm": 1e-5}
    lint = lint_recipe(recipe(**unknown))
    assert lint.findings() == []
    for title in ("Memory layers", "Clipping"):
        assert f"not checked: cannot load the model {tmp_path}: " in outcome(lint, title)
    plain = lint_recipe(recipe(memory=None))
    assert outcome(plain, "Exposure") == "not checked: the recipe has no memory"
    assert [o.title for o in plain.outcomes] == list(CHECKS)


def test_a_model_on_disk_tells_its_blocks_and_dtype(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA | {"dtype": "bfloat16"}))
    model = {"name_or_path": str(tmp_path), "dtype": "auto"}
    assert codes(lint_recipe(recipe(model=model, memory__layers=[3], mode="memory"))) == ["lint.layers"]
    assert codes(lint_recipe(recipe(model=model, trainer__learning_rate=1e-5))) == ["lint.half_weights"]
    assert codes(lint_recipe(recipe(model=model, trainer__learning_rate=1e-5, mode="memory"))) == []


def text_data(tmp_path: Path, learnt: list[str], held: list[str], **changes: Any) -> tuple[Recipe, Data]:
    """A recipe on documents written to ``tmp_path`` (a byte is a token), and its data."""
    for name, documents in (("train", learnt), ("eval", held)):
        lines = [json.dumps({"text": document}) for document in documents]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    paths = {"data__path": str(tmp_path / "train.jsonl"), "data__eval_path": str(tmp_path / "eval.jsonl")}
    made = recipe(data__source="jsonl", **paths, **changes)
    return made, load_data(made.data)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"data__packing": "cut", "data__min_tokens": 2}, "data.min_tokens: 17"),
        ({"data__packing": "concatenate"}, "memory.boundary: carry"),
    ],
)
def test_short_documents_are_counted(tmp_path: Path, changes: dict[str, Any], advice: str) -> None:
    """Three of five documents have 11 tokens (10 bytes and the end), chunks have 16."""
    learnt = ["a" * 10, "b" * 10, "c" * 10, "d" * 80, "e" * 100]
    faulty, data = text_data(tmp_path, learnt, ["f" * 100], **changes)
    lint = lint_recipe(faulty, data=data)
    (finding,) = lint.findings()
    assert (finding.code, finding.severity) == ("lint.short_documents", WARNING)
    shown = data.statistics.train
    assert shown is not None
    lengths = [int(n) for n in shown.piece_tokens]
    assert f"{100 * sum(n <= 16 for n in lengths) / len(lengths):.1f} % of the {len(lengths)} training" in finding.says
    assert advice in finding.fix
    carried = recipe(data__source="jsonl", **_paths(tmp_path), **changes, memory__boundary="carry")
    assert codes(lint_recipe(carried, data=data)) == []


def test_documents_that_are_all_short_are_fatal(tmp_path: Path) -> None:
    faulty, data = text_data(tmp_path, ["a" * 10, "b" * 12], ["f" * 10], data__min_tokens=2)
    (finding,) = lint_recipe(faulty, data=data).findings()
    assert (finding.code, finding.severity) == ("lint.short_documents", FATAL)


@pytest.mark.parametrize("packing", ["cut", "concatenate"])
def test_evaluation_documents_are_looked_for_in_the_training_data(tmp_path: Path, packing: str) -> None:
    learnt = [letter * 100 for letter in "abcdef"]
    # Where documents are concatenated, the end of a row cuts this one elsewhere than in training.
    faulty, data = text_data(tmp_path, learnt, ["z" * 100, "c" * 100], data__packing=packing)
    (finding,) = lint_recipe(faulty, data=data).findings()
    assert (finding.code, finding.severity) == ("lint.overlap", WARNING)
    assert finding.says.startswith("1 of 2 evaluation")
    sound, data = text_data(tmp_path, learnt, ["z" * 100, "y" * 100], data__packing=packing)
    assert lint_recipe(sound, data=data).findings() == []


def _paths(folder: Path) -> dict[str, str]:
    return {"data__path": str(folder / "train.jsonl"), "data__eval_path": str(folder / "eval.jsonl")}


def test_evaluation_files_within_the_training_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    for name in ("a.txt", "b.txt", "held/c.txt", "held/d.txt"):
        (tmp_path / name).write_text("text")
    inside = recipe(data__source="files", data__path=str(tmp_path), data__eval_path=str(tmp_path / "held"))
    (finding,) = lint_recipe(inside).findings()
    assert (finding.code, finding.severity) == ("lint.overlap", WARNING)
    assert "2 of the 2 evaluation files" in finding.says
    link = tmp_path.parent / f"{tmp_path.name}-link"
    link.symlink_to(tmp_path)
    linked = recipe(data__source="files", data__path=str(tmp_path / "*.txt"), data__eval_path=str(link / "b.txt"))
    assert codes(lint_recipe(linked)) == ["lint.overlap"]
    apart = recipe(data__source="files", data__path=str(tmp_path / "*.txt"), data__eval_path=str(tmp_path / "held"))
    assert codes(lint_recipe(apart)) == []
    missing = recipe(data__source="files", data__path=str(tmp_path / "none"), data__eval_path=str(tmp_path))
    assert "no such file" in outcome(lint_recipe(missing), "Evaluation sources")


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{k: v for k, v in (LLAMA | changes).items() if k != "model_type"}))


def memory_share(model: LlamaForCausalLM, config: FastWeightConfig, ids: torch.Tensor) -> float:
    """RMS of what the memory of block 1 adds to the last chunk, relative to the plain projection's output."""
    memory = attach(model, config)
    seen: dict[str, torch.Tensor] = {}
    memory.layers[1].observer = lambda o: seen.update(z=o.z[:, -config.chunk_size :], out=o.output)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        slow = seen["z"] @ memory.layers[1].weight.T
    added = seen["out"][:, -config.chunk_size :] - slow
    memory.detach()
    return float(added.norm() / slow.norm())


@pytest.mark.parametrize("alike", [False, True], ids=["random tokens", "one token repeated"])
def test_a_clipped_memory_keeps_within_the_share_that_lint_allows_it(alike: bool) -> None:
    """The bound η (n − 1) τ / (σ √D) holds, and a sequence whose updates all point one way comes near it."""
    eta, limit, size, tokens = 0.5, 0.01, 16, 128
    config = FastWeightConfig(layers=[1], chunk_size=size, eta=eta, init={"normal": 5.0}, max_update_norm=limit)
    ids = torch.full((1, tokens), 7) if alike else torch.arange(3, 3 + tokens).unsqueeze(0)
    shares = [memory_share(llama(seed, hidden_size=64), config, ids) for seed in range(3)]
    bound = eta * (tokens // size - 1) * limit / (LLAMA["initializer_range"] * math.sqrt(64))
    assert max(shares) <= 1.3 * bound  # of a random W0, σ √D ‖z‖ is what ‖W0 z‖ is on average
    if alike:
        assert min(shares) >= 0.5 * bound


def test_what_lint_calls_rounded_off_is_lost_in_bfloat16() -> None:
    """A memory at a tenth of the resolution changes few of the outputs, in float32 nearly all of them."""
    ids = torch.arange(3, 131).unsqueeze(0)
    changed = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = llama(hidden_size=64).to(dtype)
        limit = 0.1 * torch.finfo(torch.bfloat16).eps / 4 * LLAMA["initializer_range"] * math.sqrt(64) / 7
        config = FastWeightConfig(layers=[1], chunk_size=16, eta=1.0, init={"normal": 5.0}, max_update_norm=limit)
        outputs: list[torch.Tensor] = []
        memory = attach(model, config)
        memory.layers[1].observer = lambda o, outputs=outputs: outputs.append(o.output)
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
            with memory.using(eta=0.0):
                model(input_ids=ids, use_cache=False)
        changed[dtype] = float((outputs[0] != outputs[1])[:, 16:].float().mean())
    assert changed[torch.bfloat16] < 0.1
    assert changed[torch.float32] > 0.5


@pytest.mark.parametrize(
    ("dtype", "rate", "lost"),
    [(torch.bfloat16, 1e-5, True), (torch.float32, 1e-5, False), (torch.bfloat16, 1e-3, False)],
)
def test_small_steps_of_adamw_are_lost_in_bfloat16_weights(dtype: torch.dtype, rate: float, lost: bool) -> None:
    """The premise of `lint.half_weights`: weights of std 0.02, twenty steps one way."""
    torch.manual_seed(0)
    weight = nn.Parameter((0.02 * torch.randn(1000)).to(dtype))
    before = weight.detach().double()
    optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0, fused=True)
    for _ in range(20):
        weight.grad = torch.full_like(weight, 1e-3)
        optimizer.step()
    moved = float((before - weight.detach().double()).mean()) / (20 * rate)
    assert (moved < 0.5) == lost
    assert lost or moved == pytest.approx(1, abs=0.05)


def test_float16_weights_take_wrong_steps() -> None:
    """The premise of the fatal one: the same steps, as PyTorch's two forms of AdamW take them."""
    for fused in (True, False):
        weight = nn.Parameter(torch.full((100,), 0.02, dtype=torch.float16))
        optimizer = torch.optim.AdamW([weight], lr=1e-4, weight_decay=0, fused=fused)
        for _ in range(20):
            weight.grad = torch.full_like(weight, 1e-3)
            optimizer.step()
        moved = float((0.02 - weight.detach().double()).mean())
        assert not moved < 2 * 20 * 1e-4  # twice the way and more, or infinite


MODES: list[TrainMode] = ["memory", "memory+layers", "memory+lora", "all"]


def wrapped(mode: TrainMode) -> tuple[nn.Module, Any]:
    family = BY_NAME["llama"]
    model: nn.Module = family.make()
    if mode == "memory+lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    memory = attach(model, family.config())
    return model, memory.train_only(mode)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_saves_all_that_it_trains(mode: TrainMode, tmp_path: Path) -> None:
    """What a recipe can ask for has no gap: the files hold as many numbers as require a gradient."""
    model, memory = wrapped(mode)
    assert lint_model(memory) == []
    BY_NAME["llama"].loss(model, BY_NAME["llama"].tokens(2, 12)).backward()
    save_weights(model, memory, tmp_path)
    saved = 0
    for path in tmp_path.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            saved += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert saved == sum(p.numel() for p in model.parameters() if p.requires_grad)


def _under_the_head() -> tuple[Any, nn.Module]:
    model = BY_NAME["llama"].make()
    return attach(model.get_submodule("model"), BY_NAME["llama"].config()), model


def _adapters_without_peft() -> tuple[Any, nn.Module]:
    model: Any = BY_NAME["llama"].make()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    return attach(model, BY_NAME["llama"].config()).train_only("memory+lora"), model


@pytest.mark.parametrize(("make", "name"), [(_under_the_head, "lm_head.weight"), (_adapters_without_peft, "lora_A")])
def test_a_trained_parameter_that_is_not_saved_is_found(
    make: Callable[[], tuple[Any, nn.Module]], name: str, tmp_path: Path
) -> None:
    memory, model = make()
    (finding,) = lint_model(memory, model)
    assert (finding.code, finding.severity) == ("lint.unsaved", WARNING)
    assert name in finding.says
    BY_NAME["llama"].loss(model, BY_NAME["llama"].tokens(2, 12)).backward()
    assert any(name in key and p.grad is not None for key, p in model.named_parameters())
    save_weights(model, memory, tmp_path)
    with safe_open(tmp_path / "memory" / "memory.safetensors", "pt") as file:
        assert not any(name in key for key in file.keys())  # noqa: SIM118
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert lint_model(memory, model) == []


def test_peft_around_an_attached_model_saves_what_it_adds() -> None:
    model = BY_NAME["llama"].make()
    memory = attach(model, BY_NAME["llama"].config())
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert any("modules_to_save" in name for name, p in peft.named_parameters() if p.requires_grad)
    assert lint_model(memory, peft) == []
    assert [f.code for f in lint_model(memory)] == ["lint.unsaved"]  # without the PeftModel nobody saves the adapters
