"""Documents come in one order, with names that are the same on every machine, and no problem goes unsaid."""

import gzip
import json
import logging
import os
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from inlay.data import DataError, TextConfig
from inlay.data.problems import Problems
from inlay.data.sources import (
    Document,
    find_files,
    is_held_out,
    iterate_documents,
    read_dataset,
    read_documents,
    read_files,
    read_jsonl,
    read_python_stdlib,
)


def config(**fields: object) -> TextConfig:
    return TextConfig.model_validate(
        {"task": "text", "sequence_length": 16, "tokenizer": {"kind": "bytes"}, "source": "files"} | fields
    )


def skipped(read: Callable[[Problems], Iterator[Document]]) -> tuple[list[Document], list[str]]:
    """The documents `read` yields, and the problems it reports on its way."""
    problems = Problems("raise", limit=1000)
    return list(read(problems)), problems.found


def write_lines(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"\n".join(lines))
    return path


def test_the_standard_library_gives_megabytes_of_long_documents_without_tests_and_packages() -> None:
    problems = Problems()
    documents = list(read_python_stdlib(problems))
    names = [document.name for document in documents]
    assert problems.found == []
    assert names == sorted(names)
    assert 6e6 < sum(len(document.text) for document in documents) < 16e6
    assert sum(len(document.text) > 8_000 for document in documents) > 200
    assert "argparse.py" in names
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert folders.isdisjoint({"test", "tests", "site-packages", "dist-packages", "__pycache__"})


def test_a_library_file_that_cannot_be_decoded_is_reported_and_a_declared_encoding_is_followed(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'é'\n".encode("latin-1"))
    (tmp_path / "broken.py").write_bytes(b"name = '\xff'\n")
    (tmp_path / "wrong.py").write_bytes(b"# coding: no-such-codec\n")
    (tmp_path / "empty.py").touch()
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere")
    documents, problems = skipped(lambda problems: read_python_stdlib(problems, tmp_path))
    assert [document.name for document in documents] == ["latin.py"]
    assert "name = 'é'" in documents[0].text
    assert [problem.split(":")[0] for problem in problems] == [str(tmp_path / "broken.py"), str(tmp_path / "wrong.py")]


def test_library_text_is_what_python_itself_reads() -> None:
    document = next(document for document in read_python_stdlib(Problems()) if document.name == "argparse.py")
    import argparse

    with tokenize.open(argparse.__file__) as file:
        assert document.text == file.read()


def test_the_held_out_share_is_the_fraction_and_the_choice_never_changes() -> None:
    names = [f"folder/{index}.py" for index in range(4000)]
    held = [name for name in names if is_held_out(name, 0.05)]
    assert 150 < len(held) < 250
    assert set(held) <= {name for name in names if is_held_out(name, 0.2)}
    # Pinned: another choice would move documents between training and evaluation of runs already made.
    assert is_held_out("sched.py", 0.05)
    assert not is_held_out("argparse.py", 0.05)


def test_train_and_evaluation_share_no_document_and_miss_none() -> None:
    stdlib = config(source="python-stdlib", eval_fraction=0.3)
    train, held = read_documents(stdlib, Problems())
    everything = list(read_python_stdlib(Problems()))
    assert sorted(train + held) == sorted(everything)
    assert 0.2 < len(held) / len(everything) < 0.4
    assert list(iterate_documents(stdlib, "train", Problems())) == train
    assert list(iterate_documents(stdlib, "eval", Problems())) == held


def test_given_evaluation_data_is_used_whole_and_nothing_is_held_out(tmp_path: Path) -> None:
    for name in ("train", "held"):
        (tmp_path / name).mkdir()
        for index in range(30):
            (tmp_path / name / f"{index:02}.txt").write_text(f"{name} {index}")
    both = config(path=str(tmp_path / "train"), eval_path=str(tmp_path / "held"), max_documents=20)
    train, held = read_documents(both, Problems())
    assert [document.text for document in train] == [f"train {index}" for index in range(20)]
    assert [document.text for document in held] == [f"held {index}" for index in range(20)]


def test_files_are_sorted_named_from_their_folder_and_read_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/y.md", ".hidden/c.txt", "a/.d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    folder, pattern = str(tmp_path), str(tmp_path / "*" / "*.txt")
    assert [name for _, name in find_files(folder)] == ["a/y.md", "a/z.txt", "b.txt"]
    assert [name for _, name in find_files(pattern)] == ["a/z.txt"]
    assert [name for _, name in find_files((str(tmp_path / "b.txt"), folder))] == ["b.txt", "a/y.md", "a/z.txt"]


def test_linked_folders_are_read_and_links_to_nothing_are_reported(tmp_path: Path) -> None:
    for name in ("elsewhere/one.txt", "elsewhere/deep/two.txt", "corpus/own/three.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    corpus = tmp_path / "corpus"
    (corpus / "linked").symlink_to(tmp_path / "elsewhere")
    (corpus / "again").symlink_to(corpus / "own")
    (corpus / "own" / "round").symlink_to(tmp_path)
    (corpus / "gone.txt").symlink_to(tmp_path / "nowhere")
    read, problems = skipped(lambda problems: read_files(str(corpus), problems))
    assert [document.name for document in read] == ["linked/deep/two.txt", "linked/one.txt", "own/three.txt"]
    assert problems == [f"{corpus}/gone.txt: cannot be read (No such file or directory)"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "one.txt").write_text("one")
    scan = os.scandir

    def deny(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(DataError, match=r"cannot read the folder .*closed \(Permission denied\)"):
        find_files(str(tmp_path))


def test_relative_patterns_are_taken_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.txt").write_text("one")
    monkeypatch.chdir(tmp_path)
    assert find_files("*.txt") == [(Path("one.txt"), "one.txt")]


def test_paths_that_lead_to_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file or folder: .*missing\.txt"):
        find_files(str(tmp_path / "missing.txt"))
    with pytest.raises(DataError, match=r"no file matches .*\*\.txt"):
        find_files(str(tmp_path / "*.txt"))
    with pytest.raises(DataError, match=r"no file ending in \.jsonl or \.jsonl\.gz in "):
        find_files(str(tmp_path), suffixes=(".jsonl", ".jsonl.gz"))


def test_unreadable_text_files_are_reported_with_line_and_offset(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_bytes(b"\xef\xbb\xbfline\r\nend")
    (tmp_path / "latin.txt").write_bytes(b"\xef\xbb\xbffirst\nsecond \xe9\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n")
    documents, problems = skipped(lambda problems: read_files(str(tmp_path), problems))
    assert documents == [Document("good.txt", "line\r\nend")]
    assert problems == [
        f"{tmp_path}/blank.txt: holds no text",
        f"{tmp_path}/empty.txt: is empty",
        f"{tmp_path}/latin.txt:2: is not UTF-8 (byte 0xe9 at offset 16)",
    ]


NUL = "likely UTF-16 without a byte order mark, or no text; save it as UTF-8"


def test_text_with_nul_characters_is_in_a_wrong_encoding(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "little.txt").write_bytes("ab\n".encode("utf-16-le"))
    (tmp_path / "one.txt").write_bytes(b"first\nsec\0ond\n")
    read, problems = skipped(lambda problems: read_files(str(tmp_path), problems))
    assert read == [Document("good.txt", "text")]
    assert problems == [
        f"{tmp_path}/little.txt:1: holds a NUL character (offset 1): {NUL}",
        f"{tmp_path}/one.txt:2: holds a NUL character (offset 9): {NUL}",
    ]


def test_lines_with_nul_characters_are_in_a_wrong_encoding(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a\\u0000b"}\n{"text": "good"}\n' + '{"text": "a"}'.encode("utf-16-le"))
    read, problems = skipped(lambda problems: read_jsonl(str(path), "text", problems))
    assert read == [Document("rows.jsonl:2", "good")]
    assert problems == [
        f"{path}:1: field 'text' holds a NUL character (character 1): {NUL}",
        f"{path}:3: holds a NUL character (offset 1 of the line): {NUL}",
    ]


def test_a_file_without_a_line_of_text_is_reported_as_one_without_text(tmp_path: Path) -> None:
    write_lines(tmp_path / "good.jsonl", b'{"text": "good"}', b"")
    write_lines(tmp_path / "blank.jsonl", b" ", b"", b"")
    (tmp_path / "empty.jsonl").touch()
    read, problems = skipped(lambda problems: read_jsonl(str(tmp_path), "text", problems))
    assert read == [Document("good.jsonl:1", "good")]
    assert problems == [f"{tmp_path}/blank.jsonl: holds no text", f"{tmp_path}/empty.jsonl: is empty"]


def test_each_bad_line_is_reported_with_its_number_and_reason(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "rows.jsonl",
        b'{"text": "first"}',
        b'{"text": }',
        b"[1, 2]",
        b'{"body": "x", "id": 3}',
        b'{"text": 7}',
        b'{"text": " "}',
        b"",
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": ' + b"1" * 5000 + b"}",
        b'{"text": "last"}',
    )
    documents, problems = skipped(lambda problems: read_jsonl(str(path), "text", problems))
    assert documents == [Document("rows.jsonl:1", "first"), Document("rows.jsonl:11", "last")]
    reasons = {int(problem.removeprefix(f"{path}:").split(":")[0]): problem.split(": ", 1)[1] for problem in problems}
    assert reasons.keys() == {2, 3, 4, 5, 6, 8, 9, 10}
    assert reasons[2] == "is no JSON (Expecting value, column 10)"
    assert reasons[3] == "is no JSON object but an array"
    assert reasons[4] == "has no field 'text' (its fields: 'body', 'id')"
    assert reasons[5] == "field 'text' is no string but a number"
    assert reasons[6] == "field 'text' is empty"
    assert reasons[8] == "is not UTF-8 (byte 0xff at offset 10) of the line"
    assert reasons[9].startswith("field 'text' holds half a surrogate pair")
    assert reasons[10].startswith("is no JSON that can be read")


def test_compressed_lines_are_read_and_a_file_that_breaks_off_is_reported(tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"text": f"line {index}"}).encode() + b"\n" for index in range(500))
    whole, broken, no_gzip = (tmp_path / f"{name}.jsonl.gz" for name in ("whole", "broken", "none"))
    whole.write_bytes(gzip.compress(lines))
    broken.write_bytes(gzip.compress(lines)[:-200])
    no_gzip.write_bytes(lines)
    assert len(list(read_jsonl(str(whole), "text", Problems()))) == 500
    _, problems = skipped(lambda problems: read_jsonl((str(broken), str(no_gzip)), "text", problems))
    assert len(problems) == 2
    assert problems[0].startswith(f"{broken}:")
    assert problems[1].startswith(f"{no_gzip}:1: cannot be read (Not a gzipped file")


def test_raise_lists_the_problems_together_and_stops_at_twenty(tmp_path: Path) -> None:
    few = write_lines(tmp_path / "few.jsonl", b"1", b'{"text": "good"}', b"2")
    with pytest.raises(DataError) as caught:
        read_documents(config(source="jsonl", path=str(few)), Problems("raise"))
    assert str(caught.value).startswith("2 problems in the data")
    assert f"{few}:1: " in str(caught.value)
    assert f"{few}:3: " in str(caught.value)

    many = write_lines(tmp_path / "many.jsonl", *[b"1"] * 50)
    with pytest.raises(DataError, match="the first 20 problems") as caught:
        read_documents(config(source="jsonl", path=str(many)), Problems("raise"))
    assert f"{many}:20: " in str(caught.value)
    assert f"{many}:21: " not in str(caught.value)


def test_skip_logs_each_problem_and_counts_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path / "rows.jsonl", b"1", b'{"text": "good"}', b"2")
    problems = Problems("skip")
    with caplog.at_level(logging.WARNING):
        train, held = read_documents(config(source="jsonl", path=str(path)), problems)
    assert train + held == [Document("rows.jsonl:2", "good")]
    assert problems.skipped == 2
    assert [f"{path}:1" in caplog.messages[0], f"{path}:3" in caplog.messages[1]] == [True, True]


@pytest.fixture(scope="module")
def parquet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("corpus")
    Dataset.from_dict({"body": ["one", "two", None, "", "three"], "id": range(5)}).to_parquet(
        folder / "train-00000.parquet"
    )
    Dataset.from_dict({"body": ["held out"], "id": [5]}).to_parquet(folder / "validation-00000.parquet")
    return folder


def test_a_local_parquet_folder_reads_like_a_data_set_of_the_hub(parquet_folder: Path) -> None:
    documents, problems = skipped(
        lambda problems: read_dataset(str(parquet_folder), None, "train", "body", problems),
    )
    assert documents == [Document("train:0", "one"), Document("train:1", "two"), Document("train:4", "three")]
    assert problems == [
        f"{parquet_folder} (train):2: column 'body' is no string but null",
        f"{parquet_folder} (train):3: column 'body' is empty",
    ]


def test_an_evaluation_split_is_read_from_the_same_data_set(parquet_folder: Path) -> None:
    splits = config(source="dataset", path=str(parquet_folder), text_field="body", eval_split="validation")
    _, held = read_documents(splits, Problems("skip"))
    assert held == [Document("validation:0", "held out")]


def test_a_wrong_column_split_or_name_is_one_clear_error(parquet_folder: Path) -> None:
    with pytest.raises(DataError, match="text_field can be one of: body, id"):
        list(read_dataset(str(parquet_folder), None, "train", "text", Problems()))
    with pytest.raises(DataError, match=r"cannot open the data set .* split test"):
        list(read_dataset(str(parquet_folder), None, "test", "body", Problems()))
