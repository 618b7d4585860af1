"""A recording in, an answer out; a conversation that outlives the process; what the report says of it."""

from __future__ import annotations

import json
import re
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sphn
import torch
from moshi.conditioners import ConditionAttributes
from moshi.models import LMGen, loaders
from typer.testing import CliRunner

import inlay
from inlay import cli
from inlay.data import DataError
from inlay.fastweight.streaming import StateError
from inlay.moshi.commits import CommitLog
from inlay.moshi.duplex import Duplex, DuplexError, Moshi, Voice, _Pieces, load_moshi
from inlay.moshi.lm_gen import MemoryLMGen
from inlay.moshi.run import run_file
from inlay.moshi.run_report import run_sections, write_run
from inlay.moshi.session import load_session, save_session
from inlay.moshi.streaming import steps_of
from inlay.moshi.toy import ToySizes, write_toy_checkpoint
from tests.moshi.streams import CHUNK, KINDS, listening, tiny_lm, user_codes

RATE, FRAME = 24000, 1920
SIZES = ToySizes(
    dim=32,
    num_layers=2,
    num_heads=2,
    context=8,
    card=16,
    depformer_dim=16,
    depformer_layers=1,
    mimi_dim=8,
    mimi_filters=2,
)
SETTINGS: dict[str, Any] = {"layers": "all", "chunk_size": 4, "eta": 0.02, "init": {"normal": 0.3}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_checkpoint(tmp_path_factory.mktemp("moshi"), sizes=SIZES)


@pytest.fixture(scope="module")
def moshi(checkpoint: Path) -> Moshi:
    moshi = load_moshi(checkpoint)
    torch.manual_seed(0)
    inlay.attach(moshi.lm, inlay.FastWeightConfig(**SETTINGS))
    return moshi


def sound(frames: float, channels: int = 1, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (0.1 * generator.standard_normal((channels, round(frames * FRAME)))).astype(np.float32)


def recording(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    sphn.write_wav(str(path), samples, rate)
    return path


def heard_back(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getsampwidth()) == (RATE, 2)
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return samples.reshape(-1, file.getnchannels()).T


class TestFile:
    def test_two_calls_with_a_session_equal_one(self, moshi: Moshi, tmp_path: Path) -> None:
        """Samples of the answer, drawn at random, bit for bit; the memory and the commits go on."""
        voice = sound(17)
        whole = recording(tmp_path / "whole.wav", voice)
        parts = [
            recording(tmp_path / "a.wav", voice[:, : 7 * FRAME]),
            recording(tmp_path / "b.wav", voice[:, 7 * FRAME :]),
        ]
        session = tmp_path / "session.safetensors"
        at_once = run_file(moshi, whole, tmp_path / "whole-out.wav", voice=Voice(seed=3))
        runs = []
        for part in parts:
            runs.append(run_file(moshi, part, tmp_path / f"out-{part.name}", voice=Voice(seed=3), session=session))
            torch.manual_seed(99)  # whatever happens in between
        answer = np.concatenate([heard_back(tmp_path / f"out-{part.name}") for part in parts], axis=1)
        assert np.array_equal(answer, heard_back(tmp_path / "whole-out.wav"))
        assert np.abs(answer).max() > 0
        assert [run.frames_before for run in runs] == [0, 7]
        assert runs[0].frames + runs[1].frames == at_once.frames == 17
        ours = [(c.block, c.chunk, c.tokens, c.pre_norm, c.post_norm) for run in runs for c in run.commits]
        assert ours == [(c.block, c.chunk, c.tokens, c.pre_norm, c.post_norm) for c in at_once.commits]
        assert at_once.chunks == (17 + 1) // 4  # the first frame is stepped twice

    def test_a_call_too_short_for_a_chunk_tells_how_large_the_sessions_memory_is(
        self, moshi: Moshi, tmp_path: Path
    ) -> None:
        session = tmp_path / "session"
        before = run_file(moshi, recording(tmp_path / "a.wav", sound(9)), None, session=session)
        assert before.sum_before == 0
        size = max(commit.relative_sum for commit in before.commits if commit.chunk == before.chunks)
        after = run_file(moshi, recording(tmp_path / "b.wav", sound(1)), None, session=session)
        assert after.commits == []
        assert after.largest_sum == after.sum_before == pytest.approx(size, rel=1e-6)
        assert f"{100 * size:.2g} %" in write_run(after, tmp_path / "report").read_text()
        assert run_file(moshi, recording(tmp_path / "c.wav", sound(1)), None).largest_sum == 0

    def test_stereo_is_heard_on_the_right_and_kept_there(self, moshi: Moshi, tmp_path: Path) -> None:
        user, other = sound(5), sound(5, seed=1)
        stereo = recording(tmp_path / "stereo.wav", np.concatenate([other, user]))
        mono = recording(tmp_path / "mono.wav", user)
        run_file(moshi, stereo, tmp_path / "a.wav", voice=Voice(seed=0), stereo=True)
        run_file(moshi, mono, tmp_path / "b.wav", voice=Voice(seed=0))
        both, alone = heard_back(tmp_path / "a.wav"), heard_back(tmp_path / "b.wav")
        assert np.array_equal(both[0], alone[0])
        assert np.abs(both[1] / 32767 - user[0]).max() < 1e-4

    def test_any_rate_and_any_length(self, moshi: Moshi, tmp_path: Path) -> None:
        """The last frame is filled up; what comes out covers what went in."""
        slow = recording(tmp_path / "16k.wav", sound(2.4)[:, : round(2.4 * FRAME * 16 / 24)], 16000)
        run = run_file(moshi, slow, tmp_path / "out.wav")
        assert run.frames == 3
        assert heard_back(tmp_path / "out.wav").shape == (1, 3 * FRAME)
        assert run_file(moshi, recording(tmp_path / "short.wav", sound(0.1)), None).frames == 1

    def test_without_a_memory(self, moshi: Moshi, tmp_path: Path) -> None:
        memory = inlay.find_memory(moshi.lm)
        assert memory is not None
        with memory.disabled():
            run = run_file(moshi, recording(tmp_path / "in.wav", sound(5)), None)
        assert run.commits == []
        assert run.chunk_size is None
        assert [section.title for section in run_sections(run)] == ["Pace", "Transcript"]

    def test_what_cannot_be_heard(self, moshi: Moshi, tmp_path: Path) -> None:
        out = tmp_path / "out.wav"
        with pytest.raises(DataError, match="missing"):
            run_file(moshi, tmp_path / "nowhere.wav", out)
        (tmp_path / "text.wav").write_text("not a sound")
        with pytest.raises(DataError, match=r"text\.wav cannot be read"):
            run_file(moshi, tmp_path / "text.wav", out)
        with wave.open(str(tmp_path / "three.wav"), "wb") as file:
            file.setparams((3, 2, RATE, 0, "NONE", ""))
            file.writeframes(bytes(3 * 2 * FRAME))
        with pytest.raises(DuplexError, match=r"three\.wav has 3 channels; give mono, or stereo with the user"):
            run_file(moshi, tmp_path / "three.wav", out)
        with pytest.raises(DuplexError, match="holds no samples"):
            run_file(moshi, recording(tmp_path / "empty.wav", sound(0)), out)
        heard = recording(tmp_path / "in.wav", sound(1))
        before = heard.read_bytes()
        with pytest.raises(DuplexError, match=r"the answer would be written over .*in\.wav, which is heard"):
            run_file(moshi, heard, tmp_path / "." / "in.wav")
        with pytest.raises(DuplexError, match=r"the answer cannot be written to .*: (Not a directory|File exists)"):
            run_file(moshi, heard, heard / "out.wav")
        with pytest.raises(DuplexError, match=r"the session cannot be written to .*: (Not a directory|File exists)"):
            run_file(moshi, heard, out, session=heard / "session")
        assert heard.read_bytes() == before
        damaged = tmp_path / "session"
        damaged.write_bytes(b"x" * 100)
        with pytest.raises(inlay.CheckpointError, match="damaged or cut off"):
            run_file(moshi, heard, out, session=damaged)
        assert not moshi.lm.is_streaming
        assert not moshi.mimi.is_streaming
        left = {"text.wav", "three.wav", "empty.wav", "session", "in.wav"}
        assert {path.name for path in tmp_path.iterdir()} == left

    def test_a_model_without_a_voice_is_refused(self, moshi: Moshi) -> None:
        listener = tiny_lm(memory=False)
        listener.dep_q = 0
        with pytest.raises(DuplexError, match="ears only listens"):
            Moshi(listener, moshi.mimi, moshi.text_tokenizer, "ears")

    def test_a_tokenizer_that_does_not_know_all_text_tokens_is_refused(
        self, moshi: Moshi, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(moshi.lm, "text_card", 32_000)
        known = moshi.text_tokenizer.get_piece_size()
        with pytest.raises(DuplexError, match=f"speaks 32,000 text tokens, its tokenizer knows {known:,}"):
            Moshi(moshi.lm, moshi.mimi, moshi.text_tokenizer)

    def test_weights_are_not_widened(self, checkpoint: Path) -> None:
        """Kyutai's 7B are 15 GB in bfloat16: in float32 they do not fit where these do."""
        assert {p.dtype for p in load_moshi(checkpoint).lm.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (np.zeros(FRAME, np.int16), r"not \[1920\] int16; divide by 32,768 as float32"),
        (np.zeros(FRAME), r"not \[1920\] float64; use \.astype"),
        (np.zeros(1000, np.float32), r"a frame is \[1920\] float32 samples in -1…1, not \[1000\] float32$"),
        (np.zeros((1, FRAME), np.float32), r"not \[1, 1920\] float32$"),
    ],
)
def test_what_is_no_frame_is_not_heard(frame: Any, message: str, moshi: Moshi) -> None:
    with Duplex(moshi) as duplex:
        with pytest.raises(DuplexError, match=message):
            duplex.hear(frame)
        assert duplex.frames == 0


class TestSession:
    @pytest.mark.parametrize("kind", KINDS)
    def test_rows_go_on_bit_for_bit_in_another_stream(self, kind: str, tmp_path: Path) -> None:
        """Two rows at phases of their own, one paused; into a model built anew, by graphs of their own."""
        path, codes = tmp_path / "rows.safetensors", user_codes(2, 2 * CHUNK + 20)
        tails = []
        gen = KINDS[kind](tiny_lm(), support_out_of_sync=True)
        with gen.streaming(2), listening(gen) as heard:
            gen.set_exec_mask(torch.tensor([True, False]))
            for t in range(5):
                gen.step(codes[:, :, t : t + 1])
            gen.set_exec_mask(torch.tensor([True, True]))
            for t in range(5, 2 * CHUNK):
                gen.step(codes[:, :, t : t + 1])
            gen.set_exec_mask(torch.tensor([False, True]))
            save_session(path, gen)
            begun = len(heard.outputs)
            tails.append([gen.step(codes[:, :, t : t + 1]) for t in range(2 * CHUNK, codes.shape[2])])
            tails[0] += [*heard.outputs[begun:], *steps_of(gen).tensors().values()]
        other = KINDS[kind](tiny_lm(), support_out_of_sync=True)
        torch.manual_seed(1234)
        with other.streaming(2), listening(other) as heard:
            for t in range(3):
                other.step(codes[:, :, t : t + 1])  # has read something else
            address = steps_of(other).layers[0].sum.data_ptr()
            load_session(path, other)
            assert steps_of(other).layers[0].sum.data_ptr() == address
            begun = len(heard.outputs)
            tails.append([other.step(codes[:, :, t : t + 1]) for t in range(2 * CHUNK, codes.shape[2])])
            tails[1] += [*heard.outputs[begun:], *steps_of(other).tensors().values()]
        assert all(torch.equal(a, b) for a, b in zip(*tails, strict=True))

    def test_the_random_numbers_of_another_kind_of_device_are_left_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, codes, first = tmp_path / "s.safetensors", user_codes(1, 2), MemoryLMGen(tiny_lm(), use_sampling=False)
        with first.streaming(1), monkeypatch.context() as patch:
            patch.setattr("inlay.moshi.session._random_state", lambda device: torch.zeros(16, dtype=torch.uint8))
            first.step(codes[:, :, :1])
            save_session(path, first)
            expected = [first.step(codes[:, :, 1:]), *(t.clone() for t in steps_of(first).tensors().values())]
        other = MemoryLMGen(tiny_lm(), use_sampling=False)
        with other.streaming(1):
            before = torch.get_rng_state()
            load_session(path, other)
            assert torch.equal(torch.get_rng_state(), before)
            ours = [other.step(codes[:, :, 1:]), *steps_of(other).tensors().values()]
        assert all(a is b or torch.equal(a, b) for a, b in zip(ours, expected, strict=True))

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_file_with_a_full_chunk_is_gone_on_with(
        self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, codes, first = tmp_path / "s.safetensors", user_codes(1, CHUNK + 1), LMGen(tiny_lm(), use_sampling=False)
        with first.streaming(1), monkeypatch.context() as patch:
            patch.setattr("inlay.fastweight.stepping.StepState.commit", lambda self: None)
            for t in range(CHUNK):
                first.step(codes[:, :, t : t + 1])
            assert steps_of(first).phase.tolist() == [CHUNK]
            save_session(path, first)
        other = KINDS[kind](tiny_lm(), use_sampling=False)
        with other.streaming(1):
            load_session(path, other)
            other.step(codes[:, :, CHUNK:])
            assert (steps_of(other).chunks.tolist(), steps_of(other).phase.tolist()) == ([1], [1])

    def test_it_is_refused_where_it_does_not_belong(self, tmp_path: Path) -> None:
        path = tmp_path / "session.safetensors"

        def gen(**changes: Any) -> LMGen:
            return MemoryLMGen(tiny_lm(**changes))

        first = gen()
        with first.streaming(1):
            first.step(user_codes(1, 1))
            save_session(path, first)

        def refused(other: LMGen, rows: int, match: str) -> None:
            with other.streaming(rows):
                other.step(user_codes(rows, 1))
                before = {name: t.clone() for name, t in other.lm_model.transformer.state_dict().items()}
                offset = other._streaming_state.offsets.clone()  # type: ignore[union-attr]
                with pytest.raises(inlay.CheckpointError, match=match):
                    load_session(path, other)
                assert torch.equal(other._streaming_state.offsets, offset)  # type: ignore[union-attr]
                assert all(torch.equal(before[n], t) for n, t in other.lm_model.transformer.state_dict().items())

        refused(gen(), 2, r"is of 1 rows, this stream of 2: enter lm_gen\.streaming\(1\)")
        refused(gen(chunk_size=4), 1, "of another model: memory is .*'chunk_size': 8")
        refused(gen(context=12), 1, "of another model: window is 16 there and 12 here")
        refused(gen(memory=False), 1, "of another model: memory is .* there and None here")
        refused(gen(dtype=torch.bfloat16), 1, "of another model: dtype is 'torch.float32' there")
        trained = gen()
        with torch.no_grad():
            next(iter(inlay.find_memory(trained.lm_model).parameters())).add_(0.01)  # type: ignore[union-attr]
        refused(trained, 1, "of other weights: the model or its memory has been trained since")
        with pytest.raises(StateError, match=r"lm_gen has no stream open: enter 'with lm_gen\.streaming"):
            load_session(path, gen())
        content = bytearray(path.read_bytes())
        content[-20] ^= 1
        path.write_bytes(bytes(content))
        refused(gen(), 1, "damaged")

    @pytest.mark.parametrize("way", ["sum", "cross"])
    def test_a_session_belongs_to_its_conditions(self, way: str, tmp_path: Path) -> None:
        lut = {"type": "lut", "lut": {"n_bins": 3, "dim": 8, "tokenizer": "noop", "possible_values": ["a", "b"]}}
        fuser = {"cross_attention_pos_emb": False, "sum": [], "cross": []} | {way: ["mood"]}
        sizes = {"cross_attention": way == "cross", "dim": 16, "card": 16, "text_card": 24, "num_heads": 2}
        sizes |= {"num_layers": 2, "context": 12, "depformer_dim": 8, "depformer_num_heads": 2}
        sizes |= {"depformer_num_layers": 1, "depformer_dim_feedforward": 24}
        kwargs: dict[str, Any] = loaders._lm_kwargs | sizes | {"conditioners": {"mood": lut}, "fuser": fuser}
        torch.manual_seed(0)
        lm = loaders.get_moshi_lm(None, kwargs, dtype=torch.float32)

        def gen(mood: str) -> LMGen:
            conditions = lm.condition_provider.prepare_and_provide(
                [ConditionAttributes(text={"mood": mood}, tensor={})]
            )
            return MemoryLMGen(lm, use_sampling=False, condition_tensors=conditions)

        path, codes = tmp_path / "s.safetensors", torch.zeros(1, 8, 1, dtype=torch.long)
        for mood in "aab":
            other = gen(mood)
            with other.streaming(1):
                if not path.exists():
                    other.step(codes)
                    save_session(path, other)
                elif mood == "a":
                    load_session(path, other)
                    other.step(codes)
                else:
                    with pytest.raises(inlay.CheckpointError, match=f"begun with another condition for {way}"):
                        load_session(path, other)

    def test_its_size_is_constant(self, tmp_path: Path) -> None:
        gen = MemoryLMGen(tiny_lm())
        sizes = []
        with gen.streaming(1):
            for _ in range(3):
                for t in range(11):
                    gen.step(user_codes(1, 11)[:, :, t : t + 1])
                save_session(tmp_path / "s", gen)
                sizes.append((tmp_path / "s").stat().st_size)
        assert max(sizes) - min(sizes) < 64  # digits of the counts in its header


class TestReport:
    def test_the_log_tells_what_the_buffers_hold(self) -> None:
        lm = tiny_lm(max_update_norm=4.0)
        memory = inlay.find_memory(lm)
        assert memory is not None
        gen = LMGen(lm, support_out_of_sync=True)
        codes = user_codes(2, 3 * CHUNK)
        with gen.streaming(2):
            log, sums = CommitLog(lm), {0: [0.0], 1: [0.0]}
            for t in range(3 * CHUNK):
                gen.set_exec_mask(torch.tensor([True, t >= 3]))
                if t == 2 * CHUNK + 1:
                    gen.reset_streaming(torch.tensor([True, False]))
                gen.step(codes[:, :, t : t + 1])
                for commit in log.observe(float(t)):
                    before = sums[commit.block][-1] if commit.row == 1 else None
                    norm = float(steps_of(gen).layers[commit.block].sum[commit.row].norm())
                    assert commit.post_norm == pytest.approx(norm, rel=1e-5)
                    if commit.row == 1:
                        assert commit.pre_norm == pytest.approx(before, rel=1e-5)
                        assert commit.tokens == t - 2
                        sums[commit.block].append(norm)
                    weight = float(memory.layers[commit.block].weight.detach().norm())
                    assert commit.relative_sum == pytest.approx(0.1 * norm / weight, rel=1e-5)
                    assert commit.relative_delta == pytest.approx(0.1 * commit.delta_norm / weight, rel=1e-5)
                    assert commit.milliseconds == t
                    assert commit.clipped
                    assert commit.delta_norm == pytest.approx(4.0, rel=1e-4)
            seen = [(c.row, c.block, c.chunk) for c in log.commits]
        per_row = {0: [1, 2], 1: [1, 2]}  # the first row was emptied before its third
        assert seen == sorted(seen, key=lambda s: (s[2], s[0], s[1]))
        assert all([c for r, b, c in seen if (r, b) == (row, 0)] == per_row[row] for row in per_row)

    def test_files(self, moshi: Moshi, tmp_path: Path) -> None:
        run = run_file(moshi, recording(tmp_path / "in.wav", sound(13)), None, voice=Voice(seed=0))
        page = write_run(run, tmp_path / "report").read_text()
        lines = [json.loads(line) for line in (tmp_path / "report" / "commits.jsonl").read_text().splitlines()]
        assert [(line["block"], line["chunk"], line["tokens"]) for line in lines] == [
            (block, chunk, 4 * chunk) for chunk in (1, 2, 3) for block in (0, 1)
        ]
        wanted = {"delta_norm", "pre_norm", "post_norm", "relative_delta", "relative_sum", "clipped", "milliseconds"}
        assert wanted <= lines[0].keys()
        figures = json.loads((tmp_path / "report" / "run.json").read_text())
        assert figures["chunks"] == 3
        assert figures["real_time_factor"] == pytest.approx(sum(run.milliseconds) / 1000 / (13 * 0.08))
        for title in ("Commits", "The memory beside the weight", "norm", "No update was clipped", "Time per frame"):
            assert title in page
        assert not re.search(r"""(src|href)=["']https?://""", page)

    def test_clipping_is_plotted_over_time(self, moshi: Moshi, tmp_path: Path) -> None:
        memory = inlay.find_memory(moshi.lm)
        assert memory is not None
        source = recording(tmp_path / "in.wav", sound(13))
        free = run_file(moshi, source, None, voice=Voice(seed=0))
        smallest = min(commit.delta_norm for commit in free.commits)
        with memory.using(max_update_norm=smallest / 2):
            run = run_file(moshi, source, None, voice=Voice(seed=0))
        assert all(commit.clipped for commit in run.commits)
        assert all(commit.delta_norm == pytest.approx(smallest / 2, rel=0.02) for commit in run.commits)
        page = write_run(run, tmp_path / "report").read_text()
        assert "Clipping: % against seconds of audio. layers clipped runs from 100 to 100;" in page
        assert "No update was clipped" not in page

    def test_a_recording_shorter_than_a_chunk(self, moshi: Moshi, tmp_path: Path) -> None:
        run = run_file(moshi, recording(tmp_path / "in.wav", sound(2)), None)
        assert "the memory was not written" in write_run(run, tmp_path / "report").read_text()


def test_letters_that_come_in_bytes(moshi: Moshi) -> None:
    tokenizer = moshi.text_tokenizer
    pieces = _Pieces(tokenizer, {3, 0})

    def spelled(text: str) -> list[int]:
        return [tokenizer.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]

    assert [pieces.add(token) for token in [3, *spelled("é"), 0, *spelled("€")]] == ["", "", "é", "", "", "", "€"]
    word = next(i for i in range(tokenizer.get_piece_size()) if tokenizer.id_to_piece(i).startswith("▁"))
    text = tokenizer.id_to_piece(word).replace("▁", " ")
    assert pieces.add(spelled("é")[0]) == ""
    assert pieces.add(word) == "\N{REPLACEMENT CHARACTER}" + text
    assert pieces.add(tokenizer.eos_id()) == ""


def test_command(checkpoint: Path, moshi: Moshi, tmp_path: Path) -> None:
    memory = inlay.find_memory(moshi.lm)
    assert memory is not None
    memory.save_pretrained(tmp_path / "memory")
    source = recording(tmp_path / "in.wav", sound(6))
    arguments = ["moshi", "run", str(source), str(tmp_path / "out.wav"), "--checkpoint", str(checkpoint)]
    options = [
        "--finetuned",
        str(tmp_path / "memory"),
        "--session",
        str(tmp_path / "s"),
        "--report",
        str(tmp_path / "r"),
    ]
    with pytest.raises(DuplexError, match=r"the answer is written as WAV; call it .*out\.wav"):
        CliRunner().invoke(cli.app, [*arguments[:3], str(tmp_path / "out.mp3"), *arguments[4:]], catch_exceptions=False)
    result = CliRunner().invoke(cli.app, [*arguments, *options, "--seed", "0"])
    assert result.exit_code == 0, result.output
    assert "heard 0.5 s at" in result.output
    assert "1 chunks of 4 frames" in result.output
    assert heard_back(tmp_path / "out.wav").shape == (1, 6 * FRAME)
    assert (tmp_path / "r" / "report.html").is_file()
    assert (tmp_path / "s").is_file()
    plain = CliRunner().invoke(cli.app, [*arguments, *options[:2], "--no-memory"])
    assert "memory:" not in plain.output
    refused = CliRunner().invoke(cli.app, [*arguments, *options[:4], "--no-memory"])
    assert isinstance(refused.exception, inlay.CheckpointError)
