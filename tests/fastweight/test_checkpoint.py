"""A memory on disk: what goes in comes out, and what does not fit changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

import inlay
from inlay import CheckpointError, NonFiniteMemoryError
from inlay.fastweight import checkpoint
from inlay.files import sha256
from tests.fastweight.families import BY_NAME, MODELS, Model, hook_counts, modules_of, snapshot

LLAMA = BY_NAME["llama"]
TENSORS, HEADER = "memory.safetensors", "memory.json"


def trained(mode: Any, family: Model = LLAMA, training: bool = True, **changes: Any) -> tuple[nn.Module, inlay.Memory]:
    """A model and its memory after two steps of training."""
    model = family.make()
    memory = inlay.attach(model, family.config(**changes)).train_only(mode)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train(training)
    for step in range(2):
        optimizer.zero_grad()
        family.loss(model, family.tokens(2, 22, seed=step)).backward()
        optimizer.step()
    return model.eval(), memory


def logits(model: nn.Module, family: Model = LLAMA) -> Tensor:
    with torch.no_grad():
        return family.logits(model, family.tokens(2, 22))


def names(directory: Path) -> set[str]:
    return set(safetensors.torch.load_file(directory / TENSORS))


@pytest.mark.parametrize("mode", ["memory", "memory+layers", "all"])
@pytest.mark.parametrize("family", MODELS, ids=lambda family: family.name)
def test_the_round_trip_is_exact(family: Model, mode: str, tmp_path: Path) -> None:
    model, memory = trained(mode, family)
    memory.save_pretrained(tmp_path)
    again = family.make()
    loaded = inlay.attach_pretrained(again, tmp_path)
    assert loaded.config == memory.config
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in again.named_parameters())
    assert torch.equal(logits(again, family), logits(model, family))


def test_training_the_memory_alone_saves_no_tensor_of_the_base(tmp_path: Path) -> None:
    trained("memory")[1].save_pretrained(tmp_path)
    assert names(tmp_path) == {f"memory.{i}.{name}" for i in (0, 2) for name in ("conv", "projection")}


@pytest.mark.parametrize("training", [True, False], ids=["train mode", "eval mode"])
def test_base_tensors_that_were_trained_are_saved_and_no_others(training: bool, tmp_path: Path) -> None:
    """In eval mode too, which is how some switch dropout off."""
    trained("memory+layers", training=training)[1].save_pretrained(tmp_path)
    base = {name.removeprefix("base.") for name in names(tmp_path) if name.startswith("base.")}
    assert base == {
        n for n, _ in LLAMA.make().named_parameters() if n.startswith(("model.layers.0.", "model.layers.2."))
    }


def test_a_forward_without_a_backward_trains_nothing(tmp_path: Path) -> None:
    model = LLAMA.make().train()
    memory = inlay.attach(model, LLAMA.config())
    LLAMA.loss(model, LLAMA.tokens(2, 22))
    memory.train_only("memory")
    LLAMA.loss(model, LLAMA.tokens(2, 22)).backward()
    memory.save_pretrained(tmp_path)
    assert not any(name.startswith("base.") for name in names(tmp_path))


def test_a_base_trained_while_the_memory_was_off_is_saved(tmp_path: Path) -> None:
    model = LLAMA.make().train()
    memory = inlay.attach(model, LLAMA.config()).train_only("all")
    with memory.disabled():
        LLAMA.loss(model, LLAMA.tokens(2, 22)).backward()
    memory.save_pretrained(tmp_path)
    assert "base.model.embed_tokens.weight" in names(tmp_path)


def test_base_tensors_can_be_left_out(tmp_path: Path) -> None:
    _, memory = trained("all")
    memory.save_pretrained(tmp_path, base=False)
    assert not any(name.startswith("base.") for name in names(tmp_path))


def test_a_loaded_memory_saves_again_what_it_was_loaded_with(tmp_path: Path) -> None:
    trained("memory+layers")[1].save_pretrained(tmp_path / "one")
    inlay.attach_pretrained(LLAMA.make(), tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = (safetensors.torch.load_file(tmp_path / d / TENSORS) for d in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_bfloat16_model_keeps_a_float32_memory_through_the_round_trip(tmp_path: Path) -> None:
    model = LLAMA.make().bfloat16()
    memory = inlay.attach(model, LLAMA.config())
    memory.save_pretrained(tmp_path)
    again = LLAMA.make().bfloat16()
    inlay.attach_pretrained(again, tmp_path)
    assert {t.dtype for t in safetensors.torch.load_file(tmp_path / TENSORS).values()} == {torch.float32}
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain target", "PEFT target"])
def test_a_memory_saved_from_a_peft_model_fits_the_plain_one_and_the_other_way_round(
    wrapped: bool, tmp_path: Path
) -> None:
    def peft_model(model: nn.Module) -> nn.Module:
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))

    source, target = LLAMA.make(), LLAMA.make()
    source, target = (source, peft_model(target)) if wrapped else (peft_model(source), target)
    memory = inlay.attach(source, LLAMA.config()).train_only("memory+layers")
    LLAMA.loss(source.train(), LLAMA.tokens(2, 22)).backward()
    memory.save_pretrained(tmp_path)
    assert not any("lora" in name or "base_layer" in name for name in names(tmp_path))
    inlay.attach_pretrained(target, tmp_path)
    assert torch.equal(logits(target), logits(source.eval()))


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """A consistent save with other tensors in it."""
    tensors = safetensors.torch.load_file(directory / TENSORS)
    change(tensors)
    safetensors.torch.save_file(tensors, directory / TENSORS)
    header = json.loads((directory / HEADER).read_text())
    header["tensors"] = {name: [*t.shape] for name, t in tensors.items()}
    header["sha256"] = sha256(directory / TENSORS)
    (directory / HEADER).write_text(json.dumps(header))


def edit_header(directory: Path, **changes: Any) -> None:
    header = json.loads((directory / HEADER).read_text())
    (directory / HEADER).write_text(json.dumps(header | changes))


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def header_of_another_save(directory: Path) -> None:
    """What two runs that write to one directory leave behind."""
    header = (directory / HEADER).read_bytes()
    inlay.attach(LLAMA.make(), LLAMA.config()).save_pretrained(directory)
    (directory / HEADER).write_bytes(header)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda d: rewrite(d, lambda t: t.pop("memory.2.conv")), r"missing there: \['memory.2.conv'\]"),
    "unexpected": (
        lambda d: rewrite(d, lambda t: t.update({"memory.1.conv": torch.zeros(2)})),
        r"no place here: \['memory.1.conv'\]",
    ),
    "unexpected base": (
        lambda d: rewrite(d, lambda t: t.update({"base.model.nothing": torch.zeros(2)})),
        r"no place here: \['base.model.nothing'\]",
    ),
    "shape": (
        lambda d: rewrite(d, lambda t: t.update({"memory.0.conv": torch.zeros(16, 3)})),
        r"memory.0.conv is \[16, 3\] there and \[16, 5\] here",
    ),
    "NaN": (lambda d: rewrite(d, lambda t: t["memory.0.conv"].fill_(float("nan"))), "'memory.0.conv' holds NaN"),
    "truncated tensors": (lambda d: cut(d / TENSORS, 0.7), "is damaged"),
    "truncated in its header": (lambda d: cut(d / TENSORS, 0.01), "is damaged"),
    "empty tensors": (lambda d: cut(d / TENSORS, 0), "is damaged"),
    "one bit": (lambda d: flip_a_bit(d / TENSORS), "is damaged"),
    "two saves": (header_of_another_save, "not of the same save"),
    "truncated JSON": (lambda d: cut(d / HEADER, 0.5), "is not a memory's header"),
    "empty JSON": (lambda d: cut(d / HEADER, 0), "is not a memory's header"),
    "no text": (lambda d: (d / HEADER).write_bytes(b"\xff\xfe\x00{}"), "is not a memory's header"),
    "a list": (lambda d: (d / HEADER).write_text("[1]"), "is not a memory's header"),
    "odd model": (lambda d: edit_header(d, model="llama"), "is not a memory's header"),
    "odd tensors": (lambda d: edit_header(d, tensors="none"), "is not a memory's header"),
    "unknown key": (lambda d: edit_header(d, config={"chunks": 3}), "chunks"),
    "format": (lambda d: edit_header(d, format=2), r"is of format 2, this version of inlay .* reads 1"),
    "no tensors": (lambda d: (d / TENSORS).unlink(), "memory.safetensors is missing"),
    "no header": (lambda d: (d / HEADER).unlink(), "memory.json is missing"),
    "model type": (
        lambda d: edit_header(d, model={"type": "gpt2", "blocks": 3, "projection": "mlp.down_proj"}),
        "of another model: type is 'gpt2' there and 'llama' here",
    ),
    "blocks": (
        lambda d: edit_header(d, model={"type": "llama", "blocks": 30, "projection": "mlp.down_proj"}),
        "blocks is 30 there and 3 here",
    ),
    "projection": (
        lambda d: edit_header(d, model={"type": "llama", "blocks": 3, "projection": "fc2"}),
        "projection is 'fc2' there and 'mlp.down_proj' here",
    ),
    "intermediate size": (
        lambda d: edit_header(d, model={"intermediate_size": 31}),
        r"intermediate_size is 31 there and 32 here\. Load it into the model that it was trained with",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused_and_changes_nothing(damage: str, tmp_path: Path) -> None:
    trained("memory+layers")[1].save_pretrained(tmp_path)
    break_it, message = DAMAGES[damage]
    break_it(tmp_path)
    model = LLAMA.make()
    before, modules, keys, hooks = snapshot(model), modules_of(model), list(model.state_dict()), hook_counts(model)
    with pytest.raises(CheckpointError, match=message):
        inlay.attach_pretrained(model, tmp_path)
    assert modules_of(model) == modules
    assert list(model.state_dict()) == keys
    assert hook_counts(model) == hooks
    assert inlay.find_memory(model) is None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_memory_of_a_wider_model_is_refused(tmp_path: Path) -> None:
    inlay.attach(LLAMA.make(), LLAMA.config()).save_pretrained(tmp_path)
    wide = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2
        )
    )
    with pytest.raises(CheckpointError, match=r"memory.0.conv is \[16, 5\] there and \[32, 5\] here"):
        inlay.attach_pretrained(wide, tmp_path)
    assert inlay.find_memory(wide) is None


@pytest.mark.parametrize("damage", ["missing", "one bit", "model type"])
def test_loading_into_an_attached_memory_is_as_strict_and_keeps_it(damage: str, tmp_path: Path) -> None:
    model, memory = trained("memory")
    trained("memory+layers")[1].save_pretrained(tmp_path)
    before = logits(model)
    break_it, message = DAMAGES[damage]
    break_it(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        memory.load(tmp_path)
    assert torch.equal(logits(model), before)


def test_a_memory_with_nan_is_not_written(tmp_path: Path) -> None:
    _, memory = trained("memory")
    memory.save_pretrained(tmp_path)
    before = (tmp_path / TENSORS).read_bytes()
    with torch.no_grad():
        memory.layers[2].target.conv[0, 0] = float("inf")
    with pytest.raises(NonFiniteMemoryError, match="block 2 holds NaN or infinity in 'conv'"):
        memory.save_pretrained(tmp_path)
    assert (tmp_path / TENSORS).read_bytes() == before


@pytest.mark.parametrize("failing", ["tensors", "header"])
def test_a_write_that_fails_leaves_the_old_save_whole(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, memory = trained("memory")
    memory.save_pretrained(tmp_path)
    expected = logits(model)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(files) == {TENSORS, HEADER}
    with torch.no_grad():
        memory.layers[0].target.conv.add_(1.0)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    if failing == "tensors":
        monkeypatch.setattr(checkpoint, "save_file", full)
    else:
        monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        memory.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    again = LLAMA.make()
    inlay.attach_pretrained(again, tmp_path)
    assert torch.equal(logits(again), expected)
