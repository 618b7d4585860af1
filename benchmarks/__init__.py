"""Measured claims: ``python -m benchmarks`` (or ``make bench``) runs every entry, one claim to a file."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported; its profiler writes to stderr otherwise
