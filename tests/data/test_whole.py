"""A folder is there whole or not at all."""

from pathlib import Path

import pytest

from inlay.data.whole import save_whole


def writing(text: str):
    return lambda folder: (folder / "a").write_text(text)


def is_whole(folder: Path) -> bool:
    return (folder / "a").is_file()


def test_what_fails_while_it_is_written_leaves_nothing(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        save_whole(tmp_path / "cache" / "one", fails)
    assert not list((tmp_path / "cache").iterdir())


def test_the_first_of_two_writers_stays(tmp_path: Path) -> None:
    def slow(folder: Path) -> None:
        save_whole(tmp_path / "one", writing("first"))
        writing("second")(folder)

    save_whole(tmp_path / "one", slow)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["first"]


def test_what_is_not_whole_makes_way(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "rest").write_text("")
    save_whole(tmp_path / "one", writing("new"), is_whole)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a"]
    save_whole(tmp_path / "one", writing("newer"), is_whole)
    assert (tmp_path / "one" / "a").read_text() == "new"
