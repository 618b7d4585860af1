"""Files are there whole or not at all, with the mode that `open` gives, whoever writes beside."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from inlay import files
from inlay.files import remove_abandoned, replacing, replacing_together, write_folder, write_whole

posix = pytest.mark.skipif(os.name != "posix", reason="modes and signals of POSIX")


def contents(folder: Path) -> dict[str, str]:
    """All that lies there, folders by an empty text."""
    entries = sorted(folder.rglob("*"))
    return {str(entry.relative_to(folder)): entry.read_text() if entry.is_file() else "" for entry in entries}


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_the_new_content_takes_the_place_of_the_old(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    assert write_whole(path, "ä\n") == path
    assert path.read_bytes() == "ä\n".encode()
    assert write_whole(str(path), b"\r\n") == path
    assert path.read_bytes() == b"\r\n"
    assert contents(path.parent).keys() == {"a.txt"}


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127], ids=["ascii", "two bytes each"])
def test_a_name_may_be_as_long_as_the_file_system_allows(name: str, tmp_path: Path) -> None:
    write_whole(tmp_path / name, "a")
    write_folder(tmp_path / "folders" / name, lambda folder: (folder / "b").write_text("b"))
    assert contents(tmp_path) == {name: "a", "folders": "", f"folders/{name}": "", f"folders/{name}/b": "b"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_what_fails_leaves_the_old_files_and_nothing_beside(error: type[BaseException], tmp_path: Path) -> None:
    def fail() -> None:
        with replacing(tmp_path / "a") as new:
            assert new.name == "a"
            new.write_text("half")
            raise error

    def fail_together() -> None:
        with replacing_together(tmp_path / "b") as folder:
            (folder / "a").write_text("new")
            (folder / "b").write_text("half")
            raise error

    for name in ("a", "b"):
        (tmp_path / name).write_text("old")
    for failing in (fail, fail_together):
        with pytest.raises(error):
            failing()
        assert contents(tmp_path) == {"a": "old", "b": "old"}
    assert not files._in_use


@posix
def test_the_mode_follows_the_umask_whoever_made_the_file(umask: int, tmp_path: Path) -> None:
    def mode(name: str) -> int:
        return (tmp_path / name).stat().st_mode & 0o777

    (tmp_path / "opened").touch()
    write_whole(tmp_path / "written", "")
    with replacing(tmp_path / "tensors") as new:
        save_file({"a": torch.zeros(2)}, new)
        assert new.stat().st_mode & 0o777 == 0o600, "safetensors has changed: the module's docstring names it"
    assert mode("written") == mode("tensors") == mode("opened") == 0o666 & ~umask
    (tmp_path / "written").chmod(0o640)
    write_whole(tmp_path / "written", "again")
    assert mode("written") == 0o640


def test_files_that_belong_together_are_moved_the_last_one_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda new, target: (moved.append(target), replace(new, target))[1])
    with replacing_together(tmp_path / "header") as folder:
        for name in ("header", "tensors", "adapter/config"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)
        assert not contents(tmp_path).keys() & {"header", "tensors"}
    assert moved == [tmp_path / name for name in ("adapter/config", "tensors", "header")]
    assert contents(tmp_path) == {name: name for name in ("adapter/config", "header", "tensors")} | {"adapter": ""}


def test_of_two_writers_the_last_to_end_stays_and_neither_sees_the_other(tmp_path: Path) -> None:
    path, begun, ended = tmp_path / "a", threading.Event(), threading.Event()

    def slow() -> None:
        with replacing(path) as new:
            new.write_text("slow")
            begun.set()
            assert ended.wait(60)

    thread = threading.Thread(target=slow)
    thread.start()
    assert begun.wait(60)
    write_whole(path, "this process")
    other = f"from inlay.files import write_whole; write_whole({str(path)!r}, 'another process')"
    subprocess.run([sys.executable, "-c", other], check=True)
    assert path.read_text() == "another process"
    ended.set()
    thread.join()
    assert contents(tmp_path) == {"a": "slow"}


def left(name: str, process: int, machine: str | None = None) -> str:
    """The name of what a process leaves when it is killed while it writes ``name``."""
    return f".{name}.{machine or files._machine()}-{process}.00aa.tmp"


@posix
def test_what_a_killed_process_left_goes_with_the_next_write_of_the_same_path(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    alive, same = os.getppid(), os.getpid()  # numbers come again
    for process in (ended.pid, alive, same):
        for name in ("a", "b", "a.b"):
            (tmp_path / left(name, process)).mkdir()
    (tmp_path / ".a.tmp").touch()
    elsewhere = left("a", ended.pid, "0123abcd")  # of another machine, where the process may live
    (tmp_path / elsewhere).mkdir()
    write_whole(tmp_path / "a", "")
    stay = {"a", ".a.tmp", elsewhere, *(left(name, alive) for name in ("a", "b", "a.b"))}
    others = {left(name, process) for name in ("b", "a.b") for process in (ended.pid, same)}
    assert contents(tmp_path).keys() == stay | others
    remove_abandoned(tmp_path)
    assert contents(tmp_path).keys() == stay


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    named = re.escape(repr(str(path))) + "$"

    def write(error: OSError) -> None:
        with replacing(path):
            raise error

    with pytest.raises(OSError, match="No space left on device: " + named):
        write(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(FileNotFoundError, match=named), replacing(path):
        pass  # nothing is written
    with pytest.raises(FileNotFoundError, match=r"heard'$"):
        write(FileNotFoundError(errno.ENOENT, "No such file", "heard"))
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=named):
        write_whole(path, "")
    assert contents(tmp_path) == {"a": ""}


def test_a_symbolic_link_is_replaced_and_its_target_left(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    write_whole(tmp_path / "link", "new")
    assert contents(tmp_path) == {"link": "new", "target": "old"}
    assert not (tmp_path / "link").is_symlink()


def writing(text: str) -> Callable[[Path], int]:
    return lambda folder: (folder / "a").write_text(text)


def has_a(folder: Path) -> bool:
    return (folder / "a").is_file()


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("no space left")

    (tmp_path / "cache" / left("one", 2**22 + 1)).mkdir(parents=True)  # there is no such process
    with pytest.raises(OSError, match="no space left"):
        write_folder(tmp_path / "cache" / "one", fails)
    assert not list((tmp_path / "cache").iterdir())


def test_the_first_of_two_writers_of_a_folder_stays(tmp_path: Path) -> None:
    def slow(folder: Path) -> None:
        write_folder(tmp_path / "one", writing("first"))
        writing("second")(folder)

    write_folder(tmp_path / "one", slow)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["first"]


def test_a_folder_that_is_not_whole_makes_way(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "rest").write_text("")
    write_folder(tmp_path / "one", writing("new"), has_a)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a"]
    write_folder(tmp_path / "one", writing("newer"), has_a)
    assert (tmp_path / "one" / "a").read_text() == "new"


@posix
def test_files_of_a_folder_have_the_mode_that_open_gives(umask: int, tmp_path: Path) -> None:
    write_folder(tmp_path / "one", lambda new: save_file({"x": torch.zeros(1)}, new / "x.safetensors"))
    assert (tmp_path / "one" / "x.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
