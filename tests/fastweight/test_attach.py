"""Attaching: what is refused, what is trained, and that the tools around a model go on working."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload
from pydantic import ValidationError
from torch import Tensor, nn

import inlay
from inlay import AttachError, FastWeightConfig, MemoryNeverReadError, NonFiniteMemoryError
from tests.closeness import assert_close, relative_error
from tests.fastweight.families import (
    BY_NAME,
    WIDTH,
    enable_checkpointing,
    hook_counts,
    modules_of,
    trainable,
)

LLAMA = BY_NAME["llama"]
GPT2 = BY_NAME["gpt2"]
IDS = LLAMA.tokens(2, 22)


def logits(model: nn.Module, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return LLAMA.logits(model, ids, **kwargs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [0, 3]}, r"layers \[3\] do not exist: the model has 3 blocks, so indices run from 0 to 2"),
        ({"layers": [-4]}, r"layers \[-4\] do not exist.*-3 to -1"),
        ({"layers": [0, 0]}, r"layers \[0, 0\] names a block twice"),
        ({"layers": [2, -1]}, r"layers \[2, -1\] names a block twice"),
        (
            {"projection": "model.layers.{layer}.mlp.down"},
            r"no module 'mlp.down'. Its linear layers are .*mlp.down_proj",
        ),
        ({"projection": "model.layers.{layer}.nowhere.x"}, "no module 'nowhere.x'"),
        ({"projection": "model.blocks.{layer}.mlp.down_proj"}, r"'model.blocks' is no list.*'model.layers'"),
        ({"projection": "model.layers.{layer}.mlp"}, "is a LlamaMLP; a memory can be attached to nn.Linear"),
        ({"projection": "model.layers.{layer}.mlp", "target": "hidden"}, "is a LlamaMLP"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_and_changes_nothing(changes: dict[str, Any], message: str) -> None:
    model = LLAMA.make()
    keys, modules, hooks, before = list(model.state_dict()), modules_of(model), hook_counts(model), logits(model)
    with pytest.raises(AttachError, match=message):
        inlay.attach(model, FastWeightConfig(**changes))
    assert list(model.state_dict()) == keys
    assert modules_of(model) == modules
    assert hook_counts(model) == hooks
    assert inlay.find_memory(model) is None
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "every:x"}, r'layers must be "every:k", "all" or a list of block indices'),
        ({"layers": "every:0"}, 'layers must be "every:k"'),
        ({"layers": "every:"}, 'layers must be "every:k"'),
        ({"layers": []}, "layers is empty; name at least one block"),
        ({"conv_kernel": 4}, "conv_kernel must be odd .*got 4, use 5"),
        ({"init": "next_token", "conv_kernel": 1}, "set conv_kernel to 3 or more"),
        ({"init": {"normal": -1.0}}, "greater than 0"),
        ({"chunks": 4}, "chunks\n.*Extra inputs are not permitted"),
        ({"chunk_size": 0}, "chunk_size\n.*greater than or equal to 1"),
        ({"exposure": 1.5}, "exposure\n.*less than or equal to 1"),
        ({"eta": float("nan")}, "eta\n.*finite number"),
        ({"eta": float("inf")}, "eta\n.*finite number"),
        ({"init": {"normal": float("inf")}}, "normal\n.*finite number"),
        ({"max_update_norm": 1.0, "max_update_ratio": 0.1}, "set one of them"),
        ({"projection": "model.layers.mlp.down_proj"}, r"must hold one \{layer\} between dots"),
    ],
)
def test_a_config_that_means_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FastWeightConfig(**changes)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("every:2", [0, 2]), ("every:6", [0]), ("all", [0, 1, 2]), ([2, 0], [0, 2]), ([-1], [2])],
)
def test_layers_name_the_blocks_that_get_a_memory(layers: Any, expected: list[int]) -> None:
    assert list(inlay.attach(LLAMA.make(), FastWeightConfig(layers=layers)).layers) == expected


@pytest.mark.parametrize("part", ["model", "decoder"])
def test_attaching_twice_is_refused_and_the_first_memory_goes_on(part: str) -> None:
    model = LLAMA.make()
    memory = inlay.attach(model, LLAMA.config())
    before, modules = logits(model), modules_of(model)
    with pytest.raises(AttachError, match=r"has a memory already.*memory\.detach\(\)"):
        inlay.attach(model if part == "model" else model.model, LLAMA.config(layers=[1]))
    assert modules_of(model) == modules
    assert inlay.find_memory(model) is memory
    assert torch.equal(logits(model), before)
    memory.detach()
    inlay.attach(model, LLAMA.config(layers=[1]))


def test_a_projection_that_leads_up_is_refused() -> None:
    model = LLAMA.build()
    with pytest.raises(AttachError, match=r"'up_proj' of block 1 gives 32 features and the model is 16 wide: it is"):
        inlay.attach(model, FastWeightConfig(layers=[1], projection="model.layers.{layer}.mlp.up_proj"))
    with pytest.raises(AttachError, match="attach takes a FastWeightConfig; got dict"):
        inlay.attach(model, {"layers": [1]})  # type: ignore[arg-type]


def test_a_model_without_blocks_is_refused_with_the_way_out() -> None:
    with pytest.raises(AttachError, match=r"no decoder blocks found in Sequential.*projection='path.to.blocks"):
        inlay.attach(nn.Sequential(nn.Linear(4, 4)), FastWeightConfig())


def test_target_hidden_is_refused_where_no_mlp_has_an_input_of_its_own() -> None:
    """A container's hooks never run, and a block's input is not its MLP's."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)
            self.parts = nn.ModuleDict({"out": nn.Linear(8, WIDTH)})

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc2(self.fc1(x).relu())

    model = nn.ModuleDict({"blocks": nn.ModuleList([Block()])})
    for path in ("fc2", "parts.out"):
        config = FastWeightConfig(layers="all", target="hidden", projection=f"blocks.{{layer}}.{path}")
        with pytest.raises(AttachError, match=r"no MLP module with a forward.*use target='embeddings'"):
            inlay.attach(model, config)
        assert inlay.find_memory(model) is None


def test_the_ratio_of_a_quantized_weight_is_refused() -> None:
    model = LLAMA.make()
    projection = model.model.layers[0].mlp.down_proj
    projection.weight = nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(AttachError, match=r"holds it quantized \(torch.int8\); use max_update_norm"):
        inlay.attach(model, LLAMA.config(max_update_ratio=0.1))


def test_weights_that_are_offloaded_are_refused_and_may_be_afterwards() -> None:
    ids = LLAMA.tokens(1, 22)
    with torch.no_grad():
        expected = LLAMA.make()(input_ids=ids).logits
    model = cpu_offload(LLAMA.make())
    with pytest.raises(AttachError, match=r"the weights of block 0 are offloaded .* attach, and dispatch it then"):
        inlay.attach(model, LLAMA.config())
    model = LLAMA.make()
    inlay.attach(model, LLAMA.config(init="zero"))
    with torch.no_grad():
        assert torch.equal(cpu_offload(model)(input_ids=ids).logits, expected)


def test_documents_that_are_no_longer_than_a_chunk_are_refused() -> None:
    memory = inlay.attach(LLAMA.make(), LLAMA.config(chunk_size=16))
    with pytest.raises(
        MemoryNeverReadError, match=r"longest has 16 tokens and chunk_size is 16.*chunk_size of 4 or less"
    ):
        memory.check_lengths([3, 16, 5])
    memory.check_lengths([3, 17])


def test_training_on_sequences_shorter_than_a_chunk_warns_once() -> None:
    model = LLAMA.make().train()
    inlay.attach(model, LLAMA.config(chunk_size=22))
    with pytest.warns(UserWarning, match="training on sequences of 22 tokens with chunk_size=22"):
        LLAMA.logits(model, IDS)
    LLAMA.logits(model, IDS)


@pytest.mark.parametrize("boundary", ["reset", "carry"])
def test_training_on_packed_or_padded_documents_shorter_than_a_chunk_warns_too(boundary: str) -> None:
    model = LLAMA.make().train()
    restart = torch.cat([torch.arange(9), torch.arange(13)]).expand(2, -1)
    mask = torch.ones_like(IDS)
    mask[:, 12:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inlay.attach(model, LLAMA.config(chunk_size=12, boundary=boundary))
        LLAMA.logits(model, IDS, position_ids=restart)
        inlay.find_memory(model).detach()
        inlay.attach(model, LLAMA.config(chunk_size=13, boundary=boundary))
        if boundary == "carry":
            LLAMA.logits(model, IDS, position_ids=restart)
    for given in {"attention_mask": mask}, {"document_ids": IDS % 2 if boundary == "reset" else mask - 1}:
        inlay.find_memory(model).detach()
        inlay.attach(model, LLAMA.config(chunk_size=13, boundary=boundary))
        with pytest.warns(UserWarning, match=r"training on documents of at most \d+ tokens with chunk_size=13"):
            LLAMA.logits(model, IDS, **given)
    if boundary == "reset":
        inlay.find_memory(model).detach()
        inlay.attach(model, LLAMA.config(chunk_size=13))
        with pytest.warns(UserWarning, match="training on documents of at most 13 tokens with chunk_size=13"):
            LLAMA.logits(model, IDS, position_ids=restart)


@pytest.mark.parametrize("name", ["conv", "projection"])
def test_nan_in_the_memory_names_layer_and_step(name: str, tmp_path: Path) -> None:
    memory = inlay.attach(LLAMA.make(), LLAMA.config())
    memory.raise_if_not_finite(6)
    with torch.no_grad():
        getattr(memory.layers[2].target, name)[0, 0] = float("nan")
    with pytest.raises(NonFiniteMemoryError, match=rf"block 2 holds NaN or infinity in '{name}' at step 7\. Lower"):
        memory.raise_if_not_finite(7)
    with pytest.raises(NonFiniteMemoryError):
        memory.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_output_that_overflowed_in_training_names_layer_and_step(checkpointing: bool) -> None:
    model = LLAMA.make().train()
    memory = inlay.attach(model, LLAMA.config(eta=1e38, layers=[1]))
    if checkpointing:
        enable_checkpointing(model)
    LLAMA.logits(model, IDS)
    with pytest.raises(NonFiniteMemoryError, match=r"block 1 gave NaN or infinity at step 3.*Lower eta \(now 1e\+38\)"):
        memory.raise_if_not_finite(3)
    memory.clear_statistics()
    memory.raise_if_not_finite(3)


def test_a_layer_outside_its_models_forward_says_so() -> None:
    model = LLAMA.make()
    memory = inlay.attach(model, LLAMA.config())
    with pytest.raises(RuntimeError, match=r"memory of block 0 was called outside a forward of its model"):
        memory.layers[0](torch.zeros(1, 4, 32))
    with memory.disabled():
        memory.layers[0](torch.zeros(1, 4, 32))


def test_document_ids_of_a_wrong_shape_are_refused_and_the_next_forward_is_right() -> None:
    model = LLAMA.make()
    inlay.attach(model, LLAMA.config())
    expected = logits(model)
    with pytest.raises(
        ValueError, match=r"document_ids must be a tensor \[B, T\] = \[2, 22\] of integers; got .* \[22\]"
    ):
        logits(model, document_ids=torch.zeros(22, dtype=torch.long))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("entry", ["model", "decoder"])
def test_after_an_interrupted_forward_the_next_one_is_right(error: type[BaseException], entry: str) -> None:
    model = LLAMA.make().train()
    inlay.attach(model, LLAMA.config())
    enable_checkpointing(model)
    other = LLAMA.tokens(2, 22, seed=8)
    expected = logits(model, other), model.model(input_ids=other, use_cache=False)[0]
    functions = [block._gradient_checkpointing_func for block in model.model.layers]

    def interrupt(*args: Any) -> None:
        raise error

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        LLAMA.logits(model, IDS, document_ids=(torch.arange(22) // 6).expand(2, -1))
    handle.remove()
    if entry == "model":
        assert torch.equal(logits(model, other), expected[0])
    else:
        assert torch.equal(model.model(input_ids=other, use_cache=False)[0], expected[1])
    assert [block._gradient_checkpointing_func for block in model.model.layers] == functions


MEMORY_NAMES = {f"model.layers.{i}.mlp.down_proj.target.{name}" for i in (0, 2) for name in ("conv", "projection")}


def test_train_only_memory() -> None:
    model = LLAMA.make()
    memory = inlay.attach(model, LLAMA.config()).train_only()
    assert set(trainable(model)) == MEMORY_NAMES
    assert {id(p) for p in memory.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}


def test_train_only_memory_and_layers() -> None:
    model = LLAMA.make()
    inlay.attach(model, LLAMA.config()).train_only("memory+layers")
    expected = {n for n, _ in model.named_parameters() if n.startswith(("model.layers.0.", "model.layers.2."))}
    assert set(trainable(model)) == expected
    assert expected > MEMORY_NAMES


def test_train_only_all() -> None:
    model = LLAMA.make()
    memory = inlay.attach(model, LLAMA.config())
    memory.train_only("memory").train_only("all")
    assert set(trainable(model)) == {name for name, _ in model.named_parameters()}


def test_train_only_refuses_what_it_does_not_know() -> None:
    memory = inlay.attach(LLAMA.make(), LLAMA.config())
    with pytest.raises(ValueError, match=r"train_only takes one of .*'memory\+lora'.*got 'lora'"):
        memory.train_only("lora")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the model has no LoRA adapters"):
        memory.train_only("memory+lora")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it where the graph breaks
@pytest.mark.parametrize(("backend", "target"), [("eager", "hidden"), ("aot_eager", "embeddings")])
def test_a_compiled_model_gives_the_same(backend: str, target: str) -> None:
    torch._dynamo.reset()
    model = LLAMA.make()
    memory = inlay.attach(model, LLAMA.config(target=target))
    expected = logits(model)
    other = LLAMA.tokens(2, 22, seed=4)
    document_ids = torch.tensor([0] * 10 + [1] * 12).expand(2, -1)
    expected_other = logits(model, other, document_ids=document_ids)
    compiled = torch.compile(model, backend=backend)
    assert_close(logits(compiled), expected, 1e-6)
    assert_close(logits(compiled, other, document_ids=document_ids), expected_other, 1e-6)
    assert inlay.find_memory(compiled) is memory
    with memory.disabled():
        assert_close(logits(compiled), logits(LLAMA.make()), 1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_model_trains_with_the_plain_gradients() -> None:
    torch._dynamo.reset()

    def gradients(compiled: bool) -> dict[str, Tensor]:
        model = LLAMA.make().train()
        memory = inlay.attach(model, LLAMA.config()).train_only("all")
        run = torch.compile(model, backend="aot_eager") if compiled else model
        LLAMA.loss(run, IDS).backward()
        return {name: p.grad for name, p in (memory.base_parameters() | dict(memory.named_parameters())).items()}

    plain = gradients(False)
    for name, gradient in gradients(True).items():
        assert_close(gradient, plain[name], 1e-5, name)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_under_autocast_a_fresh_memory_changes_no_bit_and_a_used_one_is_close_to_float32(name: str) -> None:
    family = BY_NAME[name]
    model = family.make()
    with torch.autocast("cpu", torch.bfloat16):
        base = logits(model)
    memory = inlay.attach(model, family.config(init="zero"))
    with torch.autocast("cpu", torch.bfloat16):
        fresh = logits(model)
    assert torch.equal(fresh, base)
    assert fresh.dtype == base.dtype
    memory.detach()
    inlay.attach(model, family.config())
    with torch.autocast("cpu", torch.bfloat16):
        used = family.logits(model, IDS)
    assert relative_error(used, logits(model)) < 0.05
    assert relative_error(used, base) > 0.1
    with torch.autocast("cpu", torch.bfloat16):
        family.loss(model.train(), IDS).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_deep_copy_has_a_memory_of_its_own() -> None:
    model = LLAMA.make()
    memory = inlay.attach(model, LLAMA.config(target="hidden"))
    expected, base = logits(model), logits(LLAMA.make())
    twin = copy.deepcopy(model)
    its = inlay.find_memory(twin)
    assert its is not None
    assert its is not memory
    assert its.model is twin
    assert torch.equal(logits(twin), expected)
    assert not {id(p) for p in its.parameters()} & {id(p) for p in model.parameters()}
    with memory.disabled():
        assert torch.equal(logits(twin), expected)
    with its.disabled():
        assert torch.equal(logits(twin), base)
        assert torch.equal(logits(model), expected)
    memory.detach()
    assert torch.equal(logits(twin), expected)
    assert torch.equal(logits(model), base)
    its.detach()
    assert torch.equal(logits(twin), base)
    assert hook_counts(twin) == hook_counts(LLAMA.make())


def test_a_pickled_model_has_a_memory_of_its_own(tmp_path: Path) -> None:
    model = LLAMA.make()
    inlay.attach(model, LLAMA.config())
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(again), logits(model))
    memory = inlay.find_memory(again)
    assert memory is not None
    assert memory.model is again
    assert torch.equal(logits(memory.detach()), logits(LLAMA.make()))


def test_a_teacher_and_a_student_of_one_model_do_not_mix() -> None:
    """Distillation with the memory off as teacher, interleaved with the student's forwards."""
    model = LLAMA.make().train()
    memory = inlay.attach(model, LLAMA.config()).train_only("memory")
    student = LLAMA.logits(model, IDS)
    with torch.no_grad(), memory.disabled():
        teacher = LLAMA.logits(model, IDS.flip(1))
    again = LLAMA.logits(model, IDS)
    assert torch.equal(teacher, logits(LLAMA.make(), IDS.flip(1)))
    (student - teacher).square().mean().backward()
    first = [p.grad.clone() for p in memory.parameters()]
    model.zero_grad()
    (again - teacher).square().mean().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(first, memory.parameters(), strict=True))


def test_weights_moved_or_loaded_after_attach_are_the_projections_own() -> None:
    """The layer and the module it stands for share their parameters, whatever replaces them."""
    model = LLAMA.make()
    projection = model.model.layers[0].mlp.down_proj
    memory = inlay.attach(model, LLAMA.config())
    model.load_state_dict(
        LLAMA.make(seed=7).state_dict() | {n: p for n, p in model.state_dict().items() if ".target." in n}, assign=True
    )
    model.double()
    assert memory.layers[0].weight is projection.weight
    assert projection.weight.dtype == torch.float64
    memory.detach()
    assert_close(logits(model), logits(LLAMA.make(seed=7).double()), 1e-12)


def test_save_pretrained_of_the_attached_model_keeps_the_keys_of_the_base(tmp_path: Path) -> None:
    model = LLAMA.make()
    inlay.attach(model, LLAMA.config())
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert set(again.state_dict()) == set(LLAMA.make().state_dict())
    assert torch.equal(logits(again), logits(LLAMA.make()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_generate_without_a_cache_from_left_padded_prompts(name: str) -> None:
    """Each row of the batch is generated as it is alone, with the memory in it."""
    family = BY_NAME[name]
    model = family.make()
    memory = inlay.attach(model, family.config(eta=0.3))
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": False, "eos_token_id": None, "pad_token_id": 0}
    prompts = [family.tokens(1, 14, seed=1), family.tokens(1, 9, seed=2)]
    batch = torch.zeros(2, 14, dtype=torch.long)
    mask = torch.zeros(2, 14, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        batch[i, 14 - prompt.shape[1] :] = prompt[0]
        mask[i, 14 - prompt.shape[1] :] = 1
    together = model.generate(input_ids=batch, attention_mask=mask, **options)[:, 14:]
    for i, prompt in enumerate(prompts):
        alone = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
        assert together[i].tolist() == alone[0, prompt.shape[1] :].tolist()
        # Greedy by hand, from whole forwards.
        ids = prompt
        for _ in range(6):
            ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
        assert ids.tolist() == alone.tolist()
    with memory.disabled():
        base = model.generate(input_ids=batch, attention_mask=mask, **options)[:, 14:]
    assert base.tolist() != together.tolist()


def test_importing_and_attaching_patch_nothing_outside_the_model() -> None:
    other, linear, forward = LLAMA.make(), nn.Linear.forward, transformers.LlamaModel.forward
    hooks = hook_counts(other)
    model = LLAMA.make()
    inlay.attach(model, LLAMA.config())
    logits(model)
    assert nn.Linear.forward is linear
    assert transformers.LlamaModel.forward is forward
    assert hook_counts(other) == hooks
    assert torch.equal(logits(other), logits(LLAMA.make()))
