"""Stored soft tokens: what comes back, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from inlay.softtoken import store_file as store_file_module
from inlay.softtoken.documents import answer, encode_documents
from inlay.softtoken.store import (
    SoftTokenStore,
    StoreError,
    StoreHeader,
    StoreWriter,
    hash_text,
    save_store,
)
from tests.softtoken.local import byte_level, llama
from tests.softtoken.stored import HEADER, WIDTH, Run, a_run, bits, contents, memory_of, notes, tensors, texts

# Round trips

FORMS = pytest.mark.parametrize("form", ["embeddings", "kv"])


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_slots_come_back_bit_for_bit_from_a_file(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    lengths = [3, 0, 7, 1]
    memory = memory_of(lengths, form, dtype)
    save_store(tmp_path / "a" / "slots.safetensors", HEADER, notes(lengths), memory)
    store = SoftTokenStore.open(tmp_path / "a" / "slots.safetensors")
    assert store.header == HEADER
    assert store.form == form
    assert [*store.documents.values()] == notes(lengths)
    for row, name in enumerate(store.documents):
        assert bits(store.load([name])) == bits(memory.row(row))
    together = store.load(["é/2", "é/1", "é/2", "é/0"])
    assert together.lengths.tolist() == [7, 0, 7, 3]
    for row, source in enumerate([2, 1, 2, 0]):
        assert bits(together.row(row)) == bits(memory.row(source))
    for tensor in tensors(together):
        unread = ~together.mask if form == "embeddings" else ~together.mask[:, None].expand(tensor.shape[:3])
        assert not tensor[unread].any()


@FORMS
def test_slots_come_back_bit_for_bit_from_a_folder_of_shards(form: str, tmp_path: Path) -> None:
    batches = [[3, 5], [1], [2, 2, 9]]
    memories = [memory_of(lengths, form, torch.bfloat16, seed) for seed, lengths in enumerate(batches)]
    with StoreWriter(tmp_path, HEADER, shard_bytes=1) as writer:
        for number, (lengths, memory) in enumerate(zip(batches, memories, strict=True)):
            writer.add(notes(lengths, 10 * number), memory)
    assert len(list(tmp_path.glob("shard-*.safetensors"))) == 3
    store = SoftTokenStore.open(tmp_path)
    assert [*store.documents] == ["é/0", "é/1", "é/10", "é/20", "é/21", "é/22"]
    mixed = store.load(["é/22", "é/0", "é/10", "é/21", "é/22"])
    for row, (batch, source) in enumerate([(2, 2), (0, 0), (1, 0), (2, 1), (2, 2)]):
        assert bits(mixed.row(row)) == bits(memories[batch].row(source))


def test_the_file_is_plain_safetensors_that_others_can_read(tmp_path: Path) -> None:
    memory = memory_of([2, 3], "embeddings", torch.float32)
    save_store(tmp_path / "slots.safetensors", HEADER, notes([2, 3]), memory)
    assert memory.embeddings is not None
    assert torch.equal(
        load_file(tmp_path / "slots.safetensors")["embeddings"],
        torch.cat([memory.embeddings[0, :2], memory.embeddings[1]]),
    )
    with safe_open(tmp_path / "slots.safetensors", framework="pt") as file:
        written = {name: json.loads(text) for name, text in file.metadata().items() if name not in ("kind", "sha256")}
    assert written["header"]["model"] == HEADER.model
    assert written["documents"][1] == {
        "id": "é/1", "source": hash_text("1"), "tokens": 12, "slots": 3, "ratio": 4,
    }  # fmt: skip


def test_only_the_documents_asked_for_are_read(tmp_path: Path) -> None:
    """With everything else in the tensors overwritten, what was left alone still loads."""
    path = tmp_path / "slots.safetensors"
    lengths = [4, 4, 4]
    memory = memory_of(lengths, "embeddings", torch.float32)
    save_store(path, HEADER, notes(lengths), memory)
    content = bytearray(path.read_bytes())
    row = 4 * WIDTH * 4
    content[-3 * row : -2 * row] = content[-row:] = bytes(row)
    path.write_bytes(content)
    store = SoftTokenStore.open(path)
    assert bits(store.load(["é/1"])) == bits(memory.row(1))
    for other in ("é/0", "é/2"):
        with pytest.raises(StoreError, match=f"the slots of '{other}' do not have their checksum"):
            store.load(["é/1", other])


# What is refused


@pytest.mark.parametrize("kind", ["model", "weights", "compressor", "ratios", "layout"])
def test_another_model_compressor_or_layout_is_refused_and_named(kind: str, tmp_path: Path) -> None:
    run = a_run(learned=True, ratios=(4,))
    encode_documents(run, texts(2), tmp_path)
    store = SoftTokenStore.open(tmp_path)
    store.check(run.model, run.compressor, run.layout)
    store.check(run.model, run.compressor, run.layout.layout)
    other = run
    if kind == "model":
        other, said = Run(llama(400), run.compressor, run.layout), r"another model: vocabulary is \d+ there and 400"
    elif kind == "weights":
        other, said = a_run(seed=1, learned=True, ratios=(4,)), r"another model: of the same shape, with other weights"
    elif kind == "ratios":
        other, said = a_run(learned=True, ratios=(4, 8)), r"another compressor: ratios is \[4\] there and \[4, 8\] here"
    elif kind == "layout":
        changed = run.layout.layout.model_copy(update={"anchor": "A: "})
        other = Run(run.model, run.compressor, changed.bind(byte_level()))
        said = "another layout: anchor is 'Answer: ' there and 'A: ' here"
    else:
        said = "another training of the compressor: its weights differ"
        with torch.no_grad():
            next(iter(run.compressor.trainable_parameters())).add_(1e-3)
    with pytest.raises(StoreError, match=said):
        store.check(other.model, other.compressor, other.layout)
    with pytest.raises(StoreError, match=said):
        answer(other, store, [("d/0.txt", "Who?")])
    before = contents(store)
    with pytest.raises(StoreError, match=said):
        encode_documents(other, texts(3), tmp_path, replace=True)
    assert contents(SoftTokenStore.open(tmp_path)) == before


def test_a_flipped_bit_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "slots.safetensors"
    save_store(path, HEADER, notes([1, 2]), memory_of([1, 2], "kv", torch.bfloat16))
    whole = path.read_bytes()
    source = random.Random(0)
    for offset in [*range(16), *range(16, len(whole), 3)]:
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << source.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"slots\.safetensors"):
            SoftTokenStore.open(path).load(["é/0", "é/1"])


def test_a_file_that_was_cut_off_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "slots.safetensors"
    save_store(path, HEADER, notes([1, 2]), memory_of([1, 2], "embeddings", torch.float32))
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=r"damaged or cut off|of something else"):
            SoftTokenStore.open(path)


def test_newer_formats_and_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = memory_of([2], "embeddings", torch.float32)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for name, said in [("other", "something else"), ("text", "no safetensors file"), ("none", "is no file")]:
        with pytest.raises(StoreError, match=said):
            SoftTokenStore.open(tmp_path / f"{name}.safetensors")
    with pytest.raises(StoreError, match="holds no soft tokens: there is no shard in it"):
        SoftTokenStore.open(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(store_file_module, "FORMAT", 2)
        save_store(tmp_path / "new.safetensors", HEADER, notes([2]), memory)
    save_store(tmp_path / "one.safetensors", HEADER, notes([2]), memory)
    with pytest.raises(StoreError, match=r"ids are a list; got the text 'a': give \['a'\]"):
        SoftTokenStore.open(tmp_path / "one.safetensors").load("a")
    with pytest.raises(StoreError, match=r"is of format 2 .* reads 1; it was written by inlay"):
        SoftTokenStore.open(tmp_path / "new.safetensors")


def test_shards_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    other = StoreHeader(HEADER.model | {"width": 64}, HEADER.compressor, HEADER.layout)
    save_store(tmp_path / "shard-00000.safetensors", HEADER, notes([2]), memory_of([2], "embeddings", torch.float32))
    save_store(tmp_path / "shard-00001.safetensors", other, notes([2]), memory_of([2], "embeddings", torch.float32))
    with pytest.raises(StoreError, match=r"00001.*does not belong with .*00000.*: width is 64 there and 32 here"):
        SoftTokenStore.open(tmp_path)
    save_store(tmp_path / "shard-00001.safetensors", HEADER, notes([2]), memory_of([2], "embeddings", torch.float16))
    with pytest.raises(StoreError, match="its slots have another form"):
        SoftTokenStore.open(tmp_path)


def test_slots_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    memory = memory_of([2, 3], "embeddings", torch.float32)
    with StoreWriter(tmp_path, HEADER) as writer:
        writer.add(notes([2, 3]), memory)
        for odd, said in [
            (memory_of([2], "kv", torch.float32), "'0.keys' is None there"),
            (memory_of([2], "embeddings", torch.float64), r"is \('torch.float32', \[32\]\) there"),
            (memory_of([3], "embeddings", torch.float32), "'é/5' has 3 slots and is said to have 2"),
            (memory_of([2, 2], "embeddings", torch.float32), "1 documents for a memory of 2 rows"),
        ]:
            with pytest.raises(StoreError, match=said):
                writer.add(notes([2], 5), odd)
    assert [*SoftTokenStore.open(tmp_path).documents] == ["é/0", "é/1"]
    assert memory.embeddings is not None
    memory.embeddings[1, 0, 0] = float("nan")
    path = tmp_path / "slots.safetensors"
    for documents, slots, said in [
        (notes([2, 3]), memory, "the slots of 'é/1' hold NaN or infinity"),
        (notes([2]) * 2, memory_of([2, 2], "embeddings", torch.float32), "the document 'é/0' comes twice"),
    ]:
        with pytest.raises(StoreError, match=said):
            save_store(path, HEADER, documents, slots)
    assert not path.exists()


def test_one_process_writes_at_a_time_and_to_a_folder_of_its_own(tmp_path: Path) -> None:
    with (
        StoreWriter(tmp_path / "store", HEADER),
        pytest.raises(StoreError, match="another process is writing"),
        StoreWriter(tmp_path / "store", HEADER),
    ):
        pass
    with StoreWriter(tmp_path / "store", HEADER):
        pass
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"holds other files \(notes.txt"):
        StoreWriter(tmp_path, HEADER).__enter__()
    with pytest.raises(StoreError, match=r"notes.txt is a file"):
        StoreWriter(tmp_path / "notes.txt", HEADER).__enter__()
