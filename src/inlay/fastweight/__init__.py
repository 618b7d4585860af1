"""Fast weights: the operation, its state, the layer and how it is attached to a model."""

from inlay.fastweight.clip import clip_targets, update_norms
from inlay.fastweight.config import FastWeightConfig, NormalInit
from inlay.fastweight.errors import (
    AttachError,
    CheckpointError,
    InlayError,
    MemoryNeverReadError,
    NonFiniteMemoryError,
)
from inlay.fastweight.layer import FastWeightConv1D, FastWeightLinear, FastWeightProjection
from inlay.fastweight.memory import Memory, TrainMode, attach, attach_pretrained, find_memory
from inlay.fastweight.operation import fast_weight_linear
from inlay.fastweight.parallel import fast_weight_linear_parallel
from inlay.fastweight.reference import fast_weight_linear_reference
from inlay.fastweight.session import Session
from inlay.fastweight.state import NO_DOCUMENT, FastWeightState
from inlay.fastweight.streaming import StateError
from inlay.fastweight.target import TargetGenerator

__all__ = [
    "NO_DOCUMENT",
    "AttachError",
    "CheckpointError",
    "FastWeightConfig",
    "FastWeightConv1D",
    "FastWeightLinear",
    "FastWeightProjection",
    "FastWeightState",
    "InlayError",
    "Memory",
    "MemoryNeverReadError",
    "NonFiniteMemoryError",
    "NormalInit",
    "Session",
    "StateError",
    "TargetGenerator",
    "TrainMode",
    "attach",
    "attach_pretrained",
    "clip_targets",
    "fast_weight_linear",
    "fast_weight_linear_parallel",
    "fast_weight_linear_reference",
    "find_memory",
    "update_norms",
]
