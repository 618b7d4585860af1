"""How every test runs: one torch thread a process, no hub, property tests without a clock, little garbage."""

from __future__ import annotations

import gc
import os

import torch
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # or it is asked, again and again, for what a test says does not exist

# Bit-equality is asked of forwards that route other tokens to an expert, whose products then have other shapes; with
# several threads the BLAS library splits those differently and rounds differently, in the base model too. And two
# processes of two threads each on two cores wait for each other many times over.
torch.set_num_threads(1)

# A busy machine makes a slow example, not a wrong one. On CI the same examples are drawn each time.
settings.register_profile("inlay", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("inlay")


def pytest_collection_finish() -> None:
    """Take what was imported out of the garbage collector's sight: every Trainer collects, half a second each time."""
    gc.collect()
    gc.freeze()
