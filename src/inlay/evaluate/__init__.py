"""Evaluation: what the memory buys, by position, by length of context and by distance of the fact; what soft tokens
keep of a context, beside every cheap way to spend as many slots."""

from inlay.evaluate.collapse import examine_collapse
from inlay.evaluate.collapse_results import Collapse
from inlay.evaluate.compress import evaluate_compression
from inlay.evaluate.compress_results import CompressEvaluation
from inlay.evaluate.compress_scores import MethodScores
from inlay.evaluate.intervals import Interval, paired_interval
from inlay.evaluate.position import (
    Buckets,
    LossDifference,
    PositionLoss,
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
    "Collapse",
    "CompressEvaluation",
    "Evaluation",
    "EvaluationError",
    "GrowingContext",
    "Interval",
    "LossDifference",
    "MethodScores",
    "PositionLoss",
    "RecallAccuracy",
    "difference",
    "evaluate_compression",
    "evaluate_model",
    "evaluating",
    "examine_collapse",
    "growing_context",
    "loss_by_position",
    "paired_interval",
    "recall_accuracy",
    "with_and_without_memory",
]
