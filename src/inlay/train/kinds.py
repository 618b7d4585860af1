"""Which kind of recipe a YAML file holds, so that one command runs them all."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml

RecipeKind = Literal["text", "moshi"]


def recipe_kind(path: Path) -> RecipeKind:
    """``moshi`` for a recipe with a ``moshi_paths`` section, else ``text``, also for what cannot be read as a recipe:
    whoever reads it then says what is wrong.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return "text"
    return "moshi" if isinstance(raw, dict) and "moshi_paths" in raw else "text"
