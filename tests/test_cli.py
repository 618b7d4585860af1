"""The ``inlay`` command as a whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import inlay
from inlay import fastweight
from inlay.cli import main
from inlay.train.callback import MemoryCallback


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from inlay.cli import app;"
        "assert CliRunner().invoke(app, ['compress', 'train', '--help']).exit_code == 0;"
        "print(*sorted({'torch', 'transformers', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_public_names_are_fetched_when_they_are_used() -> None:
    assert inlay.MemoryCallback is MemoryCallback
    for name in set(inlay.__all__) - {"__version__", "MemoryCallback"}:
        assert getattr(inlay, name) is getattr(fastweight, name)
    with pytest.raises(AttributeError, match="has no attribute 'atach'"):
        inlay.atach  # type: ignore[attr-defined]  # noqa: B018


def test_a_place_that_cannot_be_written_is_told_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").write_text("a file, where the folder of runs should be")
    (tmp_path / "recipe.yaml").write_text(
        "name: here\nmode: all\nmodel: {config: {model_type: gpt2, n_embd: 16, n_layer: 1, n_head: 2}}\n"
        "memory: {layers: [0], chunk_size: 8, eta: 0.1}\ndata: {task: recall, sequence_length: 64, pairs: 4}\n"
        "trainer: {max_steps: 1, use_cpu: true}\n"
    )
    arguments = ["inlay", "train", str(tmp_path / "recipe.yaml"), "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert f"error: [Errno 20] Not a directory: '{tmp_path}/runs" in capsys.readouterr().err
