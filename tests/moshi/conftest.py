"""Kyutai's package decides on import whether it compiles its small kernels; on a CPU that takes long."""

import os

os.environ["NO_TORCH_COMPILE"] = "1"
