"""Which kind of recipe a YAML file holds, so that one command serves them all."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml

RecipeKind = Literal["text", "compress", "moshi"]

_OWN: dict[RecipeKind, set[str]] = {
    "moshi": {"moshi_paths"},
    "compress": {"decoder", "compressor", "layout", "objectives", "pretraining"},
    "text": {"model"},
}
"""Sections that recipes of one kind have and the others have not."""


def recipe_kind(path: Path) -> RecipeKind | None:
    """By the sections of the recipe; None for what cannot be read as one: whoever reads it then says what is wrong."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    sections = raw.keys() if isinstance(raw, dict) else set()
    return next((kind for kind, own in _OWN.items() if sections & own), None)
