"""Inlay: a fixed-size memory for long context, inlaid into a pretrained transformer.

    memory = inlay.attach(model, inlay.FastWeightConfig(layers="every:6", chunk_size=1024, eta=3e-4))

Importing it changes nothing; :func:`attach` changes the one model it is given and ``memory.detach()`` gives it back.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from inlay.fastweight import (
        AttachError,
        CheckpointError,
        FastWeightConfig,
        InlayError,
        Memory,
        MemoryNeverReadError,
        NonFiniteMemoryError,
        Session,
        StateError,
        attach,
        attach_pretrained,
        find_memory,
    )
    from inlay.train.callback import MemoryCallback

__all__ = [
    "AttachError",
    "CheckpointError",
    "FastWeightConfig",
    "InlayError",
    "Memory",
    "MemoryCallback",
    "MemoryNeverReadError",
    "NonFiniteMemoryError",
    "Session",
    "StateError",
    "__version__",
    "attach",
    "attach_pretrained",
    "find_memory",
]


def __getattr__(name: str) -> Any:
    """A public name is fetched when it is first used: ``inlay --help`` need not wait for torch and transformers."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = "inlay.train.callback" if name == "MemoryCallback" else "inlay.fastweight"
    value = globals()[name] = getattr(import_module(place), name)
    return value
