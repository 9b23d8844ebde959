"""Copies of weights, compared."""

from __future__ import annotations

from pathlib import Path

from faults.test_faults import ALONE, events, train
from logged import numbers


def test_a_weight_that_nobody_else_holds_is_restored(folder: Path) -> None:
    weight = ({"kind": "weight", "rank": 0, "step": 9},)
    code, said = train(folder, "weight", *ALONE, "--ranks", "1", "--restarts", "2", faults=weight)
    assert code == 0, said
    (broken,) = events(folder, "weight", "broken")
    assert broken["reason"].startswith("weight unembedding.weight is not finite on rank 0")
    assert len(events(folder, "weight", "resumed")) == 1 and not events(folder, "weight", "skipped")
    assert len(numbers(folder / "runs/weight")) == 40
