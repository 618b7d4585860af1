"""Training: recipes, the Trainer, and runs on disk."""

from inlay.train.directory import RunError
from inlay.train.monitor import MemoryMonitor
from inlay.train.recipe import Recipe, RecipeError, check_recipe, dump_recipe, load_recipe
from inlay.train.report import training_curve, write_run_report
from inlay.train.run import Run, build_model, load_run, train
from inlay.train.trainer import InlayTrainer, MetricsFile, read_metrics

__all__ = [
    "InlayTrainer",
    "MemoryMonitor",
    "MetricsFile",
    "Recipe",
    "RecipeError",
    "Run",
    "RunError",
    "build_model",
    "check_recipe",
    "dump_recipe",
    "load_recipe",
    "load_run",
    "read_metrics",
    "train",
    "training_curve",
    "write_run_report",
]
