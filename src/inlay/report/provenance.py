"""What a report says of where its figures come from."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
import transformers

from inlay import __version__
from inlay.devices import chosen_device


def provenance(device: torch.device | str | None = None) -> dict[str, Any]:
    """Versions, and what the figures were measured on: ``device``, or the GPU if there is one."""
    device = chosen_device(device)
    return {
        "inlay": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores",
    }
