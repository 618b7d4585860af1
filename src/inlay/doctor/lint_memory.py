"""What lint looks for in the memory of any recipe, of text and of Moshi: each check a function from a :class:`Case`.

A check that lacks what it needs (the model's configuration, the data) raises :class:`NotChecked` with the reason, so
that "fine" always means looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch

from inlay.doctor.findings import Finding, Severity
from inlay.doctor.lint_case import Case, NotChecked
from inlay.doctor.reach_plan import chunks_in
from inlay.fastweight import AttachError, FastWeightConfig

LEAST_SHARE = 1e-4
"""A memory that can never make up this much of its layer's output does nothing, in float32 too."""


def _sequence(case: Case) -> Iterator[Finding]:
    length, size = case.tokens, case.memory.chunk_size
    chunks = chunks_in(length, size)
    fix = f"memory.chunk_size: {max(1, (length - 1) // 7)}, or {case.length(8 * size)}, for at least 8 chunks"
    if chunks == 1:
        says = f"sequences of {length} tokens are not longer than a chunk of {size}: what is written is never read"
        yield Finding("lint.never_read", Severity.FATAL, says, fix)
    elif chunks == 2:
        says = f"sequences of {length} tokens hold 2 chunks of {size}: only the first is ever read, and by one"
        yield Finding("lint.few_chunks", Severity.WARNING, says, fix)


def _layers(case: Case) -> Iterator[Finding]:
    if case.memory.projection is not None:
        raise NotChecked("not checked: memory.projection names blocks of its own")
    blocks = case.blocks
    try:
        case.memory.layer_indices(blocks)
    except AttachError as error:
        fix = f"memory.layers: indices from 0 to {blocks - 1}, or every:6"
        yield Finding("lint.layers", Severity.FATAL, f"memory.{error}", fix)


def _eta(case: Case) -> Iterator[Finding]:
    if case.memory.eta == 0:
        default = FastWeightConfig.model_fields["eta"].default
        says = "memory.eta is 0: whatever is written is multiplied by 0, so the memory neither acts nor learns"
        yield Finding("lint.eta", Severity.FATAL, says, f"memory.eta: {default:g}")


def _clip(case: Case) -> Iterator[Finding]:
    """Can a clipped memory ever matter?

    n − 1 updates of norm at most τ sum to at most (n − 1) τ, and ‖S z‖ ≤ ‖S‖ ‖z‖, while a W0 of independent entries of
    standard deviation σ gives ‖W0 z‖ ≈ σ √D ‖z‖. So whatever is learnt, the memory's share of the output is at most

        η (n − 1) τ / (σ √D)        with τ = max_update_ratio · ‖W0‖ = max_update_ratio · σ √(D F) if it is relative

    It has to exceed LEAST_SHARE, and in half precision half the spacing of the output's own numbers, to which W0 z has
    been rounded already: less is rounded away from it.
    """
    memory = case.memory
    key, limit = "max_update_norm", memory.max_update_norm
    chunks = chunks_in(case.tokens, memory.chunk_size)
    if limit is None and memory.max_update_ratio is not None:
        key, limit = "max_update_ratio", memory.max_update_ratio
    if limit is None or chunks == 1 or memory.eta == 0:
        return
    per_limit = memory.eta * (chunks - 1) / (case.weight_std * math.sqrt(case.width))
    if key == "max_update_ratio":
        per_limit *= case.weight_std * math.sqrt(case.width * case.inner)
    # Numbers from 1 to 2 are eps apart: relative to them, half of that is between eps / 4 and eps / 2.
    resolution = torch.finfo(case.output_dtype).eps / 4
    if limit * per_limit < max(LEAST_SHARE, resolution):
        says = (
            f"memory.{key}: {limit:g} leaves the memory at most {limit * per_limit:.1e} of its layer's output, when "
            f"{chunks - 1} updates have been written and whatever it learns"
        )
        if resolution > LEAST_SHARE:
            says += f"; {str(case.output_dtype).removeprefix('torch.')} rounds off what is below {resolution:.1e}"
        fix = f"memory.{key}: null (clip only what diverges), or {0.1 / per_limit:.1g}, which allows a tenth"
        yield Finding("lint.clip", Severity.FATAL, says, fix)


def _exposure(case: Case) -> Iterator[Finding]:
    if case.memory.exposure > 0 and case.memory.chunk_size > 1:
        says = (
            f"memory.exposure is {case.memory.exposure:g}: while training, a token reads up to "
            f"{case.memory.chunk_size - 1} tokens that come after it, its label among them; evaluation runs without "
            "it, so its loss is another quantity than the training loss"
        )
        yield Finding("lint.exposure", Severity.WARNING, says, "memory.exposure: 0")


def _learning_rates(case: Case) -> Iterator[Finding]:
    for key, rate in case.rates.items():
        if rate <= 0:
            yield Finding("lint.learning_rate", Severity.FATAL, f"{key} is {rate:g}: nothing is learnt", f"{key}: 1e-3")
        elif rate > 1 and case.adam:
            says = f"{key} is {rate:g}: AdamW moves every weight by about that in each step, and weights are below 1"
            yield Finding("lint.learning_rate", Severity.WARNING, says, f"{key}: 1e-3")


MEMORY_CHECKS: dict[str, Callable[[Case], Iterable[Finding]]] = {
    "Chunks in a sequence": _sequence,
    "Memory layers": _layers,
    "Step size": _eta,
    "Clipping": _clip,
    "Exposure": _exposure,
    "Learning rates": _learning_rates,
}
"""The checks by their titles, in the order in which they are told."""
