"""Errors of the memory. Each message says what is wrong, where, and what to do."""


class InlayError(Exception):
    """Base of every error that Inlay raises on purpose."""


class AttachError(InlayError, ValueError):
    """A memory cannot be attached to this model as configured; the model is unchanged."""


class CheckpointError(InlayError, ValueError):
    """A saved memory is damaged or is not of this model; the model is unchanged."""


class MemoryGoneError(InlayError, RuntimeError):
    """Something took a memory layer out of its model behind the memory's back."""


class MemoryNeverReadError(InlayError, ValueError):
    """No sequence is longer than a chunk, so nothing that is written can ever be read."""


class NonFiniteMemoryError(InlayError, ArithmeticError):
    """A memory holds or produced NaN or infinity."""
