"""Sessions: streaming without a KV cache, rows of their own, and files that outlive the process or refuse to load."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import inlay
from inlay.fastweight import CheckpointError, Memory, Session, StateError
from inlay.fastweight.causal_lm import with_cache
from tests.closeness import assert_close
from tests.fastweight.test_streaming import llama, tokens

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def made(dtype: torch.dtype = torch.float64, representation: Any = "auto", **config: Any) -> tuple[Any, Memory]:
    model = llama(dtype=dtype, **config)
    memory = inlay.find_memory(model)
    assert memory is not None
    memory.representation = representation
    return model, memory


@torch.no_grad()
def read(session: Session, ids: Tensor, *cuts: int, **options: Tensor) -> Tensor:
    """Logits of ``ids`` read in pieces of ``cuts`` tokens."""
    pieces = ids.split(list(cuts) or [ids.shape[1]], dim=1)
    return torch.cat([session.step(piece, **options).logits for piece in pieces], 1)


def saved(tmp_path: Path, **config: Any) -> tuple[PreTrainedModel, Memory, Path]:
    model, memory = made(**config)
    session = memory.session(2)
    read(session, tokens(2, 13), 9, 1, 3)
    path = tmp_path / "alice.safetensors"
    session.save(path)
    return model, memory, path


def test_forwards_in_a_session_go_on_with_its_memory_and_only_with_that() -> None:
    """What a call gives depends on the earlier ones through the sum: that of a whole forward with the same chunks."""
    model, memory = made()
    ids, session = tokens(1, 20), memory.session()
    with torch.no_grad(), session:
        model(ids[:, :10])
        second = model(ids[:, 10:15]).logits
    fresh = read(memory.session(), ids[:, 10:15])
    assert (second - fresh).abs().max() > 0.01
    with torch.no_grad():
        assert_close(model(ids[:, 10:15], use_cache=False).logits, fresh, 1e-12)
    delta = dict(zip(memory.layers, (layer.total() for layer in session.state.layers.values()), strict=True))
    assert {i: pytest.approx(float(s.norm())) for i, s in delta.items()} == {
        i: float(n) for i, n in session.sum_norms().items()
    }


@pytest.mark.parametrize("representation", ["dense", "deferred"])
def test_what_was_read_in_inference_mode_goes_on_outside_it(representation: str) -> None:
    _, memory = made(representation=representation)
    ids, session = tokens(2, 20), memory.session(2)
    expected = read(memory.session(2), ids, 7, 1, 12)
    with torch.inference_mode():
        first = session.step(ids[:, :7]).logits.clone()
    rest = read(session, ids[:, 7:], 1, 12)
    assert torch.equal(torch.cat([first, rest], 1), expected)


def test_a_session_goes_on_with_its_own_chunk_size_alone() -> None:
    _, memory = made(chunk_size=5)
    ids, session = tokens(1, 20), memory.session()
    read(session, ids[:, :7])
    with memory.using(chunk_size=4), pytest.raises(StateError, match="in chunks of 5, and the memory now runs with"):
        read(session, ids[:, 7:])
    assert_close(read(session, ids[:, 7:]), read(memory.session(), ids, 7, 13)[:, 7:], 1e-12)


def test_a_kv_cache_carries_the_session_so_the_whole_forward_is_given_piece_by_piece() -> None:
    model, memory = made()
    ids, cache, session = tokens(2, 20), DynamicCache(), memory.session(2)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        with session:
            pieces = [model(piece, **with_cache(model, cache)).logits for piece in ids.split([9, 1, 1, 4, 5], dim=1)]
        assert_close(torch.cat(pieces, 1), whole, 1e-12)
        assert session.tokens_read.tolist() == [20, 20]


def test_generate_in_a_session_gives_what_it_gives_without_and_leaves_the_session_further_on() -> None:
    model, memory = made()
    prompt, session = tokens(1, 7), memory.session()
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    alone = model.generate(prompt, **options)
    with session:
        assert torch.equal(model.generate(prompt, **options), alone)
    assert session.tokens_read.tolist() == [18]  # generate does not read its last token
    assert session.chunks_committed.tolist() == [3]


def test_gradients_flow_through_a_session_until_it_is_detached() -> None:
    _, memory = made()
    ids, session = tokens(1, 20), memory.session()
    session.step(ids[:, :10])
    (gradient,) = torch.autograd.grad(session.step(ids[:, 10:]).logits.square().mean(), [memory.layers[0].target.conv])
    assert gradient.abs().max() > 0
    session.detach()
    session.step(ids[:, :1]).logits.sum().backward()


def test_padding_is_not_counted_and_a_chunk_counts_when_it_is_written() -> None:
    _, memory = made(chunk_size=5)
    ids, session = tokens(3, 12), memory.session(3)
    assert session.tokens_read.tolist() == [0, 0, 0]
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, :7] = 0
    read(session, ids, attention_mask=mask)
    assert session.tokens_read.tolist() == [12, 5, 12]
    assert session.chunks_committed.tolist() == [2, 0, 2]  # the second row's is full, and open until the next token
    read(session, ids[:, :2], 1, 1)
    assert session.tokens_read.tolist() == [14, 7, 14]
    assert session.chunks_committed.tolist() == [2, 1, 2]
    session.select([1, 0])
    session.reset([1])
    assert session.tokens_read.tolist() == [7, 0]
    assert session.chunks_committed.tolist() == [1, 0]
    assert [norm[1].item() for norm in session.sum_norms().values()] == [0.0, 0.0]


def test_taking_tokens_back_takes_them_off_the_count() -> None:
    model, memory = made()
    cache, session = DynamicCache(), memory.session()
    with torch.no_grad(), session:
        model(tokens(1, 8), **with_cache(model, cache))
        cache.crop(-2)
    assert session.tokens_read.tolist() == [6]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("representation", ["dense", "deferred"])
def test_after_a_reset_logits_are_those_of_a_fresh_session_bit_for_bit(dtype: torch.dtype, representation: str) -> None:
    _, memory = made(dtype, representation)
    ids, session = tokens(2, 20), memory.session(2)
    fresh = read(memory.session(2), ids, 7, 1, 1, 11)
    for forget in (lambda: session.reset(), lambda: session.reset([0, 1]), lambda: session.reset([True, True])):
        read(session, tokens(2, 17, seed=1), 13, 1, 3)
        forget()
        assert torch.equal(read(session, ids, 7, 1, 1, 11), fresh)
        assert session.tokens_read.tolist() == [20, 20]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("representation", ["auto", "dense", "deferred"])
def test_a_row_that_is_reset_beside_others_is_a_row_that_has_read_nothing_bit_for_bit(
    dtype: torch.dtype, representation: str
) -> None:
    """The fresh row saw only padding while its neighbour read, so that both batches have the same chunk grid."""
    _, memory = made(dtype, representation)
    ids, other = tokens(2, 20), tokens(2, 13, seed=1)
    session, fresh = memory.session(2), memory.session(2)
    read(session, other, 9, 1, 3)
    session.reset([0])
    with torch.no_grad():
        for piece in other.split([9, 1, 3], dim=1):
            fresh.step(piece, attention_mask=torch.tensor([[0], [1]]).expand_as(piece))
    assert torch.equal(read(session, ids, 7, 1, 12)[0], read(fresh, ids, 7, 1, 12)[0])
    assert session.tokens_read.tolist() == fresh.tokens_read.tolist() == [20, 33]


@pytest.mark.parametrize("representation", ["dense", "deferred"])
def test_a_row_that_is_reset_keeps_nothing_and_leaves_the_other_rows_alone(representation: str) -> None:
    """Bit for bit the same whatever the row had read before; and to rounding what a fresh row gives."""
    _, memory = made(representation=representation)
    ids, other = tokens(2, 20), tokens(2, 13, seed=1)
    after = []
    for seed in (2, 3):
        session = memory.session(2)
        before = other.clone()
        before[0] = tokens(1, 13, seed=seed)
        read(session, before, 9, 1, 3)
        session.reset([0])
        after.append(read(session, ids, 7, 1, 12))
    assert torch.equal(*after)
    assert_close(after[0][:1], read(memory.session(), ids[:1], 7, 1, 12), 1e-12)
    whole = memory.session()
    read(whole, other[1:], 9, 1, 3)
    assert_close(after[0][1:], read(whole, ids[1:], 7, 1, 12), 1e-12)


def test_rows_are_selected_and_copies_go_their_own_way() -> None:
    _, memory = made()
    session = memory.session(2)
    read(session, tokens(2, 13))
    branch = session.copy()
    session.select([1, 1, 0])
    assert session.batch_size == 3
    ids = tokens(2, 8, seed=4)
    three = read(session, ids[[1, 1, 0]])
    assert_close(three, read(branch, ids)[[1, 1, 0]], 1e-12)
    assert branch.tokens_read.tolist() == [21, 21]
    assert session.to("cpu").nbytes > branch.nbytes > 0


def test_another_batch_size_is_refused_before_anything_is_read() -> None:
    _, memory = made()
    session = memory.session(2)
    with pytest.raises(
        StateError, match=r"made for 2 rows, this call has 3: make it with memory.session\(batch_size=3"
    ):
        session.step(tokens(3, 4))
    assert torch.equal(read(session, tokens(2, 8)), read(memory.session(2), tokens(2, 8)))
    with pytest.raises(ValueError, match="at least one row"):
        memory.session(0)
    with pytest.raises(IndexError, match=r"mask of rows must be \[B\] = \[2\]"):
        session.reset([True])


def test_one_session_at_a_time() -> None:
    model, memory = made()
    first, second = memory.session(), memory.session()
    with first:
        first.step(tokens(1, 3))
        with pytest.raises(StateError, match="another session of this memory is open"):
            second.step(tokens(1, 3))
        with pytest.raises(StateError, match="this session is open already"), first:
            pass
        model(tokens(1, 3))
    second.step(tokens(1, 3))
    assert (first.tokens_read.item(), second.tokens_read.item()) == (6, 3)
    memory.detach()
    with pytest.raises(StateError, match="has been detached"):
        first.step(tokens(1, 3))


@pytest.mark.parametrize("before", [0, 7])
def test_after_an_error_in_a_forward_the_session_is_neither_continued_nor_saved(tmp_path: Path, before: int) -> None:
    model, memory = made()
    session = memory.session()
    with torch.no_grad():
        if before:
            session.step(tokens(1, before))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.model.layers[1], "forward", lambda *a, **k: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                session.step(tokens(1, 3))
    assert memory.open_session is None
    with pytest.raises(StateError, match=r"begin anew with session.reset\(\)"):
        session.step(tokens(1, 3))
    with pytest.raises(StateError, match="not saved"):
        session.save(tmp_path / "file")
    assert not list(tmp_path.iterdir())
    session.reset()
    assert torch.equal(read(session, tokens(1, 8)), read(memory.session(), tokens(1, 8)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("representation", ["dense", "deferred"])
@pytest.mark.parametrize("length", [3, 5, 24])
def test_a_loaded_session_goes_on_bit_for_bit(tmp_path: Path, dtype: Any, representation: str, length: int) -> None:
    _, memory = made(dtype, representation)
    session, path = memory.session(2), tmp_path / "session"
    read(session, tokens(2, length + 2), length, 1, 1)
    session.save(path)
    ids = tokens(2, 30, seed=5)
    expected = read(session, ids, 1, 1, 9, 1, 1, 1, 1, 15)

    _, other = made(dtype, representation)
    loaded = other.load_session(path)
    assert loaded.tokens_read.tolist() == [length + 2] * 2
    assert torch.equal(read(loaded, ids, 1, 1, 9, 1, 1, 1, 1, 15), expected)
    assert loaded.chunks_committed.tolist() == session.chunks_committed.tolist()
    assert loaded.state.length == session.state.length


def test_a_session_that_has_read_nothing_can_be_saved(tmp_path: Path) -> None:
    _, memory = made()
    memory.session(2).save(tmp_path / "folder" / "new")
    loaded = memory.load_session(tmp_path / "folder" / "new")
    assert loaded.batch_size == 2
    assert torch.equal(read(loaded, tokens(2, 8)), read(memory.session(2), tokens(2, 8)))


def test_the_header_says_whose_it_is(tmp_path: Path) -> None:
    _, memory, path = saved(tmp_path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    read_header = {name: json.loads(text) for name, text in header.items() if name not in ("kind", "sha256")}
    assert read_header["format"] == 1
    assert read_header["inlay"] == inlay.__version__
    assert read_header["model"]["type"] == "llama"
    assert inlay.FastWeightConfig(**read_header["config"]) == memory.config
    assert read_header["batch_size"] == 2
    assert read_header["tokens_read"] == [13, 13]
    assert read_header["chunks_committed"] == [2, 2]


def wider() -> Memory:
    model = inlay.find_memory(llama())
    assert model is not None
    config = model.model.config
    config.intermediate_size = 32
    other = type(model.model)(config)
    return inlay.attach(other.double(), model.config)


def retrained() -> Memory:
    _, memory = made()
    with torch.no_grad():
        memory.layers[2].target.conv[0, 0] += 1e-6
    return memory


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: made(chunk_size=6)[1], "another config: chunk_size is 5 there and 6 here"),
        (lambda: made(layers=[0])[1], "another model: projection of block 2"),
        (wider, r"another model: .*projection of block 0 is \[16, 24\] there and \[16, 32\] here"),
        (retrained, "another training: other weights of the memory wrote it"),
        (lambda: made(torch.float32)[1], "another training: other weights"),
    ],
    ids=["config", "layers", "width", "weights", "dtype"],
)
def test_a_session_of_something_else_is_refused(tmp_path: Path, other: Callable[[], Memory], message: str) -> None:
    _, _, path = saved(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        other().load_session(path)


def test_files_that_are_no_session_are_refused(tmp_path: Path) -> None:
    _, memory, path = saved(tmp_path)
    with pytest.raises(CheckpointError, match="is no file: there is no session to load"):
        memory.load_session(tmp_path / "none")
    with pytest.raises(CheckpointError, match="is no file"):
        memory.load_session(tmp_path)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        memory.load_session(tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "tensors")
    with pytest.raises(CheckpointError, match="of something else"):
        memory.load_session(tmp_path / "tensors")
    with safe_open(path, framework="pt") as file:
        newer = {**file.metadata(), "format": "2", "inlay": '"9.0"'}
    save_file(load_file(path), tmp_path / "newer", metadata=newer)
    with pytest.raises(CheckpointError, match=r"is of format 2 .* reads 1; it was written by inlay 9.0"):
        memory.load_session(tmp_path / "newer")


def test_every_cut_and_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """All of the header's bits in turn would take minutes: a random choice of them, and of the tensors'."""
    _, memory, path = saved(tmp_path)
    content, damaged = path.read_bytes(), tmp_path / "damaged"
    header = 8 + int.from_bytes(content[:8], "little")
    chosen = random.Random(0)
    bits = [chosen.randrange(8 * header) for _ in range(150)] + [
        chosen.randrange(8 * header, 8 * len(content)) for _ in range(50)
    ]
    for bit in bits:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            memory.load_session(damaged)
    for length in [0, 4, 8, header - 1, header, header + 1, len(content) - 1]:
        damaged.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="no safetensors file, or one that is damaged or cut off"):
            memory.load_session(damaged)


def save_forever(session: Session, path: Path, started: int) -> None:
    """In a forked child: tell the parent that it has begun, and save until it is killed."""
    try:
        os.write(started, b".")
        while True:
            session.save(path)
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_kill_while_saving_leaves_a_loadable_file_each_of_200_times(tmp_path: Path) -> None:
    """A child that saves in a loop is killed (SIGKILL) at a random moment, 200 times; each time the file loads."""
    _, memory = made(chunk_size=64, init="next_token")
    session, path = memory.session(8), tmp_path / "session.safetensors"
    read(session, tokens(8, 70))
    expected = read(session.copy(), tokens(8, 9))
    session.save(path)
    begun = time.perf_counter()
    session.save(path)
    duration = time.perf_counter() - begun
    moments, left = random.Random(0), 0
    for _ in range(200):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            save_forever(session, path, writer)
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)
        time.sleep(moments.uniform(0, 2 * duration))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the child ended by itself: saving failed in it"
        left += len(list(tmp_path.iterdir())) > 1
        loaded = memory.load_session(path)
        assert loaded.tokens_read.tolist() == [70] * 8
    assert left > 20, f"only {left} kills met a save half-way; the test shows too little"
    assert torch.equal(read(loaded, tokens(8, 9)), expected)
    session.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
