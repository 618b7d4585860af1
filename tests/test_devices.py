"""Where commands and loaded runs compute: where they are told to, else on the GPU if there is one."""

from __future__ import annotations

import pytest
import torch

from inlay import InlayError
from inlay.devices import chosen_device
from inlay.train.directory import training_device


@pytest.mark.parametrize("there", [False, True], ids=["without a GPU", "with a GPU"])
def test_the_gpu_is_chosen_where_there_is_one_and_nothing_else_was_asked_for(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    expected = torch.device("cuda" if there else "cpu")
    assert chosen_device() == training_device({}) == expected
    assert chosen_device("cpu") == training_device({"use_cpu": True}) == torch.device("cpu")
    assert chosen_device(torch.device("meta")) == torch.device("meta")


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda:1", torch.device("cuda:1")):
        with pytest.raises(InlayError, match="device cuda:1: no CUDA is available here; leave it out, or give cpu"):
            chosen_device(device)
    with pytest.raises(InlayError, match="device gpu: Expected one of cpu, cuda"):
        chosen_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen_device("cuda:1") == torch.device("cuda", 1)
