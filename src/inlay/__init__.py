"""Inlay: a fixed-size memory for long context, inlaid into a pretrained transformer.

    memory = inlay.attach(model, inlay.FastWeightConfig(layers="every:6", chunk_size=1024, eta=3e-4))

Importing it changes nothing; :func:`attach` changes the one model it is given and ``memory.detach()`` gives it back.
"""

__version__ = "0.1.0"

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

__all__ = [
    "AttachError",
    "CheckpointError",
    "FastWeightConfig",
    "InlayError",
    "Memory",
    "MemoryNeverReadError",
    "NonFiniteMemoryError",
    "Session",
    "StateError",
    "__version__",
    "attach",
    "attach_pretrained",
    "find_memory",
]
