"""Questions are read as they stand, what cannot be used is named with its place, and no context is in both sets."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from inlay.data import DataError, QAConfig, QAExample, load_qa
from inlay.data.facts import facts_context
from inlay.data.qa_statistics import TokenLengths


def config(**fields: Any) -> Any:
    return TypeAdapter(QAConfig).validate_python(fields)


def write_json(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def write_lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def question(name: str, *answers: str, **fields: object) -> dict[str, object]:
    return {
        "id": name,
        "question": f" who is {name}? ",
        "answers": [{"text": answer, "answer_start": 0} for answer in answers],
        **fields,
    }


def article(title: str, *paragraphs: tuple[str, Sequence[dict[str, object]]]) -> dict[str, object]:
    return {"title": title, "paragraphs": [{"context": context, "qas": [*asked]} for context, asked in paragraphs]}


def squad(*articles: dict[str, object], version: str = "1.1") -> dict[str, object]:
    return {"version": version, "data": [*articles]}


def evaluation_file(folder: Path) -> str:
    """Some evaluation data, so that all of the file under test is training data."""
    return write_json(folder / "held.json", squad(article("Held", ("held context", [question("held", "yes")]))))


def problems_of(**fields: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        load_qa(config(**fields))
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_squad_1_is_read_with_all_its_answers(tmp_path: Path) -> None:
    path = write_json(
        tmp_path / "train.json",
        squad(
            article("North", (" One two. ", [question("a", "One", " two "), question("b", "two")])),
            article("South", ("Three.", [question("c", "Three")])),
        ),
    )
    data = load_qa(config(source="squad", path=path, eval_path=evaluation_file(tmp_path)))
    assert data.train == [
        QAExample("a", " One two. ", "who is a?", ("One", "two")),
        QAExample("b", " One two. ", "who is b?", ("two",)),
        QAExample("c", "Three.", "who is c?", ("Three",)),
    ]
    assert [example.id for example in data.eval] == ["held"]
    assert data.skipped == 0


def test_squad_2_marks_questions_without_an_answer_and_plausible_answers_are_none(tmp_path: Path) -> None:
    plausible = [{"text": "One", "answer_start": 0}]
    asked = [
        question("a", "One", is_impossible=False),
        question("b", is_impossible=True, plausible_answers=plausible),
    ]
    path = tmp_path / "train.json.gz"
    path.write_bytes(gzip.compress(json.dumps(squad(article("N", ("One.", asked)), version="v2.0")).encode()))
    data = load_qa(config(source="squad", path=str(path), eval_path=evaluation_file(tmp_path)))
    assert [example.answers for example in data.train] == [("One",), ()]


def test_a_squad_record_that_cannot_be_used_is_named_by_place_and_id(tmp_path: Path) -> None:
    broken = [
        question("no-answer"),
        question("both", "One", is_impossible=True),
        {"id": "no-question", "answers": []},
        {"question": "who?", "answers": []},
        question("empty", " "),
        {**question("text"), "answers": ["One", 3]},
        {**question("null"), "answers": None},
        question("kept", "One"),
    ]
    content = squad(article("N", ("One.", broken)), {"title": "no paragraphs"})
    content["data"].append({"paragraphs": [{"qas": []}, 7]})  # type: ignore[attr-defined]
    path = write_json(tmp_path / "broken.json", content)
    at = f"{path}:data[0].paragraphs[0].qas"
    assert problems_of(source="squad", path=path, eval_path=evaluation_file(tmp_path)) == [
        f"{at}[0]: (id no-answer) has 0 answers and is_impossible False: a question without answers has is_impossible "
        "true, one with answers false",
        f"{at}[1]: (id both) has 1 answers and is_impossible True: a question without answers has is_impossible true, "
        "one with answers false",
        f"{at}[2]: (id no-question) has no field 'question' (its fields: 'id', 'answers')",
        f"{at}[3]: has no field 'id' (its fields: 'question', 'answers')",
        f"{at}[4]: (id empty) field 'answers[0].text' is empty; an unanswerable question has an empty list",
        f"{at}[5]: (id text) field 'answers[1]' should be a string; got 3",
        f"{at}[6]: (id null) field 'answers' should be a list; got None; an unanswerable question has an empty list",
        f"{path}:data[1]: has no field 'paragraphs' (its fields: 'title')",
        f"{path}:data[2].paragraphs[0]: has no field 'context' (its fields: 'qas')",
        f"{path}:data[2].paragraphs[1]: should be a JSON object; got 7",
    ]


def test_a_file_that_is_no_squad_is_told_what_it_looks_like(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "lines.json", {"context": "c"}, {"context": "d"})
    rows = write_json(tmp_path / "rows.json", {"context": "c"})
    (tmp_path / "bytes.json").write_bytes(b'{"data": "\xff"}')
    (tmp_path / "broken.json").write_text('{"data":\n [}')
    assert problems_of(source="squad", path=str(tmp_path)) == [
        f"{tmp_path}/broken.json: is no JSON (Expecting value, line 2, column 3)",
        f"{tmp_path}/bytes.json: is not UTF-8 (byte 0xff at offset 10)",
        f"{lines}: is no JSON (Extra data, line 2, column 1); for one question per line, set source: jsonl",
        f"{rows}: has no field 'data' (its fields: 'context'): it is no SQuAD file; for one question per line, "
        "set source: jsonl",
    ]


def test_lines_are_read_with_answers_in_every_form(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "rows.jsonl",
        {"text": "c1", "q": " who? ", "a": " me "},
        {"text": "c2", "q": "who?", "a": ["me", "you"]},
        {"text": "c3", "q": "who?", "a": {"text": ["me"], "answer_start": [0]}},
        {"text": "c4", "q": "who?", "a": {"text": "me"}},
        {"text": "c5", "q": "who?", "a": [{"text": "me"}]},
        {"text": "c6", "q": "who?", "a": []},
        {"text": "c7", "q": "who?", "a": {"text": [], "answer_start": []}},
    )
    fields = {"context_field": "text", "question_field": "q", "answers_field": "a"}
    held = write_lines(tmp_path / "held.jsonl", {"text": "h", "q": "who?", "a": "me"})
    data = load_qa(config(source="jsonl", path=path, eval_path=held, **fields))
    assert [example.answers for example in data.train] == [("me",), ("me", "you"), ("me",), ("me",), ("me",), (), ()]
    assert data.train[0] == QAExample("rows.jsonl:1", "c1", "who?", ("me",))


NUL = "likely UTF-16 without a byte order mark, or no text; save it as UTF-8"


def test_a_line_that_cannot_be_used_is_named_by_its_number_and_field(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        '{"context": "c", "question": "q", "answers": "a"}',
        '{"context": "c", "question": }',
        "[1]",
        '{"context": "c", "answers": "a"}',
        '{"context": " ", "question": "q", "answers": "a"}',
        '{"context": "c", "question": 7, "answers": "a"}',
        '{"context": "c", "question": "q"}',
        '{"context": "c", "question": "q", "answers": ""}',
        '{"context": "c", "question": "q", "answers": {"start": 1}}',
        '{"context": "\\ud800", "question": "q", "answers": "a"}',
        '{"context": "c\\u0000", "question": "q", "answers": "a"}',
        '{"context": "c\0", "question": "q", "answers": "a"}',
        '{"context": "c2", "question": "q", "answers": "a", "name": true}',
    ]
    path.write_text("\n".join(rows))
    found = problems_of(source="jsonl", path=str(path))
    assert found == [
        f"{path}:2: is no JSON (Expecting value, column 30)",
        f"{path}:3: should be a JSON object; got [1]",
        f"{path}:4: has no field 'question' (its fields: 'context', 'answers'): set question_field",
        f"{path}:5: field 'context' is empty",
        f"{path}:6: field 'question' should be a string; got 7",
        f"{path}:7: has no field 'answers' (its fields: 'context', 'question'): set answers_field",
        f"{path}:8: field 'answers' is empty; an unanswerable question has an empty list",
        f"{path}:9: has no field 'text' (its fields: 'start') in answers",
        f"{path}:10: field 'context' holds half a surrogate pair (character 0)",
        f"{path}:11: field 'context' holds a NUL character (character 1): {NUL}",
        f"{path}:12: holds a NUL character (offset 14 of the line): {NUL}",
    ]
    ids = problems_of(source="jsonl", path=write_lines(tmp_path / "id.jsonl", json.loads(rows[-1])), id_field="name")
    assert ids == [f"{tmp_path}/id.jsonl:1: field 'name' should be a string or a number; got True"]


def test_a_file_of_blank_lines_holds_no_questions(tmp_path: Path) -> None:
    write_lines(tmp_path / "good.jsonl", {"context": "c", "question": "q", "answers": "a"})
    (tmp_path / "blank.jsonl").write_text(" \n\n")
    assert problems_of(source="jsonl", path=str(tmp_path)) == [f"{tmp_path}/blank.jsonl: holds no text"]


def test_twenty_problems_are_enough_and_skip_counts_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = [{"context": f"c{index}", "question": "q", "answers": "a"} for index in range(50)]
    path = write_lines(tmp_path / "rows.jsonl", *[1] * 30, *good)
    with pytest.raises(DataError, match="the first 20 problems"):
        load_qa(config(source="jsonl", path=path))
    with caplog.at_level(logging.WARNING):
        data = load_qa(config(source="jsonl", path=path, on_error="skip", eval_fraction=0.5))
    assert data.skipped == len(caplog.records) == 30
    assert len(data.train) + len(data.eval) == 50


def test_ids_are_unique_or_an_error(tmp_path: Path) -> None:
    asked = [question("a", "One"), question("b", "One"), question("a", "One")]
    path = write_json(tmp_path / "train.json", squad(article("N", ("One.", asked))))
    at = f"{path}:data[0].paragraphs[0].qas"
    found = problems_of(source="squad", path=path)
    assert found == [f"{at}[2]: has the id 'a' of {at}[0]; ids should be unique"]


def test_contexts_are_held_out_whole_and_by_title(tmp_path: Path) -> None:
    articles = [
        article(
            f"title {number}",
            *(
                (f"text {number} {part}", [question(f"{number}-{part}-{k}", "x") for k in range(2)])
                for part in range(3)
            ),
        )
        for number in range(200)
    ]
    path = write_json(tmp_path / "train.json", squad(*articles))
    data = load_qa(config(source="squad", path=path, eval_fraction=0.25))
    titles = [{example.id.split("-")[0] for example in part} for part in (data.train, data.eval)]
    assert not titles[0] & titles[1]
    assert len(titles[0] | titles[1]) == 200
    assert len(titles[1]) / 200 == pytest.approx(0.25, abs=0.09)
    assert len(data.train) + len(data.eval) == 1200
    assert load_qa(config(source="squad", path=path, eval_fraction=0.25)) == data


def test_a_context_under_two_titles_is_in_one_set_only(tmp_path: Path) -> None:
    articles = [
        article(f"title {number}", (f"text {number % 50}", [question(str(number), "x")])) for number in range(100)
    ]
    path = write_json(tmp_path / "train.json", squad(*articles))
    data = load_qa(config(source="squad", path=path, eval_fraction=0.3))
    sets = [{example.context for example in part} for part in (data.train, data.eval)]
    assert all(sets)
    assert not sets[0] & sets[1]


def test_lines_are_held_out_by_context_or_by_a_title_that_is_given(tmp_path: Path) -> None:
    rows = [
        {"context": f"c{number // 2}", "title": f"t{number // 20}", "question": f"q{number}", "answers": "a"}
        for number in range(1000)
    ]
    path = write_lines(tmp_path / "rows.jsonl", *rows)
    for title in (None, "title"):
        data = load_qa(config(source="jsonl", path=path, title_field=title, eval_fraction=0.2))
        held = {int(example.context[1:]) for example in data.eval}
        assert len(data.eval) == 2 * len(held)
        assert (len(held) % 10 == 0 and len({context // 10 for context in held}) == len(held) / 10) == (
            title is not None
        )


def test_an_evaluation_file_may_not_share_a_context_with_training(tmp_path: Path) -> None:
    train = write_lines(
        tmp_path / "train.jsonl",
        {"context": "c1", "question": "q1", "answers": "a"},
        {"context": "c2", "question": "q2", "answers": "a"},
    )
    held = write_lines(tmp_path / "held.jsonl", {"context": "c2", "question": "other", "answers": "a"})
    fields = {"source": "jsonl", "path": train, "eval_path": held}
    assert problems_of(**fields) == [
        f"{train}:2: asks about a context of the evaluation data ({held}:1); remove one of them"
    ]
    data = load_qa(config(**fields, on_error="skip"))
    assert [example.context for example in data.train] == ["c1"]
    assert data.skipped == 1


def test_data_sets_are_read_by_split_and_column(tmp_path: Path) -> None:
    rows = [
        {
            "id": f"n{number}",
            "context": f"c{number}",
            "question": f"q{number}",
            "answers": {"text": ["a"] * (number % 3)},
        }
        for number in range(40)
    ]
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "train.jsonl", *rows[:30])
    write_lines(folder / "test.jsonl", *rows[30:])
    data = load_qa(config(source="dataset", path=str(folder), eval_split="test", id_field="id"))
    assert [example.id for example in data.train] == [f"n{number}" for number in range(30)]
    assert [len(example.answers) for example in data.eval] == [number % 3 for number in range(30, 40)]
    assert load_qa(config(source="dataset", path=str(folder), eval_fraction=0.3)).train[0].id.startswith("train:")
    found = problems_of(source="dataset", path=str(folder), eval_split="test", context_field="body")
    reason = "has no field 'body' (its fields: 'id', 'context', 'question', 'answers'): set context_field"
    assert found[0] == f"{folder} (test):0: {reason}"
    with pytest.raises(DataError, match=r"cannot open the data set [\s\S]*It is a folder with data files, or a hub id"):
        load_qa(config(source="dataset", path=str(folder), split="missing"))


def test_limits_take_the_first_questions_and_spread_evaluation_evenly(tmp_path: Path) -> None:
    rows = [{"context": f"c{number}", "question": "q", "answers": "a"} for number in range(100)]
    train = write_lines(tmp_path / "train.jsonl", *rows[:50])
    held = write_lines(tmp_path / "held.jsonl", *rows[50:])
    data = load_qa(config(source="jsonl", path=train, eval_path=held, max_examples=41, max_eval_examples=5))
    assert [example.context for example in data.train] == [f"c{number}" for number in range(41)]
    assert [example.context for example in data.eval] == ["c50", "c60", "c70", "c80", "c90"]


def test_a_set_without_questions_is_an_error_with_the_fix(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "one.jsonl", {"context": "c", "question": "q", "answers": "a"})
    with pytest.raises(DataError, match=r"no evaluation question: none of 1 .*raise eval_fraction, or give eval_path"):
        load_qa(config(source="jsonl", path=path, eval_fraction=0.001))
    with pytest.raises(DataError, match="no training question: all were held out; lower eval_fraction"):
        load_qa(config(source="jsonl", path=path, eval_fraction=0.999))
    empty = write_json(tmp_path / "empty.json", squad())
    with pytest.raises(DataError, match=r"no question in .*empty"):
        load_qa(config(source="squad", path=empty))
    with pytest.raises(DataError, match="no such file or folder"):
        load_qa(config(source="squad", path=str(tmp_path / "missing.json")))


def test_generated_facts_are_loaded_without_being_made() -> None:
    settings = config(source="facts", train_examples=10**9)
    data = load_qa(settings)
    assert len(data.train) == 10**9
    context, question = divmod(10**9 - 1, settings.questions)
    assert data.train[10**9 - 1] == facts_context(settings, "train", context)[question]
    assert data.eval[0] == facts_context(settings, "eval", 0)[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "squad"}, "Field required"),
        ({"source": "parquet", "path": "x"}, "does not match any of the expected tags"),
        ({"source": "squad", "path": "x", "context_field": "c"}, "Extra inputs are not permitted"),
        ({"source": "jsonl", "path": "x", "eval_path": "y", "eval_fraction": 0.2}, "eval_fraction has no effect"),
        ({"source": "dataset", "path": "x", "eval_split": "y", "eval_fraction": 0.2}, "eval_fraction has no effect"),
    ],
)
def test_fields_that_the_source_does_not_read_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**fields)


def test_token_lengths_worked_by_hand() -> None:
    lengths = TokenLengths(((1, 10), (3, 85), (7, 4), (40, 1)))
    assert lengths.texts == 100
    assert lengths.mean == pytest.approx((10 + 255 + 28 + 40) / 100)
    assert lengths.longest == 40
    assert [lengths.quantile(share) for share in (0.1, 0.101, 0.95, 0.951, 0.99, 1.0)] == [1, 3, 3, 7, 7, 40]
    assert [lengths.beyond(limit) for limit in (0, 3, 7, 39, 40)] == [1, 0.05, 0.01, 0.01, 0]
