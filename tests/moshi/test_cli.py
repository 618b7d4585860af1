"""`inlay moshi`: what the commands print, and with which exit code they end."""

from __future__ import annotations

import re
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from inlay.cli import app, main
from inlay.data.audio_check import check_audio
from inlay.moshi import weights
from inlay.moshi.codes_store import CodesStore
from inlay.moshi.toy import ToySizes, write_toy_checkpoint
from inlay.moshi.weights import MoshiCheckpoint, load_checkpoint
from tests.moshi.conversations import noise, write_conversation, write_manifest

SIZES = ToySizes(dim=16, num_layers=1, num_heads=2, context=8, card=32, depformer_dim=16, depformer_layers=1)


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["moshi", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_check_prints_the_figures_and_every_problem(tmp_path: Path) -> None:
    good = write_conversation(tmp_path, "good")
    mono = write_conversation(tmp_path, "mono", samples=noise(2, channels=1))
    sound, problems = write_manifest(tmp_path, [good], "a.jsonl"), write_manifest(tmp_path, [mono], "b.jsonl")
    code, output = call("check", sound)
    assert code == 0
    assert "words of the main speaker │ 2" in output
    code, output = call("check", f"{sound}:2,{problems}:1")
    assert code == 1
    assert f"{problems}:1" in output.replace("\n", "")
    assert re.search(r"\bis\W+mono\b", output)  # a long path before it may break the line in between


def test_the_table_of_problems_shows_them_as_they_are(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "lists no conversation" in shown(empty)
    assert call("check", empty)[0] == 1
    good = write_conversation(tmp_path, "good")
    (tmp_path / good["path"]).with_suffix(".json").write_text('{"alignments": [["x", 1, 2, "SPEAKER_MAIN"]]}')
    assert "not [word, [start, end], speaker]" in shown(write_manifest(tmp_path, [good], "a.jsonl"))


def shown(data: Path) -> str:
    """What ``check`` prints, on a screen on which no line breaks."""
    screen = StringIO()
    for table in check_audio(str(data)).tables():
        Console(file=screen, width=1000, emoji=False).print(table)
    return screen.getvalue()


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_synthesise_check_encode_one_after_the_other(tmp_path: Path) -> None:
    toy = write_toy_checkpoint(tmp_path / "toy", sizes=SIZES)
    options = ["--conversations", 2, "--duration", 8, "--return-after", 3]
    code, output = call("synthesise", tmp_path / "speech", *options)
    assert code == 0
    assert "data.jsonl" in output
    assert call("check", tmp_path / "speech")[0] == 0
    for encoded_now in (2, 0):
        code, output = call("encode", tmp_path / "speech", tmp_path / "codes", "--weights", toy)
        assert code == 0
        assert f"2 conversations, {sum(e.frames for e in CodesStore(tmp_path / 'codes').entries):,} frames" in output
        assert f"{encoded_now} encoded now, 0 skipped" in output


@pytest.mark.parametrize(
    ("there", "options", "expected"),
    [
        (False, [], "cpu"),
        (True, [], "cuda"),
        (True, ["--device", "cpu"], "cpu"),
        (True, ["--device", "cuda:0"], "cuda:0"),
    ],
)
def test_encode_runs_mimi_on_the_gpu_if_there_is_one(
    there: bool, options: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = write_toy_checkpoint(tmp_path / "toy", sizes=SIZES)
    data = write_manifest(tmp_path, [write_conversation(tmp_path, "one")])
    devices: list[str] = []

    def on_the_cpu(source: str, *, device: torch.device) -> MoshiCheckpoint:
        devices.append(str(device))
        return load_checkpoint(source)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(weights, "load_checkpoint", on_the_cpu)
    assert call("encode", data, tmp_path / "codes", "--weights", toy, *options)[0] == 0
    assert devices == [expected]


def test_what_was_done_wrong_is_told_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command, message in (
        (["check", tmp_path / "gone"], "gone: no such file or folder"),
        (["check", f"{tmp_path}/a.jsonl:x"], "a.jsonl:x: no such file or folder, and 'x' is no weight"),
        (["encode", tmp_path, tmp_path / "out", "--weights", tmp_path], "model.safetensors is missing"),
        (["encode", tmp_path, tmp_path / "out", "--device", "cuda"], "device cuda: no CUDA is available here"),
        (["synthesise", tmp_path / "out", "--duration", 5], "no phrase could return"),
    ):
        monkeypatch.setattr("sys.argv", ["inlay", "moshi", *map(str, command)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        told = capsys.readouterr().err.replace("\n", "")
        assert told.startswith("error:")
        assert message in told
