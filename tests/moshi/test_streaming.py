"""A stream equals the whole forward, row by row, whenever rows start, stop, are saved or begin anew."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from moshi.models import LMGen, LMModel
from torch import Tensor

import inlay
from inlay.fastweight.streaming import StateError
from inlay.moshi.lm_gen import MemoryLMGen
from inlay.moshi.streaming import MemoryStream, steps_of
from tests.closeness import assert_close, relative_error
from tests.moshi.models import make_codes, make_lm
from tests.moshi.streams import CARD, CHUNK, CONFIGS, CONTEXT, KINDS, Heard, listening, tiny_lm, user_codes, whole

both_kinds = pytest.mark.parametrize("kind", KINDS)


def run(gen: LMGen, codes: Tensor, masks: Tensor | None = None) -> list[Tensor | None]:
    """Step through ``codes`` ``[B, K, T]``, running only the rows of ``masks`` ``[T, B]`` if given."""
    outputs = []
    for t in range(codes.shape[2]):
        if masks is not None:
            gen.set_exec_mask(masks[t])
        outputs.append(gen.step(codes[:, :, t : t + 1]))
    return outputs


def buffers(gen: LMGen) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in steps_of(gen).tensors().items()}


def assert_row_is_whole(lm: LMModel, heard: Heard, row: int, steps: list[int] | slice = slice(None)) -> None:
    given, output, logits = heard.row(row, steps)
    expected = whole(lm, given)
    assert_close(output, expected[0], 1e-4, f"output of row {row}")
    assert_close(logits, expected[1], 1e-4, f"logits of row {row}")


@pytest.mark.parametrize(
    ("kind", "name"), [*(("LMGen", name) for name in CONFIGS), ("MemoryLMGen", "embeddings"), ("MemoryLMGen", "ratio")]
)
def test_equals_whole_forward_past_the_window(kind: str, name: str) -> None:
    lm = tiny_lm(**CONFIGS[name])
    gen = KINDS[kind](lm, use_sampling=False)
    with gen.streaming(2), listening(gen) as heard:
        run(gen, user_codes(2, 3 * CONTEXT + 3))
    for row in range(2):
        assert_row_is_whole(lm, heard, row)
    memory = inlay.find_memory(lm)
    assert memory is not None
    with memory.disabled():  # or the comparison would say nothing
        assert relative_error(whole(lm, heard.row(0)[0])[0], heard.row(0)[1]) > 0.1


def test_equals_the_models_own_forward_with_its_delays() -> None:
    """Kyutai's ``LMModel.forward`` delays codes and puts initial tokens in by its own code; a stream is fed frames."""
    frames, lm = 40, make_lm()
    inlay.attach(lm, inlay.FastWeightConfig(layers=[1, 3], chunk_size=6, eta=0.1, init={"normal": 0.5}))
    fed = make_codes(1, frames)[:, 9:]
    logits: list[Tensor] = []
    gen = LMGen(lm, use_sampling=False, on_text_logits_hook=lambda x: logits.append(x.clone()))
    with gen.streaming(1):
        answers = run(gen, fed)
    own = torch.cat([answer for answer in answers if answer is not None], dim=2)
    spoken = own.shape[2]
    # The user's frame of step 0 lies before the first position: what enters there are the initial tokens.
    codes = torch.cat([own, fed[:, :, 1 : spoken + 1]], dim=1)
    with torch.no_grad():
        expected = lm(codes)
    assert_close(torch.cat(logits, dim=2)[:, :, :spoken], expected.text_logits, 1e-4)
    assert torch.equal(expected.text_logits.argmax(-1)[0], own[0, :1])
    said = expected.mask[0]
    assert torch.equal(expected.logits.argmax(-1)[0][said], own[0, 1:][said])


@both_kinds
def test_rows_start_stop_and_begin_anew_on_their_own(kind: str) -> None:
    rows, frames = 3, 80
    lm = tiny_lm()
    gen = KINDS[kind](lm, use_sampling=False, support_out_of_sync=True)
    codes = user_codes(rows, frames)
    generator = torch.Generator().manual_seed(5)
    ran = torch.rand(frames, rows, generator=generator) < torch.tensor([0.9, 0.6, 1.0])
    ran[:30, 2] = False  # comes later than the others
    anew = {41: [0], 57: [0, 2], 70: [1]}
    since: list[list[int]] = [[], [], []]
    segments: list[tuple[int, list[int]]] = []
    with gen.streaming(rows), listening(gen) as heard:
        for t in range(frames):
            if t in anew:
                mask = torch.zeros(rows, dtype=torch.bool)
                mask[anew[t]] = True
                gen.reset_streaming(mask)
                for row in anew[t]:
                    segments.append((row, since[row]))
                    since[row] = []
            run(gen, codes[:, :, t : t + 1], ran[t : t + 1])
            for row in ran[t].nonzero().flatten().tolist():
                since[row].append(t)
        assert steps_of(gen).tokens.tolist() == [len(steps) for steps in since]
        assert steps_of(gen).chunks.tolist() == [len(steps) // CHUNK for steps in since]
    for row, steps in [*segments, *enumerate(since)]:
        assert_row_is_whole(lm, heard, row, steps)


def test_a_reset_row_equals_a_fresh_one_bit_for_bit() -> None:
    lm = tiny_lm()
    codes = user_codes(2, 45)
    first = torch.tensor([True, False])

    def listen(used_before: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
        gen = LMGen(lm, use_sampling=False, support_out_of_sync=True)
        with gen.streaming(2), listening(gen) as heard:
            if used_before:
                run(gen, user_codes(2, 37, seed=9), first.expand(37, 2))
                gen.reset_streaming(first)
                gen.set_exec_mask(torch.tensor([True, True]))
            before = len(heard.outputs)
            run(gen, codes)
            return heard.outputs[before:], buffers(gen)

    (used, used_state), (fresh, fresh_state) = listen(True), listen(False)
    assert all(torch.equal(a, b) for a, b in zip(used, fresh, strict=True))
    assert all(torch.equal(used_state[name], fresh_state[name]) for name in fresh_state)


def test_a_paused_row_keeps_every_bit() -> None:
    gen = MemoryLMGen(tiny_lm(), use_sampling=False, support_out_of_sync=True)
    with gen.streaming(2):
        run(gen, user_codes(2, CHUNK + 7))
        before = buffers(gen)
        run(gen, user_codes(2, 20, seed=1), torch.tensor([False, True]).expand(20, 2))
        after = buffers(gen)
    assert all(torch.equal(before[name][0], after[name][0]) for name in before)
    assert not torch.equal(before["0.sum"][1], after["0.sum"][1])


@pytest.mark.parametrize(
    ("kind", "guidance"),
    [("LMGen", {"cfg_is_no_text": True}), ("MemoryLMGen", {"cfg_is_masked_until": [3, 20]})],
)
def test_classifier_free_guidance_doubles_the_rows(kind: str, guidance: dict[str, Any]) -> None:
    """Each of the two halves is given codes of its own, and remembers those."""
    lm = tiny_lm()
    gen = KINDS[kind](lm, use_sampling=False, cfg_coef=2.0, support_out_of_sync=True, **guidance)
    first = torch.tensor([True, False])
    with gen.streaming(2), listening(gen) as heard:
        run(gen, user_codes(2, 30), first.expand(30, 2))
        run(gen, user_codes(2, 41, seed=2), torch.ones(41, 2, dtype=torch.bool))
        assert steps_of(gen).tokens.tolist() == [71, 41, 71, 41]
        gen.reset_streaming(first)
        assert steps_of(gen).chunks.tolist() == [0, 41 // CHUNK, 0, 41 // CHUNK]
    for row in range(4):
        assert_row_is_whole(lm, heard, row, slice(None) if row % 2 == 0 else slice(30, None))
    assert not torch.equal(heard.row(0)[0], heard.row(2)[0])


def test_more_than_one_frame_at_a_time() -> None:
    """Not by LMGen; the model itself streams so. Within the window: past it Kyutai's ring of keys forgets too early."""
    frames, cuts = 75, [1, CONTEXT, 3, 2 * CHUNK, 1, 7, 4, 15, 2, 10]
    assert sum(cuts) == frames
    lm = tiny_lm(context=frames)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(CARD, (2, lm.num_codebooks, frames), generator=generator)
    with lm.streaming(2), torch.no_grad():
        outputs = [lm.forward_text(piece)[0] for piece in codes.split(cuts, dim=2)]
        assert steps_of(lm).tokens.tolist() == [frames] * 2
        assert steps_of(lm).chunks.tolist() == [frames // CHUNK] * 2
        assert steps_of(lm).phase.tolist() == [frames % CHUNK] * 2
    assert_close(torch.cat(outputs, dim=1), whole(lm, codes)[0], 1e-4)


def test_a_fresh_memory_streams_as_the_model_without_one() -> None:
    codes, heard_by = user_codes(2, 40), {}
    for name in ("none", "fresh", "disabled"):
        lm = tiny_lm(memory=name != "none", **{"init": "zero"} if name == "fresh" else {})
        memory = inlay.find_memory(lm)
        if name == "disabled":
            assert memory is not None
            with memory.disabled():
                gen = LMGen(lm, use_sampling=False)
                with gen.streaming(2), listening(gen) as heard:
                    run(gen, codes)
        else:
            gen = LMGen(lm, use_sampling=False)
            with gen.streaming(2), listening(gen) as heard:
                run(gen, codes)
        heard_by[name] = torch.cat(heard.outputs, dim=1)
    assert torch.equal(heard_by["fresh"], heard_by["none"])
    assert torch.equal(heard_by["disabled"], heard_by["none"])


def test_a_copy_of_the_streaming_state_goes_on_bit_for_bit() -> None:
    """Kyutai's get and set, of the model's part; MemoryLMGen's own count of phases follows."""
    lm = tiny_lm()
    codes = user_codes(2, 60)
    gen = MemoryLMGen(lm, use_sampling=False)
    state = gen.streaming(2)
    with state, listening(gen) as heard:
        run(gen, codes[:, :, :29])
        kept = copy.deepcopy(lm.get_streaming_state())
        tail = [[], []]
        for attempt in range(2):
            own = gen._streaming_state
            assert own is not None
            if attempt == 0:
                cache, offsets = own.cache.clone(), own.offsets.clone()
            else:
                own.cache.copy_(cache)
                own.offsets = offsets
                lm.set_streaming_state(kept)
            begun = len(heard.outputs)
            run(gen, codes[:, :, 29:])
            tail[attempt] = [*heard.outputs[begun:], *buffers(gen).values()]
    assert all(torch.equal(a, b) for a, b in zip(*tail, strict=True))


def test_copies_share_the_layers_and_no_buffer() -> None:
    lm = tiny_lm()
    with lm.streaming(2):
        steps = steps_of(lm)
        twin = copy.deepcopy(steps)
        assert twin._modules is steps._modules
        own = {t.data_ptr() for t in steps.tensors().values()}
        assert own.isdisjoint(t.data_ptr() for t in twin.tensors().values())
        assert twin.exec_mask.data_ptr() != steps.exec_mask.data_ptr()


def test_bytes_and_addresses_are_constant() -> None:
    lm = tiny_lm()
    gen = LMGen(lm, use_sampling=False, support_out_of_sync=True)
    with gen.streaming(2):
        steps = steps_of(gen)
        expected = sum(
            2 * 4 * (layer.out_features * layer.in_features + CHUNK * (layer.out_features + layer.in_features) + 2)
            for layer in inlay.find_memory(lm).layers.values()  # type: ignore[union-attr]
        )
        assert steps.nbytes == expected + 3 * 2 * 8
        addresses = [t.data_ptr() for t in steps.tensors().values()]
        run(gen, user_codes(2, 3 * CHUNK))
        gen.reset_streaming(torch.tensor([True, False]))
        run(gen, user_codes(2, CHUNK + 1))
        assert [t.data_ptr() for t in steps.tensors().values()] == addresses
        assert steps.nbytes == expected + 3 * 2 * 8


def test_half_precision_sums_in_float32() -> None:
    lm = tiny_lm(dtype=torch.bfloat16)
    gen = LMGen(lm, use_sampling=False)
    with gen.streaming(1), listening(gen) as heard:
        run(gen, user_codes(1, 60))
        tensors = steps_of(gen).tensors()
    assert {name: t.dtype for name, t in tensors.items() if name.startswith("0.")} == {
        "0.sum": torch.float32,
        "0.z": torch.bfloat16,
        "0.x": torch.bfloat16,
        "0.last": torch.float32,
    }
    given, output, _ = heard.row(0)
    assert_close(output.float(), whole(lm, given)[0].float(), 3e-2)


def test_what_each_commit_was_is_noted() -> None:
    """‖Δ‖ and clip scale of the newest chunk, against the sum's own change."""
    lm = tiny_lm(max_update_norm=3.0)
    gen = LMGen(lm, use_sampling=False)
    with gen.streaming(1):
        run(gen, user_codes(1, 2 * CHUNK))
        before = buffers(gen)
        run(gen, user_codes(1, CHUNK, seed=4))
        after = buffers(gen)
    delta = (after["1.sum"] - before["1.sum"]).norm()
    norm, scale = after["1.last"][0].tolist()
    assert norm == pytest.approx(float(delta), rel=1e-4)
    assert norm == pytest.approx(3.0, rel=1e-4)
    assert 0 < scale < 1


def test_rows_can_be_loaded_in_place() -> None:
    lm = tiny_lm()
    codes = user_codes(1, 40)
    gen = MemoryLMGen(lm, use_sampling=False)
    with gen.streaming(1):
        run(gen, codes)
        kept = buffers(gen)
        address = steps_of(gen).layers[0].sum.data_ptr()
        run(gen, codes)
        steps_of(gen).load(kept)
        assert steps_of(gen).layers[0].sum.data_ptr() == address
        assert all(torch.equal(t, kept[name]) for name, t in buffers(gen).items())
        with pytest.raises(StateError, match=r"0\.sum is None"):
            steps_of(gen).load({name: t for name, t in kept.items() if name != "0.sum"})
        run(gen, codes[:, :, : CHUNK + 1])  # counts from where the loaded rows stand
        assert steps_of(gen).chunks.tolist() == [(40 + CHUNK + 1) // CHUNK]


@both_kinds
@pytest.mark.parametrize("after", [CHUNK - 1, CHUNK])
def test_an_error_in_the_step_that_fills_a_chunk_leaves_the_memory_whole(kind: str, after: int) -> None:
    """Hooks come after the frame was read: the step before the last of a chunk, and the last."""
    lm, failing = tiny_lm(), False

    def hook(token: Tensor) -> None:
        if failing:
            raise KeyboardInterrupt

    gen = KINDS[kind](lm, use_sampling=False, on_text_hook=hook)
    codes = user_codes(2, 3 * CHUNK + 3)
    with gen.streaming(2), listening(gen) as heard:
        run(gen, codes[:, :, : after - 1])
        failing = True
        with pytest.raises(KeyboardInterrupt):
            run(gen, codes[:, :, after - 1 : after])
        failing = False
        assert int(steps_of(gen).phase.max()) < CHUNK
        run(gen, codes[:, :, after:])
        assert steps_of(gen).chunks.tolist() == [3, 3]
    assert_row_is_whole(lm, heard, 1)


def test_a_copy_of_a_state_commits_in_the_steps_of_another() -> None:
    lm, codes, ends = tiny_lm(), user_codes(1, 3 * CHUNK), []
    for kind in KINDS.values():
        gen, plain = kind(lm, use_sampling=False), LMGen(lm, use_sampling=False)
        with gen.streaming(1):
            run(gen, codes[:, :, :5])
            state = copy.deepcopy(lm.get_streaming_state())
        with plain.streaming(1):
            lm.set_streaming_state(state)
            run(plain, codes[:, :, 5:])
            assert steps_of(lm).chunks.tolist() == [3]
            ends.append(buffers(plain))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


class TestRefusals:
    def test_attach_within_a_stream(self) -> None:
        lm = tiny_lm(memory=False)
        before = dict(lm.named_modules())
        gen = LMGen(lm)
        with gen.streaming(1), pytest.raises(inlay.AttachError, match=r"is streaming.*Leave the 'with"):
            inlay.attach(lm, inlay.FastWeightConfig(layers="all"))
        assert dict(lm.named_modules()) == before

    def test_attach_after_a_stream_takes_part_in_the_next(self) -> None:
        """Kyutai's modules note their streaming children once."""
        lm = tiny_lm(memory=False)
        gen = LMGen(lm, use_sampling=False)
        with gen.streaming(1):
            run(gen, user_codes(1, 3))
        memory = inlay.attach(lm, inlay.FastWeightConfig(layers="all", chunk_size=4))
        with gen.streaming(1):
            run(gen, user_codes(1, 9))
            assert steps_of(gen).chunks.tolist() == [2]
        memory.detach()
        assert not any(isinstance(module, MemoryStream) for module in lm.modules())
        with gen.streaming(1):
            run(gen, user_codes(1, 3))

    @pytest.mark.parametrize("name", ["detach", "disabled", "using"])
    def test_changes_within_a_stream(self, name: str) -> None:
        lm = tiny_lm()
        memory = inlay.find_memory(lm)
        assert memory is not None

        def change() -> None:
            if name == "detach":
                memory.detach()
            else:
                with getattr(memory, name)():
                    pass

        gen = LMGen(lm)
        with gen.streaming(1):
            with pytest.raises(StateError, match=rf"memory\.{name}\(\) within an open stream"):
                change()
            run(gen, user_codes(1, 2))
        change()

    def test_a_stream_that_outlives_what_it_began_in(self) -> None:
        lm = tiny_lm()
        memory = inlay.find_memory(lm)
        assert memory is not None
        gen = LMGen(lm)
        with memory.disabled():
            stream = gen.streaming(1)
        with stream, pytest.raises(StateError, match="switched on within a stream"):
            run(gen, user_codes(1, 1))
        with memory.using(eta=0.5):
            stream = gen.streaming(1)
        with stream, pytest.raises(StateError, match="settings changed within a stream"):
            run(gen, user_codes(1, 1))

    def test_other_rows_than_the_stream(self) -> None:
        lm = tiny_lm()
        codes = torch.zeros(3, lm.num_codebooks, 1, dtype=torch.long)
        with lm.streaming(2), pytest.raises(StateError, match=r"begun for 2 rows, this call has 3.*streaming\(3\)"):
            lm.forward_text(codes)

    def test_a_state_from_before_the_memory(self) -> None:
        lm = tiny_lm(memory=False)
        with lm.streaming(1):
            state = lm.get_streaming_state()
        inlay.attach(lm, inlay.FastWeightConfig(layers="all"))
        lm.transformer._streaming_state = state["transformer"]
        codes = torch.zeros(1, lm.num_codebooks, 1, dtype=torch.long)
        with pytest.raises(StateError, match="the memory's part of its streaming state is missing"):
            lm.forward_text(codes)

    def test_no_stream_no_state(self) -> None:
        lm = tiny_lm()
        with pytest.raises(StateError, match="no stream is open"):
            steps_of(lm)
        with pytest.raises(StateError, match="no memory"):
            steps_of(tiny_lm(memory=False))
