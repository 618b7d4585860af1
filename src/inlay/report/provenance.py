"""What a report says of where its figures come from."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
import transformers

from inlay import __version__


def provenance() -> dict[str, Any]:
    """Versions and the device."""
    return {
        "inlay": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
    }
