"""The ``inlay`` command as a whole."""

from __future__ import annotations

import subprocess
import sys

import pytest

import inlay
from inlay import fastweight


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from inlay.cli import app;"
        "assert CliRunner().invoke(app, ['compress', 'train', '--help']).exit_code == 0;"
        "print(*sorted({'torch', 'transformers', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_public_names_are_fetched_when_they_are_used() -> None:
    for name in inlay.__all__:
        assert name == "__version__" or getattr(inlay, name) is getattr(fastweight, name)
    with pytest.raises(AttributeError, match="has no attribute 'atach'"):
        inlay.atach  # type: ignore[attr-defined]  # noqa: B018
