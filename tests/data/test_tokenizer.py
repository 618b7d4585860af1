"""Tokens give back the text, and a tokenizer is learnt once."""

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inlay.data import BpeTokenizer, ByteTokenizer, DataError, Document, PretrainedTokenizer, load_tokenizer
from inlay.data import tokenizer as module
from inlay.data.tokenizer import END_OF_TEXT, default_cache_dir, encode_documents, padding_id

DOCUMENTS = [Document(f"{index}.py", f"def f{index}(self):\n    return self.x + {index}\n" * 20) for index in range(9)]
BPE = BpeTokenizer(kind="bpe", vocab_size=280)
BYTES = load_tokenizer(ByteTokenizer(kind="bytes"), [])


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory):
    return load_tokenizer(BPE, DOCUMENTS, tmp_path_factory.mktemp("cache"))


@settings(max_examples=150, deadline=None)
@given(text=st.text() | st.sampled_from([END_OF_TEXT, "a <|pad|> b", " don 't \r\n\t . ,", "\x00\ufeff", "née 🙂"]))
def test_any_text_comes_back_from_its_tokens(bpe, text: str) -> None:
    for tokenizer in (bpe, BYTES):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert set(ids).isdisjoint(tokenizer.all_special_ids)


def test_vocabularies_are_as_large_as_asked_and_ids_fit(bpe) -> None:
    assert (len(bpe), len(BYTES)) == (280, 258)
    assert {bpe.eos_token_id, bpe.pad_token_id} == {278, 279}
    assert BYTES("é")["input_ids"] != BYTES("e")["input_ids"]
    assert [len(BYTES(text)["input_ids"]) for text in ("abc", "é", "🙂")] == [3, 2, 4]


def test_a_bpe_is_learnt_from_the_documents(bpe) -> None:
    text = DOCUMENTS[0].text
    assert len(bpe(text)["input_ids"]) < len(BYTES(text)["input_ids"]) / 2


def test_a_bpe_is_learnt_once_and_anew_when_anything_it_hangs_on_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    train = module._train_bpe
    monkeypatch.setattr(module, "_train_bpe", lambda *args: trained.append(1) or train(*args))
    first = load_tokenizer(BPE, DOCUMENTS, tmp_path)
    again = load_tokenizer(BPE, iter(DOCUMENTS), tmp_path)
    assert len(trained) == 1
    assert again.get_vocab() == first.get_vocab()
    load_tokenizer(BPE, [*DOCUMENTS, Document("more", "x")], tmp_path)
    load_tokenizer(BPE.model_copy(update={"vocab_size": 270}), DOCUMENTS, tmp_path)
    load_tokenizer(BPE.model_copy(update={"max_documents": 3}), DOCUMENTS, tmp_path)
    assert len(trained) == 4
    assert not list(tmp_path.glob("**/.writing-*"))


def test_two_writers_of_one_cache_both_get_the_tokenizer(tmp_path: Path) -> None:
    sizes: list[int] = []
    threads = [
        threading.Thread(target=lambda: sizes.append(len(load_tokenizer(BPE, DOCUMENTS, tmp_path)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [280] * 4
    assert len(list((tmp_path / "tokenizers").iterdir())) == 1


def test_a_saved_folder_loads_as_a_pretrained_tokenizer(bpe, tmp_path: Path) -> None:
    bpe.save_pretrained(tmp_path)
    loaded = load_tokenizer(PretrainedTokenizer(kind="pretrained", name_or_path=str(tmp_path)), [])
    assert loaded(DOCUMENTS[0].text)["input_ids"] == bpe(DOCUMENTS[0].text)["input_ids"]
    assert loaded.eos_token_id == bpe.eos_token_id


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("INLAY_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "inlay"


def test_documents_are_encoded_in_order_and_closed_once(bpe) -> None:
    many = [Document(str(index), f"text {index}") for index in range(200)]
    plain = dict(encode_documents(bpe, many, add_eos=False))
    closed = dict(encode_documents(bpe, many, add_eos=True))
    assert list(closed) == [document.name for document in many]
    for document in many:
        assert bpe.decode(plain[document.name]) == document.text
        np.testing.assert_array_equal(closed[document.name], [*plain[document.name], bpe.eos_token_id])


def test_errors_name_the_fix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training document"):
        load_tokenizer(BPE, [], tmp_path)
    with pytest.raises(DataError, match="cannot load the tokenizer"):
        load_tokenizer(PretrainedTokenizer(kind="pretrained", name_or_path=str(tmp_path)), [])
    no_eos = load_tokenizer(ByteTokenizer(kind="bytes"), [])
    no_eos.eos_token = None
    with pytest.raises(DataError, match="add_eos: false"):
        list(encode_documents(no_eos, DOCUMENTS, add_eos=True))
    no_eos.pad_token = None
    assert padding_id(no_eos) == 0
