"""Measured results as JSON that any reader takes: no NaN, no half-written file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inlay.files import write_whole


def plain(value: Any) -> Any:
    """``value`` with None for every number that JSON cannot hold, and lists for tuples."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(value: Mapping[str, Any], path: str | Path) -> Path:
    """Write ``value`` to ``path``, whole or not at all; its folder is made if missing."""
    text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False)
    return write_whole(path, text + "\n")
