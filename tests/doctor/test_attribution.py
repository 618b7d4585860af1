"""Gradient attribution: the norms are those of a plain backward, nothing is disturbed, and the right cause is named."""

from __future__ import annotations

import json
import math
from typing import Any

import peft
import pytest
import torch
import transformers
from pydantic import TypeAdapter
from torch import Tensor, nn

import inlay
from inlay.doctor.attribution import Attribution, attribute_gradients
from inlay.doctor.findings import Severity
from inlay.doctor.gradients import GradientError, GradientNorms, Reading, gradient_norms, group_norms, parameter_groups
from inlay.doctor.trials import Trial
from tests.fastweight.families import BY_NAME, enable_checkpointing, snapshot

LLAMA = BY_NAME["llama"]
GROUPS = ["convolution", "projection", "base down projection", "rest"]


def batch_of(tokens: int, rows: int = 2, **more: Tensor) -> dict[str, Tensor]:
    ids = LLAMA.tokens(rows, tokens)
    return {"input_ids": ids, "labels": ids.clone(), **more}


def attached(mode: Any = "memory", *, model: nn.Module | None = None, **changes: Any) -> tuple[nn.Module, inlay.Memory]:
    model = LLAMA.make() if model is None else model
    torch.manual_seed(1)
    return model, inlay.attach(model, LLAMA.config(**changes)).train_only(mode)


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


def trial(attribution: Attribution, factor: str, setting: str) -> Trial:
    (found,) = [t for t in attribution.trials if t.factor == factor and t.setting.startswith(setting)]
    return found


def found(attribution: Attribution) -> dict[str, Severity]:
    return {finding.code: finding.severity for finding in attribution.findings()}


# The configuration of the requirement documents, in small: 7 chunks, every update clipped to 1e-5, init normal. X0 has
# unit RMS, as in a trained model with summed codebooks, so that the clip bites at both of their inits.


def documents_model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config)
    model.model.embed_tokens.weight.data *= 5
    return model


def documents_attribution(std: float, **changes: Any) -> Attribution:
    settings = {"chunk_size": 16, "eta": 3e-4, "init": {"normal": std}, "max_update_norm": 1e-5} | changes
    model, memory = attached(model=documents_model(), **settings)
    lengths = {"125 chunks": batch_of(2000, rows=1)}
    return attribute_gradients(memory, model, batch_of(112, 1), longer_batch=batch_of(224, 1), lengths=lengths)


@pytest.fixture(scope="module")
def small_init() -> Attribution:
    return documents_attribution(1e-4)


@pytest.fixture(scope="module")
def large_init() -> Attribution:
    return documents_attribution(1e-2)


def test_seven_chunks_were_seven_chunks(small_init: Attribution) -> None:
    assert small_init.own.reading == Reading(chunks=7, reading=6, longest=112)
    assert small_init.own.clip_rate == 1.0


@pytest.mark.parametrize("init", ["small_init", "large_init"])
def test_on_the_documents_configuration_the_clip_is_named(init: str, request: pytest.FixtureRequest) -> None:
    attribution: Attribution = request.getfixturevalue(init)
    (finding,) = attribution.findings()
    assert (finding.code, finding.severity) == ("gradient.clip", Severity.FATAL)
    assert finding.fix == "set memory.max_update_norm: null"
    assert attribution.sentence.startswith("the clip keeps the memory from learning: it shortens 100% of the updates")
    assert attribution.remedy is trial(attribution, "clip", "off")


def test_raising_the_init_lowered_the_gradient(small_init: Attribution, large_init: Attribution) -> None:
    """What the documents did in despair: 1e-4 to 1e-2. The same random numbers, so it is the same memory scaled."""
    lowered = large_init.own.memory / small_init.own.memory
    assert lowered == pytest.approx(0.01, rel=1e-3)
    assert trial(small_init, "init", "×100").ratio == pytest.approx(lowered, rel=1e-3)
    assert "an init 100 times as large divides it by 100" in small_init.sentence
    assert large_init.own.memory_rms < 1e-8 < small_init.own.memory_rms


def test_125_chunks_alone_would_not_have_helped(small_init: Attribution, large_init: Attribution) -> None:
    for attribution, without_clip in ((small_init, 10), (large_init, 1e5)):
        length = trial(attribution, "sequence length", "125 chunks").ratio
        assert length is not None
        assert 1 < length < 5
        clip = trial(attribution, "clip", "off").ratio
        assert clip is not None
        assert clip > max(without_clip, 4 * length)
        assert f"length alone does little (125 chunks: {length:.2f} times" in attribution.sentence
    longest = trial(large_init, "sequence length", "125 chunks").norms
    assert longest is not None
    assert longest.memory_rms < 1e-8, "still nothing that AdamW could step by"


def test_without_the_clip_the_same_memory_is_healthy_at_the_larger_init() -> None:
    attribution = documents_attribution(1e-2, max_update_norm=None)
    assert attribution.findings() == []
    assert attribution.sentence.startswith("the memory gets a gradient (RMS ")
    clip = trial(attribution, "clip", "on (‖Δ‖ ≤ 1e-05)")
    assert clip.ratio is not None
    assert clip.ratio < 1e-5


def test_reading_ahead_is_measured_and_never_advised(small_init: Attribution) -> None:
    half, full = trial(small_init, "exposure", "0.5"), trial(small_init, "exposure", "1")
    assert half.ratio is not None
    assert full.ratio is not None
    assert 1 < half.ratio < full.ratio
    assert half.fix == full.fix == ""


def test_a_fresh_memory_is_clipped_only_once_it_writes() -> None:
    attribution = documents_attribution(1e-2, init="zero")
    assert attribution.own.clip_rate == 0.0
    assert trial(attribution, "clip", "off").ratio == 1.0
    assert found(attribution) == {"gradient.clip": Severity.FATAL}
    assert attribution.sentence.startswith("once the target has grown, the clip keeps the memory from learning")


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
        "counters": [b.clone() for layer in memory.layers.values() for b in layer.statistics.buffers()],
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


# The verdict.


def attribution_of(*, batch: dict[str, Tensor] | None = None, **changes: Any) -> Attribution:
    model, memory = attached(**changes)
    return attribute_gradients(memory, model, batch_of(22) if batch is None else batch)


def test_a_fresh_memory_whose_projection_waits_for_the_convolution_is_healthy() -> None:
    attribution = attribution_of(init="zero")
    assert attribution.own.groups["projection"].norm == 0.0
    assert attribution.own.groups["convolution"].norm > 0
    assert attribution.findings() == []
    texts = [item.body for item in attribution.section().items if hasattr(item, "body")]
    assert any("the projection's gradient is exactly 0 at the first step" in text for text in texts)


@pytest.mark.parametrize("exposure", [0.0, 1.0])
def test_documents_of_one_chunk_are_never_read(exposure: float) -> None:
    documents = torch.tensor([[0] * 11 + [1] * 11] * 2)
    attribution = attribution_of(batch=batch_of(22, document_ids=documents), chunk_size=11, exposure=exposure)
    (finding,) = attribution.findings()
    assert (finding.code, finding.severity) == ("gradient.never_read", Severity.FATAL)
    assert "no document of the batch is longer than a chunk (the longest has 11 tokens" in finding.says
    assert ("exactly zero" in finding.says) == (exposure == 0)
    assert ("reading ahead" in finding.says) == (exposure == 1)
    assert finding.fix.startswith("set memory.chunk_size: 2 or less")
    assert "memory.boundary: carry" in finding.fix, "the neighbours are two chunks together"
    carried = trial(attribution, "boundary", "carry").norms
    assert carried is not None
    assert carried.reading.reading == 2


def test_carry_is_not_advised_where_it_does_not_help() -> None:
    (finding,) = attribution_of(chunk_size=22).findings()
    assert finding.code == "gradient.never_read"
    assert "carry" not in finding.fix


@pytest.mark.parametrize(
    ("changes", "code", "severity", "says", "fix"),
    [
        ({"eta": 0.0}, "gradient.zero", 2, "dominant cause is η: with 0.0003 it gets one", "set memory.eta: 0.0003"),
        (
            {"eta": 1e-11},
            "gradient.vanishing",
            2,
            "dominant cause is η, which it is in proportion to and which is 30,000,000 times below",
            "set memory.eta: 0.0003",
        ),
        (
            {"init": {"normal": 1e-4}},
            "gradient.weak",
            1,
            "dominant cause is init, which it is in proportion to and which is 100 times below the usual",
            "set memory.init: {normal: 0.01}",
        ),
        (
            {"max_update_ratio": 1e-9},
            "gradient.clip",
            2,
            "it shortens 100% of the updates, to 2.5e−10 of the base weight all told",
            "set memory.max_update_ratio: null",
        ),
    ],
)
def test_what_starves_a_memory_is_named(changes: dict[str, Any], code: str, severity: int, says: str, fix: str) -> None:
    (finding,) = attribution_of(**changes).findings()
    assert (finding.code, finding.severity, finding.fix) == (code, severity, fix)
    assert says in finding.says


def test_steps_of_unequal_size_do_not_decide_the_cause() -> None:
    """η ×10 and init ×100 raise any gradient in proportion. What is to blame is what lies below its usual value."""
    documents = torch.arange(22).div(5, rounding_mode="floor").expand(2, 22)  # of five tokens: two chunks, barely
    batch = batch_of(22, document_ids=documents)
    usual = attribution_of(batch=batch, eta=3e-4, init={"normal": 0.05})
    ratios = {(t.factor, t.setting): t.ratio for t in usual.trials}
    assert ratios["η", "×10"] == pytest.approx(10, rel=1e-2)
    assert ratios["init", "×100"] == pytest.approx(100, rel=0.1)
    assert found(usual) == {"gradient.weak": Severity.WARNING}
    assert usual.remedy is trial(usual, "boundary", "carry")
    assert "dominant cause is boundary: with carry it is 2.25 times as large" in usual.sentence
    carried = attribution_of(batch=batch, eta=3e-4, init={"normal": 0.02}, boundary="carry")
    assert carried.remedy is None
    assert carried.sentence.endswith(
        "nothing that was tried but a larger init or η, to which it is in proportion, makes it more than twice as large"
    )
    tiny = attribution_of(batch=batch, eta=3e-6, init={"normal": 0.05})
    assert tiny.remedy is trial(tiny, "η", "×10")
    assert "dominant cause is η, which it is in proportion to and which is 100 times below the usual" in tiny.sentence


def test_a_gradient_that_is_no_number_is_fatal() -> None:
    assert found(attribution_of(eta=3e37)) == {"gradient.not_finite": Severity.FATAL}


def test_what_could_not_be_tried_says_why() -> None:
    attribution = attribution_of(chunk_size=1)
    assert trial(attribution, "chunk size", "halved").why_not == "chunks of one token cannot be halved"
    assert trial(attribution, "sequence length", "×2").why_not == "the data gave no batch of twice the length"
    assert {t.norms is None for t in attribution.trials[-2:]} == {True}


def test_a_trial_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, memory = attached()
    forward = model.forward

    def limited(input_ids: Tensor, **kwargs: Any) -> Any:
        if input_ids.shape[1] > 22:
            raise torch.OutOfMemoryError
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", limited)
    attribution = attribute_gradients(memory, model, batch_of(22), longer_batch=batch_of(44))
    assert [(t.factor, t.why_not) for t in attribution.trials if t.why_not] == [
        ("sequence length", "it does not fit into the device's memory")
    ]


def test_progress_counts_the_trials() -> None:
    model, memory = attached()
    seen: list[tuple[int, int]] = []
    attribution = attribute_gradients(memory, model, batch_of(22), progress=lambda *counts: seen.append(counts))
    assert seen == [(n, len(attribution.trials)) for n in range(len(attribution.trials) + 1)]


def test_the_table_tells_the_figures_and_marks_the_remedy(large_init: Attribution) -> None:
    section = large_init.section()
    table = section.items[0]
    assert list(table.columns) == ["factor", "setting", *GROUPS[:3]]
    assert len(table.rows) == 1 + len(large_init.trials)
    assert table.rows[0][:2] == ["recipe", "as it is"]
    assert float(str(table.rows[0][2]).replace("−", "-")) == pytest.approx(
        large_init.own.groups["convolution"].norm, rel=0.01
    )
    cells = {(row[0], row[1]): row[2:] for row in table.rows}
    assert cells["init", "×100"] == ["0.0100 ×", "0.0100 ×", "1.00 ×"]
    marked = [row[:2] for row, verdict in zip(table.rows, table.verdicts, strict=True) if verdict == "good"]
    assert marked == [["clip", "off"]]
    assert "Measured at ‖Δ‖ ≤ 1e-05, init normal 0.01, η 0.0003, chunks of 16 tokens" in section.text


def test_json_holds_every_figure(large_init: Attribution) -> None:
    content = json.loads(TypeAdapter(Attribution).dump_json(large_init))
    assert content["own"]["groups"]["convolution"]["norm"] == large_init.own.groups["convolution"].norm
    assert [t["ratio"] for t in content["trials"]] == [t.ratio for t in large_init.trials]
    assert TypeAdapter(Attribution).validate_python(content) == large_init
