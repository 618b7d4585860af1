"""``inlay plan``: lengths on the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from inlay import cli
from inlay.cli import app


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def test_wanted_chunks_give_tokens_and_seconds() -> None:
    text = shown("reach", "--chunks", "125", "--chunk-size", "256", "--frame-rate", "12.5")
    assert "32,000" in text  # 125 full chunks
    assert "2,560" in text  # seconds
    assert "31,745" in text  # 124 full ones and a token


def test_seconds_give_chunks() -> None:
    assert "8 " in shown("reach", "--seconds", "150", "--frame-rate", "12.5")


def test_without_a_wish_the_claims_are_checked() -> None:
    text = shown("reach")
    for stated, mean in (("49.0 %", "42.9 %"), ("99.6 %", "49.6 %")):
        assert stated in text
        assert mean in text


@pytest.mark.parametrize("wishes", [["--seconds", "150"], ["--chunks", "3", "--tokens", "7"], ["--ever-read", "1.5"]])
def test_wishes_that_cannot_be_had_are_explained(wishes: list[str]) -> None:
    result = CliRunner().invoke(app, ["plan", "reach", *wishes])
    assert result.exit_code == 2
    assert "Invalid value" in result.output


@pytest.mark.parametrize("command", [["plan", "memory"], ["doctor"]])
@pytest.mark.parametrize("config", [None, "{"])
def test_a_model_that_cannot_be_had_is_told_with_the_key_that_names_it(
    command: list[str],
    config: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    arguments = ["src/inlay/recipes/qwen3.yaml", f"model.name_or_path={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["inlay", *command, *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    told = capsys.readouterr().err
    assert f"cannot load the model {tmp_path}: " in told
    assert "model.name_or_path is a hub id, or a folder that save_pretrained wrote" in told
