"""The benchmark refuses wrong results, and its memory figures are those one can work out by hand."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from torch import Tensor, nn

from benchmarks import operation
from benchmarks.__main__ import ENTRIES, main
from benchmarks.measure import NotTheSameError, extra_bytes, ratio, require_same, take_turns

CPU = torch.device("cpu")
FLOAT = 4


def reads_its_own_update(z: Tensor, v: Tensor, weight: Tensor, *, eta: float, chunk_size: int) -> Tensor:
    """Update before apply: the sum runs to j = i."""
    z_chunks, v_chunks = (x.unflatten(1, (-1, chunk_size)).transpose(0, 1) for x in (z, v))
    out = z_chunks @ (weight + eta * (v_chunks.mT @ z_chunks).cumsum(0)).mT
    return out.transpose(0, 1).reshape(*z.shape[:2], -1)


def forgets_a_gradient(z: Tensor, v: Tensor, weight: Tensor, *, eta: float, chunk_size: int) -> Tensor:
    return operation.scan(z, v.detach() + 0 * v, weight, eta=eta, chunk_size=chunk_size)


@pytest.mark.parametrize(("wrong", "what"), [(reads_its_own_update, "output"), (forgets_a_gradient, "dv")])
def test_a_fast_form_that_is_wrong_is_never_timed(wrong, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation, "take_turns", lambda *_: pytest.fail("timed a wrong result"))
    with pytest.raises(NotTheSameError, match=what):
        operation.run(True, CPU, lambda *_: None, fast=wrong)


def test_a_result_that_is_not_a_number_is_not_close() -> None:
    with pytest.raises(NotTheSameError, match="nan"):
        require_same({"out": torch.tensor([float("nan")])}, {"out": torch.ones(1)}, 1e-4, "scan")


def test_the_run_writes_every_figure_and_misses_an_aim_without_failing(tmp_path, capsys) -> None:
    entries = [name for name in ENTRIES if name != "moshi"]  # that has a test of its own
    main([*entries, "--quick", "--output", str(tmp_path / "new" / "bench.json")])
    printed = capsys.readouterr().out
    assert "T=256" in printed
    entry = json.loads((tmp_path / "new" / "bench.json").read_text())["entries"]["operation"]
    assert [row["chunks"] for row in entry["lengths"]] == [7, 32]
    for row in entry["lengths"]:
        assert max(row["errors"].values()) <= operation.TOLERANCE
        assert set(row["seconds"]) == set(row["extra_bytes"]) == {"scan", "materialised", "linear"}
    assert any(not aim["met"] for aim in entry["aims"])  # at these sizes the overhead decides
    by_claim = {aim["claim"].split(":")[-1].strip(): aim for aim in entry["aims"]}
    assert by_claim["extra memory, materialised over scan"]["met"]


def test_extra_memory_is_what_is_neither_there_before_nor_a_result() -> None:
    a, b, c = torch.randn(64, 32), torch.randn(32, 128), torch.randn(128, 16)
    assert extra_bytes(lambda: [a @ b], CPU) == 0
    assert extra_bytes(lambda: [a @ b @ c], CPU) == 64 * 128 * FLOAT
    assert extra_bytes(lambda: [torch.empty(5000).sum()], CPU) == 5000 * FLOAT


def test_extra_memory_counts_what_autograd_keeps() -> None:
    x = torch.ones(1000, requires_grad=True)

    def step() -> list[Tensor]:
        y = x.exp().exp()  # autograd keeps both
        return [y, *torch.autograd.grad(y, [x], torch.ones(1000))]

    # The inner exponential, the cotangent, and the gradient between the two; the outer one and dx are results.
    assert extra_bytes(step, CPU) == 3 * 1000 * FLOAT


def test_what_is_dead_is_freed_before_the_step_and_not_within_it() -> None:
    module = nn.Linear(4, 4)
    module.__dict__["itself"] = module
    seen = weakref.ref(module)
    del module
    alive: list[bool] = []

    def step() -> list[Tensor]:
        alive.append(seen() is not None)
        return [torch.ones(4).exp()]

    extra_bytes(step, CPU)
    assert alive == [False]


def test_the_scans_extra_memory_is_one_weight_however_many_chunks() -> None:
    sizes = operation.Sizes(width=32, inner=64, chunk_size=16, rounds=1)
    for chunks in (2, 9, 40):
        inputs = operation.Inputs.random(chunks * 16, sizes, CPU)
        step = operation.step_of(operation.scan, inputs, 16)
        assert 0 < extra_bytes(step, CPU) <= 4 * 32 * 64 * FLOAT
        step = operation.step_of(operation.materialised, inputs, 16)
        assert extra_bytes(step, CPU) >= (chunks - 1) * 32 * 64 * FLOAT


def test_variants_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) or [] for name in "ABC"}
    seconds = take_turns(steps, 2, CPU)
    assert calls == list("ABC" * 3)
    assert {len(values) for values in seconds.values()} == {2}
    assert ratio([3.0, 4.0, 100.0], [2.0, 2.0, 1.0]).medians == 2.0
    assert ratio([3.0, 4.0, 100.0], [2.0, 2.0, 1.0]).minima == 3.0
