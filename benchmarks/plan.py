"""The doctor's memory plan: predicted peaks of a training step against measured ones.

Measured is a second step, when the optimizer has its states: the bytes of the tensors that are there before it, and
what PyTorch's allocator hands out beyond them while it runs (:func:`benchmarks.measure.extra_bytes`: on CUDA
``torch.cuda.max_memory_allocated``, on the CPU the allocator's own events). The step is written out here once more, and
its batch comes from the data pipeline, so that nothing of the prediction is in its measurement.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils.operations import convert_to_fp32
from peft import LoraConfig, get_peft_model
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from benchmarks.entry import Aim, Entry, Progress
from benchmarks.measure import extra_bytes
from inlay.data import collate
from inlay.data.packing import Piece, fill_row
from inlay.doctor.dry_run import TrainingStep, dry_run
from inlay.fastweight import FastWeightConfig, attach
from inlay.sliced_loss import slice_loss

MIB = 2**20

_SIZE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
_QUICK = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def run(quick: bool, device: torch.device, progress: Progress) -> Entry:
    """Predict and measure every case; ``quick``: tiny models."""
    size, tokens = (_QUICK, 96) if quick else (_SIZE, 1280)
    memory = FastWeightConfig(layers=[0, 1] if quick else [1, 3, 5], chunk_size=16 if quick else 256)
    cases = _cases(tokens, device.type)
    rows = []
    for done, (name, (family, step)) in enumerate(cases.items()):
        progress(done, len(cases), name)
        config = AutoConfig.for_model(family, **size, num_key_value_heads=size["num_attention_heads"], vocab_size=8192)
        predicted = dry_run(config, memory, step).peak.total
        measured = measured_bytes(config, memory, step, device)
        rows.append({"case": name, "predicted": predicted, "measured": measured})
    furthest = max(max(row["predicted"] / row["measured"], row["measured"] / row["predicted"]) for row in rows)
    aim = Aim("predicted against measured peak, the case that is furthest off", furthest, 1.15, False)
    return Entry("Peak memory of a training step, predicted and measured", [_table(rows)], [aim], {"cases": rows})


def measured_bytes(config: PreTrainedConfig, memory: FastWeightConfig, step: TrainingStep, device: torch.device) -> int:
    """Peak bytes of the second of two training steps on ``device``, everything that is held included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sequences shorter than a chunk, of deprecated names
        return _measure(config, memory, step, device)


def _measure(config: PreTrainedConfig, memory: FastWeightConfig, step: TrainingStep, device: torch.device) -> int:
    model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, step.dtype)).to(device).train()
    slice_loss(model)
    if step.gradient_checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if step.lora is not None:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **step.lora))
    attach(model, memory).train_only(step.mode)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {"adamw": {"fused": True}, "adamw_torch": {}, "sgd": {}}[step.optimizer]
    optimizer = (torch.optim.SGD if step.optimizer == "sgd" else torch.optim.AdamW)(trained, **options)
    batch = {name: column.to(device) for name, column in batch_of(step).items()}

    def loss() -> Tensor:
        mixed = torch.autocast(device.type, getattr(torch, step.autocast)) if step.autocast else nullcontext()
        with mixed:
            output = model(**batch, use_cache=False)
        return (convert_to_fp32(output) if step.autocast else output).loss

    def update() -> list[Tensor]:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if not step.accumulate:
            optimizer.zero_grad()
        return []

    update()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    held = [*model.parameters(), *model.buffers(), *states, *gradients, *batch.values()]
    before = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    return sum(before.values()) + extra_bytes(update, device)


def batch_of(step: TrainingStep) -> dict[str, Tensor]:
    """A batch as the data pipeline makes it: rows of one document or several, with a token of padding or none."""
    tokens = step.tokens - 1 if step.padded else step.tokens
    size = step.document_tokens or tokens
    lengths = [min(size, tokens - start) for start in range(0, tokens, size)]
    pieces = [Piece("", torch.randint(3, 200, (length,)).numpy()) for length in lengths]
    row = fill_row(pieces, sequence_length=step.tokens, pad_token_id=0)
    return collate([row] * step.batch_size)


def _cases(tokens: int, device: str) -> dict[str, tuple[str, TrainingStep]]:
    plain = TrainingStep(tokens, dtype="float32", mode="all", device="cuda" if device == "cuda" else "cpu")
    lora = {"r": 8, "target_modules": "all-linear"}
    return {
        "llama, all": ("llama", plain),
        "llama, all, checkpointing": ("llama", replace(plain, gradient_checkpointing=True)),
        "llama, all, bf16 autocast": ("llama", replace(plain, autocast="bfloat16")),
        "qwen3, memory, bf16": ("qwen3", replace(plain, mode="memory", dtype="bfloat16")),
        "qwen3, memory, bf16, T doubled, checkpointing": (
            "qwen3",
            replace(plain, mode="memory", dtype="bfloat16", tokens=2 * tokens, gradient_checkpointing=True),
        ),
        "llama, memory+layers, bf16, B=2": (
            "llama",
            replace(plain, mode="memory+layers", dtype="bfloat16", batch_size=2),
        ),
        "llama, memory+lora, bf16": ("llama", replace(plain, mode="memory+lora", dtype="bfloat16", lora=lora)),
        "llama, all, bf16, packed rows": ("llama", replace(plain, dtype="bfloat16", document_tokens=tokens // 3)),
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Peak of a training step after the first", title_justify="left")
    for heading in ("case", "predicted MiB", "measured MiB", "off by"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for row in rows:
        off = row["predicted"] / row["measured"] - 1
        table.add_row(row["case"], f"{row['predicted'] / MIB:,.1f}", f"{row['measured'] / MIB:,.1f}", f"{off:+.2%}")
    return table
