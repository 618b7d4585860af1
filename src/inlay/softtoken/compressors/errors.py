"""The error of compressors. Its message says what is wrong, where, and what to do."""

from inlay.fastweight.errors import InlayError


class CompressorError(InlayError, ValueError):
    """This compressor does not go with this model, context, ratio or directory."""
