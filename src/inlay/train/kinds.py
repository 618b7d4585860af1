"""Which kind of recipe a YAML file holds, so that one command serves them all, and the others say which does."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml

from inlay.train.yaml_recipe import RecipeError

RecipeKind = Literal["text", "compress", "moshi", "memories"]

_OWN: dict[RecipeKind, set[str]] = {
    "moshi": {"moshi_paths"},
    "memories": {"fast_weights", "soft_tokens", "tasks"},
    "compress": {"decoder", "compressor", "layout", "objectives", "pretraining"},
    "text": {"model"},
}
"""Sections that recipes of a kind have and those further down have not."""

_NAMES: dict[RecipeKind, tuple[str, str]] = {
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
    sections = raw.keys() if isinstance(raw, dict) else set()
    return next((kind for kind, own in _OWN.items() if sections & own), None)


def refuse_other_kinds(path: str | Path, wanted: RecipeKind) -> None:
    """Make sure that ``path`` holds no recipe of another kind than ``wanted``.

    Raises:
        RecipeError: It does; names what it is and which commands take it.
    """
    kind = recipe_kind(Path(path))
    if kind not in (wanted, None):
        name, commands = _NAMES[kind]
        raise RecipeError(f"{path} is a recipe of {name}, for {commands}; here one of {_NAMES[wanted][0]} is asked for")
