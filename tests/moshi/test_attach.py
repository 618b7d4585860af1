"""A memory in Kyutai's own LMModel."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from moshi.modules.gating import ActivationGating
from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora, replace_lora_with_linear
from torch import Tensor, nn

import inlay
from inlay import AttachError, CheckpointError, FastWeightConfig
from inlay.fastweight import FastWeightProjection, fast_weight_linear_reference
from inlay.fastweight.errors import MemoryGoneError
from inlay.moshi import require_moshi
from inlay.moshi.gating import ModularGating
from inlay.moshi.lora import fuse_lora
from tests.closeness import assert_close, relative_error
from tests.moshi.models import TEXT_CARD, WIDTH, make_codes, make_lm, outputs

CONFIG = FastWeightConfig(layers=[0, 2], chunk_size=8, eta=0.1)


def trained(config: FastWeightConfig = CONFIG, **changes: object) -> tuple[nn.Module, inlay.Memory]:
    """A model whose memory writes something."""
    lm = make_lm(**changes)
    memory = inlay.attach(lm, config)
    generator = torch.Generator().manual_seed(3)
    for parameter in memory.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return lm, memory


def structure(model: nn.Module) -> dict[str, int]:
    return {name: id(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("gating", ["silu", "none"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_fresh_memory_changes_no_bit(gating: str, training: bool) -> None:
    lm, codes = make_lm(gating=gating, depformer_gating="silu").train(training), make_codes()
    before, keys = outputs(lm, codes), list(lm.state_dict())
    memory = inlay.attach(lm, FastWeightConfig(layers="all", chunk_size=8, eta=0.1))
    for with_memory, without in zip(outputs(lm, codes), before, strict=True):
        assert torch.equal(with_memory, without)
    assert [key for key in lm.state_dict() if ".target." not in key] == keys
    with memory.disabled():
        assert torch.equal(outputs(lm, codes)[0], before[0])


def test_upstreams_gating_is_bit_equal_to_the_one_that_stands_in() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        theirs = ActivationGating(WIDTH, 33, F.silu, dtype=dtype)
        x = torch.randn(2, 7, WIDTH, dtype=dtype)
        assert torch.equal(ModularGating(theirs)(x), theirs(x))


def test_the_memory_is_in_the_main_transformer_and_nowhere_else() -> None:
    lm = make_lm(num_layers=8)
    inlay.attach(lm, FastWeightConfig(layers="every:3", chunk_size=8))
    memories = [name for name, module in lm.named_modules() if isinstance(module, FastWeightProjection)]
    assert memories == [f"transformer.layers.{i}.gating.linear_out" for i in (0, 3, 6)]


def test_layers_out_of_range_are_refused_with_the_range() -> None:
    lm = make_lm()
    before = structure(lm)
    with pytest.raises(AttachError, match=r"layers \[10, 20, 30\] do not exist: the model has 4 blocks"):
        inlay.attach(lm, FastWeightConfig(layers=[10, 20, 30]))
    assert structure(lm) == before


@pytest.mark.parametrize("gating", ["silu", "none"])
def test_detach_gives_the_very_same_modules_back(gating: str) -> None:
    lm = make_lm(gating=gating, depformer_gating="silu")
    before, attributes = structure(lm), set(lm.__dict__)
    memory = inlay.attach(lm, CONFIG)
    assert structure(lm) != before
    lm.train()
    memory.detach()
    assert structure(lm) == before
    assert set(lm.__dict__) == attributes
    assert all(module.training for module in lm.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.modules())


def test_the_memory_layer_computes_the_operation_of_the_paper_with_the_summed_streams_as_x0() -> None:
    lm, memory = trained(FastWeightConfig(layers=[1], chunk_size=8, eta=0.1), dtype=torch.float64)
    layer, seen = memory.layers[1], {}
    layer.register_forward_hook(lambda module, args, output: seen.update(z=args[0], out=output))
    codes = make_codes()
    outputs(lm, codes)
    # The streams' embeddings, summed by hand: initial tokens first, then the delayed codes but the last.
    inputs = torch.full((2, 17, 41), -1)
    for stream, delay in enumerate(lm.delays):
        start = TEXT_CARD if stream == 0 else lm.card
        row = torch.cat([torch.full((2, 1 + delay), start), codes[:, stream]], dim=1)
        inputs[:, stream] = row[:, :41]
    x0 = lm.text_emb(inputs[:, 0, :40])
    for book in range(16):
        x0 = x0 + lm.emb[book](inputs[:, book + 1, :40])
    v = layer.target(x0)
    expected = fast_weight_linear_reference(seen["z"], v, layer.weight, eta=0.1, chunk_size=8)
    out = expected[0] if isinstance(expected, tuple) else expected
    assert_close(seen["out"], out, 1e-12, "the memory layer")


@pytest.mark.parametrize("entry", ["forward", "forward_text"])
def test_document_ids_reach_the_memory(entry: str) -> None:
    lm, memory = trained()
    codes = make_codes(1, 40)
    ids = torch.tensor([[0] * 20 + [1] * 20])

    def run(codes: Tensor, **kwargs: Tensor) -> Tensor:
        return outputs(lm, codes, **kwargs)[1] if entry == "forward" else lm.forward_text(codes, **kwargs)[1][0, 0]

    whole, reset = run(codes), run(codes, document_ids=ids)
    assert torch.equal(whole[:20], reset[:20])
    assert relative_error(reset[20:], whole[20:]) > 1e-3
    if entry == "forward_text":  # the model's forward delays codes across the documents
        for layer in lm.transformer.layers:
            layer.self_attn.context = 1  # so that only the memory can tell one document of the other
        alone = run(codes[..., 20:])
        assert_close(run(codes, document_ids=ids)[20:], alone, 1e-5, "the second document by itself")
    carry = run(codes)
    with memory.using(boundary="carry"):
        assert torch.equal(run(codes, document_ids=ids), carry)


@pytest.mark.parametrize("trainable", ["memory", "all"])
def test_moshis_own_checkpointing_gives_the_same_gradients(trainable: str) -> None:
    codes = make_codes()
    gradients = []
    for checkpointing in (False, True):
        lm, memory = trained()
        lm.train()
        memory.train_only(trainable)
        lm.transformer.checkpointing = checkpointing
        losses = []
        for half in (codes, codes.flip(-1)):  # two forwards before one backward
            audio, text = outputs(lm, half)
            losses.append(audio.pow(2).mean() + text.pow(2).mean())
        assert lm.transformer.checkpointing is checkpointing
        assert not any("forward" in block.__dict__ for block in lm.transformer.layers)
        torch.stack(losses).sum().backward()
        gradients.append({n: p.grad for n, p in lm.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys() != set()
    for name in plain:
        assert_close(recomputed[name], plain[name], 1e-6, name)


def test_checkpointing_runs_each_block_twice_and_its_memory_counts_once() -> None:
    lm, memory = trained(FastWeightConfig(layers=[1], chunk_size=8, eta=0.1, max_update_norm=1e-3))
    lm.train()
    lm.transformer.checkpointing = True
    runs = []
    lm.transformer.layers[3].self_attn.register_forward_hook(lambda *_: runs.append(1))
    audio, _ = outputs(lm, make_codes())
    audio.sum().backward()
    assert len(runs) == 2
    assert int(memory.layers[1].statistics.updates) == 2 * 5


def test_state_survives_an_error_inside_the_forward() -> None:
    lm, _ = trained()
    lm.train()
    lm.transformer.checkpointing = True
    hook = lm.transformer.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        outputs(lm, make_codes())
    hook.remove()
    assert lm.transformer.checkpointing is True
    assert not any("forward" in block.__dict__ for block in lm.transformer.layers)


@pytest.mark.parametrize("order", ["lora first", "memory first"])
def test_kyutais_lora_and_the_memory_go_together(order: str) -> None:
    lm, codes = make_lm(), make_codes()
    reference = copy.deepcopy(lm)
    if order == "lora first":
        replace_all_linear_with_lora(lm, rank=2, scaling=2.0)
        memory = inlay.attach(lm, CONFIG)
    else:
        memory = inlay.attach(lm, CONFIG)
        replace_all_linear_with_lora(lm, rank=2, scaling=2.0)
    assert isinstance(lm.transformer.layers[0].gating.linear_out, LoRALinear)
    assert isinstance(lm.transformer.layers[0].gating.linear_out.frozen_W, FastWeightProjection)
    assert memory.base_parameters().keys() == dict(reference.named_parameters()).keys()
    for module in lm.modules():
        if isinstance(module, LoRALinear):
            nn.init.zeros_(module.lora_B.weight)
    assert torch.equal(outputs(lm, codes)[0], outputs(reference, codes)[0])
    memory.train_only("memory+lora")
    chosen = {name for name, p in lm.named_parameters() if p.requires_grad}
    assert any("lora_B" in name for name in chosen)
    assert all(".lora_" in name or ".target." in name for name in chosen)
    memory.detach()
    lm.requires_grad_(True)  # matmul picks its kernel by that
    assert not any(isinstance(module, FastWeightProjection | ModularGating) for module in lm.modules())
    assert torch.equal(outputs(lm, codes)[0], outputs(reference, codes)[0])


@pytest.mark.parametrize("order", ["lora first", "memory first"])
def test_adapters_are_fused_around_the_memory(order: str) -> None:
    lm, codes = make_lm(), make_codes()
    if order == "lora first":
        replace_all_linear_with_lora(lm, rank=2, scaling=2.0)
    memory = inlay.attach(lm, CONFIG)
    if order == "memory first":
        replace_all_linear_with_lora(lm, rank=2, scaling=2.0)
    generator = torch.Generator().manual_seed(3)
    for parameter in [*memory.parameters(), *(p for name, p in lm.named_parameters() if ".lora_" in name)]:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    with torch.no_grad():
        expected = outputs(lm, codes)[0]
        fuse_lora(lm)
        assert not any(isinstance(module, LoRALinear) for module in lm.modules())
        assert_close(outputs(lm, codes)[0], expected, 1e-5)
        with memory.disabled():
            assert relative_error(outputs(lm, codes)[0], expected) > 1e-2
    memory.detach()
    assert not any(isinstance(module, FastWeightProjection | ModularGating) for module in lm.modules())


def test_a_memory_that_was_taken_out_behind_its_back_is_missed() -> None:
    """Upstream's way of fusing adapters puts a plain layer in place of the one with the memory."""
    lm, codes = make_lm(), make_codes()
    replace_all_linear_with_lora(lm, rank=2, scaling=2.0)
    inlay.attach(lm, CONFIG)
    replace_lora_with_linear(lm)
    with pytest.raises(MemoryGoneError, match=r"block 0 is no longer in the model.*fuse_lora"):
        outputs(lm, codes)


def test_a_copy_of_the_model_has_a_memory_of_its_own() -> None:
    lm, memory = trained()
    codes, ids = make_codes(1), torch.tensor([[0] * 20 + [1] * 20])
    clone = copy.deepcopy(lm)
    for parameter in memory.parameters():
        nn.init.zeros_(parameter)
    for parameter in inlay.find_memory(clone).parameters():
        parameter.data.mul_(2)
    one, two = (model.forward_text(codes, document_ids=ids)[1] for model in (lm, clone))
    assert relative_error(two, one) > 1e-3


def test_saved_and_attached_again_it_is_the_same_to_the_bit(tmp_path: Path) -> None:
    lm, memory = trained()
    memory.save_pretrained(tmp_path)
    again, codes = make_lm(), make_codes()
    inlay.attach_pretrained(again, tmp_path)
    assert torch.equal(outputs(again, codes)[0], outputs(lm, codes)[0])
    with pytest.raises(CheckpointError, match="blocks is 4 there and 2 here"):
        inlay.attach_pretrained(make_lm(num_layers=2), tmp_path)


def test_hidden_targets_take_the_input_of_the_gating() -> None:
    lm, memory = trained(CONFIG.model_copy(update={"target": "hidden"}))
    codes = make_codes()
    with memory.disabled():
        base = outputs(lm, codes)[1]
    assert relative_error(outputs(lm, codes)[1], base) > 1e-3
    with pytest.raises(AttachError, match="no MLP module"):
        inlay.attach(make_lm(gating="none", depformer_gating="silu"), FastWeightConfig(layers=[0], target="hidden"))


def test_without_kyutais_package_inlay_works_and_the_moshi_part_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['moshi'] = None\n"
        "import inlay\n"
        "try:\n    import inlay.moshi\n"
        "except inlay.InlayError as error:\n    print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "'moshi' cannot be imported" in out
    assert "pip install --no-deps moshi==0.2.13" in out


def test_what_kyutais_package_needs_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sphn", None)
    with pytest.raises(ImportError, match=r"'sphn' cannot be imported[^$]*pip install sphn sentencepiece einops"):
        require_moshi()
