"""The `data:` part of a recipe refuses what would be ignored or could not work."""

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from inlay.data import DataConfig, RecallConfig, TextConfig

ADAPTER = TypeAdapter(DataConfig)
TEXT = {"task": "text", "source": "files", "path": "notes", "sequence_length": 64, "tokenizer": {"kind": "bytes"}}
STDLIB = {"task": "text", "source": "python-stdlib", "sequence_length": 64, "tokenizer": {"kind": "bytes"}}


def test_the_task_picks_the_model_also_inside_a_recipe() -> None:
    class Recipe(BaseModel):
        data: DataConfig

    assert isinstance(Recipe(data=TEXT).data, TextConfig)
    assert isinstance(Recipe(data={"task": "recall"}).data, RecallConfig)


def test_a_dumped_configuration_validates_to_the_same() -> None:
    for source in (TEXT, STDLIB, TEXT | {"eval_path": ["held", "more"]}, {"task": "recall"}):
        config = ADAPTER.validate_python(source)
        assert ADAPTER.validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_lenght": 3}, "Extra inputs"),
        ({"path": None}, "needs a path"),
        ({"source": "python-stdlib"}, "path has no effect"),
        ({"source": "files", "text_field": "body"}, "text_field has no effect"),
        ({"source": "jsonl", "split": "validation"}, "split has no effect"),
        ({"source": "jsonl", "streaming": True, "max_eval_sequences": 4}, "streaming has no effect"),
        ({"source": "dataset", "path": ["a", "b"]}, "not a list"),
        ({"source": "dataset", "streaming": True}, "max_eval_sequences"),
        (
            {"source": "dataset", "streaming": True, "max_eval_sequences": 4, "tokenizer": {"kind": "bpe"}},
            "tokenizer.max_documents",
        ),
        ({"eval_path": "held", "eval_fraction": 0.2}, "eval_fraction has no effect"),
        ({"min_tokens": 65}, "above sequence_length"),
        ({"tokenizer": {"kind": "bpe", "vocab_size": 257}}, "258"),
        ({"tokenizer": {"kind": "bytes", "vocab_size": 300}}, "Extra inputs"),
    ],
)
def test_text_settings_that_cannot_work_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ADAPTER.validate_python(TEXT | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 62, "pairs": 16}, "at least 64"),
        ({"pairs": 16, "keys": 15}, "as many distinct keys"),
        ({"sequence_length": 256, "min_distance": 128}, "at most 127, or a sequence_length of at least 258"),
    ],
)
def test_recall_settings_that_cannot_work_are_refused_with_the_number_that_does(changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ADAPTER.validate_python({"task": "recall"} | changes)


def test_min_tokens_is_a_quarter_of_the_sequence_and_never_a_single_token() -> None:
    assert ADAPTER.validate_python(STDLIB).min_piece_tokens == 16
    assert ADAPTER.validate_python(STDLIB | {"sequence_length": 4}).min_piece_tokens == 2
    assert ADAPTER.validate_python(STDLIB | {"min_tokens": 5}).min_piece_tokens == 5


@pytest.mark.parametrize("model", [TextConfig, RecallConfig])
def test_every_field_says_what_it_is(model: type[BaseModel]) -> None:
    silent = [name for name, field in model.model_fields.items() if not field.description]
    assert silent == []
