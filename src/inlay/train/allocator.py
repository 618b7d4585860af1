"""Keep freed memory: what the C library does with a small model's tensors costs a third of a training step.

glibc gives a freed block of a few megabytes back to the system, and every step fetches the same blocks again, page by
page. A process that trains on the CPU does better to keep them.
"""

from __future__ import annotations

import ctypes
import os

_KEPT = 2**30
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")

KEEP_FREED_MEMORY = {variable: str(_KEPT) for variable in _VARIABLES}
"""The environment of a process that does so from its start."""


def keep_freed_memory() -> bool:
    """Let this process keep up to 1 GiB that it has freed. False where the C library has no such setting.

    What the environment says of either threshold stands.
    """
    if any(variable in os.environ for variable in _VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _KEPT)) and bool(mallopt(_M_MMAP_THRESHOLD, _KEPT))
