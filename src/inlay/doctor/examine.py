"""``examine``: everything the doctor measures on a model with a memory and one real batch.

Nothing of the model is changed: parameters, gradients, modes, counters and random state are afterwards what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from inlay.doctor.attribution import attribute_gradients
from inlay.doctor.causality import probe_causality
from inlay.doctor.diagnosis import Diagnosis
from inlay.doctor.findings import Examination
from inlay.doctor.reach import examine_reach
from inlay.doctor.scale import examine_scale
from inlay.doctor.step_size import recommend_step_size
from inlay.fastweight import AttachError, find_memory
from inlay.report.provenance import provenance

Progress = Callable[[str], None]
"""Called with the name of each examination before it is made."""


def examine(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    longer_batch: Mapping[str, Tensor] | None = None,
    frame_rate: float | None = None,
    length_key: str = "data.sequence_length",
    progress: Progress | None = None,
) -> Diagnosis:
    """Say whether, and why, the memory of ``model`` learns or does not.

    Args:
        model: A causal LM with a memory attached; what is to be trained requires a gradient.
        batch: One real batch: ``input_ids`` and ``labels`` ``[B, T]`` and what else :func:`inlay.data.collate` gives.
        longer_batch: The same data in sequences twice as long, to see what length alone would change.
        frame_rate: Frames per second where tokens are frames of audio, so that lengths are told in seconds too.
        length_key: The recipe's key for a length, for the fixes.
        progress: See :data:`Progress`.

    Raises:
        AttachError: The model has no memory.
    """
    memory = find_memory(model)
    if memory is None:
        raise AttachError(f"{type(model).__name__} has no memory to examine; give it one with inlay.attach")
    steps: dict[str, Callable[[], Examination]] = {
        "reach": lambda: examine_reach(batch, memory.config, frame_rate=frame_rate, length_key=length_key),
        "gradients": lambda: attribute_gradients(memory, model, batch, longer_batch=longer_batch),
        "causality": lambda: probe_causality(model, batch),
        "scale": lambda: examine_scale(memory, model, batch),
        "step_size": lambda: recommend_step_size(memory, model, batch),
    }
    made: dict[str, Examination] = {}
    for name, step in steps.items():
        if progress is not None:
            progress(name)
        made[name] = step()
    return Diagnosis(type(model).__name__, made, provenance=provenance(next(memory.parameters()).device))
