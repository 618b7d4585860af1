"""The plan of a Moshi recipe's training step: Kyutai's own model, run without its numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from inlay.doctor.dry_run import PlanError
from inlay.doctor.plan_kyutai import model_sizes, plan_moshi_recipe
from inlay.moshi.weights import MoshiCheckpoint
from tests.moshi.runs import make_recipe, make_store, make_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> MoshiCheckpoint:
    return make_toy(tmp_path_factory.mktemp("toy"))


def test_a_plan_holds_the_whole_model_and_grows_with_the_length(toy: MoshiCheckpoint, tmp_path: Path) -> None:
    store = make_store(tmp_path / "codes", toy)
    held = sum(parameter.nbytes for parameter in toy.load_lm().parameters())
    short, long = (
        plan_moshi_recipe(make_recipe(toy, store, duration_sec=seconds)).plan.peak_bytes for seconds in (76.8, 153.6)
    )
    assert held < short < long


def test_the_sizes_of_a_folder_are_its_own_and_a_missing_one_is_named(toy: MoshiCheckpoint, tmp_path: Path) -> None:
    sizes, assumptions = model_sizes(toy.source)
    assert (sizes["dim"], sizes["num_layers"], assumptions) == (16, 3, [])
    with pytest.raises(PlanError, match="no such folder"):
        model_sizes(str(tmp_path / "nowhere"))
