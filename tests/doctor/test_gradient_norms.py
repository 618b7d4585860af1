"""Gradient norms are those of a plain backward, a trial's those of the recipe it stands for; nothing is disturbed."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.doctor.attribution import attribute_gradients
from inlay.doctor.gradients import GradientError, GradientNorms, Reading, gradient_norms, group_norms, parameter_groups
from tests.doctor.attributions import GROUPS, LLAMA, attached, batch_of, trial
from tests.fastweight.families import enable_checkpointing, snapshot


def group_of(name: str) -> str:
    for end, group in zip((".target.conv", ".target.projection", "mlp.down_proj.weight"), GROUPS[:3], strict=True):
        if name.endswith(end) and (group != GROUPS[2] or name.split(".")[2] in ("0", "2")):
            return group
    return "rest"


def norms_by_hand(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, float]:
    """Norms by group of a plain backward with everything trained, in float64."""
    model.requires_grad_(True).train()
    model.zero_grad()
    model(**batch, use_cache=False).loss.backward()
    squares = dict.fromkeys(GROUPS, 0.0)
    for name, parameter in model.named_parameters():
        squares[group_of(name)] += float(parameter.grad.double().pow(2).sum())
    return {group: math.sqrt(square) for group, square in squares.items()}


def norms_of(measured: GradientNorms) -> dict[str, float]:
    return {name: group.norm for name, group in measured.groups.items()}


# What is measured.


@pytest.mark.parametrize("boundary", ["reset", "carry"])
def test_the_norms_are_those_of_a_plain_backward(boundary: str) -> None:
    documents = torch.tensor([[0] * 13 + [1] * 9, [0] * 18 + [-1] * 4])
    labels = LLAMA.tokens(2, 22).masked_fill(documents < 0, -100)
    batch = batch_of(22) | {"labels": labels, "document_ids": documents}
    model, memory = attached("all", boundary=boundary)
    measured = gradient_norms(memory, model, batch)
    assert norms_of(measured) == pytest.approx(norms_by_hand(model, batch), rel=1e-5)
    with torch.no_grad():
        assert measured.loss == pytest.approx(float(model(**batch, use_cache=False).loss), rel=1e-5)
    # chunks of 4: 13 and 9 tokens are 4 + 3 chunks (6 of one row of 22), 18 are 5; the first of each reads nothing
    reset = Reading(chunks=12, reading=9, longest=18)
    assert measured.reading == (reset if boundary == "reset" else Reading(chunks=11, reading=9, longest=22))


CHANGES = {
    ("η", "×10"): {"eta": 0.5},
    ("η", "÷10"): {"eta": 0.005},
    ("chunk size", "halved (2)"): {"chunk_size": 2},
    ("chunk size", "doubled (8)"): {"chunk_size": 8},
    ("exposure", "0.5"): {"exposure": 0.5},
    ("exposure", "1"): {"exposure": 1.0},
    ("boundary", "carry"): {"boundary": "carry"},
    ("target", "normalized"): {"normalize_target": True},
    ("clip", "on"): {"max_update_norm": 1e-5},
    ("init", "×100"): {"init": {"normal": 50.0}},
    ("init", "÷100"): {"init": {"normal": 0.005}},
}


@pytest.mark.parametrize("position_ids", [False, True])
def test_every_trial_is_what_a_recipe_with_that_change_gives(position_ids: bool) -> None:
    batch = batch_of(22)
    if position_ids:  # packed: documents of 13 and 9 tokens
        batch["position_ids"] = torch.tensor([[*range(13), *range(9)]] * 2)
    longer = batch_of(44)
    model, memory = attached("all")
    attribution = attribute_gradients(memory, model, batch, longer_batch=longer)
    assert len(attribution.trials) == len(CHANGES) + 1
    for (factor, setting), changes in CHANGES.items():
        other, _ = attached(**changes)
        measured = trial(attribution, factor, setting).norms
        assert measured is not None
        assert norms_of(measured) == pytest.approx(norms_by_hand(other, batch), rel=2e-4), (factor, setting)
    measured = trial(attribution, "sequence length", "×2 (44 tokens)").norms
    assert measured is not None
    assert norms_of(measured) == pytest.approx(norms_by_hand(attached()[0], longer), rel=1e-5)
    effects = [abs(math.log(t.ratio)) for t in attribution.trials if t.ratio]
    assert effects == sorted(effects, reverse=True)


def test_what_is_not_trained_has_no_rest_and_the_base_is_measured_all_the_same() -> None:
    model, memory = attached("memory")
    expected = norms_by_hand(attached()[0], batch_of(22))
    expected.pop("rest")
    assert norms_of(gradient_norms(memory, model, batch_of(22))) == pytest.approx(expected, rel=1e-5)


class QuantizedLinear(nn.Linear):
    """Keeps its weight in eight bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter((linear.weight * 100).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) / 100)


def test_a_quantized_base_has_no_gradient_and_the_memory_has() -> None:
    model = LLAMA.make()
    for block in model.model.layers:
        block.mlp.down_proj = QuantizedLinear(block.mlp.down_proj)
    model, memory = attached(model=model, max_update_norm=1e-3)
    attribution = attribute_gradients(memory, model, batch_of(22))
    assert [*attribution.own.groups] == GROUPS[:2]
    assert attribution.own.memory > 0
    assert attribution.own.base_rms is None
    assert attribution.section().items


@pytest.mark.parametrize("order", ["lora first", "memory first"])
def test_beside_lora_the_rest_is_the_adapters(order: str) -> None:
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model, memory = LLAMA.make(), None
    if order == "memory first":
        model, memory = attached()
    model = peft.get_peft_model(model, lora)
    if memory is None:
        memory = attached(model=model)[1]
    memory.train_only("memory+lora")
    measured = gradient_norms(memory, model, batch_of(22))
    model.train()
    model(**batch_of(22), use_cache=False).loss.backward()
    adapters = [p.grad for name, p in model.named_parameters() if "lora_" in name]
    norm = float(torch.cat([gradient.flatten() for gradient in adapters]).norm())
    assert measured.groups["rest"].norm == pytest.approx(norm, rel=1e-5)
    assert measured.groups["rest"].elements == sum(gradient.numel() for gradient in adapters)
    assert [*measured.groups] == GROUPS


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["memory", "all"])
def test_gradient_checkpointing_changes_nothing(mode: str, reentrant: bool) -> None:
    plain = gradient_norms(*reversed(attached(mode)), batch_of(22))  # type: ignore[arg-type]
    model, memory = attached(mode)
    enable_checkpointing(model, reentrant=reentrant)
    kept = next(memory.parameters()).grad = torch.ones_like(next(memory.parameters()))
    measured = gradient_norms(memory, model, batch_of(22))
    assert norms_of(measured) == pytest.approx(norms_of(plain), rel=1e-5)
    assert measured.reading == plain.reading
    assert next(memory.parameters()).grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert [p.grad for p in model.parameters()].count(None) == len([*model.parameters()]) - 1


def test_group_norms_of_what_a_training_step_left_in_grad() -> None:
    model, memory = attached("all")
    groups = parameter_groups(model, memory)
    assert group_norms(groups) == {}
    expected = norms_by_hand(model, batch_of(22))
    assert group_norms(groups) == pytest.approx(expected, rel=1e-5)
    for parameter in groups["rest"]:
        parameter.grad = None
    groups["convolution"][0].grad = None
    remaining = groups["convolution"][1].grad
    assert remaining is not None
    assert [*group_norms(groups)] == GROUPS[:3]
    assert group_norms(groups)["convolution"] == pytest.approx(float(remaining.norm()), rel=1e-5)


def test_gradients_in_bf16_are_summed_up_in_float32() -> None:
    parameter = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    other = nn.Parameter(torch.zeros(10))
    parameter.grad, other.grad = torch.full_like(parameter, 0.01), torch.full_like(other, 0.5)
    exact = math.sqrt(1000 * float(parameter.grad[0]) ** 2 + 10 * 0.25)
    assert group_norms({"rest": [parameter, other]}) == pytest.approx({"rest": exact}, rel=1e-6)


# What is left behind: nothing.


def state_of(model: nn.Module, memory: inlay.Memory) -> dict[str, Any]:
    return {
        "parameters": snapshot(model),
        "storage": [p.data_ptr() for p in model.parameters()],
        "gradients": {n: (id(p.grad), None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()] + [layer.base.training for layer in memory.layers.values()],
        "config": memory.config,
        "layer configs": [layer.config for layer in memory.layers.values()],
        "chunk sizes": [layer.target.chunk_size for layer in memory.layers.values()],
        "counters": [b.clone() for layer in memory.layers.values() for b in layer.statistics.counters()],
        "observers": [layer.observer for layer in memory.layers.values()],
        "session": memory.open_session,
        "trained": set(memory.trained_base),
        "random": torch.get_rng_state(),
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
    }


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))
    return bool(one == two)


@pytest.mark.parametrize("init", ["zero", {"normal": 0.5}])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_afterwards_bit_for_bit_as_it_was(
    init: Any, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, memory = attached("memory+layers", init=init, max_update_norm=1e-3)
    model(**batch_of(22), use_cache=False).loss.backward()
    model.eval()
    model.model.layers[1].train()
    memory.layers[0].observer = print
    memory.open_session = memory.session(batch_size=2).state
    before = state_of(model, memory)
    if fails:
        forward, calls = model.forward, []

        def failing(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:  # the trial of a larger init: everything stands changed
                raise KeyboardInterrupt
            return forward(*args, **kwargs)

        monkeypatch.setattr(model, "forward", failing)
        with pytest.raises(KeyboardInterrupt):
            attribute_gradients(memory, model, batch_of(22))
    else:
        attribute_gradients(memory, model, batch_of(22), longer_batch=batch_of(44))
    after = state_of(model, memory)
    assert [name for name in before if not same(before[name], after[name])] == []


def test_every_measurement_draws_the_same_dropout() -> None:
    model, memory = attached("all")
    model.config._attn_implementation = "eager"
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.5
    torch.manual_seed(7)
    first, second = (gradient_norms(memory, model, batch_of(22)) for _ in range(2))
    assert first == second
    torch.manual_seed(8)
    other = gradient_norms(memory, model, batch_of(22))
    assert other.memory != pytest.approx(first.memory, rel=1e-3)


@pytest.mark.filterwarnings("error")
def test_a_short_sequence_is_examined_without_the_warning_that_training_gives() -> None:
    model, memory = attached()
    gradient_norms(memory, model, batch_of(3))


def test_a_batch_without_labels_and_a_memory_that_is_off_are_refused() -> None:
    model, memory = attached()
    with pytest.raises(GradientError, match=r"LlamaForCausalLM gave no loss: the batch needs labels"):
        gradient_norms(memory, model, {"input_ids": LLAMA.tokens(1, 22)})
    with memory.disabled(), pytest.raises(GradientError, match="the memory took no part in the forward"):
        gradient_norms(memory, model, batch_of(22))
