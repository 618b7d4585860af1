"""Kyutai's Moshi with a memory: training on long audio and full-duplex streaming past the attention window.

Works on the classes of Kyutai's own ``moshi`` package, which is no dependency of Inlay: importing :mod:`inlay.moshi`
without it raises :class:`MoshiMissingError`. Never import ``moshi.server``: it starts a server when it is imported.
"""

from __future__ import annotations

import importlib

from inlay.fastweight.errors import InlayError

_NEEDS = ("einops", "sentencepiece", "sphn", "moshi")


class MoshiMissingError(InlayError, ImportError):
    """Kyutai's package, or one that it needs, is not installed."""


def require_moshi() -> None:
    """Check that Kyutai's package can be imported.

    Raises:
        MoshiMissingError: It cannot; the message says what is missing and how to install it.
    """
    for name in _NEEDS:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MoshiMissingError(
                f"Inlay's Moshi part needs Kyutai's package, but {name!r} cannot be imported ({error}). Install it "
                "without its version pins, which lag behind torch, and then what it needs:\n"
                "    pip install --no-deps moshi==0.2.13\n"
                "    pip install sphn sentencepiece einops"
            ) from error


require_moshi()
