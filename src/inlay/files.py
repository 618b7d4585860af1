"""Files and folders that are there whole or not at all.

What is written lies in a temporary folder beside its place until it is whole and on the disk, and is renamed then: at
any moment, a kill or a power cut included, there is the old file or the new one. Writers of one path do not get into
each other's way; the last to end stays. Whatever ends the writing, the temporary folder goes, and what a process that
was killed left is removed when the same path is written again.

The file has the mode that ``open`` would give it: that of the file which was there, otherwise what the umask leaves.
(Some writers, safetensors among them, make files that only their owner may read.) A symbolic link is replaced, not
followed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from secrets import token_hex

_FULL = (errno.ENOSPC, errno.EDQUOT)

_LONGEST_LABEL = 200
"""Bytes. File systems allow 255, and process and a random number take 31."""

_in_use: set[str] = set()
"""Names of this process's temporary folders: others with its number are of a killed one that had the same."""


def write_whole(path: str | Path, content: str | bytes) -> Path:
    """Write ``content``, text as UTF-8, to ``path`` by way of :func:`replacing`; returns the path."""
    with replacing(path) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path(path)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a path of the same name to write to: what is there at the end takes the place of ``path``.

    If the block raises, ``path`` is as it was.

    Args:
        path: Its folder is made if missing.

    Raises:
        OSError: It cannot be written, or is a folder; the error names ``path``.
    """
    path = Path(path)
    with replacing_together(path) as folder:
        yield folder / path.name


@contextmanager
def replacing_together(last: str | Path) -> Iterator[Path]:
    """Gives an empty folder to write files to that belong together: at the end they are moved to beside ``last``.

    All are on the disk before the first is moved. ``last`` is one of them, and the one to tell by that the others are
    there: a kill in between leaves new files with the old ``last``. If the block raises, all are as they were.

    Args:
        last: Its folder is made if missing.

    Raises:
        OSError: As from :func:`replacing`.
    """
    last = Path(last)
    if last.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(last))
    with _temporary_folder(last) as folder:
        mode = _mode_of_new_files(folder)
        yield folder
        _move(folder, last, mode)


def write_folder(folder: Path, save: Callable[[Path], object], is_whole: Callable[[Path], bool] = Path.is_dir) -> None:
    """Have ``save`` write a folder that others may be writing too, all with the same content: the first to end stays.

    Args:
        folder: Where it is to lie. What is whole there already stays, and what is not makes way.
        save: Writes into the folder it is given, which is empty.
        is_whole: Whether nothing is missing in a folder.

    Raises:
        OSError: It cannot be written; the error names ``folder``.
    """
    with _temporary_folder(folder) as temporary:
        mode = _mode_of_new_files(temporary)
        new = temporary / folder.name
        new.mkdir()
        save(new)
        for file in new.rglob("*"):
            if file.is_file():
                file.chmod(mode & 0o777)
                _flush(file)
        if not is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            new.rename(folder)
        except OSError:
            if not is_whole(folder):  # otherwise another process was first
                raise
        _flush_names(folder.parent)


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder: Path, busy: Exception) -> Iterator[None]:
    """Within it this process alone writes to ``folder``. The lock ends with the process, however that ends.

    Args:
        folder: Gets a file ``.lock``. Where the system or the file system has no locks, nothing is locked.
        busy: Raised where another process is within.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        except OSError:  # a file system without locks
            pass
        yield


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Remove from ``folder`` what killed processes of this machine left there of writing ``name``, or any file."""
    pattern = re.compile(rf"\.{'.+' if name is None else re.escape(_label(name))}\.{_machine()}-(\d+)\.\w+\.tmp")
    with suppress(OSError):  # a folder may be written to and not listed
        for entry in os.listdir(folder):
            found = pattern.fullmatch(entry)
            if found and entry not in _in_use and not _is_of_another(int(found[1])):
                shutil.rmtree(folder / entry, ignore_errors=True)


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path``, gone afterwards. An OSError of the block names ``path`` in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent, path.name)
    prefix = f".{_label(path.name)}.{_machine()}-{os.getpid()}."
    folder = path.with_name(f"{prefix}{token_hex(4)}.tmp")
    _in_use.add(folder.name)
    try:
        folder.mkdir(0o700)
        yield folder
    except OSError as error:
        unnamed = error.filename is None and error.errno in _FULL
        if unnamed or (prefix in str(error.filename) and error.filename2 is None):
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _in_use.discard(folder.name)


def _label(name: str) -> str:
    """What the temporary folder of a file is called after it: the name, or a hash of one that leaves it no room."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= _LONGEST_LABEL else hashlib.sha256(encoded).hexdigest()


def _mode_of_new_files(folder: Path) -> int:
    probe = folder / "mode"  # asking for the umask would change it for all threads
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    return mode


def _move(folder: Path, last: Path, mode: int) -> None:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file != folder / last.name]
    moves = [(file, last.parent / file.relative_to(folder)) for file in [*files, folder / last.name]]
    for new, target in moves:
        _flush(new)
        wanted = target.stat().st_mode if target.is_file() else mode
        if new.stat().st_mode != wanted:
            new.chmod(wanted & 0o777)
    for new, target in moves:
        target.parent.mkdir(parents=True, exist_ok=True)
        new.replace(target)
    for parent in {target.parent for _, target in moves}:
        _flush_names(parent)


def _flush_names(folder: Path) -> None:
    """Let what was renamed in a folder outlive a power cut."""
    with suppress(OSError):  # some network file systems cannot
        _flush(folder)


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@cache
def _machine() -> str:
    """Whose process numbers are meant: of this machine, and of this container on it."""
    container = Path("/proc/self/ns/pid")
    numbers = os.readlink(container) if container.is_symlink() else ""
    return hashlib.sha256(f"{platform.node()} {numbers}".encode()).hexdigest()[:8]


def _is_of_another(process: int) -> bool:
    """Whether ``process`` is another than this one and alive."""
    if os.name != "posix":
        return process != os.getpid()  # there, asking ends the process
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
