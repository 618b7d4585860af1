"""Which kind of recipe a YAML file holds, so that one command serves them all, and the others say which does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

RecipeKind = Literal["text", "compress", "moshi", "memories"]

_OWN: dict[RecipeKind, set[str]] = {
    "moshi": {"moshi_paths"},
    "memories": {"fast_weights", "soft_tokens", "tasks"},
    "compress": {"decoder", "compressor", "layout", "objectives", "pretraining"},
    "text": {"model"},
}
"""Sections that recipes of a kind have and those further down have not."""

NAMES: dict[RecipeKind, tuple[str, str]] = {
    "moshi": ("Moshi", "inlay train, evaluate, doctor, moshi run"),
    "compress": ("soft tokens", "inlay train, evaluate, doctor, compress encode"),
    "memories": ("the comparison of both memories", "inlay evaluate --memories"),
    "text": ("fast weights in a text model", "inlay train, evaluate, doctor, generate, chat"),
}
"""What recipes of each kind are of, and the commands that take them."""


def recipe_kind(path: Path) -> RecipeKind | None:
    """By the sections of the recipe; None for what cannot be read as one: whoever reads it then says what is wrong."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return kind_of(raw) if isinstance(raw, dict) else None


def kind_of(raw: Mapping[str, Any]) -> RecipeKind | None:
    """By the sections of a recipe that is read; None where they are of no kind."""
    return next((kind for kind, own in _OWN.items() if raw.keys() & own), None)
