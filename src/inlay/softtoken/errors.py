"""Errors of soft tokens and their layout. Each message says what is wrong, where, and what to do."""

from inlay.fastweight.errors import InlayError


class SoftTokenError(InlayError, ValueError):
    """These slots do not make a memory, or not one that can be used in this way."""


class LayoutError(InlayError, ValueError):
    """This layout does not go with this tokenizer, memory or batch."""
