"""Problems in the user's data: where they are, and whether they stop the run."""

from __future__ import annotations

import logging

from inlay.data.config import OnError

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """The data cannot be used as it is. The message names the file and line, and what would mend it."""


class Problems:
    """Takes every unreadable file or line, and applies `on_error` to it.

    Args:
        on_error: "raise" collects problems and raises them together; "skip" logs each as a warning.
        limit: with "raise", how many are collected before `DataError` is raised without reading on.
        remedy: what the error says can be done about all of them at once.

    `skipped` counts what was left out so far (with "skip").
    """

    def __init__(
        self,
        on_error: OnError = "raise",
        limit: int = 20,
        remedy: str = "on_error: skip leaves such documents out",
    ) -> None:
        self.on_error = on_error
        self.remedy = remedy
        self.limit = limit
        self.skipped = 0
        self.found: list[str] = []

    def report(self, where: str, reason: str) -> None:
        """Take one problem. `where` is "file" or "file:line". Raises `DataError` once `limit` is reached."""
        if self.on_error == "skip":
            self.skipped += 1
            logger.warning("skipped %s: %s", where, reason)
            return
        self.found.append(f"{where}: {reason}")
        if len(self.found) >= self.limit:
            self._raise("the first ")

    def check(self) -> None:
        """Raise `DataError` with everything collected. To be called when the source has been read."""
        if self.found:
            self._raise("")

    def _raise(self, which: str) -> None:
        count = len(self.found)
        lines = "\n  ".join(self.found)
        raise DataError(f"{which}{count} problem{'s' if count > 1 else ''} in the data ({self.remedy}):\n  {lines}")
