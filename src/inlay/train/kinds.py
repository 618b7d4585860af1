"""Which kind of recipe a YAML file holds, so that one command serves them all."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml

RecipeKind = Literal["text", "compress", "moshi"]

_COMPRESS = {"decoder", "compressor", "layout", "objectives", "pretraining"}
"""Sections that recipes of soft tokens have and the others have not."""


def recipe_kind(path: Path) -> RecipeKind:
    """By the sections of the recipe; ``text`` also for what cannot be read as one: whoever reads it then says what is
    wrong.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return "text"
    sections = raw.keys() if isinstance(raw, dict) else set()
    return "moshi" if "moshi_paths" in sections else "compress" if sections & _COMPRESS else "text"
