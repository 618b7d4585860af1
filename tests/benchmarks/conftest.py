"""Kyutai's package compiles small kernels on first use, which a test neither needs nor has the time for."""

from __future__ import annotations

import os

os.environ.setdefault("NO_TORCH_COMPILE", "1")
