"""How often a forward makes the host wait for a GPU: at most a few times, whatever the layers, chunks and tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache

import inlay
from inlay.fastweight.causal_lm import with_cache
from tests.fastweight.test_other_device import DOCUMENTS, llama, settings, tokens
from tests.other_device import Elsewhere, elsewhere, other_device
from tests.waits import waits

__all__ = ["other_device"]

LEFT_PADDED = (torch.arange(23) >= torch.tensor([[0], [4]])).long()


def there(**tensors: Tensor) -> dict[str, Any]:
    return {name: Elsewhere(tensor) for name, tensor in tensors.items()}


def test_waits_are_seen() -> None:
    one = Elsewhere(torch.ones(3))

    def inlays(code: str) -> list[str]:
        with waits() as seen:
            exec(compile(code, "/src/inlay/some.py", "exec"), {"torch": torch, "one": one, "there": one.device})
        return seen

    asking = ["bool(one.any())", "one.tolist()", "one.cpu()", "torch.equal(one, one)", "one[one > 0]"]
    asking += ["torch.tensor([1.0], device=there)", "torch.ones(3).to(there)", "one[torch.tensor([0, 1])]"]
    for code in asking:
        assert len(inlays(code)) == 1, code
    for code in ("one + 1", "one[one > 0] = 0", "torch.where(one > 0, one, 0.0)", "torch.zeros(3, device=there)"):
        assert not inlays(code), code
    assert not inlays("torch.ones(3).to(there, non_blocking=True)")


TRAINING: dict[str, tuple[dict[str, Any], dict[str, Tensor], int]] = {
    "whole rows": ({}, {}, 0),
    "clipped by norm": ({"max_update_norm": 0.5}, {}, 0),
    "clipped by ratio, hidden target, exposed": (
        {"max_update_ratio": 0.5, "target": "hidden", "exposure": 0.5, "normalize_target": True},
        {},
        0,
    ),
    "a mask without padding": ({}, {"attention_mask": torch.ones(2, 23, dtype=torch.long)}, 1),
    "padding": ({}, {"attention_mask": (DOCUMENTS >= 0).long()}, 3),
    "documents": ({}, {"document_ids": DOCUMENTS}, 3),
    "documents, clipped": ({"max_update_norm": 0.5}, {"document_ids": DOCUMENTS}, 3),
    "packed by positions": ({}, {"position_ids": torch.tensor([[*range(9), *range(14)], [*range(23)]])}, 3),
    "packed by positions, carried": (
        {"boundary": "carry"},
        {"position_ids": torch.tensor([[*range(9), *range(14)], [*range(23)]])},
        0,
    ),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", TRAINING)
def test_a_training_step(case: str, checkpointing: bool) -> None:
    """Forward, backward and recomputation."""
    changes, extra, most = TRAINING[case]
    model = elsewhere(llama())
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    inlay.attach(model.train(), settings(layers="all", **changes)).train_only("all")
    ids = tokens()
    for wanted in (most + 1 if most == 3 else most, most):  # the first step also asks whether a document is long enough
        with waits() as seen:
            model(**there(input_ids=ids, labels=ids, **extra), use_cache=False).loss.backward()
        assert len(seen) == wanted, seen


@pytest.mark.parametrize("representation", ["dense", "deferred"])
@pytest.mark.parametrize("masked", [False, True])
def test_prefill_and_decode(representation: Any, masked: bool) -> None:
    """A step within a chunk, one that commits a chunk, a piece that goes beyond the open chunk, and one after it."""
    model, ids, cache, counts = elsewhere(llama()).eval(), tokens(), DynamicCache(), []
    inlay.attach(model, settings(layers="all")).representation = representation
    for start, stop in ((0, 13), (13, 14), (14, 15), (15, 16), (16, 22), (22, 23)):
        piece = {"input_ids": ids[:, start:stop]} | ({"attention_mask": LEFT_PADDED[:, :stop]} if masked else {})
        with torch.no_grad(), waits() as seen:
            model(**there(**piece), **with_cache(model, cache))
        counts.append(len(seen))
    assert counts == ([3, 1, 1, 1, 3, 1] if masked else [0, 0, 0, 0, 2, 0])


def test_a_session_whose_rows_are_reset_and_chosen_knows_where_they_stand() -> None:
    model, ids = elsewhere(llama()).eval(), tokens(3)
    session = inlay.attach(model, settings(layers="all")).session(3)
    with torch.no_grad(), waits() as seen:
        session.step(Elsewhere(ids[:, :12]))
        session.reset([1])
        session.select([2, 0, 1, 1])
        session.copy().to("meta").step(Elsewhere(ids[[2, 0, 1, 1], 12:13]))
    assert [one.split()[1] for one in seen] == ["_beside_layers"] * 3, seen  # reset, select, copy
    assert session.state.phases == [2, 2, 0, 0]


def test_beam_search_waits_twice_a_token() -> None:
    """For the mask, and for which beams go on; the phases go with them on the host."""
    model: Any = elsewhere(llama()).eval()
    inlay.attach(model, settings(layers="all"))
    ids, mask, new = tokens(2, 12), LEFT_PADDED[:, :12], 9
    with waits() as seen:
        model.generate(
            **tree_map_only(Tensor, Elsewhere, {"inputs": ids, "attention_mask": mask}), num_beams=2, max_new_tokens=new
        )
    assert len(seen) <= 2 * new + 2, seen


def test_the_model_without_a_memory_makes_nobody_of_ours_wait() -> None:
    model, ids = elsewhere(llama()), tokens()
    memory = inlay.attach(model, settings(layers="all"))
    with memory.disabled(), waits() as seen:
        model(**there(input_ids=ids, labels=ids, attention_mask=(DOCUMENTS >= 0).long()), use_cache=False)
    assert not seen
