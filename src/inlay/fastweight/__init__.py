"""Fast weights: the operation, its state, the layer and how it is attached to a model."""

from inlay.fastweight.operation import fast_weight_linear
from inlay.fastweight.reference import fast_weight_linear_reference
from inlay.fastweight.state import NO_DOCUMENT, FastWeightState

__all__ = ["NO_DOCUMENT", "FastWeightState", "fast_weight_linear", "fast_weight_linear_reference"]
