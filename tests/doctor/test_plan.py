"""The memory plan is held against the allocator: each predicted peak is measured in a step that really runs."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from rich.console import Console
from torch import Tensor

from benchmarks.measure import extra_bytes
from benchmarks.plan import batch_of, measured_bytes
from inlay import FastWeightConfig, attach, sliced_loss
from inlay.doctor import dry_run as dry_run_module
from inlay.doctor.dry_run import PlanError, TrainingStep, dry_run
from inlay.doctor.findings import Severity
from inlay.doctor.plan import RecipePlan, _model_config, plan_recipe, training_step
from inlay.doctor.plan_step import PORT_COPIES, longest_tokens, materialised_bytes, plan_memory
from inlay.fastweight import FastWeightProjection
from inlay.report import Report, render_report
from inlay.report.console import print_section
from inlay.train.recipe import Recipe, check_recipe
from inlay.train.trainer import InlayTrainer
from tests.fastweight.families import qwen3_moe

GIB = 2**30
MEMORY = FastWeightConfig(layers=[1, 3], chunk_size=64)
STEP = TrainingStep(1024, batch_size=2, dtype="float32", mode="all", device="cpu")
LORA = {"r": 8, "target_modules": "all-linear"}
CLIPPED = MEMORY.model_copy(
    update={"target": "hidden", "max_update_norm": 1.0, "exposure": 0.5, "normalize_target": True}
)


def architecture(family: str = "llama", **changes: Any) -> transformers.PreTrainedConfig:
    """Four blocks whose activations at a thousand tokens are many times their weights."""
    if family == "gpt2":
        size = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 2048}
        return transformers.GPT2Config(vocab_size=256, bos_token_id=1, eos_token_id=2, **size, **changes)
    size = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.AutoConfig.for_model(family, **{"vocab_size": 256} | size | heads | changes)


SMALL = architecture(num_hidden_layers=2)

CASES = {
    "llama": (architecture(), STEP, MEMORY),
    "checkpointing, a longer row": (
        architecture(),
        replace(STEP, tokens=1500, batch_size=1, gradient_checkpointing=True),
        MEMORY,
    ),
    "logits of a large vocabulary": (architecture(vocab_size=4000), replace(STEP, tokens=512), MEMORY),
    "gpt2, bf16, memory alone": (
        architecture("gpt2"),
        replace(STEP, tokens=300, dtype="bfloat16", mode="memory"),
        MEMORY,
    ),
    "qwen3, bf16, memory+layers, three rows, checkpointing": (
        architecture("qwen3"),
        replace(STEP, tokens=400, batch_size=3, dtype="bfloat16", mode="memory+layers", gradient_checkpointing=True),
        MEMORY,
    ),
    "qwen3, bf16, LoRA, checkpointing": (
        architecture("qwen3"),
        replace(STEP, tokens=520, dtype="bfloat16", mode="memory+lora", lora=LORA, gradient_checkpointing=True),
        MEMORY,
    ),
    "autocast, gradients accumulated": (
        architecture(),
        replace(STEP, tokens=300, autocast="bfloat16", accumulate=True),
        MEMORY,
    ),
    "clipped, exposed, hidden target": (architecture(), replace(STEP, mode="memory"), CLIPPED),
    "packed documents": (architecture(), replace(STEP, document_tokens=300), MEMORY),
    "padding, sliding window, SGD": (
        architecture("mistral", sliding_window=64),
        replace(STEP, padded=True, optimizer="sgd", batch_size=1),
        MEMORY,
    ),
    "eager attention, AdamW not fused": (
        architecture(attn_implementation="eager"),
        replace(STEP, tokens=400, optimizer="adamw_torch"),
        MEMORY,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_predicted_peak_is_the_measured_one(case: str) -> None:
    config, step, memory = CASES[case]
    measured = measured_bytes(config, memory, step, torch.device("cpu"))
    assert measured > 15 * 2**20
    assert dry_run(config, memory, step).peak.total == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    "options",
    [{"bf16": True}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}],
    ids=["autocast", "checkpointing, accumulating"],
)
def test_the_trainer_itself_needs_what_was_predicted(options: dict[str, Any], tmp_path: Path) -> None:
    step = replace(
        STEP,
        tokens=512,
        autocast="bfloat16" if "bf16" in options else None,
        gradient_checkpointing="bf16" not in options,
        accumulate="bf16" not in options,
    )
    config = architecture(vocab_size=1000)
    model = transformers.AutoModelForCausalLM.from_config(config)
    memory = attach(model, MEMORY).train_only("all")
    rows = [{name: column[0] for name, column in batch_of(step).items()}] * 8
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=step.batch_size,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        **options,
    )
    trainer = InlayTrainer(memory=memory, model=model, args=arguments, train_dataset=rows)

    def train() -> list[Tensor]:
        trainer.train()
        return []

    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    measured = weights + extra_bytes(train, torch.device("cpu"))
    assert dry_run(config, MEMORY, step).peak.total == pytest.approx(measured, rel=0.01)


def test_weights_gradients_and_optimizer_states_are_counted_by_hand() -> None:
    config = architecture(hidden_size=256, intermediate_size=1024, head_dim=64)
    # So short that the peak is where every gradient is there.
    step = replace(STEP, tokens=65, batch_size=1, gradient_checkpointing=True)
    plan = plan_memory(config, MEMORY, step)
    width, inner = 256, 1024
    block = width * width * (1 + 1 / 2 + 1 / 2 + 1) + 3 * width * inner + 2 * width
    model = 4 * block + 2 * 256 * width + width
    memory = 2 * (width * 5 + width * width)
    tensors = 4 * (4 + 3 + 2) + 2 + 1 + 2 * 2  # of blocks, embedding and head, last norm, memory
    assert plan.parts["optimizer"] == pytest.approx(8 * (model + memory) + 4 * tensors, rel=1e-3)
    assert plan.parts["weights"] == pytest.approx(4 * (model + memory), rel=1e-3)
    assert plan.parts["gradients"] == pytest.approx(4 * (model + memory), rel=0.08)  # the embedding's is last
    assert plan.peak_bytes == sum(plan.parts.values())


def test_a_padded_batch_costs_a_mask_in_every_layer() -> None:
    step = replace(STEP, tokens=512, mode="all")
    whole, padded = (dry_run(architecture(), MEMORY, replace(step, padded=some)).peak for some in (False, True))
    squares = step.batch_size * step.tokens**2
    # A boolean mask for all layers and, for each of the four, the same in float32 for its backward.
    assert padded.total - whole.total >= squares * (1 + 4 * 4)


def test_the_memory_costs_one_sum_a_layer_and_its_own_states_however_many_chunks() -> None:
    width, inner = 128, 352
    own = 2 * (width * width + 5 * width)  # parameters of two layers
    small, large = (
        plan_memory(architecture(), replace_chunk(size), replace(STEP, tokens=2048, mode="memory", batch_size=1))
        for size in (1024, 8)
    )
    for plan in (small, large):
        assert plan.memory_bytes >= 4 * 3 * own
    assert large.memory_bytes <= small.memory_bytes
    assert large.materialised_bytes == 2 * 256 * width * inner * 4
    assert large.materialised_bytes > 10 * large.memory_bytes


def replace_chunk(size: int) -> FastWeightConfig:
    return MEMORY.model_copy(update={"chunk_size": size})


def test_walking_a_few_chunks_is_as_good_as_walking_all(monkeypatch: pytest.MonkeyPatch) -> None:
    step = replace(STEP, tokens=600, gradient_checkpointing=True, document_tokens=250)
    memory = MEMORY.model_copy(update={"layers": [1]})
    few = dry_run(SMALL, memory, step)
    monkeypatch.setattr(dry_run_module, "_CHUNKS", 10**6)
    assert dry_run(SMALL, memory, step) == few


@pytest.mark.parametrize(
    "changes", [{}, {"tokens": 192, "mode": "memory", "autocast": "bfloat16", "gradient_checkpointing": True}]
)
def test_the_logits_of_a_large_vocabulary_are_planned_in_slices(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured, with the loss in slices, walked in two of them and in all."""
    config, step = architecture(vocab_size=4000), replace(STEP, **{"tokens": 512, **changes})
    whole = dry_run(config, MEMORY, step).peak.total
    monkeypatch.setattr(sliced_loss, "LOGITS_AT_ONCE", 2 * 4000 * step.tokens // 8)
    few = dry_run(config, MEMORY, step)
    assert few.peak.total == pytest.approx(measured_bytes(config, MEMORY, step, torch.device("cpu")), rel=0.02)
    assert few.peak.total < (0.75 if "mode" in changes else 0.95) * whole
    monkeypatch.setattr(sliced_loss, "_MADE", 10**6)
    assert dry_run(config, MEMORY, step) == few


def test_a_dry_run_touches_neither_the_model_nor_the_random_state() -> None:
    model = transformers.AutoModelForCausalLM.from_config(architecture())
    before = {name: (id(p), p.requires_grad, p.sum().item()) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    with torch.no_grad():
        trace = dry_run(model, MEMORY, replace(STEP, mode="memory"))
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: (id(p), p.requires_grad, p.sum().item()) for name, p in model.named_parameters()} == before
    assert not any(isinstance(m, FastWeightProjection) for m in model.modules())
    assert trace == dry_run(model.config, MEMORY, replace(STEP, mode="memory"))


def test_a_model_that_routes_by_numbers_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match="Qwen3Moe"):
        dry_run(qwen3_moe([0]), MEMORY.model_copy(update={"layers": [0]}), replace(STEP, tokens=16))


@given(
    weights=st.integers(0, 10**9),
    lines=st.lists(st.tuples(st.integers(-(10**9), 10**9), st.integers(1, 10**7)), min_size=1, max_size=4),
    square=st.integers(0, 50),
    budget=st.integers(0, 10**11),
)
def test_the_longest_fit_is_the_longest(weights: int, lines: list[tuple[int, int]], square: int, budget: int) -> None:
    def peak(tokens: int) -> int:
        return max(weights, *(start + slope * tokens for start, slope in lines)) + square * tokens**2

    fit = longest_tokens(budget, SMALL, MEMORY, STEP, peak=peak)
    assert len(fit.tried) <= 40
    if not fit.tokens:
        assert peak(2 * 64) > budget
        return
    assert fit.peak_bytes == peak(fit.tokens) <= budget
    assert fit.tokens % 64 == 0
    longer = max(fit.tokens + 64, int(fit.tokens * 1.02))
    assert longer >= 2**20 or peak(longer) > budget


def test_the_longest_fit_of_a_model_fits_and_one_chunk_more_does_not() -> None:
    memory = MEMORY.model_copy(update={"layers": [1]})
    step = replace(STEP, gradient_checkpointing=True, batch_size=1)
    fit = longest_tokens(60 * 2**20, SMALL, memory, step, frame_rate=12.5)
    assert fit.chunks >= 8
    assert fit.seconds == fit.chunks * 64 / 12.5
    assert dry_run(SMALL, memory, replace(step, tokens=fit.tokens)).peak.total <= 60 * 2**20
    longer = max(fit.tokens + 64, int(1.01 * fit.tokens))
    assert dry_run(SMALL, memory, replace(step, tokens=longer)).peak.total > 60 * 2**20
    assert len(fit.tried) <= 7


def test_the_materialised_formula_holds_0_172_gib_a_chunk_for_moshis_shape() -> None:
    trace = dry_run_module.Trace(dry_run(architecture(), MEMORY, replace(STEP, tokens=65)).peak, ((4096, 11264),))
    step = TrainingStep(32_000)
    held = materialised_bytes(trace, FastWeightConfig(chunk_size=256), step)
    assert held / 125 / GIB == pytest.approx(0.172, abs=5e-4)
    assert held / GIB == pytest.approx(21.5, abs=0.05)


def recipe(**changes: Any) -> Any:
    model = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
    raw = {
        "name": "small",
        "model": {"config": model | {"num_attention_heads": 4, "num_key_value_heads": 4}},
        "memory": {"layers": [0], "chunk_size": 32},
        "data": {"task": "recall", "sequence_length": 512},
        "mode": "all",
        "trainer": {"per_device_train_batch_size": 4},
        "doctor": {"budget_gb": 0.02, "frame_rate": 12.5},
    }
    return check_recipe(Recipe, raw | changes)


@pytest.fixture(scope="module")
def over() -> RecipePlan:
    """A recipe whose step needs more than its 20 MB."""
    return plan_recipe(recipe())


def test_a_step_beyond_its_budget_is_fatal_and_the_fix_names_what_fits(over: RecipePlan) -> None:
    (finding,) = over.findings()
    assert (finding.code, finding.severity) == ("memory.out_of_memory", Severity.FATAL)
    assert "4 × 512 tokens" in finding.says
    assert over.longest is not None
    assert f"data.sequence_length: {over.longest.tokens} ({over.longest.chunks} chunks, duration_sec" in finding.fix
    offered = {one.change: one.peak_bytes <= 20_000_000 for one in over.alternatives}
    assert {"trainer.gradient_checkpointing: true", "trainer.per_device_train_batch_size: 1"} <= set(offered)
    assert any(offered.values())
    for change, fits in offered.items():
        assert (change in finding.fix) == fits


def test_within_a_tenth_of_the_budget_is_a_warning_and_below_it_nothing(over: RecipePlan) -> None:
    peak = over.plan.peak_bytes
    (tight,) = replace(over, budget_bytes=int(1.05 * peak)).findings()
    assert (tight.code, tight.severity) == ("memory.tight", Severity.WARNING)
    assert replace(over, budget_bytes=int(1.2 * peak)).findings() == []
    assert replace(over, budget_bytes=None).findings() == []


def test_flash_attention_is_planned_as_sdpa() -> None:
    flash = recipe(model=recipe().model.model_dump() | {"attn_implementation": "flash_attention_2"})
    assert _model_config(flash, vocab_size=100)._attn_implementation == "sdpa"


def test_where_nothing_fits_the_fix_says_what_helps_most(over: RecipePlan) -> None:
    (finding,) = replace(over, budget_bytes=1000, longest=None).findings()
    least = min(over.alternatives, key=lambda one: one.peak_bytes)
    assert finding.fix.startswith("no one change is enough")
    assert least.change in finding.fix


def test_the_lengths_are_the_recipes_own_and_what_surrounds_it(over: RecipePlan) -> None:
    assert [cost.tokens for cost in over.lengths] == [256, 512, 1024]
    assert [cost.seconds for cost in over.lengths] == [20.48, 40.96, 81.92]
    assert over.lengths[1].kept_bytes == over.plan.peak_bytes
    for cost in over.lengths:
        assert cost.checkpointed_bytes < cost.kept_bytes
        assert cost.materialised_bytes == 4 * cost.chunks * 64 * 176 * 4  # rows, chunks, D, F, float32


def test_the_recipes_trainer_and_data_decide_what_is_planned() -> None:
    text = {"task": "text", "source": "files", "path": "x", "sequence_length": 64, "tokenizer": {"kind": "bytes"}}
    trainer = {"bf16": True, "optim": "adafactor", "gradient_accumulation_steps": 4}
    step, assumptions = training_step(recipe(trainer=trainer, data=text), SMALL)
    assert (step.autocast, step.accumulate, step.padded, step.batch_size) == ("bfloat16", True, True, 8)
    assert len(assumptions) == 2
    packed, _ = training_step(recipe(data=text | {"packing": "concatenate"}), SMALL)
    assert (packed.padded, packed.document_tokens) == (False, 32)
    flash = recipe(data=text, model=recipe().model.model_dump() | {"attn_implementation": "flash_attention_2"})
    assert not training_step(flash, SMALL)[0].padded


def test_the_section_shows_in_terminal_and_html_and_goes_to_json(over: RecipePlan) -> None:
    shown = StringIO()
    print_section(Console(width=160, file=shown), over.section())
    for words in ("optimizer states", f"{PORT_COPIES} copies", "duration_sec"):
        assert words in shown.getvalue()
    assert "Peak by length" in render_report(Report("Doctor", sections=[over.section()]))
    adapter = TypeAdapter(RecipePlan)
    assert adapter.validate_json(adapter.dump_json(over)) == over
