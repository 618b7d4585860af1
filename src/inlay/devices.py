"""Where a model runs."""

from __future__ import annotations

import torch

from inlay.fastweight.errors import InlayError


def chosen_device(device: str | torch.device | None = None) -> torch.device:
    """Where a command or a loaded run computes: where it was told to, else on the GPU if there is one.

    Raises:
        InlayError: PyTorch knows no such device, or it is a GPU and CUDA is not available.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InlayError(f"device {device}: {str(error).splitlines()[0]}") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InlayError(f"device {device}: no CUDA is available here; leave it out, or give cpu")
    return chosen
