"""Documents to be encoded, from text files and JSON lines, under the ids that they get in a store."""

from __future__ import annotations

from pathlib import Path

from inlay.data import Document
from inlay.data.config import Paths
from inlay.data.json_lines import JSONL
from inlay.data.problems import Problems
from inlay.data.sources import find_files, read_files, read_jsonl_file


def read_documents(paths: Paths, *, text_field: str = "text", id_field: str = "id") -> list[Document]:
    """The documents of text files, folders, globs, and of JSON lines (``.jsonl``, ``.jsonl.gz``).

    A text file is called by its path relative to the folder or glob. A line is called by its ``id_field``, or, where it
    has none, by its file and line number.

    Raises:
        DataError: Nothing is found, files or lines cannot be used, or two documents have one id; they are listed.
    """
    problems = Problems(remedy="mend them, or take them out")
    documents: list[Document] = []
    files: dict[str, Path] = {}
    for path, name in find_files(paths):
        if name.endswith(JSONL):
            found = [*read_jsonl_file(path, name, text_field, problems, id_field=id_field)]
        else:
            found = [Document(name, one.text) for one in read_files(str(path), problems)]
        for document in found:
            if (other := files.setdefault(document.name, path)) != path:
                problems.report(str(path), f"has a document called {document.name!r}, and so has {other}")
        documents += found
    problems.check()
    return documents
