"""The benchmark of Moshi's training, on sizes that show only that it works."""

from __future__ import annotations

import torch

from benchmarks import moshi


def test_its_steps_train_and_its_memory_grows_with_the_length_alone() -> None:
    entry = moshi.run(True, torch.device("cpu"), lambda done, total, what: None)
    assert [row["frames"] for row in entry.data["steps"]] == [96] * 4
    for row in entry.data["steps"]:
        assert row["peak_bytes"] > 0
        assert row["losses"][-1] < row["losses"][0]
    assert entry.data["steps"][2]["trained_parameters"] > entry.data["steps"][0]["trained_parameters"]
    small, large = entry.data["attention"]
    assert large["windowed"] < 5 * small["windowed"]  # the length is 4 times as large
    assert large["kyutai"] > 8 * small["kyutai"]
