"""Evaluation: what the memory buys, by position, by length of context and by distance of the fact."""

from inlay.evaluate.intervals import Interval, paired_interval
from inlay.evaluate.position import (
    Buckets,
    LossDifference,
    PositionLoss,
    compare_memory,
    difference,
    loss_by_position,
    with_and_without_memory,
)
from inlay.evaluate.recall import RecallAccuracy, recall_accuracy
from inlay.evaluate.results import Evaluation
from inlay.evaluate.scoring import EvaluationError, evaluating
from inlay.evaluate.suite import NO_MEMORY, evaluate_model
from inlay.evaluate.window import GrowingContext, growing_context

__all__ = [
    "NO_MEMORY",
    "Buckets",
    "Evaluation",
    "EvaluationError",
    "GrowingContext",
    "Interval",
    "LossDifference",
    "PositionLoss",
    "RecallAccuracy",
    "compare_memory",
    "difference",
    "evaluate_model",
    "evaluating",
    "growing_context",
    "loss_by_position",
    "paired_interval",
    "recall_accuracy",
    "with_and_without_memory",
]
