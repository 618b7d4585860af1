"""What fine-tuning leaves behind: saved, read back, read by Kyutai's own loader."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from moshi.models import loaders
from safetensors.torch import load_file, save_file
from torch import nn

import inlay
from inlay import CheckpointError, FastWeightConfig, InlayError
from inlay.moshi.checkpoint import load_finetuned, load_trained, save_finetuned
from inlay.moshi.lora import LoraConfig, add_lora, embedding_parameters
from inlay.moshi.model import MoshiForTraining
from inlay.moshi.toy import ToySizes, write_toy_checkpoint
from inlay.moshi.weights import MoshiCheckpoint, load_checkpoint
from inlay.moshi.yarn import YarnConfig, apply_yarn, yarn_of
from tests.moshi.models import make_codes, outputs

SIZES = ToySizes(dim=16, num_layers=3, num_heads=2, context=12, card=16, depformer_dim=8, depformer_layers=1)
LORA = LoraConfig(enable=True, rank=2, ft_embed=True)
MEMORY = FastWeightConfig(layers=[0, 2], chunk_size=8, eta=0.1)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> MoshiCheckpoint:
    folder = tmp_path_factory.mktemp("toy")
    return load_checkpoint(write_toy_checkpoint(folder, sizes=SIZES), dtype=torch.float32)


def raw(toy: MoshiCheckpoint) -> dict[str, Any]:
    assert toy.info.raw_config is not None
    return toy.info.raw_config


def trained(toy: MoshiCheckpoint, kind: str, steps: int = 2) -> nn.Module:
    """A model after a few steps in one mode."""
    lm = toy.load_lm().train()
    if "lora" in kind:
        add_lora(lm, LORA)
    memory = inlay.attach(lm, MEMORY) if "memory" in kind else None
    if memory is not None:
        memory.train_only({"memory": "memory", "memory+layers": "memory+layers", "memory+lora": "memory+lora"}[kind])
    elif kind == "lora":
        for name, parameter in lm.named_parameters():
            parameter.requires_grad_(".lora_" in name)
    if "lora" in kind:
        for parameter in embedding_parameters(lm).values():
            parameter.requires_grad_(True)
    task = MoshiForTraining(lm)
    optimizer = torch.optim.AdamW([p for p in lm.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        task(make_codes(1, 40)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    task.restore()
    return lm.eval()


def logits(lm: nn.Module, frames: int = 20) -> torch.Tensor:
    """Of a model whose parameters ask for no gradient: matmul picks its kernel by that."""
    return torch.cat([x.flatten() for x in outputs(lm.requires_grad_(False), make_codes(1, frames))])


@pytest.mark.parametrize("kind", ["memory", "memory+layers", "memory+lora", "lora", "all"])
def test_everything_that_was_trained_comes_back_in_one_call_to_the_bit(
    toy: MoshiCheckpoint, kind: str, tmp_path: Path
) -> None:
    lm = trained(toy, kind)
    save_finetuned(tmp_path, lm, raw(toy))
    again, memory = load_finetuned(toy, tmp_path)
    assert (memory is not None) == ("memory" in kind)
    theirs, ours = dict(lm.named_parameters()), dict(again.named_parameters())
    assert theirs.keys() == ours.keys()
    changed = 0
    fresh = dict(toy.load_lm().named_parameters())
    for name, parameter in theirs.items():
        assert torch.equal(parameter, ours[name]), name
        changed += name not in fresh or not torch.equal(parameter, fresh[name])
    assert changed
    assert torch.equal(logits(lm), logits(again))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["memory", "memory+layers", "memory+lora", "lora"])
def test_what_was_loaded_is_saved_again_to_the_byte(
    toy: MoshiCheckpoint, kind: str, frozen: bool, tmp_path: Path
) -> None:
    """Also the embeddings that were trained with adapters, and whatever asks for gradients by then."""
    save_finetuned(tmp_path / "one", trained(toy, kind), raw(toy))
    again, _ = load_finetuned(toy, tmp_path / "one")
    if frozen:
        again.requires_grad_(False)
    save_finetuned(tmp_path / "two", again, raw(toy))
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}


def test_a_longer_window_is_saved_with_what_was_trained_in_it(toy: MoshiCheckpoint, tmp_path: Path) -> None:
    lm = toy.load_lm().requires_grad_(False)
    add_lora(lm, LORA)
    apply_yarn(lm, YarnConfig(factor=2.0, beta_fast=16.0))
    save_finetuned(tmp_path, lm, raw(toy))
    again, _ = load_finetuned(toy, tmp_path)
    assert again.context == 2 * SIZES.context
    assert yarn_of(again) == YarnConfig(factor=2.0, beta_fast=16.0, original_context=SIZES.context)
    load_trained(again, tmp_path)
    for frames in (20, 40):  # within the longer window, and past it
        assert torch.equal(logits(lm, frames), logits(again, frames))
    plain = toy.load_lm()
    assert not torch.equal(logits(plain), logits(again))
    (tmp_path / "yarn.json").write_text('{"factor": 0.5}')
    with pytest.raises(CheckpointError, match=r"yarn\.json is damaged"):
        load_finetuned(toy, tmp_path)
    save_finetuned(tmp_path, plain, raw(toy))  # into the same folder: the window of before goes
    assert not (tmp_path / "yarn.json").exists()


def test_kyutais_own_loader_reads_the_adapters(toy: MoshiCheckpoint, tmp_path: Path) -> None:
    lm = trained(toy, "lora")
    save_finetuned(tmp_path, lm, raw(toy))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["lora"], config["lora_rank"], config["lora_scaling"]) == (True, 2, 2.0)
    info = loaders.CheckpointInfo.from_hf_repo(
        "nowhere",
        moshi_weights=toy.info.moshi_weights,
        mimi_weights=toy.info.mimi_weights,
        tokenizer=toy.info.tokenizer,
        config_path=tmp_path / "config.json",
        mimi_config_path=Path(toy.source) / "mimi_config.json",
        lora_weights=tmp_path / "lora.safetensors",
    )
    theirs = info.get_moshi(dtype=torch.float32)
    assert torch.equal(logits(theirs), logits(lm))


def test_adapters_under_the_older_names_of_attention_are_read_as_kyutai_reads_them(
    toy: MoshiCheckpoint, tmp_path: Path
) -> None:
    lm = trained(toy, "lora")
    save_finetuned(tmp_path, lm, raw(toy))
    tensors = load_file(tmp_path / "lora.safetensors")
    older = {re.sub(r"^(transformer\..*)(in|out)_projs\.0\.", r"\1\2_proj.", name): t for name, t in tensors.items()}
    assert older.keys() != tensors.keys()
    save_file(older, tmp_path / "lora.safetensors")
    assert torch.equal(logits(load_finetuned(toy, tmp_path)[0]), logits(lm))


def test_files_of_before_do_not_stay_in_the_folder(toy: MoshiCheckpoint, tmp_path: Path) -> None:
    kinds = {
        "all": {"consolidated.safetensors"},
        "lora": {"lora.safetensors"},
        "memory+lora": {"lora.safetensors", "memory.json", "memory.safetensors"},
        "memory": {"memory.json", "memory.safetensors"},
    }
    for kind in ("all", "lora", "memory+lora", "memory", "all"):
        save_finetuned(tmp_path, trained(toy, kind, steps=0), raw(toy))
        assert {path.name for path in tmp_path.iterdir()} == kinds[kind] | {"config.json"}


def test_a_memory_of_before_does_not_stay_in_the_folder(toy: MoshiCheckpoint, tmp_path: Path) -> None:
    lm = trained(toy, "memory")
    save_finetuned(tmp_path, lm, raw(toy))
    memory = inlay.find_memory(lm)
    assert memory is not None
    memory.detach()
    save_finetuned(tmp_path, lm.requires_grad_(False), raw(toy))
    assert load_finetuned(toy, tmp_path)[1] is None


def test_an_empty_list_of_conditioners_asks_for_no_condition(toy: MoshiCheckpoint, tmp_path: Path) -> None:
    lm = loaders.get_moshi_lm(None, {**toy.lm_config, "conditioners": {}}, device="cpu", dtype=torch.float32)
    assert lm.condition_provider is not None
    MoshiForTraining(lm).restore()
    lm.condition_provider.conditioners["style"] = nn.Identity()
    with pytest.raises(InlayError, match="conditioned"):
        MoshiForTraining(lm)


def test_kyutais_own_loader_reads_a_whole_model(toy: MoshiCheckpoint, tmp_path: Path) -> None:
    lm = trained(toy, "all")
    save_finetuned(tmp_path, lm, raw(toy))
    theirs = loaders.get_moshi_lm(tmp_path / "consolidated.safetensors", dict(toy.lm_config), dtype=torch.float32)
    assert torch.equal(logits(theirs), logits(lm))


def test_fresh_adapters_change_nothing(toy: MoshiCheckpoint) -> None:
    lm = toy.load_lm()
    before = logits(lm)
    add_lora(lm, LORA)
    assert torch.equal(logits(lm), before)
    with pytest.raises(inlay.InlayError, match="adapters already"):
        add_lora(lm, LORA)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json is missing"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda d: (d / "lora.safetensors").unlink(), "lora.safetensors is missing"),
        (lambda d: (d / "lora.safetensors").write_bytes(b"no"), "lora.safetensors is damaged"),
        (lambda d: (d / "memory.safetensors").unlink(), "memory.safetensors is missing"),
        (lambda d: rename(d, "text_linear.lora_A.weight", "text_linear.lora_a.weight"), "nearest is 'text_linear.lor"),
        (lambda d: rename(d, "text_linear.lora_A.weight", None), "'text_linear.lora_A.weight' among them"),
        (lambda d: replace(d, "lora_rank", 3), r"is \[2, \d+\] there and \[3, \d+\] in this model"),
        (lambda d: replace(d, "dim", 32), "dim is 32 there and 16 here"),
    ],
)
def test_damage_is_named(toy: MoshiCheckpoint, tmp_path: Path, harm: Any, message: str) -> None:
    save_finetuned(tmp_path, trained(toy, "memory+lora", steps=0), raw(toy))
    harm(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_finetuned(toy, tmp_path)


def rename(directory: Path, name: str, to: str | None) -> None:
    tensors = load_file(directory / "lora.safetensors")
    tensor = tensors.pop(name)
    save_file(tensors | ({} if to is None else {to: tensor}), directory / "lora.safetensors")


def replace(directory: Path, key: str, value: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def test_what_is_trained_and_has_no_file_is_refused(toy: MoshiCheckpoint, tmp_path: Path) -> None:
    lm = trained(toy, "memory+lora", steps=0)
    lm.out_norm.alpha.requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"trained and have no file: out_norm\.alpha"):
        save_finetuned(tmp_path, lm, raw(toy))


def test_a_wrong_file_leaves_the_model_as_it_was(toy: MoshiCheckpoint, tmp_path: Path) -> None:
    lm = trained(toy, "lora", steps=0)
    save_finetuned(tmp_path, lm, raw(toy))
    rename(tmp_path, "text_linear.lora_A.weight", "text_linear.lora_a.weight")
    before = {name: p.clone() for name, p in lm.named_parameters()}
    with pytest.raises(CheckpointError):
        load_trained(lm, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in lm.named_parameters())
