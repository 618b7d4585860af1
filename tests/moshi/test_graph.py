"""Under CUDA graphs the memory really updates: counted in replays that enter no Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moshi.models import LMGen

import inlay
from inlay.moshi.lm_gen import MemoryLMGen
from inlay.moshi.streaming import steps_of
from tests.closeness import assert_close
from tests.moshi.graphs import CaptureError, Graphed, Recording, graphs
from tests.moshi.streams import CARD, CHUNK, CONFIGS, KINDS, listening, tiny_lm, user_codes, whole

__all__ = ["graphs"]


def test_a_buffer_kept_in_python_stands_still() -> None:
    """The Moshi port's fault, which the stand-in must show: 300 steps, and the list grew in two of them."""
    buffer: list[torch.Tensor] = []
    total = torch.zeros(())

    def step(x: torch.Tensor) -> torch.Tensor:
        buffer.append(x)
        total.add_(x)
        return total + 1

    graphed = Graphed(step)
    for i in range(300):
        out = graphed(torch.tensor(float(i)))
    assert len(buffer) == 2
    assert float(out) == 1 + sum(range(300))


def test_questions_to_the_device_are_refused() -> None:
    for question in (
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x + torch.tensor([1.0]),
    ):
        with pytest.raises(CaptureError), Recording():
            question(torch.ones(3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["hidden", "ratio"])
def test_commits_are_floor_of_frames_over_chunk(graphs: None, kind: str, name: str) -> None:
    frames, rows = 101, 2
    lm = tiny_lm(**CONFIGS[name])
    memory = inlay.find_memory(lm)
    assert memory is not None
    gen = KINDS[kind](lm, use_sampling=False)
    codes = user_codes(rows, frames)
    with gen.streaming(rows), listening(gen) as heard:
        for t in range(frames):
            gen.step(codes[:, :, t : t + 1])
        steps = steps_of(gen)
        assert heard.runs == 2  # warm-up and capture
        assert steps.tokens.tolist() == [frames] * rows
        assert steps.chunks.tolist() == [frames // memory.config.chunk_size] * rows
        assert steps.phase.tolist() == [frames % memory.config.chunk_size] * rows
    for row in range(rows):
        given, output, logits = heard.row(row)
        expected = whole(lm, given)
        assert_close(output, expected[0], 1e-4, f"row {row}")
        assert_close(logits, expected[1], 1e-4, f"row {row}")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_start_and_stop_by_graphs_of_their_own(graphs: None, kind: str) -> None:
    """Masks are set by a graph too, from the second time on."""
    frames, rows = 60, 3
    lm = tiny_lm()
    gen = KINDS[kind](lm, use_sampling=False, support_out_of_sync=True)
    codes = user_codes(rows, frames)
    ran = torch.rand(frames, rows, generator=torch.Generator().manual_seed(1)) < 0.6
    with gen.streaming(rows), listening(gen) as heard:
        for t in range(frames):
            gen.set_exec_mask(ran[t])
            gen.step(codes[:, :, t : t + 1])
        steps = steps_of(gen)
        assert heard.runs == 2
        assert steps.tokens.tolist() == ran.sum(0).tolist()
        assert steps.chunks.tolist() == [int(n) // CHUNK for n in ran.sum(0)]
    for row in range(rows):
        given, output, _ = heard.row(row, ran[:, row].nonzero().flatten().tolist())
        assert_close(output, whole(lm, given)[0], 1e-4, f"row {row}")


def test_frames_that_the_model_reads_between_the_steps_are_counted(graphs: None) -> None:
    """``forward_text`` within the stream of an ``LMGen``, two of whose steps were a warm-up and a capture."""
    lm, codes, ends = tiny_lm(), user_codes(2, 40), []
    between = torch.randint(CARD, (2, lm.num_codebooks, 7), generator=torch.Generator().manual_seed(1))
    for kind in KINDS.values():
        gen = kind(lm, use_sampling=False)
        with gen.streaming(2), torch.no_grad():
            for t in range(40):
                gen.step(codes[:, :, t : t + 1])
                if t in (1, 20):
                    lm.forward_text(between)
                    assert int(steps_of(gen).phase.max()) < CHUNK
            assert steps_of(gen).tokens.tolist() == [54] * 2
            assert steps_of(gen).chunks.tolist() == [54 // CHUNK] * 2
            ends.append({name: tensor.clone() for name, tensor in steps_of(gen).tensors().items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_replays_give_what_eager_steps_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[list[Any], list[torch.Tensor]]:
        lm = tiny_lm()
        torch.manual_seed(3)
        gen = LMGen(lm)  # with sampling, from the same numbers
        with gen.streaming(2), listening(gen) as heard:
            outputs = [gen.step(codes[:, :, t : t + 1]) for t in range(40)]
            outputs = [None if out is None else out.clone() for out in outputs]
            return outputs, [*heard.outputs, *(t.clone() for t in steps_of(gen).tensors().values())]

    codes = user_codes(2, 40)
    eager = run()
    monkeypatch.setattr("moshi.models.lm.CUDAGraphed", Graphed)
    replayed = run()
    for ours, theirs in zip(replayed[0], eager[0], strict=True):
        assert ours is theirs if theirs is None else torch.equal(ours, theirs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(replayed[1], eager[1], strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("gen_class", [LMGen, MemoryLMGen])
def test_on_a_gpu_by_real_graphs(gen_class: type[LMGen]) -> None:
    frames = 200
    lm = tiny_lm().cuda()
    codes = user_codes(2, frames).cuda()
    gen = gen_class(lm, use_sampling=False)
    with gen.streaming(2), listening(gen) as heard:
        for t in range(frames):
            gen.step(codes[:, :, t : t + 1])
        steps = steps_of(gen)
        assert heard.runs == 2
        assert steps.chunks.tolist() == [frames // CHUNK] * 2
    given, output, _ = heard.row(1)
    assert_close(output, whole(lm, given)[0], 1e-3)
