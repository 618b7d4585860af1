"""How every test runs: one torch thread a process under xdist, and property tests without a clock."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

# Two processes of two threads each on two cores wait for each other many times over.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# A busy machine makes a slow example, not a wrong one. On CI the same examples are drawn each time.
settings.register_profile("inlay", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("inlay")
