"""Documents encoded, by a call that nobody disturbs and by calls that are killed, and questions answered from them."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest
import torch
import transformers

from inlay.data import DataError, Document
from inlay.softtoken.compressors import (
    CompressorError,
    EncoderPoolConfig,
    LoraSettings,
    build_compressor,
)
from inlay.softtoken.document_files import read_documents
from inlay.softtoken.documents import answer, encode_documents
from inlay.softtoken.errors import LayoutError
from inlay.softtoken.pieces import tokenise
from inlay.softtoken.store import (
    SoftTokenStore,
    StoredDocument,
    StoreError,
    hash_text,
)
from tests.closeness import assert_close
from tests.softtoken.local import byte_level
from tests.softtoken.stored import Run, a_run, contents, tensors, texts

# Encoding


@pytest.mark.parametrize(("learned", "form"), [(False, "embeddings"), (True, "embeddings"), (True, "kv")])
def test_documents_are_stored_as_the_compressor_writes_each_one_alone(learned: bool, form: str, tmp_path: Path) -> None:
    run, documents = a_run(learned=learned, form=form), texts(9)
    seen: list[tuple[int, int]] = []
    report = encode_documents(run, documents, tmp_path, ratio=8, batch_size=4, progress=lambda *now: seen.append(now))
    store = SoftTokenStore.open(tmp_path)
    tokens = 0
    for name, text in documents:
        ids = torch.tensor([tokenise(byte_level(), text, plain=True)])
        alone = run.compressor.compress(ids, ratio=8)
        for stored, expected in zip(tensors(store.load([name])), tensors(alone), strict=True):
            assert_close(stored, expected, 1e-5, name)
        slots = -(-ids.shape[1] // 8)
        assert store.documents[name] == StoredDocument(name, hash_text(text), ids.shape[1], slots, 8)
        tokens += ids.shape[1]
    assert seen == sorted(seen)
    assert seen[-1] == (tokens, tokens)
    assert (report.encoded, report.skipped, report.replaced, report.tokens) == (9, 0, 0, tokens)
    assert report.nbytes == store.load([*store.documents]).nbytes


def test_what_is_asked_for_is_noted_and_asking_for_nothing_is_the_configuration(tmp_path: Path) -> None:
    encode_documents(a_run(ratios=(8, 4)), texts(2), tmp_path / "ratio")
    encode_documents(a_run(slots=3), texts(2), tmp_path / "slots")
    encode_documents(a_run(slots=3), texts(2), tmp_path / "both", ratio=4)
    asked = [
        {d.ratio for d in SoftTokenStore.open(tmp_path / n).documents.values()} for n in ("ratio", "slots", "both")
    ]
    assert asked == [{8}, {None}, {4}]
    assert {d.slots for d in SoftTokenStore.open(tmp_path / "slots").documents.values()} == {3}


def test_a_store_is_gone_on_with_or_changed_only_when_asked_to(tmp_path: Path) -> None:
    run, documents = a_run(), texts(5)
    encode_documents(run, documents[:4], tmp_path, batch_size=2, shard_seconds=0)
    before = contents(SoftTokenStore.open(tmp_path))
    with pytest.raises(StoreError, match=r"holds 4 documents already\. Go on with --resume"):
        encode_documents(run, documents, tmp_path)
    changed = [Document(documents[0].name, "another text"), *documents[1:]]
    with pytest.raises(StoreError, match=r"holds 'd/0.txt' with another text, ratio or number of slots. Replace"):
        encode_documents(run, changed, tmp_path, resume=True)
    assert contents(SoftTokenStore.open(tmp_path)) == before

    report = encode_documents(run, documents, tmp_path, resume=True)
    assert (report.encoded, report.skipped) == (1, 4)
    after = contents(SoftTokenStore.open(tmp_path))
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"d/4.txt"}

    report = encode_documents(run, changed[:2], tmp_path, replace=True)
    assert (report.encoded, report.replaced, report.skipped) == (1, 1, 1)
    store = SoftTokenStore.open(tmp_path)
    assert store.documents["d/0.txt"].source == hash_text("another text")
    assert {name: one for name, one in contents(store).items() if name != "d/0.txt"} == {
        name: one for name, one in after.items() if name != "d/0.txt"
    }
    assert sum(len(file.documents) for file in store.files) == 5, "the old slots are still there"

    report = encode_documents(run, changed, tmp_path, ratio=8, replace=True)
    assert report.replaced == 5
    assert {one.ratio for one in SoftTokenStore.open(tmp_path).documents.values()} == {8}
    assert len(list(tmp_path.glob("shard-*"))) == 1


def test_nothing_is_written_when_one_document_cannot_be_encoded(tmp_path: Path) -> None:
    run, documents = a_run(learned=True), texts(3)
    for odd, said in [
        (Document("long", "Ada " * 400), r"'long': a context of [\d,]+ tokens"),
        (Document("none", ""), "'none' has no tokens"),
    ]:
        with pytest.raises(CompressorError, match=said):
            encode_documents(run, [*documents, odd], tmp_path)
    with pytest.raises(StoreError, match=r"two documents are called 'd/0.txt'"):
        encode_documents(run, [*documents, documents[0]], tmp_path)
    with pytest.raises(CompressorError, match="ratio 5 is not among"):
        encode_documents(run, documents, tmp_path, ratio=5)
    assert not list(tmp_path.glob("shard-*"))


def test_tokens_that_the_tokenizer_does_not_know_are_counted(tmp_path: Path) -> None:
    run = a_run()
    unknown = run.layout.tokenizer.unk_token
    run.layout.tokenizer.unk_token = "Q"  # a token that a text can hold
    try:
        report = encode_documents(run, [Document("a", "QQ Ada Q"), Document("b", "Bob")], tmp_path)
    finally:
        run.layout.tokenizer.unk_token = unknown
    assert report.unknown == 3
    assert "3 of the tokens are unknown to the decoder's tokenizer" in str(report)
    assert "unknown" not in str(replace(report, unknown=0))


def test_encoding_is_in_eval_mode_and_leaves_the_modes_as_they_were(tmp_path: Path) -> None:
    run = a_run(learned=True)
    encode_documents(run, texts(2), tmp_path / "eval")
    run.model.train()
    run.compressor.train()
    for module in run.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    encode_documents(run, texts(2), tmp_path / "train")
    assert run.model.training
    assert run.compressor.training
    assert contents(SoftTokenStore.open(tmp_path / "train")) == contents(SoftTokenStore.open(tmp_path / "eval"))


def test_what_was_compressed_before_an_error_is_kept(tmp_path: Path) -> None:
    run, documents = a_run(), texts(8)

    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_documents(run, documents, tmp_path, batch_size=2, progress=interrupt)
    assert 0 < len(SoftTokenStore.open(tmp_path).documents) < 8
    assert encode_documents(run, documents, tmp_path, batch_size=2, resume=True).skipped > 0


def test_documents_are_cut_where_the_contexts_of_training_were(tmp_path: Path) -> None:
    run = replace(a_run(), context_tokens=16)
    documents = texts(8)
    report = encode_documents(run, documents, tmp_path / "cut", ratio=8)
    store = SoftTokenStore.open(tmp_path / "cut")
    long = 0
    for name, text in documents:
        ids = tokenise(byte_level(), text, plain=True)
        long += len(ids) > 16
        assert store.documents[name].tokens == min(16, len(ids))
        expected = run.compressor.compress(torch.tensor([ids[:16]]), ratio=8)
        assert_close(tensors(store.load([name]))[0], tensors(expected)[0], 1e-5, name)
    assert 0 < long < 8
    assert report.cut == long
    assert f"{long} cut at the run's context_tokens" in str(report)
    assert encode_documents(run, documents, tmp_path / "cut", ratio=8, resume=True).skipped == 8


# Killed in the middle


def watch_store(at: Callable[[int], None]) -> None:
    """From the first write on, call ``at`` with 1, 2, 3, … at each call and return in the store's modules."""
    steps, writing = itertools.count(1), False

    def watch(frame: FrameType, event: str, argument: object) -> None:
        nonlocal writing
        if "softtoken/store" in frame.f_code.co_filename:
            writing = writing or frame.f_code.co_name == "flush"
            if writing:
                at(next(steps))

    sys.setprofile(watch)


def counted(work: Callable[[], object]) -> int:
    """Do ``work`` and count the steps of the store meanwhile."""
    last = 0

    def note(step: int) -> None:
        nonlocal last
        last = step

    watch_store(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return last


def killed(work: Callable[[], object], at: int) -> bool:
    """Do ``work`` in a process that ends by kill -9 at step ``at`` of the store; False if it was done before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks beside threads
        child = os.fork()
    if child == 0:
        watch_store(lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == at else None)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("replacing", [False, True])
def test_after_any_number_of_kills_resuming_gives_what_an_undisturbed_call_gives(
    replacing: bool, tmp_path: Path
) -> None:
    run, documents, old = a_run(), texts(24), texts(24, seed=1)

    def encode(into: Path) -> object:
        return encode_documents(run, documents, into, batch_size=2, resume=True, replace=replacing, shard_seconds=0)

    encode_documents(run, old if replacing else [], tmp_path / "before", batch_size=7)
    shutil.copytree(tmp_path / "before", tmp_path / "whole")
    steps = counted(lambda: encode(tmp_path / "whole"))
    expected = contents(SoftTokenStore.open(tmp_path / "whole"))
    earlier = contents(SoftTokenStore.open(tmp_path / "before")) if replacing else {}

    source, kills, found = random.Random(0), 0, set()
    while kills < 20:
        path = tmp_path / f"killed-{kills}"
        shutil.copytree(tmp_path / "before", path)
        written = 0
        while killed(lambda: encode(path), at=1 + int(steps * source.random() ** 3)):  # noqa: B023
            kills += 1
            stored = contents(SoftTokenStore.open(path)) if list(path.glob("shard-*")) else {}
            assert all(one in (expected[name], earlier.get(name)) for name, one in stored.items())
            assert stored.keys() >= earlier.keys()
            before, written = written, sum(one == expected[name] for name, one in stored.items())
            assert written >= before, "work that was written is lost"
            found.add(written)
        store = SoftTokenStore.open(path)
        assert contents(store) == expected
        assert sum(len(file.documents) for file in store.files) == 24, "a document is there twice"
        assert not list(path.glob(".*.tmp"))
    assert len(found) > 3, "the kills did not come in the middle"


# Answers


@pytest.mark.parametrize(("form", "decoder"), [("embeddings", "llama"), ("kv", "llama"), ("kv", "mistral")])
def test_questions_about_stored_documents_are_answered_as_each_would_be_alone(
    form: str, decoder: str, tmp_path: Path
) -> None:
    run, documents = a_run(learned=True, form=form), texts(6)
    if decoder == "mistral":  # attention that slides over 12 positions
        torch.manual_seed(0)
        config = transformers.MistralConfig(
            vocab_size=len(byte_level()), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, sliding_window=12, initializer_range=0.3,
        )  # fmt: skip
        model = transformers.MistralForCausalLM(config).eval()
        compressor = build_compressor(EncoderPoolConfig(form="kv", lora=LoraSettings(r=2)), model)
        run = Run(model, compressor.eval(), run.layout)
    encode_documents(run, documents, tmp_path)
    store = SoftTokenStore.open(tmp_path)
    asked = ["Who?", "Who lives in Paris, and what is the capital of Austria?", "What is it?", "Where?"]
    pairs = [(documents[index % 6].name, asked[index % 4]) for index in range(11)]
    seen: list[tuple[int, int]] = []
    together = answer(run, store, pairs, batch_size=4, progress=lambda *now: seen.append(now))
    alone = [run.layout.answer(run.model, store.load([name]), [question])[0] for name, question in pairs]
    assert together == alone
    assert len(set(alone)) > 3
    assert seen[-1] == (11, 11)


def test_an_unknown_document_is_answered_with_the_nearest_ids(tmp_path: Path) -> None:
    run = a_run()
    encode_documents(run, texts(12), tmp_path)
    store = SoftTokenStore.open(tmp_path)
    with pytest.raises(StoreError, match=r"no document 'd/3.text'; did you mean 'd/3.txt' or"):
        answer(run, store, [("d/0.txt", "Who?"), ("d/3.text", "Who?")])
    with pytest.raises(StoreError, match=r"no document '§'; there are 'd/.*' and 7 more"):
        store.load(["§"])
    with pytest.raises(StoreError, match="holds 12 documents; say which"):
        store.only_document()


# Where documents come from


def test_text_files_are_called_by_their_path_and_lines_by_their_id(tmp_path: Path) -> None:
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "docs" / "b.txt").write_text("Bob")
    (tmp_path / "docs" / "deep" / "a.md").write_text("Ada")
    lines = [{"id": 7, "text": "seven"}, {"text": "without"}, {"id": "x/y", "text": "named", "body": "other"}]
    with gzip.open(tmp_path / "docs" / "c.jsonl.gz", "wt") as file:
        file.write("\n\n".join(map(json.dumps, lines)) + "\n")
    expected = [("b.txt", "Bob"), ("7", "seven"), ("c.jsonl.gz:3", "without"), ("x/y", "named"), ("deep/a.md", "Ada")]
    assert read_documents(str(tmp_path / "docs")) == expected
    assert read_documents(str(tmp_path / "docs" / "deep" / "a.md")) == [("a.md", "Ada")]
    assert read_documents(str(tmp_path / "docs" / "*.txt")) == [("b.txt", "Bob")]
    (tmp_path / "one.jsonl").write_text(json.dumps({"name": "n", "body": "b"}))
    assert read_documents(str(tmp_path / "one.jsonl"), text_field="body", id_field="name") == [("n", "b")]


def test_files_and_lines_that_cannot_be_used_are_all_listed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.jsonl").write_text('{"id": 1}\nno\n[1]\n{"text": "t", "id": []}\n{"text": " "}\n')
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(DataError) as caught:
        read_documents(str(tmp_path))
    (tmp_path / "d").mkdir()
    for name in ("d/e.jsonl", "d/f.jsonl"):
        (tmp_path / name).write_text('{"id": "x", "text": "one"}\n' * (1 + (name == "d/f.jsonl")))
    with pytest.raises(DataError) as twice:
        read_documents(str(tmp_path / "d"))
    assert "f.jsonl:2: has the id 'x', as line 1 has" in str(twice.value)
    assert re.search(r"f.jsonl: has a document called 'x', and so has .*e.jsonl", str(twice.value))
    for said in [
        "a.txt:1: is not UTF-8",
        "b.jsonl:1: has no field 'text' (its fields: 'id')",
        "b.jsonl:2: is no JSON (Expecting value",
        "b.jsonl:3: is no JSON object but an array",
        "b.jsonl:4: field 'id' should be a string or a number; got []",
        "b.jsonl:5: field 'text' is empty",
        "c.jsonl: is empty",
    ]:
        assert said in str(caught.value)
    assert "on_error" not in str(caught.value)  # the command has no such option


def test_of_several_questions_the_blank_one_is_named(tmp_path: Path) -> None:
    run, documents = a_run(), texts(2)
    encode_documents(run, documents, tmp_path)
    asked = [(documents[0].name, "Who?"), (documents[1].name, " ")]
    with pytest.raises(LayoutError, match=r"question 2 of 2, about 'd/1.txt': the question is missing or blank"):
        answer(run, SoftTokenStore.open(tmp_path), asked)
