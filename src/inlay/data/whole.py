"""Folders that are there whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory


def save_whole(folder: Path, save: Callable[[Path], object], is_whole: Callable[[Path], bool] = Path.is_dir) -> None:
    """Have `save` write a folder so that it is there whole or not at all, also when two processes write it at once.

    Args:
        folder: where it is to lie. What is whole there already stays, and what is not makes way.
        save: writes into the folder it is given, which is empty.
        is_whole: whether nothing is missing in a folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".writing-", dir=folder.parent) as name:
        new = Path(name) / folder.name
        new.mkdir()
        save(new)
        if not is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            new.rename(folder)
        except OSError:
            if not is_whole(folder):  # otherwise another process was first with the same content
                raise
